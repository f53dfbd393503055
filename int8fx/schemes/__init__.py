"""The quantisation schemes that `int8fx.convert` takes, and their formulas in plain torch."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any

from .formats import FORMATS, SCALE_DTYPES, Grouping
from .quantize import DEFAULT_THRESHOLD, MAX_K, MAX_THRESHOLD


def _share_of_columns(value: object) -> float:
    if not _is_number(value) or not 0 <= value < 1:  # type: ignore[operator]  # a number
        raise ValueError(f"columns must be a share of the input columns, 0 <= columns < 1, found {value!r}")
    return float(value)  # type: ignore[arg-type]  # a number


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _count_columns(share: float, K: int) -> int:
    """``share`` of K columns as a number of columns: rounded, and at least 1 if the share is above 0."""
    return min(K, max(1, round(share * K))) if share else 0


@dataclass(frozen=True)
class LLMInt8:
    """LLM.int8(). `llm_int8` and `plain` return it."""

    threshold: float | None = DEFAULT_THRESHOLD
    columns: float = 0.0

    def __post_init__(self) -> None:
        threshold = self.threshold
        if threshold is not None:
            if not _is_number(threshold) or not (0 <= threshold <= MAX_THRESHOLD or threshold == math.inf):  # nor NaN
                raise ValueError(
                    f"threshold must be a number >= 0 that float32 holds, or None for plain int8, found {threshold!r}"
                )
            threshold = None if threshold == math.inf else float(threshold)
        object.__setattr__(self, "threshold", threshold)
        object.__setattr__(self, "columns", _share_of_columns(self.columns))

    rotation, scales, rounding, needs_moments, grouping = 1, "absmax", "nearest", False, Grouping()

    def static_columns(self, K: int) -> int:
        """How many of K input columns are not quantised, chosen when the model is converted."""
        return _count_columns(self.columns, K)

    @property
    def needs_columns(self) -> bool:
        """Whether `calibrate`'s data help to choose columns."""
        return self.columns > 0

    def __str__(self) -> str:
        if self == plain():
            return "plain"
        return _text("llm_int8", self, LLMInt8())


@dataclass(frozen=True)
class Rotated:
    """Rotated int8. `rotated` returns it."""

    block: int = 256
    columns: float = 0.01
    rounding: str = "nearest"
    hadamard: str = "regular"

    def __post_init__(self) -> None:
        is_int = isinstance(self.block, int) and not isinstance(self.block, bool)
        if not is_int or not 1 <= self.block <= MAX_K or self.block & (self.block - 1):
            raise ValueError(f"block must be a power of two up to {MAX_K:,}, found {self.block!r}")
        _choose("rounding", self.rounding, ROUNDINGS)
        if self.hadamard not in ("regular", "sylvester"):
            raise ValueError(f"hadamard must be 'regular' or 'sylvester', found {self.hadamard!r}")
        object.__setattr__(self, "columns", _share_of_columns(self.columns))

    threshold, scales, grouping = None, "absmax", Grouping()

    @property
    def rotation(self) -> int:
        """``block`` as `rotate.rotate` and the ops take it: negative for regular Hadamard matrices, 1 for none."""
        return -self.block if self.hadamard == "regular" and self.block > 1 else self.block

    def static_columns(self, K: int) -> int:
        """How many of K input columns are not quantised, chosen when the model is converted."""
        return _count_columns(self.columns, K)

    @property
    def needs_columns(self) -> bool:
        """Whether `calibrate`'s data help to choose columns."""
        return self.columns > 0

    @property
    def needs_moments(self) -> bool:
        """Whether the scheme requires ``calibrate(moments=True)``."""
        return self.rounding == "gptq"

    def __str__(self) -> str:
        return _text("rotated", self, Rotated())


