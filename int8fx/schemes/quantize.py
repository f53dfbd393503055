"""Symmetric int8 quantisation: the one place that knows 127."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

INT8_MAX = 127

MAX_K = (2**31 - 1) // INT8_MAX**2
"""Longest inner dimension whose int32 sum cannot overflow: K * 127 * 127 <= 2**31 - 1, so 133,144."""

NO_THRESHOLD = sys.float_info.max
"""A threshold that no value reaches. Infinity does the same, but an AOTInductor package cannot hold it."""

TINY = torch.finfo(torch.float32).tiny
_CHUNK = 1 << 20  # weight elements held in float32 at once while packing


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that scales and sums are carried in: float64 for float64, float32 for the rest."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def outlier_mask(x: Tensor, threshold: float, columns: Tensor | None = None, top: int = 0) -> Tensor:
    """``mask[k] = any_m(abs(x[m, k]) >= threshold) or k is one of the top columns``: those that stay in 16 bits.

    Source: LLM.int8() (arXiv 2208.07339), section 3.2. ``threshold=inf`` marks no column (plain int8),
    ``threshold=0`` marks all of them. NaN is not an outlier; it reaches the output through the row scale.
    The comparison is made in float32 (float64 for float64 x): in 16 bits torch would round the threshold.

    Args:
        x: ``[M, K]``, any float dtype.
        threshold: >= 0.
        columns: ``[C]`` int64, columns that something else takes care of: not marked, not counted.
        top: how many columns with the largest ``max_m(abs(x[m, k]))`` are marked, whatever the threshold.

    Returns:
        ``[K]`` bool.
    """
    K = x.shape[-1]
    mask = torch.zeros(K, dtype=torch.bool, device=x.device)
    if threshold < NO_THRESHOLD:
        mask = (x.abs().to(compute_dtype(x.dtype)) >= threshold).any(0)
    if columns is not None:
        mask = mask.index_fill(0, columns, False)
    if top and K and x.shape[0]:
        absmax = x.abs().amax(0)
        if columns is not None:
            absmax = absmax.index_fill(0, columns, -1.0)
        free = K - (0 if columns is None else columns.shape[0])
        mask = mask.index_fill(0, absmax.topk(min(top, free)).indices, True)
    return mask


def rotation_blocks(K: int, block: int) -> list[tuple[int, int]]:
    """``(first column, size)`` of the diagonal blocks of `rotate`'s matrix: sizes are powers of two that add up to K.

    As many of size ``block`` as K holds, then the powers of two that the rest consists of, the largest first.
    """
    blocks = [(i, block) for i in range(0, K - block + 1, block)]
    begin, size = K - K % block, block // 2
    while size:
        if K & size:
            blocks.append((begin, size))
            begin += size
        size //= 2
    return blocks


def rotate(x: Tensor, block: int) -> Tensor:
    """``y[..., i + j] = sum_k(x[..., i + k] * H[k, j]) / sqrt(n)`` in each block ``(i, n)`` of `rotation_blocks`.

    H is Sylvester's Hadamard matrix, ``H[k, j] = (-1) ** popcount(k & j)``; over ``sqrt(n)`` it is orthonormal and its
    own inverse, so ``rotate(x) @ rotate(w).T == x @ w.T`` and ``rotate(rotate(x)) == x`` in exact arithmetic.

    Floats are summed in one order on every device and for every M: butterflies ``(a + b, a - b)`` of columns at
    distance 1, 2, 4, ..., n / 2, each rounded once, then one product with ``n ** -0.5``. To first order::

        abs(error[m, k]) <= (log2(n) + 2) * u / sqrt(n) * sum_block(abs(x[m, j]))

    with u half the machine epsilon of x's dtype and the sum over the block that k is in.

    Args:
        x: ``[..., K]``, float32 or float64.
        block: a power of two; 1 leaves x as it is.

    Returns:
        ``[..., K]`` of x's dtype.
    """
    K = x.shape[-1]
    if block == 1 or not x.numel():
        return x
    whole = K - K % block
    parts = [_hadamard(x[..., :whole], block)] if whole else []
    parts += [_hadamard(x[..., i : i + n], n) for i, n in rotation_blocks(K, block) if i >= whole]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _hadamard(x: Tensor, n: int) -> Tensor:
    y, h = x.reshape(-1, n), 1
    while h < n:  # three distances at a time: torch then reads and writes the tensor half as often
        radix = min(8, n // h)
        columns = list(y.view(-1, n // (h * radix), radix, h).unbind(2))
        for i in (1, 2, 4)[: radix.bit_length() - 1]:
            for j in range(radix):
                if not j & i:
                    a, b = columns[j], columns[j | i]
                    columns[j], columns[j | i] = a + b, a - b
        y, h = torch.stack(columns, 2), h * radix
    return y.reshape(x.shape) * n**-0.5


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


def quantize_weight(weight: Tensor, block: int = 1, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`quantize_rowwise` over the rows of ``rotate(weight without columns, block)``, in little extra memory.

    One scale per output channel.

    Args:
        weight: ``[N, K]`` or ``[E, N, K]``, finite, any float dtype, any strides, on any device.
        block: of the rotation; 1 for none.
        columns: ``[C]`` int64, the columns that are kept elsewhere: zero before the rotation.

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
            if columns is not None:
                rows = rows.index_fill(-1, columns, 0)
            rows = rotate(rows.to(compute_dtype(rows.dtype)), block) if block > 1 else rows
            block_codes, block_scale = quantize_rowwise(rows)
            if rows.dtype == torch.float64:  # the codes must fit the scale as stored
                block_codes = (rows / block_scale.float().double().unsqueeze(-1)).round().to(torch.int8)
            c[i : i + step] = block_codes
            s[i : i + step] = block_scale
    return codes, scale


def dequantize(
    codes: Tensor,
    scale: Tensor,
    dtype: torch.dtype = torch.float32,
    block: int = 1,
    columns: Tensor | None = None,
    columns_weight: Tensor | None = None,
) -> Tensor:
    """``rotate(codes[..., n, k] * scale[..., n], block)``, its ``columns`` replaced by ``columns_weight``.

    Computed in float32 (float64 for float64) and rounded once.

    Args:
        codes: ``[..., N, K]`` int8.
        scale: ``[..., N]``.
        dtype: of the result.
        block: of the rotation that the codes are in.
        columns: ``[C]`` int64, the columns that are kept.
        columns_weight: ``[..., N, C]``, their weights.

    Returns:
        ``[..., N, K]`` of ``dtype``.
    """
    ct = compute_dtype(dtype)
    w = rotate(codes.to(ct) * scale.to(ct).unsqueeze(-1), block)
    if columns is not None and columns_weight is not None:
        w = w.index_copy(-1, columns, columns_weight.to(ct))
    return w.to(dtype)
