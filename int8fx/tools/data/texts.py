"""Windows of real text, to measure on and to calibrate on."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CALIBRATION_SHARE = 0.1  # the last part of each source, which is used for calibration only
_CHARACTERS = 64  # characters per token that are passed to the tokenizer: more than it needs, and not the entire text


class TextError(Exception):
    """A text cannot be read, or is too short; the message says which and what to do."""


def read(source: str) -> str:
    """The text of ``pydoc`` (the topics of Python's documentation) or of a file, which gzip may have compressed."""
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

    Both numbers are split among the sources; the first sources get one more if they do not divide. Calibration windows
    come from the last tenth of each source, the others from the text before it.

    Returns:
        ``[count, width]`` and ``[calibration, width]`` int64.

    Raises:
        TextError: a source cannot be read, or is too short for windows that do not overlap.
    """
    measured: list[list[int]] = []
    calibrating: list[list[int]] = []
    for i, source in enumerate(sources):
        text = read(source)
        cut = int(len(text) * (1 - CALIBRATION_SHARE))
        for ids, part, total in ((measured, text[:cut], count), (calibrating, text[cut:], calibration)):
            ids += _spread(tokenizer, part, len(range(i, total, len(sources))), width, source)
    first, second = (torch.tensor(ids, dtype=torch.int64).view(-1, width) for ids in (measured, calibrating))
    return first, second


def _spread(tokenizer: Any, text: str, count: int, width: int, source: str) -> list[list[int]]:
    """``count`` windows of ``width`` tokens, one at the start of each of ``count`` equal parts of ``text``."""
    parts: list[list[int]] = []
    step = len(text) // max(count, 1)
    for i in range(count):
        part = text[i * step : (i + 1) * step][: _CHARACTERS * width]
        ids = tokenizer(part, truncation=True, max_length=width).input_ids
        if len(ids) < width:
            raise TextError(f"the text {source!r} is too short for {count} windows of {width} tokens")
        parts.append(ids)
    return parts
