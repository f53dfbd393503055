"""The ops on CUDA and ROCm: chooses and launches `int8fx.triton_kernels`, for what `serves` says."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..schemes.formats import format_of
from ..schemes.quantize import INT8_MAX, TINY
from ..schemes.weight import Epilogue, Int8Weight
from .rows import Form, form

_CONSTANTS: dict[str, Any] = {"int8_max": INT8_MAX, "tiny": TINY}
Quantized = tuple[Tensor, Tensor, Tensor | None]
"""Codes ``[M, K]``, scale ``[M]``, and each weight's mask of outlier columns, ``[E, K]``; None without a threshold."""


def serves(x: Tensor, weight: Int8Weight | None = None) -> bool:
    """Whether Triton kernels take x and ``weight``: not float64, and WEIGHT_ONLY if the weight is not plain."""
    if x.dtype == torch.float64:
        return False
    return weight is None or weight.is_plain or _form(1, weight) is Form.WEIGHT_ONLY


def _form(rows: int, weight: Int8Weight) -> Form:
    return form(rows, "cuda", weight.threshold, weight.block, weight.columns is not None, weight.is_plain)


def linear(x: Tensor, weight: Int8Weight, epilogue: Epilogue) -> Tensor:
    """`reference.linear` on the GPU.

    | form (`rows.form`) | kernels                                                                                    |
    |--------------------|--------------------------------------------------------------------------------------------|
    | WEIGHT_ONLY        | `weight_only`: x is not quantised; codes of any format                                     |
    | FUSED              | `fused_linear`: all in one kernel, scales per block of K; plain weights                    |
    | QUANTIZED          | `quantize_rowwise`, `int8_matmul`; with a threshold `outlier_mask` and `extract_outliers`; |
    |                    | plain weights                                                                              |
    """
    with torch.cuda.device_of(x):
        x3d = x if weight.codes.dim() == 3 else x.reshape(1, math.prod(x.shape[:-1]), x.shape[-1])
        y = _matmul(x3d, *_batched(weight, epilogue))
    return y.view(*x.shape[:-1], weight.codes.shape[-2])


def quantize_rowwise(
    x: Tensor, threshold: float | None, block: int = 1, columns: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes ``[M, K]``, scale ``[M]`` and outlier mask ``[K]`` of x, as `reference.linear` computes them."""
    with torch.cuda.device_of(x):
        x3d = x.reshape(1, math.prod(x.shape[:-1]), x.shape[-1])
        codes, x_scale, mask = _quantize(x3d, threshold, block, columns)
    return codes, x_scale, x.new_zeros(x.shape[-1], dtype=torch.bool) if mask is None else mask[0]


def linear_quantized(
    x: Tensor, codes: Tensor, x_scale: Tensor, mask: Tensor, weight: Int8Weight, epilogue: Epilogue
) -> Tensor:
    """`linear` of x, given what `quantize_rowwise` returned for it. Only the form QUANTIZED reads that."""
    with torch.cuda.device_of(x):
        x3d = x.reshape(1, math.prod(x.shape[:-1]), x.shape[-1])
        outliers = None if weight.threshold is None else mask.contiguous()[None]
        quantized = codes.contiguous(), x_scale.contiguous(), outliers
        y = _matmul(x3d, *_batched(weight, epilogue), quantized=quantized)
    return y.view(*x.shape[:-1], weight.codes.shape[0])


def grouped_linear(x: Tensor, offsets: Tensor, weight: Int8Weight, bias: Tensor | None) -> Tensor:
    """`reference.grouped_linear` on the GPU. The sizes of groups stay on the device: the grid fits any sizes."""
    with torch.cuda.device_of(x):
        return _matmul(x[None], *_batched(weight, Epilogue(bias)), offsets=offsets.contiguous())


def _batched(weight: Int8Weight, epilogue: Epilogue) -> tuple[Int8Weight, Epilogue]:
    """Codes ``[E, N, K]``, scales ``[E, N]`` or ``[E, N, G]``, bias ``[E, N]``, other ``[E * M, N]``."""
    lead = (1,) if weight.codes.dim() == 2 else ()
    codes, scale, bias, other = weight.codes, weight.scale, epilogue.bias, epilogue.other
    scale = scale if not weight.is_plain and scale.dtype != torch.float64 else scale.float()
    zero_point, scale_range = (
        None if t is None else t.contiguous().view(*lead, *t.shape) for t in (weight.zero_point, weight.scale_range)
    )
    return (
        weight._replace(
            codes=codes.view(*lead, *codes.shape),
            scale=scale.contiguous().view(*lead, *scale.shape),
            zero_point=zero_point,
            scale_range=scale_range,
        ),
        epilogue._replace(
            bias=None if bias is None else bias.contiguous().view(*lead, *bias.shape),
            other=None if other is None else other.reshape(math.prod(other.shape[:-1]), other.shape[-1]),
        ),
    )


def _matmul(
    x: Tensor,
    weight: Int8Weight,
    epilogue: Epilogue,
    *,
    quantized: Quantized | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """``[E * M, N]`` of x ``[E, M, K]`` and a `_batched` weight and epilogue; ``[1, S, K]`` with offsets."""
    from ..triton_kernels.codes import Coding
    from ..triton_kernels.fused_linear import fused_linear
    from ..triton_kernels.int8_matmul import int8_matmul
    from ..triton_kernels.outliers import extract_outliers
    from ..triton_kernels.weight_only import weight_only

    chosen = _form(x.shape[1], weight)
    if chosen is Form.WEIGHT_ONLY:
        spec = format_of(weight.format)
        coding = Coding(weight.group_size, spec.levels, spec.zero_point, weight.zero_point, weight.scale_range)
        return weight_only(x, weight.codes, weight.scale, *epilogue, coding=coding, offsets=offsets)
    if chosen is Form.FUSED:
        return fused_linear(
            x, weight.codes, weight.scale, epilogue.bias, weight.threshold, *epilogue[1:], **_CONSTANTS, offsets=offsets
        )
    if quantized is None:
        quantized = _quantize(x, weight.threshold, weight.block, weight.columns, offsets, weight.codes.shape[0])
    codes, x_scale, mask = quantized
    outliers = None if mask is None else extract_outliers(x, mask, offsets)
    unquantised = None
    if weight.columns is not None and weight.columns_weight is not None and len(weight.columns):
        unquantised = x, weight.columns.contiguous(), weight.columns_weight.contiguous()
    bias, *after = epilogue
    return int8_matmul(
        codes, x_scale, weight.codes, weight.scale, outliers, bias, x.dtype, *after,
        unquantised=unquantised, offsets=offsets,
    )  # fmt: skip


def _quantize(
    x: Tensor,
    threshold: float | None,
    block: int,
    columns: Tensor | None,
    offsets: Tensor | None = None,
    experts: int = 1,
) -> Quantized:
    from ..triton_kernels.outliers import outlier_mask
    from ..triton_kernels.quantize_rowwise import quantize_rowwise

    columns = None if columns is None or not len(columns) else columns.contiguous()
    mask = None
    if threshold is not None:
        mask = outlier_mask(x, threshold, offsets, experts)
        if columns is not None:
            mask.index_fill_(1, columns, False)
    return *quantize_rowwise(x, mask, **_CONSTANTS, block=block, columns=columns, offsets=offsets), mask
