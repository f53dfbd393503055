"""Formats of packed weights: which values a code stands for, how codes are packed, and how groups get their scales."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

_FP4_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_FP4_E2M1_ITREX = (0.0, 0.0625, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_FP4_E2M1_BNB = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def _signed(magnitudes: tuple[float, ...]) -> tuple[float, ...]:
    """The values of 16 codes whose bit 3 is the sign, relative to the largest."""
    relative = tuple(m / max(magnitudes) for m in magnitudes)
    return (*relative, *(-m for m in relative))


@dataclass(frozen=True)
class Format:
    """What the codes of a weight stand for: ``w = (level - zero_point) * scale``, with one scale per group.

    bits: of a code. Two codes of 4 bits are in a byte, the first of them in its upper half.
    levels: code -> value; None if the level is the code itself, an integer.
    zero_point: of symmetric weights.
    """

    bits: int
    levels: tuple[float, ...] | None = None
    zero_point: int = 0

    @property
    def is_integer(self) -> bool:
        return self.levels is None

    def largest_step(self, asymmetric: bool) -> int:
        """The largest ``abs(level - zero_point)``."""
        if self.levels is not None:
            return 1
        return 2**self.bits - 1 if asymmetric else 2 ** (self.bits - 1)

    def code_columns(self, K: int) -> int:
        """How many columns the codes of a row of K have in memory."""
        return K if self.bits == 8 else -(-K // 2)


FORMATS: Mapping[str, Format] = {
    "int8": Format(8),
    "int4_clip": Format(4, zero_point=8),
    "int4_fullrange": Format(4, zero_point=8),
    "nf4": Format(4, _NF4),
    "fp4_e2m1": Format(4, _signed(_FP4_E2M1)),
    "fp4_e2m1_itrex": Format(4, _signed(_FP4_E2M1_ITREX)),
    "fp4_e2m1_bnb": Format(4, _signed(_FP4_E2M1_BNB)),
}
"""By name.

- ``int8``, ``int4_clip``: a symmetric group has the scale ``absmax / 127`` or ``absmax / 7``.
- ``int4_fullrange``: all 16 codes. The element of largest magnitude gets code -8, so the scale is minus an eighth of
  it, and may be negative. The names and formulas are those of Intel's neural-compressor.
- ``nf4``: quantiles of the normal distribution (QLoRA, Dettmers et al. 2023, arXiv 2305.14314, appendix E), in the
  order of bitsandbytes' codes. The scale of the formats from here on is the absmax.
- ``fp4_e2m1``: the E2M1 floats of the OCP Microscaling Formats specification 1.0, 5.3.3, over their largest, 6.
- ``fp4_e2m1_itrex``: the codebook that intel-extension-for-transformers calls fp4_e2m1: .0625 in place of .5.
- ``fp4_e2m1_bnb``: bitsandbytes' FP4, in the order of its codes.
"""

SCALE_DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_SMALLEST_SCALE = {
    torch.float32: torch.finfo(torch.float32).tiny,
    torch.bfloat16: torch.finfo(torch.bfloat16).tiny,
    torch.float16: 2.0**-24,  # subnormal
}
_LARGEST_SCALE_CODE = 255


class Grouping(NamedTuple):
    """How a weight is quantised in groups of consecutive input channels.

    format: a name in `FORMATS`.
    size: of a group; the last one of a row may be shorter. None: a row is one group.
    asymmetric: groups of integers have a zero point each.
    scale_dtype: of the scales.
    double_quant: scales are quantised to 8 bits themselves, over each output channel.
    """

    format: str = "int8"
    size: int | None = None
    asymmetric: bool = False
    scale_dtype: torch.dtype = torch.float32
    double_quant: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether it is one float32 scale per output channel, for symmetric int8 codes."""
        return self == Grouping()

    def count(self, K: int) -> int:
        """How many groups a row of K has."""
        return count_groups(K, self.size)


