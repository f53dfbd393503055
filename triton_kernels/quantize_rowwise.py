"""Activations to int8 codes with one scale per row, after an optional rotation, without the 16-bit columns."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .columns import is_listed
from .groups import group_of_row
from .rotate import rotate

MARKED_ROWS = 256
"""With this many rows or more, unquantised columns are marked once in a mask instead of looked up in every row."""

MAX_BLOCK = 8192
"""The largest block of a rotation: a program holds one in registers."""


@triton.jit
def to_codes(steps):
    """``round(steps)``, half to even, as int8; ``abs(steps) <= 127``.

    A float32 of ``1.5 * 2**23`` and more has no bits for a fraction. So the addition rounds to an integer, which stands
    in the low bits of the sum.
    """
    return (steps + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def row_scale(absmax_bits, INT8_MAX: tl.constexpr, TINY: tl.constexpr):
    """``max(absmax / 127, TINY)``, NaN where absmax is NaN or inf, from the bits of ``absmax`` float32.

    Read as integers, the bits of non-negative floats are ordered like the floats, and NaN is above inf. So the
    maximum of the bits keeps NaN.
    """
    absmax = absmax_bits.to(tl.float32, bitcast=True)
    absmax = absmax + (absmax - absmax)  # inf becomes NaN, so that 0 * scale cannot hide it
    scale = tl.div_rn(absmax, tl.full(absmax.shape, INT8_MAX, tl.float32))
    return tl.where(scale < TINY, TINY, scale)


@triton.jit
def _part(
    x_ptr, mask_ptr, columns_ptr, start, K, C, stride_xk,
    BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, REGULAR: tl.constexpr, WHOLE_BLOCKS: tl.constexpr,
):  # fmt: skip
    """The columns ``start <= k < start + BLOCK_K`` of a row as float32, 0 in 16-bit columns, rotated."""
    k = start + tl.arange(0, BLOCK_K)
    x = tl.load(x_ptr + k.to(tl.int64) * stride_xk, mask=k < K, other=0).to(tl.float32)
    if mask_ptr is not None:  # a mask that differs from column to column would split the load of x
        x = tl.where(tl.load(mask_ptr + k, mask=k < K, other=1) == 0, x, 0.0)
    if columns_ptr is not None:
        x = tl.where(is_listed(columns_ptr, C, start, BLOCK_K), 0.0, x)
    return rotate(x, start, K, BLOCK, REGULAR, WHOLE_BLOCKS)


@triton.jit
def _quantize_rowwise_kernel(
    x_ptr, mask_ptr, columns_ptr, offsets_ptr, codes_ptr, scale_ptr, M, K, E, C, stride_xe, stride_xm, stride_xk,
    INT8_MAX: tl.constexpr, TINY: tl.constexpr, BLOCK: tl.constexpr, REGULAR: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr, ONE_PART: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    m, e = tl.program_id(0), tl.program_id(1)
    row = (e * M + m).to(tl.int64)
    x_ptr += e.to(tl.int64) * stride_xe + m.to(tl.int64) * stride_xm
    codes_ptr += row * K
    if mask_ptr is not None:
        if offsets_ptr is not None:
            e = group_of_row(offsets_ptr, m, E, BLOCK_E)
        if e >= E:  # a row after the last group
            return
        mask_ptr += e.to(tl.int64) * K
    k = tl.arange(0, BLOCK_K)
    if ONE_PART:
        x = _part(x_ptr, mask_ptr, columns_ptr, 0, K, C, stride_xk, BLOCK_K, BLOCK, REGULAR, WHOLE_BLOCKS)
        scale = row_scale(tl.max(tl.abs(x).to(tl.int32, bitcast=True), 0), INT8_MAX, TINY)
        tl.store(codes_ptr + k, to_codes(tl.div_rn(x, tl.broadcast_to(scale, x.shape))), mask=k < K)
    else:
        absmax = tl.zeros((BLOCK_K,), tl.int32)
        for start in range(0, K, BLOCK_K):
            x = _part(x_ptr, mask_ptr, columns_ptr, start, K, C, stride_xk, BLOCK_K, BLOCK, REGULAR, WHOLE_BLOCKS)
            absmax = tl.maximum(absmax, tl.abs(x).to(tl.int32, bitcast=True))
        scale = row_scale(tl.max(absmax, 0), INT8_MAX, TINY)
        for start in range(0, K, BLOCK_K):  # x comes from the cache now
            x = _part(x_ptr, mask_ptr, columns_ptr, start, K, C, stride_xk, BLOCK_K, BLOCK, REGULAR, WHOLE_BLOCKS)
            codes = to_codes(tl.div_rn(x, tl.broadcast_to(scale, x.shape)))
            tl.store(codes_ptr + start + k, codes, mask=start + k < K)
    tl.store(scale_ptr + row, scale)


def quantize_rowwise(
    x: Tensor,
    mask: Tensor | None,
    *,
    int8_max: int,
    tiny: float,
    block: int = 1,
    columns: Tensor | None = None,
    offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``scale[m] = max_k(abs(z[m, k])) / int8_max``, ``codes[m, k] = round(z[m, k] / scale[m])``, ``z = rotate(x0)``.

    ``x0`` is x with zeros in ``columns`` and where ``mask`` is true. Codes and scales are equal bit for bit to the
    reference's: sums in its order, IEEE division, ties to even. No scale is below ``tiny``. A row whose z holds NaN or
    inf gets scale NaN. A row depends on no other row.

    A row is read once. A row of more than `tiles.MAX_ROW_PART` columns is read twice, the second time from the cache,
    because the scale must be known before the first code.

    Args:
        x: ``[E, M, K]`` float16, bfloat16 or float32, any strides; ``[1, S, K]`` with offsets.
        mask: ``[E, K]`` bool, the outlier columns of each weight; None for none.
        int8_max, tiny: the largest code and the smallest scale.
        block: of the rotation, a power of two up to `MAX_BLOCK`, negative for regular Hadamard matrices; 1 for none.
        columns: ``[C]`` distinct integers, contiguous: the unquantised columns; None for none.
        offsets: ``[E]``, the end of each group's rows. Rows after the last group keep arbitrary values.

    Returns:
        ``codes [E * M, K]`` int8 and ``scale [E * M]`` float32.

    Raises:
        ValueError: the block is too large.
    """
    E, M, K = x.shape
    regular, block = block < 0, min(abs(block), triton.next_power_of_2(K + 1) // 2) if K else 1  # at most K
    if block > MAX_BLOCK:
        raise ValueError(f"quantize_rowwise: block {block} of K = {K}; legal: at most {MAX_BLOCK} on a GPU")
    codes = torch.empty(E * M, K, dtype=torch.int8, device=x.device)
    scale = torch.empty(E * M, dtype=torch.float32, device=x.device)
    if columns is not None and E * M >= MARKED_ROWS:
        if mask is None:
            mask, offsets = torch.zeros(E, K, dtype=torch.bool, device=x.device).index_fill_(1, columns, True), None
        else:
            mask = mask.index_fill(1, columns, True)
        columns = None
    groups = E if mask is None else mask.shape[0]
    tile = tiles.for_quantize_rowwise(K, block)
    if E * M:
        _quantize_rowwise_kernel[(M, E)](
            x_ptr=x, mask_ptr=mask, columns_ptr=columns, offsets_ptr=offsets, codes_ptr=codes, scale_ptr=scale,
            M=M, K=K, E=groups, C=0 if columns is None else len(columns),
            stride_xe=x.stride(0), stride_xm=x.stride(1), stride_xk=x.stride(2),
            INT8_MAX=int8_max, TINY=tiny, BLOCK=block, REGULAR=regular, WHOLE_BLOCKS=K % block == 0,
            ONE_PART=K <= tile.BLOCK_K, BLOCK_K=tile.BLOCK_K, BLOCK_E=triton.next_power_of_2(groups),
            num_warps=tile.num_warps,
        )  # fmt: skip
    return codes, scale
