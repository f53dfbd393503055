"""Real text for measurements: windows of tokens from several sources, and other text from them to calibrate on."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CALIBRATION_SHARE = 0.1  # of each source, its end: never measured on


class TextError(Exception):
    """A text cannot be had, or is too short; the message says which and what to do."""


def read(source: str) -> str:
    """The text of ``pydoc`` (the topics of Python's own documentation) or of a file, which gzip may have compressed."""
    if source == "pydoc":
        from pydoc_data.topics import topics

        return "\n".join(topics[key] for key in sorted(topics))
    try:
        data = Path(source).read_bytes()
        data = gzip.decompress(data) if source.endswith(".gz") else data
    except (OSError, EOFError, zlib.error) as error:
        raise TextError(f"cannot read the text {source!r}: {error}; it takes pydoc or a file") from error
    return data.decode("utf-8", errors="replace")


def windows(tokenizer: Any, sources: list[str], count: int, width: int, calibration: int) -> tuple[Tensor, Tensor]:
    """Windows of ``width`` tokens, evenly spread over each source: ``count`` to measure, ``calibration`` to calibrate.

    Both numbers are split among the sources, those first getting one more. Calibration windows come from the last tenth
    of each source, the others from the rest.

    Returns:
        ``[count, width]`` and ``[calibration, width]`` int64.

    Raises:
        TextError: a source cannot be read, or is too short for windows that do not overlap.
    """
    measured, apart = [], []
    for i, source in enumerate(sources):
        text = read(source)
        cut = int(len(text) * (1 - CALIBRATION_SHARE))
        share = [len(range(i, n, len(sources))) for n in (count, calibration)]
        measured += _spread(tokenizer, text[:cut], share[0], width, source)
        apart += _spread(tokenizer, text[cut:], share[1], width, source)
    return torch.tensor(measured).view(-1, width), torch.tensor(apart).view(-1, width)


def _spread(tokenizer: Any, text: str, count: int, width: int, source: str) -> list[list[int]]:
    found = []
    step = len(text) // max(count, 1)
    for i in range(count):
        ids = tokenizer(text[i * step : (i + 1) * step][: 64 * width], truncation=True, max_length=width).input_ids
        if len(ids) < width:
            raise TextError(f"the text {source!r} is too short for {count} windows of {width} tokens")
        found.append(ids)
    return found
