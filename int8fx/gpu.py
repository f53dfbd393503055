"""GPU kernels of the int8fx ops: which of `int8fx.triton_kernels` does which product. CUDA and ROCm."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import quantize, reference
from .quantize import INT8_MAX, TINY, dequantize

_CONSTANTS = {"int8_max": INT8_MAX, "tiny": TINY}


def linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    threshold: float,
    activation: str = "none",
    other: Tensor | None = None,
    binary: str = "none",
    *rotation: object,
) -> Tensor:
    """`int8fx.reference.linear` on the GPU.

    | x                           | kernels                                                                       |
    |-----------------------------|-------------------------------------------------------------------------------|
    | threshold 0                 | `weight_only`: every column is an outlier, so nothing of x is quantised        |
    | up to 64 rows (FUSED_ROWS)  | `fused_linear`: one launch, scales per block of K                             |
    | more                        | `outlier_mask`, `quantize_rowwise`, `extract_outliers`, `int8_matmul`         |
    | float64                     | torch's operators: for checks, not for speed                                  |
    """
    _refuse("linear", rotation)
    if x.dtype == torch.float64 and weight.dim() == 2:
        quantized = quantize_rowwise(x, threshold)
        return linear_quantized(x, *quantized, weight, weight_scale, bias, activation, other, binary)
    if x.dtype == torch.float64:
        return reference.linear(x, weight, weight_scale, bias, threshold, activation, other, binary)
    from .triton_kernels.configs import FUSED_ROWS
    from .triton_kernels.fused_linear import fused_linear
    from .triton_kernels.weight_only import weight_only

    x3d, packed, other2d = _matrices(x, weight), _packed(weight, weight_scale, bias), _rows(other)
    with torch.cuda.device_of(x):
        if threshold == 0:
            y = weight_only(x3d, *packed, activation, other2d, binary)
        elif x3d.shape[1] <= FUSED_ROWS:
            y = fused_linear(x3d, *packed, threshold, activation, other2d, binary, **_CONSTANTS)
        else:
            y = _product(x3d, _quantize(x3d, threshold), packed, activation, other2d, binary)
    return y.view(*x.shape[:-1], weight.shape[-2])


def quantize_rowwise(x: Tensor, threshold: float, *rotation: object) -> tuple[Tensor, Tensor, Tensor]:
    _refuse("quantize_rowwise", rotation)
    x3d = x.reshape(1, math.prod(x.shape[:-1]), x.shape[-1])
    if x.dtype == torch.float64:
        mask = quantize.outlier_mask(x3d[0], threshold)
        return *quantize.quantize_rowwise(x3d[0], mask), mask
    with torch.cuda.device_of(x):
        codes, x_scale, mask = _quantize(x3d, threshold)
    return codes, x_scale, x.new_zeros(x.shape[-1], dtype=torch.bool) if mask is None else mask[0]


def linear_quantized(
    x: Tensor,
    codes: Tensor,
    x_scale: Tensor,
    mask: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    other: Tensor | None = None,
    binary: str = "none",
    *rotation: object,
) -> Tensor:
    _refuse("linear_quantized", rotation)
    x3d = _matrices(x, weight)
    if x.dtype == torch.float64:
        kept = torch.where(mask, x3d[0], codes * x_scale[:, None])
        y = kept @ dequantize(weight, weight_scale, torch.float64).t()
        y = reference.ACTIVATIONS[activation](y if bias is None else y + bias)
        y = y.view(*x.shape[:-1], weight.shape[0])
        return y if other is None else reference.BINARIES[binary](y, other)
    with torch.cuda.device_of(x):
        packed = _packed(weight, weight_scale, bias)
        quantized = codes.contiguous(), x_scale.contiguous(), mask.contiguous()[None]
        y = _product(x3d, quantized, packed, activation, _rows(other), binary)
    return y.view(*x.shape[:-1], weight.shape[0])


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    threshold: float,
    *rotation: object,
) -> Tensor:
    """Rows sorted by expert; how many each has stays on the device: the grid is made for any sizes."""
    _refuse("grouped_linear", rotation)
    if x.dtype == torch.float64:
        y = x.new_zeros(x.shape[0], weight.shape[1])
        begin = 0
        for e, end in enumerate(offsets.tolist()):
            bias_e = None if bias is None else bias[e]
            y[begin:end] = linear(x[begin:end], weight[e], weight_scale[e], bias_e, threshold)
            begin = max(begin, end)
        return y
    from .triton_kernels.configs import FUSED_ROWS
    from .triton_kernels.fused_linear import fused_linear

    packed, offsets = _packed(weight, weight_scale, bias), offsets.contiguous()
    with torch.cuda.device_of(x):
        if x.shape[0] <= FUSED_ROWS:
            return fused_linear(x[None], *packed, threshold, **_CONSTANTS, offsets=offsets)
        quantized = _quantize(x[None], threshold, offsets, weight.shape[0])
        return _product(x[None], quantized, packed, offsets=offsets)


def _refuse(op: str, rotation: tuple) -> None:
    """``rotation``: block, columns, columns_weight, top, as far as they are given."""
    block, *kept = rotation or (1,)
    if block != 1 or any(k is not None and not (isinstance(k, int) and k == 0) for k in kept):
        raise NotImplementedError(
            f"int8fx::{op}: the Triton kernels neither rotate nor keep columns; legal: llm_int8 without keep"
        )


def _matrices(x: Tensor, weight: Tensor) -> Tensor:
    """x as ``[E, M, K]``, one matrix per weight."""
    return x if weight.dim() == 3 else x.reshape(1, math.prod(x.shape[:-1]), x.shape[-1])


def _rows(other: Tensor | None) -> Tensor | None:
    return None if other is None else other.reshape(math.prod(other.shape[:-1]), other.shape[-1])


def _packed(weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """``[E, N, K]``, ``[E, N]`` and ``[E, N]``, as the kernels take them."""
    lead = (1,) if weight.dim() == 2 else ()
    bias = None if bias is None else bias.contiguous().view(*lead, *bias.shape)
    return weight.view(*lead, *weight.shape), weight_scale.float().contiguous().view(*lead, *weight_scale.shape), bias


def _quantize(x: Tensor, threshold: float, offsets: Tensor | None = None, experts: int = 1):
    from .triton_kernels.outliers import outlier_mask
    from .triton_kernels.quantize_rowwise import quantize_rowwise

    mask = None if threshold == float("inf") else outlier_mask(x, threshold, offsets, experts)
    return *quantize_rowwise(x, mask, **_CONSTANTS, offsets=offsets), mask


def _product(
    x: Tensor,
    quantized: tuple[Tensor, Tensor, Tensor | None],
    packed: tuple[Tensor, Tensor, Tensor | None],
    activation: str = "none",
    other: Tensor | None = None,
    binary: str = "none",
    *,
    offsets: Tensor | None = None,
) -> Tensor:
    """``quantized``: codes, x_scale and mask; ``packed``: weight, weight_scale and bias."""
    from .triton_kernels.int8_matmul import int8_matmul
    from .triton_kernels.outliers import extract_outliers

    codes, x_scale, mask = quantized
    outliers = None if mask is None else extract_outliers(x, mask, offsets)
    return int8_matmul(
        codes, x_scale, *packed[:2], outliers, packed[2], x.dtype, activation, other, binary, offsets=offsets
    )
