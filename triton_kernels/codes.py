"""Codes of weights as numbers: integers of 8 and 4 bits and codebooks of 16 levels, with zero points and scales."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Coding(NamedTuple):
    """What codes stand for: ``w = (level - zero_point) * scale``, with scale and zero point of the group of a column.

    By default the level is the code, and a row is one group.

    group_size: how many columns a group has, the last one of a row possibly fewer; None for all.
    levels: code -> level of codes of 4 bits; None if the level is the code.
    zero: the zero point of all groups, if they have none of their own.
    zero_point: ``[E, N, G]``, int8 or uint8, contiguous; ``[E, N]`` if a row is one group; or None.
    scale_range: ``[E, N, 2]`` float32, contiguous: ``scale = scale_range[0] + scale_codes * scale_range[1]``; or None.
    """

    group_size: int | None = None
    levels: tuple[float, ...] | None = None
    zero: int = 0
    zero_point: Tensor | None = None
    scale_range: Tensor | None = None


PLAIN = Coding()
"""int8 codes, one scale per output channel."""


class Codebook(NamedTuple):
    """``levels[code] / unit`` is the level of a code.

    levels: rounded to float32 in the kernel.
    parts: into how many numbers of x's dtype each of ``levels`` is cut.
    """

    levels: tuple[float, ...]
    unit: int
    parts: int


_LARGEST_UNIT = 16
_PARTS = {torch.float16: 2, torch.bfloat16: 3, torch.float32: 1}  # of 11, 8 and 24 bits: together those of a float32


def codebook(levels: tuple[float, ...], dtype: torch.dtype) -> Codebook:
    """``levels`` for products with x of ``dtype``.

    If all levels times one unit have 8 significant bits, such as those of E2M1 floats over 6 times 3, one product with
    these is exact. Others (nf4) are cut into parts. The factor 256 keeps the parts above float16's subnormal
    numbers.
    """
    if dtype == torch.float32:
        return Codebook(levels, 1, 1)
    for unit in range(1, _LARGEST_UNIT + 1):
        multiples = tuple(_rounded_to_8_bits(level * unit) for level in levels)
        if all(math.isclose(m, level * unit, rel_tol=2.0**-40) for m, level in zip(multiples, levels, strict=True)):
            return Codebook(multiples, unit, 1)
    return Codebook(tuple(level * 256 for level in levels), 256, _PARTS[dtype])


def _rounded_to_8_bits(value: float) -> float:
    fraction, exponent = math.frexp(value)
    return math.ldexp(round(fraction * 2**8), exponent - 8)


# ---- in kernels ------------------------------------------------------------------------------------------------------


@triton.jit
def cut(values, dtype: tl.constexpr):
    """``values`` as ``dtype``; float32 as bfloat16 by dropping bits, which is exact where it holds them."""
    if dtype == tl.bfloat16:
        bits = values.to(tl.int32, bitcast=True) >> 16
        result = bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        result = values.to(dtype)
    return result


@triton.jit
def widen(codes, dtype: tl.constexpr):
    """``codes``, integers from -256 to 256, as ``dtype``, exactly: both 16-bit formats hold them.

    bfloat16 is the upper half of a float32, and the lower half is 0 for a code. Written as a shift, CDNA needs 1.5
    instructions per code. Written as a conversion, the compiler adds rounding and needs four.
    """
    return cut(codes.to(tl.float32) if dtype == tl.bfloat16 else codes, dtype)


@triton.jit
def unpack(codes):
    """``codes [n, N]``, two codes of 4 bits to a byte, the first in the upper half, as ``[2 * n, N]`` codes."""
    pairs = tl.permute(tl.join(codes >> 4, codes & 15), (0, 2, 1))
    return tl.reshape(pairs, (2 * codes.shape[0], codes.shape[1]))


@triton.jit
def table_of(LEVELS: tl.constexpr):
    """``[16]`` float32: code -> level, for `look_up`. Without pointers: a launch needs no tensor for it."""
    code = tl.arange(0, 16)
    table = tl.full((16,), LEVELS[0], tl.float32)
    for i in tl.static_range(1, 16):
        table = tl.where(code == i, LEVELS[i], table)
    return table


@triton.jit
def look_up(table, codes):
    """``table[codes]``: one load from shared memory for each. A tree of selections takes three times as many
    instructions."""
    count: tl.constexpr = codes.shape[0] * codes.shape[1]
    return tl.reshape(tl.gather(table, tl.reshape(codes.to(tl.int32), (count,)), 0), codes.shape)


@triton.jit
def add_product(acc, x, codes, zero, table, PARTS: tl.constexpr):
    """``acc[m, n] + sum_k(x[m, k] * (codes[k, n] - zero[n]))``, or with ``table[codes[k, n]]``: products are exact.

    Args:
        acc: ``[BLOCK_M, BLOCK_N]`` float32.
        codes: ``[BLOCK_K, BLOCK_N]`` int8, or uint8 below 16.
        zero: of `load_zero`.
        table: of `table_of`; None if the level is the code.
        PARTS: of the `Codebook`.
    """
    if table is None:
        steps = codes if zero is None else codes.to(tl.int16) - zero
        acc = tl.dot(x, widen(steps, x.dtype), acc, input_precision="ieee")
    else:
        acc = _add_levels(acc, x, look_up(table, codes), PARTS)
    return acc


@triton.jit
def _add_levels(acc, x, levels, PARTS: tl.constexpr):
    values = cut(levels, x.dtype)
    if PARTS == 1:
        acc = tl.dot(x, values, acc, input_precision="ieee")
    else:
        # The small parts come first: their sums round far below the last bit of the largest part's.
        rest = levels - values.to(tl.float32)
        second = cut(rest, x.dtype)
        sums = tl.zeros_like(acc)
        if PARTS == 3:
            sums = tl.dot(x, cut(rest - second.to(tl.float32), x.dtype), sums, input_precision="ieee")
        sums = tl.dot(x, second, sums, input_precision="ieee")
        acc += tl.dot(x, values, sums, input_precision="ieee")
    return acc


@triton.jit
def load_zero(zero_point_ptr, at, ZERO: tl.constexpr):
    """The zero points at ``at``: ``[1, BLOCK_N]`` int16. Without a tensor ZERO, or None for 0."""
    zero = None if ZERO == 0 else ZERO
    if zero_point_ptr is not None:
        zero = tl.load(zero_point_ptr + at).to(tl.int16)[None, :]
    return zero


@triton.jit
def load_scale(scale_ptr, scale_range_ptr, channels, G, group):
    """The scales of a group as float32, ``[BLOCK_N]``. Codes of scales are ``low + code * step``, rounded once.

    The range is loaded for each group: held in registers, it would take those of the sums.
    """
    scale = tl.load(scale_ptr + channels * G + group).to(tl.float32)
    if scale_range_ptr is not None:
        low, step = tl.load(scale_range_ptr + 2 * channels), tl.load(scale_range_ptr + 2 * channels + 1)
        scale = tl.fma(scale, step, low)
    return scale