class GroupCodes(NamedTuple):
    """What `quantize_groups` returns, for R rows of K columns in G groups.

    codes: ``[R, K]`` int8, or ``[R, ceil(K / 2)]`` uint8 of 4 bits.
    scale: ``[R, G]`` of the scale's dtype, or uint8 with double quantisation; ``[R]`` if a row is one group.
    zero_point: like ``scale``; int8 for int8 codes, else uint8. None if symmetric.
    scale_range: ``[R, 2]`` float32: ``scale = scale_range[0] + scale_codes * scale_range[1]``. None without double
        quantisation.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    scale_range: Tensor | None


def count_groups(K: int, size: int | None) -> int:
    """How many groups of ``size`` a row of K columns has; None: one. A row has at least one group."""
    return 1 if size is None else max(1, -(-K // size))


def format_of(name: str | None) -> Format:
    """The format called ``name`` in an `Int8Weight`, where None is int8."""
    return FORMATS["int8" if name is None else name]


class GroupScales(NamedTuple):
    """Scales and zero points of R rows in G groups, as they are stored and as numbers.

    stored, scale_range: as in `GroupCodes`, but always ``[R, G]``.
    scale: ``[R, G]``, the values of ``stored``, of the weight's dtype.
    zero: ``[R, G]`` of the weight's dtype: whole numbers, within the codes; None if symmetric.
    """

    stored: Tensor
    scale: Tensor
    zero: Tensor | None
    scale_range: Tensor | None


ChooseScales = Callable[[Tensor, Grouping], GroupScales]
"""The scales of a weight ``[R, K]``, float32 or float64."""


def split_groups(weight: Tensor, grouping: Grouping) -> Tensor:
    """``[R, K]`` as ``[R, G, size]``; zeros fill the last group of a row."""
    R, K = weight.shape
    size = K if grouping.size is None else grouping.size
    return torch.nn.functional.pad(weight, (0, grouping.count(K) * size - K)).view(R, grouping.count(K), size)


def absmax_scales(weight: Tensor, grouping: Grouping) -> GroupScales:
    """The scales of `FORMATS`, whose largest code is the group's largest value, and zero points.

    An asymmetric group has ``low = min(0, min(w))``, ``high = max(0, max(w))``, ``scale = (high - low) / (2**bits -
    1)`` and ``zero_point = round(-low / scale)``. Scales are rounded to their dtype.

    Source: the weight-only quantisation of Intel's neural-compressor.

    Args:
        weight: ``[R, K]``, float32 or float64, finite.

    Raises:
        ValueError: the scale's dtype cannot hold a scale.
    """
    groups = split_groups(weight, grouping)
    scales = store_scales(exact_scales(groups, grouping), grouping)
    if not grouping.asymmetric:
        return scales
    smallest, largest = code_range(grouping)
    low = groups.amin(-1).clamp_max(0) if groups.shape[-1] else torch.zeros_like(scales.scale)
    zero = (-low / scales.scale.where(scales.scale != 0, 1)).round().clamp(0, largest - smallest) + smallest
    return scales._replace(zero=zero)


def store_scales(scale: Tensor, grouping: Grouping) -> GroupScales:
    """The scales ``[R, G]`` as the grouping stores them, without zero points.

    Raises:
        ValueError: the scale's dtype cannot hold a scale.
    """
    if not grouping.double_quant:
        scale = _rounded(scale, grouping.scale_dtype)
        return GroupScales(scale.to(grouping.scale_dtype), scale, None, None)
    low, high = scale.amin(-1, keepdim=True), scale.amax(-1, keepdim=True)
    scale_range = torch.cat([low, (high - low) / _LARGEST_SCALE_CODE], -1).float()
    low, step = scale_range.double().split(1, -1)
    codes = ((scale.double() - low) / step.where(step != 0, 1)).round().clamp(0, _LARGEST_SCALE_CODE)
    stored = codes.to(torch.uint8)
    return GroupScales(stored, read_scale(stored, scale_range, scale.dtype), None, scale_range)


def code_range(grouping: Grouping) -> tuple[int, int]:
    """The smallest and the largest code."""
    if FORMATS[grouping.format].bits == 4:
        return 0, 15
    return (-128, 127) if grouping.asymmetric else (-127, 127)


def encode(values: Tensor, scale: Tensor, zero: Tensor | None, grouping: Grouping) -> Tensor:
    """The codes of the levels that are nearest to ``values``. Ties of integers go to even, others to the lower value.

    Args:
        values: any shape.
        scale, zero: of the group of each value; shapes that broadcast to that of ``values``.

    Returns:
        int8 in [-128, 127], or uint8 in [0, 15], one per value.
    """
    spec = FORMATS[grouping.format]
    steps = (values / scale.where(scale != 0, 1)).where(scale != 0, 0)  # double quantisation may round a scale to 0
    if spec.is_integer:
        codes = (steps.round() + (spec.zero_point if zero is None else zero)).clamp(*code_range(grouping))
    else:
        codes = _nearest_level(steps, spec)
    return codes.to(torch.int8 if spec.bits == 8 else torch.uint8)


def decode(codes: Tensor, scale: Tensor, zero: Tensor | None, grouping: Grouping) -> Tensor:
    """``(level - zero_point) * scale`` of what `encode` returned, in the dtype of ``scale``."""
    return steps_of(codes, zero, grouping, scale.dtype) * scale


def steps_of(codes: Tensor, zero: Tensor | None, grouping: Grouping, dtype: torch.dtype) -> Tensor:
    """``level - zero_point`` of what `encode` returned."""
    spec = FORMATS[grouping.format]
    levels = _levels_of(codes, spec, dtype)
    return levels - (spec.zero_point if zero is None else zero)


def group_codes(codes: Tensor, scales: GroupScales, grouping: Grouping) -> GroupCodes:
    """What is stored of codes ``[R, K]`` of `encode`."""
    spec, one = FORMATS[grouping.format], grouping.size is None
    zero = None if scales.zero is None else scales.zero.to(torch.int8 if spec.bits == 8 else torch.uint8)
    return GroupCodes(
        codes if spec.bits == 8 else pack(codes),
        scales.stored.squeeze(1) if one else scales.stored,
        zero.squeeze(1) if one and zero is not None else zero,
        scales.scale_range,
    )


def quantize_groups(weight: Tensor, grouping: Grouping, choose: ChooseScales = absmax_scales) -> GroupCodes:
    """Rounds each value to the nearest one that its group has a code for, with the scales that ``choose`` returns.

    Args:
        weight: ``[R, K]``, float32 or float64, finite.

    Raises:
        ValueError: the scale's dtype cannot hold a scale.
    """
    scales = choose(weight, grouping)
    zero = None if scales.zero is None else scales.zero.unsqueeze(-1)
    codes = encode(split_groups(weight, grouping), scales.scale.unsqueeze(-1), zero, grouping)
    return group_codes(codes.flatten(1)[:, : weight.shape[1]], scales, grouping)


def exact_scales(groups: Tensor, grouping: Grouping) -> Tensor:
    """The scales ``[R, G]`` of `absmax_scales` for groups ``[R, G, size]``, before they are rounded to their dtype."""
    spec = FORMATS[grouping.format]
    if not groups.shape[-1]:
        return groups.new_zeros(groups.shape[:-1])
    if grouping.asymmetric:
        return (groups.amax(-1).clamp_min(0) - groups.amin(-1).clamp_max(0)) / (2**spec.bits - 1)
    if grouping.format == "int4_fullrange":
        return groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1) / -8
    largest = {"int8": 127, "int4_clip": 7}.get(grouping.format, 1)
    return groups.abs().amax(-1) / largest


def _rounded(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``scale`` rounded to ``dtype``, and at least as large as its smallest positive value, with the sign it had."""
    rounded = scale.to(dtype).to(scale.dtype)
    has_values = type(rounded) is Tensor and not rounded.is_meta  # fake tensors have none
    if has_values and not bool(rounded.isfinite().all()):
        raise ValueError(
            f"a group has the scale {scale.abs().max().item():.4g}, which {dtype} does not hold; legal: another "
            "scale_dtype"
        )
    smallest = _SMALLEST_SCALE[dtype]
    return torch.where(rounded.abs() < smallest, torch.copysign(torch.full_like(rounded, smallest), rounded), rounded)


