"""The quantisation schemes that `int8fx.convert` takes."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class LLMInt8:
    """LLM.int8(); made by `llm_int8`."""

    threshold: float = 6.0

    def __post_init__(self) -> None:
        number = isinstance(self.threshold, (int, float)) and not isinstance(self.threshold, bool)
        if not number or math.isnan(self.threshold) or self.threshold < 0:
            raise ValueError(f"threshold must be a number >= 0 (inf for plain int8), found {self.threshold!r}")
        object.__setattr__(self, "threshold", float(self.threshold))


def llm_int8(threshold: float = 6.0) -> LLMInt8:
    """LLM.int8(): int8 products, with the input columns that hold an ``abs(x) >= threshold`` kept in 16 bits.

    Source: Dettmers et al. 2022, arXiv 2208.07339, section 3. ``reference.linear`` is the formula.

    Args:
        threshold: >= 0. 6.0 is the paper's. ``inf`` is plain int8 with a scale per row; ``0`` multiplies every
            column in floating point, so only the weights are quantised. (bitsandbytes writes plain int8 as 0.)

    Raises:
        ValueError: the threshold is negative, NaN or no number.
    """
    return LLMInt8(threshold)
