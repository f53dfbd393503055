"""Plain text tables."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]]) -> str:
    """``rows`` as lines of columns, two spaces apart; the first row is the head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def show_progress(what: str, done: int, total: int) -> None:
    """A bar on stderr, over the one before."""
    width = 32 * done // max(total, 1)
    end = "\n" if done == total else ""
    print(f"\r{what} [{'#' * width}{'.' * (32 - width)}] {done}/{total}", end=end, file=sys.stderr, flush=True)
