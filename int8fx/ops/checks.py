"""The checks of the ``int8fx`` ops' arguments, and their error messages. Kernels and fakes share them.

The C++ kernels test the same conditions, and call the op's fake to raise the error.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import NoReturn

import torch
from torch import Tensor

from ..schemes import reference
from ..schemes.formats import FORMATS, Format, count_groups, format_of
from ..schemes.quantize import MAX_K, MAX_THRESHOLD, compute_dtype
from ..schemes.weight import Epilogue, Int8Weight

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
Shape = tuple[int, ...]


def _refuse(op: str, found: str, legal: str) -> NoReturn:
    raise ValueError(f"int8fx::{op}: {found}; legal: {legal}")


def _described(tensor: Tensor) -> str:
    return f"shape {tuple(tensor.shape)}, dtype {tensor.dtype}"


def count_rows(x: Tensor) -> int:
    """M of x ``[..., K]``: an int, or a SymInt where a size is one."""
    return math.prod(x.shape[:-1])


def _is_float(tensor: Tensor) -> bool:
    return tensor.dtype in _FLOATS


def _check_x(op: str, x: Tensor) -> None:
    if not _is_float(x):
        _refuse(op, f"x has dtype {x.dtype}", "float16, bfloat16, float32 or float64")
    if x.dim() == 0:
        _refuse(op, "x has 0 dimensions", "[..., K]")


def _check_quantisation(op: str, K: int, threshold: float | None, block: int, columns: Tensor | None) -> None:
    if threshold is not None and not 0 <= threshold <= MAX_THRESHOLD:
        _refuse(op, f"threshold {threshold}", f"None, or 0 to {MAX_THRESHOLD:.4g}")
    size = abs(block)
    if not 1 <= size <= MAX_K or size & (size - 1) or block == -1:
        legal = f"a power of two up to {MAX_K}, negative for regular Hadamard matrices; 1 for none"
        _refuse(op, f"block {block}", legal)
    if block != 1 and threshold is not None:
        _refuse(op, f"threshold {threshold} and block {block}", "a threshold or a rotation (a block but 1), not both")
    if columns is not None and (columns.dtype != torch.int64 or columns.dim() != 1):
        _refuse(op, f"columns has {_described(columns)}", f"[C] int64 indices below K = {K}")


def check_columns(columns: Tensor | None, K: int) -> None:
    """Raises IndexError if an unquantised column is out of range or there twice, as the C++ kernels do. CPUs only."""
    if columns is None or columns.device.type != "cpu":
        return
    numbers = columns.tolist()
    for k in numbers:
        if not 0 <= k < K:
            raise IndexError(f"int8fx: columns has {k}; legal: 0 to K - 1 for K = {K}")
    twice = next((k for k, count in Counter(numbers).items() if count > 1), None)
    if twice is not None:
        raise IndexError(f"int8fx: columns has {twice} twice; legal: different columns")


def _check_weight(op: str, weight: Int8Weight, dims: Shape | None = None) -> None:
    codes, _, threshold, block, columns, columns_weight, *_ = weight
    if weight.format is not None and weight.format not in FORMATS:
        _refuse(op, f"format {weight.format!r}", f"None, {', '.join(FORMATS)}")
    spec = format_of(weight.format)
    dtype = torch.int8 if spec.bits == 8 else torch.uint8
    if codes.dtype != dtype:
        _refuse(op, f"weight has dtype {codes.dtype}", f"{dtype} codes of {spec.bits} bits")
    if codes.dim() not in dims if dims is not None else codes.dim() == 0:
        _refuse(op, f"weight has {codes.dim()} dimensions", "[..., K]" if dims is None else " or ".join(map(str, dims)))
    K = weight.K
    if (weight.in_features is not None) != (spec.bits == 4) or codes.shape[-1] != spec.code_columns(K):
        problem = f"in_features {weight.in_features} for codes {tuple(codes.shape)} of {spec.bits} bits"
        _refuse(op, problem, "K of codes of 4 bits, of which two are in a byte; None for those of 8 bits")
    _check_groups(op, weight, spec)
    if K > MAX_K:
        _refuse(op, f"K = {K}", f"K <= {MAX_K}, or int32 sums could overflow")
    _check_quantisation(op, K, threshold, block, columns)
    if (columns is None) != (columns_weight is None):
        names = ("columns", "columns_weight") if columns_weight is None else ("columns_weight", "columns")
        _refuse(op, " without ".join(names), "both or none")
    if columns is not None and columns_weight is not None:
        shape = (*codes.shape[:-1], columns.shape[0])
        if not _is_float(columns_weight) or columns_weight.shape != shape:
            problem = f"columns_weight has {_described(columns_weight)}"
            _refuse(op, problem, f"the float weights of those columns, {shape}")


def _check_groups(op: str, weight: Int8Weight, spec: Format) -> None:
    size, channels = weight.group_size, weight.codes.shape[:-1]
    if size is not None and not 1 <= size <= MAX_K:
        _refuse(op, f"group_size {size}", f"None, or 1 to {MAX_K}")
    shape = channels if size is None else (*channels, count_groups(weight.K, size))
    scale, zero_point, scale_range = weight.scale, weight.zero_point, weight.scale_range
    is_scale = _is_float(scale) if scale_range is None else scale.dtype == torch.uint8
    if not is_scale or scale.shape != shape:
        problem = f"weight_scale has {_described(scale)} for a weight {tuple(weight.codes.shape)}"
        legal = "one float scale per output channel"
        if not weight.is_plain:
            legal = f"{tuple(shape)}, of a float dtype, or uint8 with scale_range"
        _refuse(op, problem, legal)
    if zero_point is not None:
        dtype = torch.int8 if spec.bits == 8 else torch.uint8
        if not spec.is_integer or zero_point.dtype != dtype or zero_point.shape != shape:
            problem = f"zero_point has {_described(zero_point)}"
            _refuse(op, problem, f"{tuple(shape)}, {dtype}" if spec.is_integer else f"None for {weight.format}")
    if scale_range is not None and (scale_range.dtype != torch.float32 or scale_range.shape != (*channels, 2)):
        _refuse(op, f"scale_range has {_described(scale_range)}", f"{(*channels, 2)}, torch.float32")


def _check_matmul(op: str, x: Tensor, weight: Int8Weight, bias: Tensor | None, dims: Shape) -> None:
    _check_x(op, x)
    _check_weight(op, weight, dims)
    for name, tensor in (("weight", weight.codes), ("weight_scale", weight.scale)):
        if tensor.device.type != x.device.type:  # one on meta would select the fake, whose result is undefined
            _refuse(op, f"x is on {x.device} and {name} on {tensor.device}", "one device")
    channels, K = weight.codes.shape[:-1], weight.K
    if x.shape[-1] != K:
        _refuse(op, f"x has shape {tuple(x.shape)}", f"[..., {K}] for K = {K}")
    if bias is not None and (not _is_float(bias) or bias.shape != weight.codes.shape[:-1]):
        _refuse(op, f"bias has {_described(bias)}", f"one float value per output channel, {tuple(channels)}")


def _check_epilogue(op: str, shape: Shape, epilogue: Epilogue) -> None:
    _, activation, other, binary = epilogue
    if activation not in reference.ACTIVATIONS:
        _refuse(op, f"activation {activation!r}", ", ".join(reference.ACTIVATIONS))
    if binary not in reference.BINARIES or (binary == "none") != (other is None):
        problem = f"binary {binary!r} {'without' if other is None else 'with'} other"
        _refuse(op, problem, "add or mul with other, none without")
    if other is not None and (not _is_float(other) or other.shape != shape):
        _refuse(op, f"other has {_described(other)}", f"float values in the shape of y, {tuple(shape)}")


def check_linear(x: Tensor, weight: Int8Weight, epilogue: Epilogue) -> Shape:
    """The shape of y."""
    op = "linear"
    _check_matmul(op, x, weight, epilogue.bias, (2, 3))
    codes = weight.codes
    if codes.dim() == 3 and (x.dim() != 3 or x.shape[0] != codes.shape[0]):
        _refuse(op, f"x has shape {tuple(x.shape)}", f"[{codes.shape[0]}, M, K] for a 3-D weight")
    shape = (*x.shape[:-1], codes.shape[-2])
    _check_epilogue(op, shape, epilogue)
    return shape


def check_quantize_rowwise(
    x: Tensor, threshold: float | None = None, block: int = 1, columns: Tensor | None = None
) -> None:
    """Returns if the arguments are legal."""
    _check_x("quantize_rowwise", x)
    _check_quantisation("quantize_rowwise", x.shape[-1], threshold, block, columns)


def check_linear_quantized(
    x: Tensor, codes: Tensor, x_scale: Tensor, outlier_mask: Tensor, weight: Int8Weight, epilogue: Epilogue
) -> Shape:
    """The shape of y."""
    op = "linear_quantized"
    _check_matmul(op, x, weight, epilogue.bias, (2,))
    M, K = count_rows(x), x.shape[-1]
    for name, tensor, expected, dtype in (
        ("codes", codes, (M, K), torch.int8),
        ("x_scale", x_scale, (M,), compute_dtype(x.dtype)),
        ("outlier_mask", outlier_mask, (K,), torch.bool),
    ):
        if tensor.shape != expected or tensor.dtype != dtype:
            _refuse(
                op, f"{name} has {_described(tensor)}", f"{tuple(expected)}, {dtype}: what quantize_rowwise(x) returns"
            )
    shape = (*x.shape[:-1], weight.codes.shape[0])
    _check_epilogue(op, shape, epilogue)
    return shape


def check_grouped_linear(x: Tensor, offsets: Tensor, weight: Int8Weight, bias: Tensor | None) -> Shape:
    """The shape of y."""
    op = "grouped_linear"
    _check_matmul(op, x, weight, bias, (3,))
    experts = weight.codes.shape[:1]
    if x.dim() != 2 or offsets.shape != experts or offsets.dtype not in (torch.int32, torch.int64):
        problem = f"x has shape {tuple(x.shape)}, offsets {tuple(offsets.shape)}, dtype {offsets.dtype}"
        _refuse(op, problem, f"[S, K] and one integer end per group, [{experts[0]}]")
    return x.shape[0], weight.codes.shape[1]


def check_dequantize(weight: Int8Weight, dtype: torch.dtype) -> None:
    """Returns if the arguments are legal."""
    op = "dequantize"
    _check_weight(op, weight)
    if dtype not in _FLOATS:
        _refuse(op, f"dtype {dtype}", "float16, bfloat16, float32 or float64")
