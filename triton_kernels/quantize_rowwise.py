"""Activations to int8 codes, one scale per row, without the outlier columns."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import QUANTIZE_ROWWISE


@triton.jit
def to_codes(steps):
    """``round(steps)``, half to even, as int8; ``abs(steps) <= 127``.

    Adding ``1.5 * 2**23`` leaves no room for a fraction: float32's own rounding is the rounding wanted, and the
    integer stands in the low bits of the sum.
    """
    return (steps + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def row_scale(absmax_bits, INT8_MAX: tl.constexpr, TINY: tl.constexpr):
    """``max(absmax / 127, TINY)``, NaN where absmax is NaN or inf, from the bits of ``absmax`` float32.

    As integers the bits of non-negative floats are ordered like the floats, and NaN is above inf: so the maximum is
    taken over them, and no NaN is lost.
    """
    absmax = absmax_bits.to(tl.float32, bitcast=True)
    absmax = absmax + (absmax - absmax)  # inf becomes NaN, so that 0 * scale cannot hide it
    scale = tl.div_rn(absmax, tl.full(absmax.shape, INT8_MAX, tl.float32))
    return tl.where(scale < TINY, TINY, scale)


@triton.jit
def _quantize_rowwise_kernel(
    x_ptr, mask_ptr, offsets_ptr, codes_ptr, scale_ptr, M, K, E, stride_xe, stride_xm, stride_xk,
    INT8_MAX: tl.constexpr, TINY: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    m, e = tl.program_id(0), tl.program_id(1)
    row = (e * M + m).to(tl.int64)
    x_ptr += e.to(tl.int64) * stride_xe + m.to(tl.int64) * stride_xm
    if mask_ptr is not None:
        if offsets_ptr is not None:
            i = tl.arange(0, BLOCK_E)
            ends = tl.load(offsets_ptr + i, mask=i < E, other=0)
            e = tl.sum(((ends <= m) & (i < E)).to(tl.int32), 0)
        if e >= E:  # a row behind the last group
            return
        mask_ptr += e.to(tl.int64) * K
    absmax = tl.zeros((BLOCK_K,), tl.int32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = k < K
        if mask_ptr is not None:
            inside = inside & (tl.load(mask_ptr + k, mask=k < K, other=1) == 0)
        x = tl.load(x_ptr + k.to(tl.int64) * stride_xk, mask=inside, other=0).to(tl.float32)
        absmax = tl.maximum(absmax, tl.abs(x).to(tl.int32, bitcast=True))
    scale = row_scale(tl.max(absmax, 0), INT8_MAX, TINY)
    tl.store(scale_ptr + row, scale)
    for start in range(0, K, BLOCK_K):  # x comes from the cache this time
        k = start + tl.arange(0, BLOCK_K)
        inside = k < K
        if mask_ptr is not None:
            inside = inside & (tl.load(mask_ptr + k, mask=k < K, other=1) == 0)
        x = tl.load(x_ptr + k.to(tl.int64) * stride_xk, mask=inside, other=0).to(tl.float32)
        codes = to_codes(tl.div_rn(x, tl.broadcast_to(scale, x.shape)))
        tl.store(codes_ptr + row * K + k, codes, mask=k < K)


def quantize_rowwise(
    x: Tensor, mask: Tensor | None, *, int8_max: int, tiny: float, offsets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``scale[m] = max_k(abs(x[m, k])) / int8_max``, ``codes[m, k] = round(x[m, k] / scale[m])`` over unmasked columns.

    The reference's codes and scales, bit for bit: IEEE division, half to even, masked columns get code 0, no scale is
    below ``tiny``, a row with NaN or inf in an unmasked column gets scale NaN. x is read twice, the second time from
    the cache: the scale must be known before the first code.

    Args:
        x: ``[E, M, K]`` float16, bfloat16 or float32, any strides; ``[1, S, K]`` with offsets.
        mask: ``[E, K]`` bool, the columns to leave out; None for none.
        int8_max, tiny: the largest code and the smallest scale.
        offsets: ``[E]``, the end of each group's rows; rows behind the last group are left as they are.

    Returns:
        ``codes [E * M, K]`` int8 and ``scale [E * M]`` float32.
    """
    E, M, K = x.shape
    codes = torch.empty(E * M, K, dtype=torch.int8, device=x.device)
    scale = torch.empty(E * M, dtype=torch.float32, device=x.device)
    groups = E if mask is None else mask.shape[0]
    if E * M:
        _quantize_rowwise_kernel[(M, E)](
            x, mask, offsets, codes, scale, M, K, groups, *x.stride(), int8_max, tiny,
            BLOCK_K=min(triton.next_power_of_2(max(K, 16)), QUANTIZE_ROWWISE.BLOCK_K),
            BLOCK_E=triton.next_power_of_2(groups), num_warps=QUANTIZE_ROWWISE.num_warps,
        )  # fmt: skip
    return codes, scale
