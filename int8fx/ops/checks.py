"""What the ops of the ``int8fx`` library refuse, and how they say it: shared by the kernels and the fakes."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from ..schemes import reference
from ..schemes.quantize import MAX_K, compute_dtype

_X_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _refuse(op: str, found: str, legal: str) -> NoReturn:
    raise ValueError(f"int8fx::{op}: {found}; legal: {legal}")


def _of(tensor: Tensor) -> str:
    return f"shape {tuple(tensor.shape)}, dtype {tensor.dtype}"


def _check_x(op: str, x: Tensor) -> None:
    if x.dtype not in _X_DTYPES:
        _refuse(op, f"x has dtype {x.dtype}", "float16, bfloat16, float32 or float64")
    if x.dim() == 0:
        _refuse(op, "x has 0 dimensions", "[..., K]")


def _check_codes(op: str, weight: Tensor, weight_scale: Tensor) -> None:
    if weight.dtype != torch.int8:
        _refuse(op, f"weight has dtype {weight.dtype}", "int8 codes")
    if not weight_scale.is_floating_point() or weight_scale.shape != weight.shape[:-1]:
        found = f"weight_scale has {_of(weight_scale)} for a weight {tuple(weight.shape)}"
        _refuse(op, found, "one float scale per output channel")


def _check_weight(
    op: str, x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dims: tuple[int, ...]
) -> None:
    _check_x(op, x)
    if weight.dim() not in dims:
        _refuse(op, f"weight has {weight.dim()} dimensions", " or ".join(map(str, dims)))
    _check_codes(op, weight, weight_scale)
    K = weight.shape[-1]
    if K > MAX_K:
        _refuse(op, f"K = {K}", f"K <= {MAX_K}, or int32 sums could overflow")
    if x.shape[-1] != K:
        _refuse(op, f"x has shape {tuple(x.shape)}", f"[..., {K}] for K = {K}")
    if bias is not None and (not bias.is_floating_point() or bias.shape != weight.shape[:-1]):
        _refuse(op, f"bias has {_of(bias)}", f"one float value per output channel, {tuple(weight.shape[:-1])}")


def _check_epilogue(op: str, shape: tuple, activation: str, other: Tensor | None, binary: str) -> None:
    if activation not in reference.ACTIVATIONS:
        _refuse(op, f"activation {activation!r}", ", ".join(reference.ACTIVATIONS))
    if binary not in reference.BINARIES or (binary == "none") != (other is None):
        found = f"binary {binary!r} {'without' if other is None else 'with'} other"
        _refuse(op, found, "add or mul with other, none without")
    if other is not None and (not other.is_floating_point() or other.shape != shape):
        _refuse(op, f"other has {_of(other)}", f"float values in the shape of y, {tuple(shape)}")


def _check_rotation(op: str, K: int, block: int, columns: Tensor | None, top: int = 0) -> None:
    if block < 1 or block & (block - 1):
        _refuse(op, f"block {block}", "a power of two")
    if top < 0:
        _refuse(op, f"top {top}", "a number of columns >= 0")
    if columns is not None and (columns.dtype != torch.int64 or columns.dim() != 1):
        _refuse(op, f"columns has {_of(columns)}", f"[C] int64 indices below K = {K}")


def _check_kept(
    op: str,
    weight: Tensor,
    block: int = 1,
    columns: Tensor | None = None,
    columns_weight: Tensor | None = None,
    top: int = 0,
) -> None:
    _check_rotation(op, weight.shape[-1], block, columns, top)
    if (columns is None) != (columns_weight is None):
        names = ("columns", "columns_weight") if columns_weight is None else ("columns_weight", "columns")
        _refuse(op, " without ".join(names), "both or none")
    if columns is None or columns_weight is None:
        return
    shape = (*weight.shape[:-1], columns.shape[0])
    if not columns_weight.is_floating_point() or columns_weight.shape != shape:
        _refuse(op, f"columns_weight has {_of(columns_weight)}", f"the float weights of those columns, {shape}")


def check_linear(
    x, weight, weight_scale, bias, activation, other, binary, block=1, columns=None, columns_weight=None, top=0
):
    op = "linear"
    _check_weight(op, x, weight, weight_scale, bias, (2, 3))
    if weight.dim() == 3 and (x.dim() != 3 or x.shape[0] != weight.shape[0]):
        _refuse(op, f"x has shape {tuple(x.shape)}", f"[{weight.shape[0]}, M, K] for a 3-D weight")
    _check_kept(op, weight, block, columns, columns_weight, top)
    shape = (*x.shape[:-1], weight.shape[-2])
    _check_epilogue(op, shape, activation, other, binary)
    return shape


def check_quantize(x, block=1, columns=None, top=0):
    _check_x("quantize_rowwise", x)
    _check_rotation("quantize_rowwise", x.shape[-1], block, columns, top)


def check_linear_quantized(
    x, codes, x_scale, outlier_mask, weight, weight_scale, bias, activation="none", other=None, binary="none",
    block=1, columns=None, columns_weight=None,
):  # fmt: skip
    op = "linear_quantized"
    _check_weight(op, x, weight, weight_scale, bias, (2,))
    _check_kept(op, weight, block, columns, columns_weight)
    M = 1
    for size in x.shape[:-1]:
        M = M * size
    K = x.shape[-1]
    for name, tensor, shape, dtype in (
        ("codes", codes, (M, K), torch.int8),
        ("x_scale", x_scale, (M,), compute_dtype(x.dtype)),
        ("outlier_mask", outlier_mask, (K,), torch.bool),
    ):
        if tensor.shape != shape or tensor.dtype != dtype:
            _refuse(op, f"{name} has {_of(tensor)}", f"{tuple(shape)}, {dtype}: what quantize_rowwise(x) returns")
    shape = (*x.shape[:-1], weight.shape[0])
    _check_epilogue(op, shape, activation, other, binary)
    return shape


def check_grouped(x, weight, weight_scale, bias, offsets, *rotation):
    op = "grouped_linear"
    _check_weight(op, x, weight, weight_scale, bias, (3,))
    if x.dim() != 2 or offsets.shape != weight.shape[:1] or offsets.dtype not in (torch.int32, torch.int64):
        found = f"x has shape {tuple(x.shape)}, offsets {tuple(offsets.shape)}, dtype {offsets.dtype}"
        _refuse(op, found, f"[S, K] and one integer end per group, [{weight.shape[0]}]")
    if rotation:
        _check_kept(op, weight, *rotation)


def check_dequantize(weight, weight_scale, dtype, threshold=6.0, *rotation):
    _check_codes("dequantize", weight, weight_scale)
    if dtype not in _X_DTYPES:
        _refuse("dequantize", f"dtype {dtype}", "float16, bfloat16, float32 or float64")
    if rotation:
        _check_kept("dequantize", weight, *rotation)
