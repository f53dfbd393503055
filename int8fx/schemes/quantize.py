"""Symmetric int8 quantisation: the one place with 127 and 6.0."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .formats import (
    ChooseScales,
    GroupCodes,
    Grouping,
    absmax_scales,
    format_of,
    per_column,
    quantize_groups,
    read_levels,
    read_scale,
)
from .rotate import rotate
from .weight import Int8Weight, PackedTensors

INT8_MAX = 127

MAX_K = (2**31 - 1) // INT8_MAX**2
"""Longest inner dimension whose int32 sum cannot overflow: K * 127 * 127 <= 2**31 - 1, so 133,144."""

DEFAULT_THRESHOLD = 6.0
"""LLM.int8()'s outlier threshold (arXiv 2208.07339, section 3.2)."""

MAX_THRESHOLD = torch.finfo(torch.float32).max
"""The largest threshold: a value is compared in float32."""

TINY = torch.finfo(torch.float32).tiny
_CHUNK = 1 << 20  # weight elements held in float32 at once while quantising


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scales and sums: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def outlier_mask(x: Tensor, threshold: float | None, columns: Tensor | None = None) -> Tensor:
    """``mask[k] = any_m(abs(x[m, k]) >= threshold)``: the columns that stay in 16 bits.

    Source: LLM.int8() (arXiv 2208.07339), section 3.2. ``threshold=None`` marks no column (plain int8), ``threshold=0``
    marks all of them. NaN is not an outlier; it reaches the output through the row scale. The comparison is made in
    float32 (float64 for float64 x): in 16 bits torch would round the threshold.

    Args:
        x: ``[M, K]``, any float dtype.
        threshold: >= 0, or None.
        columns: ``[C]`` int64, the unquantised columns: never marked.

    Returns:
        ``[K]`` bool.
    """
    mask = torch.zeros(x.shape[-1], dtype=torch.bool, device=x.device)
    if threshold is not None:
        mask = (x.abs().to(compute_dtype(x.dtype)) >= threshold).any(0)
        if columns is not None:
            mask = mask.index_fill(0, columns, False)
    return mask


def quantize_rowwise(x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``scale[m] = max_k(abs(x[m, k])) / 127``, ``codes[m, k] = round(x[m, k] / scale[m])`` over the unmasked columns.

    Rounding is half to even. Masked columns get code 0 and do not count for the maximum (the paper's rule). Then
    ``abs(x - codes * scale) <= scale / 2 * (1 + 2**-16)``: half a step, plus the rounding of the division. The scale is
    never below the smallest normal float32, so a row of zeros or denormals needs no special case. A row that holds NaN
    or inf in an unmasked column gets scale NaN, and its codes are undefined.

    Args:
        x: ``[M, K]``, any float dtype.
        mask: ``[K]`` bool, the masked columns; None for none.

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
        block: of the rotation (`rotate`); 1 for none.
        columns: ``[C]`` int64, the columns that are not quantised: taken as zero before the rotation.

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
            rows = rotate(rows.to(compute_dtype(rows.dtype)), block) if block != 1 else rows
            block_codes, block_scale = quantize_rowwise(rows)
            if rows.dtype == torch.float64:  # round to the scale that is stored, which is float32
                block_codes = (rows / block_scale.float().double().unsqueeze(-1)).round().to(torch.int8)
            c[i : i + step] = block_codes
            s[i : i + step] = block_scale
    return codes, scale


def pack_weight(
    weight: Tensor,
    grouping: Grouping,
    block: int = 1,
    columns: Tensor | None = None,
    choose: ChooseScales = absmax_scales,
) -> PackedTensors:
    """The packed tensors of ``rotate(weight without columns, block)``, rounded to nearest.

    `quantize_weight` for int8 with one absmax scale per output channel, else `formats.quantize_groups`.

    Args:
        weight: ``[N, K]`` or ``[E, N, K]``, finite, any float dtype, any strides, on any device.
        block: of the rotation (`rotate`); 1 for none.
        columns: ``[C]`` int64, the columns that are not quantised. Their weights keep their dtype.
        choose: how groups get their scales and zero points.

    Raises:
        ValueError: the dtype of the scales cannot hold one.
    """
    columns_weight = None if columns is None else weight.index_select(-1, columns).clone()
    if grouping.is_plain and choose is absmax_scales:
        return PackedTensors(*quantize_weight(weight, block, columns), columns, columns_weight)
    *lead, K = weight.shape
    step = max(1, _CHUNK // max(K, 1))
    rows = weight.reshape(math.prod(lead), K)
    parts: list[GroupCodes] = []
    for i in range(0, max(1, len(rows)), step):
        part = rows[i : i + step]
        if columns is not None:
            part = part.index_fill(-1, columns, 0)
        parts.append(quantize_groups(rotate(part.to(compute_dtype(part.dtype)), block), grouping, choose))

    def joined(tensors: tuple) -> Any:
        return None if tensors[0] is None else (t := torch.cat(tensors)).view(*lead, *t.shape[1:])

    codes, scale, zero_point, scale_range = map(joined, zip(*parts, strict=True))
    return PackedTensors(codes, scale, columns, columns_weight, zero_point, scale_range)


def dequantize(weight: Int8Weight, dtype: torch.dtype = torch.float32) -> Tensor:
    """``rotate(v, block)`` with ``columns_weight`` in its ``columns``; ``v[..., n, k] = (level - zero_point) * scale``.

    The level of an int8 code is the code, that of a 4-bit one `formats.FORMATS` says. Scale and zero point are those of
    the group that column k is in. Computed in float32 (float64 for float64) and rounded once.

    Returns:
        ``[..., N, K]`` of ``dtype``.
    """
    ct = compute_dtype(dtype)
    w = rotate(_dequantize_codes(weight, ct), weight.block)
    if weight.columns is not None and weight.columns_weight is not None:
        w = w.index_copy(-1, weight.columns, weight.columns_weight.to(ct))
    return w.to(dtype)


def _dequantize_codes(weight: Int8Weight, ct: torch.dtype) -> Tensor:
    K, spec = weight.K, format_of(weight.format)
    levels = read_levels(weight.codes, spec, K, ct)
    if weight.zero_point is not None:
        levels = levels - per_column(weight.zero_point.to(ct), K, weight.group_size)
    elif spec.zero_point:
        levels = levels - spec.zero_point
    return levels * per_column(read_scale(weight.scale, weight.scale_range, ct), K, weight.group_size)
