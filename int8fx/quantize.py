"""Symmetric int8 quantisation: the one place that knows 127."""

from __future__ import annotations

import torch
from torch import Tensor

INT8_MAX = 127

MAX_K = (2**31 - 1) // INT8_MAX**2
"""Longest inner dimension whose int32 sum cannot overflow: K * 127 * 127 <= 2**31 - 1, so 133,144."""

TINY = torch.finfo(torch.float32).tiny
_CHUNK = 1 << 20  # weight elements held in float32 at once while packing


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that scales and sums are carried in: float64 for float64, float32 for the rest."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def outlier_mask(x: Tensor, threshold: float) -> Tensor:
    """``mask[k] = any_m(abs(x[m, k]) >= threshold)``: the columns that stay in 16 bits.

    Source: LLM.int8() (arXiv 2208.07339), section 3.2. ``threshold=inf`` marks no column (plain int8),
    ``threshold=0`` marks all of them. NaN is not an outlier; it reaches the output through the row scale.
    The comparison is made in float32 (float64 for float64 x): in 16 bits torch would round the threshold.

    Args:
        x: ``[M, K]``, any float dtype.
        threshold: >= 0.

    Returns:
        ``[K]`` bool.
    """
    if threshold == float("inf"):
        return torch.zeros(x.shape[-1], dtype=torch.bool, device=x.device)
    return (x.abs().to(compute_dtype(x.dtype)) >= threshold).any(0)


def quantize_rowwise(x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``scale[m] = max_k(abs(x[m, k])) / 127``, ``codes[m, k] = round(x[m, k] / scale[m])`` over the unmasked columns.

    Rounding is half to even; masked columns get code 0 and do not count for the maximum (the paper's
    rule). Then ``abs(x - codes * scale) <= scale / 2 * (1 + 2**-16)``: half a step, plus the rounding of
    the division. The scale is never below the smallest normal float32, so that a row of zeros or
    denormals needs no special case. A row that holds NaN or inf in an unmasked column gets scale NaN;
    its codes mean nothing.

    Args:
        x: ``[M, K]``, any float dtype.
        mask: ``[K]`` bool, the columns to leave out; None for none.

    Returns:
        ``codes [M, K]`` int8 in [-127, 127] and ``scale [M]``, float32 (float64 for float64 x).
    """
    x = x.to(compute_dtype(x.dtype))
    if mask is not None:
        x = x.masked_fill(mask, 0)
    absmax = x.abs().amax(-1) if x.shape[-1] else x.new_zeros(x.shape[:-1])
    absmax = absmax + (absmax - absmax)  # inf becomes NaN, so that 0 * scale cannot hide it
    scale = (absmax / INT8_MAX).clamp_min(TINY)
    return (x / scale.unsqueeze(-1)).round().to(torch.int8), scale


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize_rowwise` over the rows of ``weight``, one scale per output channel, in little extra memory.

    Args:
        weight: ``[N, K]`` or ``[E, N, K]``, finite, any float dtype, any strides, on any device.

    Returns:
        ``codes [..., N, K]`` int8, contiguous, and ``scale [..., N]`` float32.
    """
    *lead, K = weight.shape
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(lead, dtype=torch.float32, device=weight.device)
    step = max(1, _CHUNK // max(K, 1))
    for w, c, s in zip(*(t.unbind(0) if len(lead) == 2 else (t,) for t in (weight, codes, scale)), strict=True):
        for i in range(0, w.shape[0], step):
            rows = w[i : i + step]
            block_codes, block_scale = quantize_rowwise(rows)
            if rows.dtype == torch.float64:  # the codes must fit the scale as stored
                block_codes = (rows / block_scale.float().double().unsqueeze(-1)).round().to(torch.int8)
            c[i : i + step] = block_codes
            s[i : i + step] = block_scale
    return codes, scale


def dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``codes[..., n, k] * scale[..., n]``, computed in float32 (float64 for float64) and rounded once.

    Args:
        codes: ``[..., N, K]`` int8.
        scale: ``[..., N]``.
        dtype: of the result.

    Returns:
        ``[..., N, K]`` of ``dtype``.
    """
    ct = compute_dtype(dtype)
    return (codes.to(ct) * scale.to(ct).unsqueeze(-1)).to(dtype)