@dataclass(frozen=True)
class WeightOnly:
    """Weight-only quantisation. `weight_only` returns it."""

    dtype: str = "int8"
    group_size: int = -1
    asymmetric: bool = False
    scale_dtype: str = "float32"
    double_quant: bool = False
    compute: str = "fp32"
    scales: str = "absmax"
    rounding: str = "nearest"

    def __post_init__(self) -> None:
        _choose("dtype", self.dtype, FORMATS)
        _choose("scale_dtype", self.scale_dtype, SCALE_DTYPES)
        _choose("compute", self.compute, _COMPUTE)
        _choose("scales", self.scales, SCALES)
        _choose("rounding", self.rounding, ROUNDINGS)
        size = self.group_size
        if not isinstance(size, int) or isinstance(size, bool) or not (size == -1 or 1 <= size <= MAX_K):
            raise ValueError(f"group_size must be -1 or 1 to {MAX_K:,}, found {size!r}")
        for name in ("asymmetric", "double_quant"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, found {getattr(self, name)!r}")
        if self.asymmetric and self.dtype not in ("int8", "int4_clip"):
            raise ValueError(f"asymmetric weights are int8 or int4_clip, found dtype {self.dtype!r}")
        if self.double_quant and self.group_size == -1:
            raise ValueError("double_quant quantises the scales of groups; group_size is -1, legal: 1 and more")
        if self.double_quant and self.scale_dtype != "float32":
            raise ValueError(f"double_quant stores scales in 8 bits, found scale_dtype {self.scale_dtype!r} beside it")

    rotation, needs_columns = 1, False

    @property
    def needs_moments(self) -> bool:
        """Whether the scheme requires ``calibrate(moments=True)``."""
        return self.scales == "search" or self.rounding == "gptq"

    @property
    def threshold(self) -> float | None:
        """0, so that all columns of x stay in floating point, or None, so that all are quantised."""
        return 0.0 if self.compute == "fp32" else None

    @property
    def grouping(self) -> Grouping:
        """As `quantize.pack_weight` takes it."""
        dtype = SCALE_DTYPES[self.scale_dtype]
        size = None if self.group_size == -1 else self.group_size
        return Grouping(self.dtype, size, self.asymmetric, dtype, self.double_quant)

    def static_columns(self, K: int) -> int:
        """How many of K input columns are not quantised: none."""
        return 0

    def __str__(self) -> str:
        return _text("weight_only", self, WeightOnly())


_COMPUTE = ("fp32", "int8")
SCALES = ("absmax", "hqq", "search")
ROUNDINGS = ("nearest", "gptq")


def _choose(name: str, value: object, legal: Iterable[str]) -> None:
    if value not in tuple(legal):
        raise ValueError(f"{name} must be one of {', '.join(legal)}, found {value!r}")


Scheme = LLMInt8 | Rotated | WeightOnly


def _text(maker: str, scheme: Scheme, default: Scheme) -> str:
    """``scheme`` as a call of its maker, without arguments that are as in ``default``."""
    values = {field.name: getattr(scheme, field.name) for field in fields(scheme)}
    arguments = [f"{name}={value!r}" for name, value in values.items() if value != getattr(default, name)]
    return f"{maker}({', '.join(arguments)})" if arguments else maker


def llm_int8(threshold: float | None = DEFAULT_THRESHOLD, columns: float = 0.0) -> LLMInt8:
    """LLM.int8(): int8 matmuls in which the input columns that hold an ``abs(x) >= threshold`` stay in 16 bits.

    Source: Dettmers et al. 2022, arXiv 2208.07339, section 3. ``reference.linear`` is the formula.

    Args:
        threshold: >= 0. 6.0 is the paper's. None (or ``inf``) is `plain` int8, 0 is `weight_only`. (bitsandbytes writes
            plain int8 as 0.)
        columns: a share of the input columns whose weights keep the model's dtype, as in the paper for all outliers.
            They are the columns whose values are largest in `calibrate`'s data. The threshold still finds outliers in
            other columns; those use the weight's int8 codes.

    Raises:
        ValueError: the threshold is negative, NaN or not a number, or columns is not in [0, 1).
    """
    return LLMInt8(threshold, columns)


def weight_only(
    dtype: str = "int8",
    group_size: int = -1,
    asymmetric: bool = False,
    scale_dtype: str = "float32",
    double_quant: bool = False,
    compute: str = "fp32",
    scales: str = "absmax",
    rounding: str = "nearest",
) -> WeightOnly:
    """Weights of 8 or 4 bits, in groups along the input channels, with activations that are not stored quantised.

    ``w = (level - zero_point) * scale`` (`formats.FORMATS`, `formats.quantize_groups`). By default int8 with one scale
    per output channel, the arithmetic of ``llm_int8(threshold=0)``.

    Args:
        dtype: ``int8``, ``int4_clip``, ``int4_fullrange``, ``nf4``, ``fp4_e2m1`` (OCP), ``fp4_e2m1_itrex`` or
            ``fp4_e2m1_bnb``.
        group_size: how many input channels have one scale. The last group of a row may be shorter. -1: all channels.
        asymmetric: int8 and int4_clip only. Each group has a zero point too.
        scale_dtype: ``float32``, ``bfloat16`` or ``float16``.
        double_quant: scales are quantised to 8 bits themselves, with a range of two float32 numbers per output channel.
            (bitsandbytes does it with the scales of 256 groups.)
        compute: ``fp32`` multiplies x as it is, and sums in float32. ``int8`` quantises each row of x to int8 first,
            except where few rows (`ops.rows`) are as fast without, and on GPUs. CPUs' kernels then round the levels of
            nf4 and of fp4_e2m1_bnb to multiples of 1/127.
        scales: how the scale of a group is chosen. ``absmax``: its largest value gets the largest code. ``hqq``: most
            weights get a small error (`hqq.hqq_scales`). ``search``: the matmul's error is small on the data of
            ``calibrate(moments=True)``, as in AWQ's clipping (`search.searched_scales`).
        rounding: of values to codes. ``nearest`` rounds each value alone. ``gptq`` makes the matmul's error small on
            the data of ``calibrate(moments=True)`` (`gptq.round_weight`). Like ``scales``, it takes time when the model
            is converted and none later: what is stored has the same form.

    Raises:
        ValueError: an argument is illegal, or two do not fit each other.
    """
    return WeightOnly(dtype, group_size, asymmetric, scale_dtype, double_quant, compute, scales, rounding)


def plain() -> LLMInt8:
    """int8 weights and activations, one scale per row of x, no outliers: ``llm_int8(threshold=None)``."""
    return LLMInt8(threshold=None)


def rotated(block: int = 256, columns: float = 0.01, rounding: str = "nearest", hadamard: str = "regular") -> Rotated:
    """Rotated int8: x and W are rotated alike along K, in blocks, which spreads outliers before they are rounded.

    ``y = int8(rotate(x_int8)) @ int8(rotate(W_int8)).T * scales + x[:, columns] @ W[:, columns].T``; see
    `rotate.rotate` and `reference.linear`. The idea is QuaRot's (Ashkboos et al. 2024, arXiv 2404.00456), here block by
    block, inside each matmul, with nothing folded into other layers. Shapes are fixed. A row's result does not depend
    on the other rows of its batch. (Without a rotation, ``block=1``, it depends on their number: few rows take a more
    exact kernel, as in LLM.int8().)

    Args:
        block: size of the Hadamard blocks, a power of two; 1 for no rotation. The columns after the last whole block
            are rotated in smaller blocks (`rotate.rotation_blocks`).
        columns: the share of input columns that are taken out before the rotation and multiplied in 16 bits; at least
            one column of each layer, 0 for none. `convert` chooses the columns whose values are largest in
            `calibrate`'s data; without data, those whose weights have the largest Euclidean norm.
        rounding: of the weight to codes. ``nearest`` rounds each value alone. ``gptq`` makes the matmul's error small
            on the data of ``calibrate(moments=True)`` (`gptq.round_weight`); the weights of unquantised columns then
            compensate for errors of the others, and are not exact copies. It takes time when the model is converted
            and none later: what is stored has the same form.
        hadamard: which Hadamard matrices. ``regular`` ones keep the mean of a block from becoming an outlier.
            ``sylvester`` is for checkpoints that were written so (`STORED`).

    Raises:
        ValueError: an argument is illegal.
    """
    return Rotated(block, columns, rounding, hadamard)


def of_bits(bits: int) -> LLMInt8 | WeightOnly:
    """A scheme for weights of ``bits``: 8 is `llm_int8`, 4 is int4 in groups of 32, as GGUF's Q4_0 has it.

    Raises:
        ValueError: bits is neither.
    """
    if bits not in (4, 8) or isinstance(bits, bool):
        raise ValueError(f"bits must be 4 or 8, found {bits!r}")
    return llm_int8() if bits == 8 else weight_only("int4_fullrange", 32, scale_dtype="float16", compute="int8")


_MAKERS: dict[str, Callable[..., Scheme]] = {
    "llm_int8": llm_int8,
    "rotated": rotated,
    "weight_only": weight_only,
    "plain": plain,
}


_SHOWN = 200  # characters of a text that is no scheme, in messages
_NAME = re.compile(r"(['\"])\w*\1")
_WARNED = re.compile(r"\\|[\d.](?![eE][+-]?\d)[A-Za-z]")  # Python's parser may warn of it: "\d", 1if, 0x1for


STORED = Rotated(64, 0.01, "nearest", "sylvester")
"""What a rotation in a file is where the file does not say: the default when the first such files were written."""


def stored_text(scheme: Scheme) -> str:
    """``str(scheme)`` for a file: arguments are left out that are as in `STORED`, whatever the defaults are."""
    return _text("rotated", scheme, STORED) if isinstance(scheme, Rotated) else str(scheme)


def parse_scheme(text: str, stored: bool = False) -> Scheme:
    """The scheme of a Python expression: ``llm_int8``, ``rotated(block=32, columns=0)``, ``plain``.

    The inverse of ``str(scheme)``; if ``stored``, of `stored_text`.

    Raises:
        ValueError: ``text`` is not such an expression.
    """
    try:
        if odd := _WARNED.search(_NAME.sub("''", text)):
            raise SyntaxError(f"invalid syntax: {odd[0]!r}")
        tree = ast.parse(text.strip(), mode="eval").body
        call = tree if isinstance(tree, ast.Call) else ast.Call(tree, [], [])
        arguments = [_literal(a) for a in call.args]
        named = {k.arg or "": _literal(k.value) for k in call.keywords}
        make = _MAKERS[call.func.id]  # type: ignore[attr-defined]  # AttributeError is caught
        if stored and make is rotated:
            named = {**dict([*vars(STORED).items()][len(arguments) :]), **named}
        return make(*arguments, **named)
    except (SyntaxError, KeyError, AttributeError, TypeError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(
            f"scheme {repr(text)[:_SHOWN]}: {str(error)[:_SHOWN]}; legal: llm_int8(threshold=6, columns=0), "
            "rotated(...), weight_only(dtype='int4_clip', group_size=32), plain"
        ) from error


def _literal(node: ast.expr) -> Any:
    return math.inf if isinstance(node, ast.Name) and node.id == "inf" else ast.literal_eval(node)
