"""GPU kernels of the int8fx ops: which of `int8fx.triton_kernels` does which product. CUDA and ROCm."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..schemes import quantize, reference
from ..schemes.quantize import INT8_MAX, TINY, dequantize, rotate

_CONSTANTS = {"int8_max": INT8_MAX, "tiny": TINY}
EXACT_ROWS = 32
"""Up to how many rows, from two on, nothing of x is quantised where the scheme does not rotate it: reading the weight
is all the time there is. Of N = K = 8192 on an H100, 16 rows take 29 us, quantised in one launch 44, in several 38; in
bfloat16 48. (One row takes 31 us so, and 26 to 31 where it is quantised in the same launch.)"""

_LARGEST = torch.finfo(torch.float32).max  # thresholds beyond it find nothing


def linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    threshold: float,
    activation: str = "none",
    other: Tensor | None = None,
    binary: str = "none",
    block: int = 1,
    columns: Tensor | None = None,
    columns_weight: Tensor | None = None,
    top: int = 0,
) -> Tensor:
    """`int8fx.schemes.reference.linear` on the GPU.

    | x                              | kernels                                                                    |
    |--------------------------------|----------------------------------------------------------------------------|
    | rotated, or columns are kept   | `quantize_rowwise`, `int8_matmul`; and what finds outliers, see "more"     |
    | threshold 0, or 2 to 32 rows   | `weight_only`: nothing of x is quantised, every column an outlier          |
    | 1 row                          | `fused_linear`: all in one kernel, scales per block of K                   |
    | more                           | `outlier_mask`, `quantize_rowwise`, `extract_outliers`, `int8_matmul`      |
    | float64                        | torch's operators: for checks, not for speed                               |

    The first line holds for any number of rows: a row's result then depends on no other row. `int8_matmul` takes x in
    its 16 bits and, for kept columns, ``columns_weight`` too.
    """
    if x.dtype == torch.float64:
        rotation = (block, columns, columns_weight, top)
        return reference.linear(x, weight, weight_scale, bias, threshold, activation, other, binary, *rotation)
    _refuse("linear", threshold, block, top)
    x3d, packed, other2d = _matrices(x, weight), _packed(weight, weight_scale, bias), _rows(other)
    with torch.cuda.device_of(x):
        plain = block == 1 and columns is None
        y = _few_rows(x3d, packed, threshold, activation, other2d, binary) if plain else None
        if y is None:
            kept = _kept(x3d, columns, columns_weight)
            quantized = _quantize(x3d, threshold, block, columns)
            y = _product(x3d, quantized, packed, activation, other2d, binary, kept=kept)
    return y.view(*x.shape[:-1], weight.shape[-2])


def quantize_rowwise(
    x: Tensor, threshold: float, block: int = 1, columns: Tensor | None = None, top: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    x3d = x.reshape(1, math.prod(x.shape[:-1]), x.shape[-1])
    if x.dtype == torch.float64:
        rest = x3d[0] if columns is None else x3d[0].index_fill(1, columns, 0)
        mask = quantize.outlier_mask(rest, threshold, columns, top)
        return *quantize.quantize_rowwise(rotate(rest.masked_fill(mask, 0), block)), mask
    _refuse("quantize_rowwise", threshold, block, top)
    with torch.cuda.device_of(x):
        codes, x_scale, found = _quantize(x3d, threshold, block, columns)
    return codes, x_scale, x.new_zeros(x.shape[-1], dtype=torch.bool) if found is None else found[0]


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
    block: int = 1,
    columns: Tensor | None = None,
    columns_weight: Tensor | None = None,
) -> Tensor:
    """With a rotation ``mask`` is not read: `quantize_rowwise` marks no column then. Nor are codes by which `linear`
    would not multiply so few rows: shared or not, a product is the same."""
    x3d = _matrices(x, weight)
    if x.dtype == torch.float64:
        y = codes.double() @ weight.double().t() * x_scale[:, None] * weight_scale
        y = y + torch.where(mask, x3d[0], 0) @ dequantize(weight, weight_scale, torch.float64, block).t()
        if columns is not None and columns_weight is not None:
            y = y + x3d[0][:, columns] @ columns_weight.double().t()
        y = reference.ACTIVATIONS[activation](y if bias is None else y + bias)
        y = y.view(*x.shape[:-1], weight.shape[0])
        return y if other is None else reference.BINARIES[binary](y, other)
    packed, kept = _packed(weight, weight_scale, bias), _kept(x3d, columns, columns_weight)
    with torch.cuda.device_of(x):
        if block == 1 and columns is None and 1 < x3d.shape[1] <= EXACT_ROWS:  # as `linear` does
            from ..triton_kernels.weight_only import weight_only

            y = weight_only(x3d, *packed, activation, _rows(other), binary)
            return y.view(*x.shape[:-1], weight.shape[0])
        quantized = codes.contiguous(), x_scale.contiguous(), mask.contiguous()[None] if block == 1 else None
        y = _product(x3d, quantized, packed, activation, _rows(other), binary, kept=kept)
    return y.view(*x.shape[:-1], weight.shape[0])


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    threshold: float,
    block: int = 1,
    columns: Tensor | None = None,
    columns_weight: Tensor | None = None,
    top: int = 0,
) -> Tensor:
    """Rows sorted by expert; how many each has stays on the device: the grid is made for any sizes."""
    if x.dtype == torch.float64:
        y = x.new_zeros(x.shape[0], weight.shape[1])
        begin = 0
        for e, end in enumerate(offsets.tolist()):
            bias_e, columns_e = (None if t is None else t[e] for t in (bias, columns_weight))
            product = (weight[e], weight_scale[e], bias_e, threshold, "none", None, "none")
            y[begin:end] = reference.linear(x[begin:end], *product, block, columns, columns_e, top)
            begin = max(begin, end)
        return y
    _refuse("grouped_linear", threshold, block, top)
    packed, offsets = _packed(weight, weight_scale, bias), offsets.contiguous()
    with torch.cuda.device_of(x):
        plain = block == 1 and columns is None
        few = _few_rows(x[None], packed, threshold, offsets=offsets) if plain else None
        if few is not None:
            return few
        kept = _kept(x[None], columns, columns_weight)
        quantized = _quantize(x[None], threshold, block, columns, offsets, weight.shape[0])
        return _product(x[None], quantized, packed, kept=kept, offsets=offsets)


def _refuse(op: str, threshold: float, block: int, top: int) -> None:
    if top or (block > 1 and threshold <= _LARGEST):
        raise NotImplementedError(
            f"int8fx::{op}: no Triton kernel chooses columns in the call where x is rotated, or by their rank; legal: "
            "llm_int8, and rotated with columns='static' or None"
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


def _kept(x: Tensor, columns: Tensor | None, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor] | None:
    """x, columns and their weights, as `int8_matmul` takes them."""
    if columns is None or weight is None or not len(columns):
        return None
    return x, columns.contiguous(), weight.contiguous()


def _few_rows(
    x: Tensor,
    packed: tuple[Tensor, Tensor, Tensor | None],
    threshold: float,
    activation: str = "none",
    other: Tensor | None = None,
    binary: str = "none",
    *,
    offsets: Tensor | None = None,
) -> Tensor | None:
    """The product in one launch, or None if there are too many rows for it."""
    from ..triton_kernels.fused_linear import fused_linear
    from ..triton_kernels.weight_only import weight_only

    if threshold == 0 or 1 < x.shape[1] <= EXACT_ROWS:
        return weight_only(x, *packed, activation, other, binary, offsets=offsets)
    if x.shape[1] > 1:
        return None
    threshold = threshold if threshold <= _LARGEST else math.inf
    return fused_linear(x, *packed, threshold, activation, other, binary, **_CONSTANTS, offsets=offsets)


def _quantize(
    x: Tensor,
    threshold: float,
    block: int,
    columns: Tensor | None,
    offsets: Tensor | None = None,
    experts: int = 1,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scales, and the mask of outlier columns for each weight; None if there can be none."""
    from ..triton_kernels.outliers import outlier_mask
    from ..triton_kernels.quantize_rowwise import quantize_rowwise

    columns = None if columns is None or not len(columns) else columns.contiguous()
    mask = None
    if threshold <= _LARGEST:
        mask = outlier_mask(x, threshold, offsets, experts)
        if columns is not None:
            mask.index_fill_(1, columns, False)
    return *quantize_rowwise(x, mask, **_CONSTANTS, block=block, columns=columns, offsets=offsets), mask


def _product(
    x: Tensor,
    quantized: tuple[Tensor, Tensor, Tensor | None],
    packed: tuple[Tensor, Tensor, Tensor | None],
    activation: str = "none",
    other: Tensor | None = None,
    binary: str = "none",
    *,
    kept: tuple[Tensor, Tensor, Tensor] | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """``quantized``: codes, x_scale and mask; ``packed``: weight, weight_scale and bias; ``kept``: see `_kept`."""
    from ..triton_kernels.int8_matmul import int8_matmul
    from ..triton_kernels.outliers import extract_outliers

    codes, x_scale, mask = quantized
    outliers = None if mask is None else extract_outliers(x, mask, offsets)
    epilogue = (packed[2], x.dtype, activation, other, binary)
    return int8_matmul(codes, x_scale, *packed[:2], outliers, *epilogue, kept=kept, offsets=offsets)
