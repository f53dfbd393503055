"""What the library and its tools print: plain text tables and a progress bar."""

from __future__ import annotations

import sys
from collections.abc import Sequence

_BAR = 32  # characters


def table(rows: Sequence[Sequence[str]], left: int | None = None) -> str:
    """``rows`` as lines of columns, with two spaces between them; the first row is the head.

    The first ``left`` columns are aligned left, the others right; by default all are aligned left.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = len(widths) if left is None else left
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row[:left], widths[:left], strict=True)]
        cells += [cell.rjust(width) for cell, width in zip(row[left:], widths[left:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def show_progress(what: str, done: int, total: int) -> None:
    """Draws a bar on stderr over the last one; the last of ``total`` steps ends the line."""
    filled = _BAR * done // max(total, 1)
    end = "\n" if done == total else ""
    print(f"\r{what} [{'#' * filled}{'.' * (_BAR - filled)}] {done}/{total}", end=end, file=sys.stderr, flush=True)