def read_scale(scale: Tensor, scale_range: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The scales as ``dtype``, float32 or float64. Codes are ``low + code * step`` in float64, and then rounded."""
    if scale_range is None:
        return scale.to(dtype)
    low, step = scale_range.double().unbind(-1)
    if scale.dim() == scale_range.dim():
        low, step = low.unsqueeze(-1), step.unsqueeze(-1)
    return (low + scale.double() * step).to(dtype)


@cache
def _sorted_levels(spec: Format) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Midpoints between the sorted levels, and the codes of these levels: for -0 that of 0."""
    assert spec.levels is not None
    codes = {level: code for code, level in reversed([*enumerate(spec.levels)])}
    levels = sorted(codes)
    return tuple((a + b) / 2 for a, b in pairwise(levels)), tuple(codes[v] for v in levels)


def _nearest_level(steps: Tensor, spec: Format) -> Tensor:
    """The codes of the levels that are nearest to ``steps``."""
    middles, codes = _sorted_levels(spec)
    return torch.tensor(codes, device=steps.device)[torch.bucketize(steps, steps.new_tensor(middles))]


def pack(codes: Tensor) -> Tensor:
    """``[R, K]`` codes of 4 bits as ``[R, ceil(K / 2)]`` bytes, the first of two in the upper half; 0 after odd K."""
    codes = torch.nn.functional.pad(codes, (0, codes.shape[-1] % 2))
    return codes[..., ::2] << 4 | codes[..., 1::2]


def unpack(codes: Tensor, K: int) -> Tensor:
    """``[..., ceil(K / 2)]`` bytes as ``[..., K]`` codes of 4 bits, uint8."""
    return torch.stack((codes >> 4, codes & 15), -1).flatten(-2)[..., :K]


def read_levels(codes: Tensor, spec: Format, K: int, dtype: torch.dtype) -> Tensor:
    """The levels of packed codes: ``[..., K]`` of ``dtype``, float32 or float64."""
    return _levels_of(unpack(codes, K) if spec.bits == 4 else codes, spec, dtype)


def _levels_of(codes: Tensor, spec: Format, dtype: torch.dtype) -> Tensor:
    if spec.levels is None:
        return codes.to(dtype)
    return torch.tensor(spec.levels, dtype=torch.float32, device=codes.device).to(dtype)[codes.int()]


def per_column(of_groups: Tensor, K: int, size: int | None) -> Tensor:
    """Values ``[..., G]`` of groups, or ``[...]`` of rows if ``size`` is None, as ``[..., K]`` or ``[..., 1]`` ones."""
    if size is None:
        return of_groups.unsqueeze(-1)
    return of_groups.repeat_interleave(size, -1)[..., :K]
