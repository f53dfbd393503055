"""The quantisation schemes that `int8fx.convert` takes."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from .quantize import NO_THRESHOLD


def _share(name: str, value: object) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= value < 1:  # type: ignore[operator]
        raise ValueError(f"{name} must be a share of the columns, 0 <= {name} < 1, found {value!r}")
    return float(value)  # type: ignore[arg-type]


def count_columns(share: float, K: int) -> int:
    """How many of K columns a share of them is: rounded, at least one of a share above 0."""
    return min(K, max(1, round(share * K))) if share else 0


@dataclass(frozen=True)
class LLMInt8:
    """LLM.int8(); made by `llm_int8`."""

    threshold: float = 6.0
    keep: float = 0.0

    def __post_init__(self) -> None:
        number = isinstance(self.threshold, (int, float)) and not isinstance(self.threshold, bool)
        if not number or math.isnan(self.threshold) or self.threshold < 0:
            raise ValueError(f"threshold must be a number >= 0 (inf for plain int8), found {self.threshold!r}")
        object.__setattr__(self, "threshold", float(self.threshold))
        object.__setattr__(self, "keep", _share("keep", self.keep))

    block, rounding = 1, "nearest"

    def static_columns(self, K: int) -> int:
        """How many columns of K are kept with exact weights, chosen when the model is converted."""
        return count_columns(self.keep, K)

    def dynamic_columns(self, K: int) -> int:
        """How many columns of K are kept in each call, chosen by its x."""
        return 0


@dataclass(frozen=True)
class Rotated:
    """Rotated int8; made by `rotated`."""

    block: int = 64
    budget: float = 0.01
    columns: str | None = "static"
    rounding: str = "nearest"

    def __post_init__(self) -> None:
        if not isinstance(self.block, int) or self.block < 1 or self.block & (self.block - 1):
            raise ValueError(f"block must be a power of two, found {self.block!r}")
        if self.columns not in ("static", "dynamic", None):
            raise ValueError(f"columns must be 'static', 'dynamic' or None, found {self.columns!r}")
        if self.rounding not in ("nearest", "gptq"):
            raise ValueError(f"rounding must be 'nearest' or 'gptq', found {self.rounding!r}")
        object.__setattr__(self, "budget", _share("budget", self.budget))

    threshold = NO_THRESHOLD

    def static_columns(self, K: int) -> int:
        """How many columns of K are kept with exact weights, chosen when the model is converted."""
        return count_columns(self.budget, K) if self.columns == "static" else 0

    def dynamic_columns(self, K: int) -> int:
        """How many columns of K are kept in each call, chosen by its x."""
        return count_columns(self.budget, K) if self.columns == "dynamic" else 0


Scheme = LLMInt8 | Rotated


def need_moments(schemes: Iterable[object]) -> bool:
    """Whether one of these schemes takes what ``calibrate(moments=True)`` finds."""
    return any(isinstance(scheme, Rotated) and scheme.rounding == "gptq" for scheme in schemes)


def parse_scheme(text: str) -> Scheme:
    """The scheme that ``text`` writes as Python does: ``llm_int8``, ``rotated(block=32, budget=0)``, ``llm_int8(inf)``.

    Raises:
        ValueError: it writes something else.
    """
    makers: dict[str, Callable[..., Scheme]] = {"llm_int8": llm_int8, "rotated": rotated}
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        call = tree if isinstance(tree, ast.Call) else ast.Call(tree, [], [])
        arguments = [_literal(a) for a in call.args]
        named = {k.arg or "": _literal(k.value) for k in call.keywords}
        return makers[call.func.id](*arguments, **named)  # type: ignore[attr-defined]
    except (SyntaxError, KeyError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"scheme {text!r}: {error}; legal: llm_int8(threshold=6, keep=0), rotated(...)") from error


def _literal(node: ast.expr) -> Any:
    return math.inf if isinstance(node, ast.Name) and node.id == "inf" else ast.literal_eval(node)


def llm_int8(threshold: float = 6.0, keep: float = 0.0) -> LLMInt8:
    """LLM.int8(): int8 products, with the input columns that hold an ``abs(x) >= threshold`` kept in 16 bits.

    Source: Dettmers et al. 2022, arXiv 2208.07339, section 3. ``reference.linear`` is the formula.

    Args:
        threshold: >= 0. 6.0 is the paper's. ``inf`` is plain int8 with a scale per row; ``0`` multiplies every
            column in floating point, so only the weights are quantised. (bitsandbytes writes plain int8 as 0.)
        keep: a share of the columns whose weights are kept exactly, in the model's dtype, as the paper has it for all
            outliers: those that are largest in `calibrate`'s data. Outliers elsewhere still are what the threshold
            finds; they use the weight's int8 codes.

    Raises:
        ValueError: the threshold is negative, NaN or no number, or keep is no share.
    """
    return LLMInt8(threshold, keep)


def rotated(
    block: int = 64, budget: float = 0.01, columns: str | None = "static", rounding: str = "nearest"
) -> Rotated:
    """Rotated int8: x and W are rotated alike along K, in blocks, so that outliers spread before they are rounded.

    ``y = int8(rotate(x_rest)) @ int8(rotate(W_rest)).T * scales + x_kept @ W_kept.T``; see `quantize.rotate` and
    `reference.linear`. The idea is QuaRot's (Ashkboos et al. 2024, arXiv 2404.00456), here block by block, inside each
    product, with nothing folded into other layers. Shapes are fixed; with static columns, or none, a row's result
    does not depend on the other rows of its batch. (Without the rotation, block 1, it depends on how many they are: few
    rows take a more exact kernel, as LLM.int8()'s do.)

    Args:
        block: size of the Hadamard blocks, a power of two; 1 for no rotation. What K has left behind its last whole
            block is rotated in smaller ones (`quantize.rotation_blocks`).
        budget: the share of input columns that are taken out before the rotation and multiplied in 16 bits; at least
            one of each layer, 0 for none: a plain int8 product.
        columns: ``static``: chosen by `convert`, from what `calibrate` found, else by the weights (the columns of
            largest Euclidean norm); their weights are kept exactly. ``dynamic``: the columns that are largest in each
            call, with the dequantised weight. ``None``: no columns.
        rounding: of the weight to codes. ``nearest``: each for itself. ``gptq``: so that the product's error is small
            on the data of ``calibrate(moments=True)`` (`rounding.round_weight`); kept columns make good what is left,
            and are exact no more. It costs time when the model is converted and nothing later: what is stored is of
            the same form.

    Raises:
        ValueError: an argument is none of these.
    """
    return Rotated(block, budget, columns, rounding)
