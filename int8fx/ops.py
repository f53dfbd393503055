"""The ops of the ``int8fx`` library: schemas, checks, fakes, autograd, autocast and the dispatch to kernels.

No output's shape depends on data: the number of outlier columns never leaves an op.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from . import cpu, gpu, reference
from .quantize import MAX_K, compute_dtype
from .quantize import dequantize as _dequantize

_LIB = torch.library.Library("int8fx", "DEF")
_EPILOGUE = "str activation='none', Tensor? other=None, str binary='none'"
_LIB.define(
    "linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, float threshold, " + _EPILOGUE + ") -> Tensor"
)
_LIB.define(
    "linear_quantized(Tensor x, Tensor codes, Tensor x_scale, Tensor outlier_mask, Tensor weight, Tensor weight_scale, "
    "Tensor? bias, " + _EPILOGUE + ") -> Tensor"
)
_LIB.define("quantize_rowwise(Tensor x, float threshold) -> (Tensor, Tensor, Tensor)")
_LIB.define(
    "grouped_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, Tensor offsets, float threshold) "
    "-> Tensor"
)
_LIB.define("dequantize(Tensor weight, Tensor weight_scale, ScalarType dtype, float threshold=6.0) -> Tensor")

linear = torch.ops.int8fx.linear
linear_quantized = torch.ops.int8fx.linear_quantized
quantize_rowwise = torch.ops.int8fx.quantize_rowwise
grouped_linear = torch.ops.int8fx.grouped_linear
dequantize = torch.ops.int8fx.dequantize


# ---- checks, shared by the kernels and the fakes ---------------------------------------------------------------------


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


def _check_linear(op, x, weight, weight_scale, bias, activation, other, binary):
    _check_weight(op, x, weight, weight_scale, bias, (2, 3))
    if weight.dim() == 3 and (x.dim() != 3 or x.shape[0] != weight.shape[0]):
        _refuse(op, f"x has shape {tuple(x.shape)}", f"[{weight.shape[0]}, M, K] for a 3-D weight")
    shape = (*x.shape[:-1], weight.shape[-2])
    _check_epilogue(op, shape, activation, other, binary)
    return shape


def _kernels(x: Tensor):
    return gpu if x.is_cuda else cpu


# ---- int8fx::linear --------------------------------------------------------------------------------------------------


def _linear_kernel(x, weight, weight_scale, bias, threshold, activation="none", other=None, binary="none"):
    _check_linear("linear", x, weight, weight_scale, bias, activation, other, binary)
    return _kernels(x).linear(x, weight, weight_scale, bias, threshold, activation, other, binary)


def _linear_fake(x, weight, weight_scale, bias, threshold, activation="none", other=None, binary="none"):
    return x.new_empty(_check_linear("linear", x, weight, weight_scale, bias, activation, other, binary))


def _setup_backward(op, ctx, output, weight, weight_scale, bias, activation, other):
    ctx.refused = None
    if activation != "none" or other is not None:
        ctx.refused = RuntimeError(
            f"int8fx::{op} has no gradient through its epilogue (activation, other); the fold pass makes such calls "
            "only in graphs whose backward has been traced"
        )
        if not isinstance(output, FakeTensor):  # AOTInductor calls folded products on fakes, with gradients enabled
            raise ctx.refused
    ctx.save_for_backward(weight, weight_scale)
    ctx.bias = None if bias is None else (bias.shape, bias.dtype)


def _backward(ctx, grad, bias_at):
    """The gradients of x, through the dequantised weight, and of the bias."""
    if ctx.refused is not None:
        raise ctx.refused
    weight, weight_scale = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad @ torch.ops.int8fx.dequantize(weight, weight_scale, grad.dtype)
    if ctx.bias is not None and ctx.needs_input_grad[bias_at]:
        shape, dtype = ctx.bias
        lead = tuple(range(len(shape) - 1, grad.dim() - 1))
        grad_bias = (grad.sum(lead) if lead else grad).to(dtype)
    return grad_x, grad_bias


def _linear_setup_context(ctx, inputs, output):
    _, weight, weight_scale, bias, _, activation, other, _ = inputs
    _setup_backward("linear", ctx, output, weight, weight_scale, bias, activation, other)


def _linear_backward(ctx, grad):
    grad_x, grad_bias = _backward(ctx, grad, bias_at=3)
    return grad_x, None, None, grad_bias, None, None, None, None


# ---- int8fx::quantize_rowwise and int8fx::linear_quantized -----------------------------------------------------------


def _quantize_rowwise_kernel(x, threshold):
    _check_x("quantize_rowwise", x)
    return _kernels(x).quantize_rowwise(x, threshold)


def _quantize_rowwise_fake(x, threshold):
    _check_x("quantize_rowwise", x)
    M = 1
    for size in x.shape[:-1]:
        M = M * size
    K = x.shape[-1]
    scale_dtype = compute_dtype(x.dtype)
    return (
        x.new_empty((M, K), dtype=torch.int8),
        x.new_empty((M,), dtype=scale_dtype),
        x.new_empty((K,), dtype=torch.bool),
    )


def _quantize_rowwise_setup_context(ctx, inputs, output):
    ctx.mark_non_differentiable(*output)


def _quantize_rowwise_backward(ctx, *grads):
    return None, None


def _check_linear_quantized(x, codes, x_scale, outlier_mask, weight, weight_scale, bias, activation, other, binary):
    op = "linear_quantized"
    _check_weight(op, x, weight, weight_scale, bias, (2,))
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


def _linear_quantized_kernel(
    x, codes, x_scale, outlier_mask, weight, weight_scale, bias, activation="none", other=None, binary="none"
):
    _check_linear_quantized(x, codes, x_scale, outlier_mask, weight, weight_scale, bias, activation, other, binary)
    return _kernels(x).linear_quantized(
        x, codes, x_scale, outlier_mask, weight, weight_scale, bias, activation, other, binary
    )


def _linear_quantized_fake(
    x, codes, x_scale, outlier_mask, weight, weight_scale, bias, activation="none", other=None, binary="none"
):
    shape = _check_linear_quantized(
        x, codes, x_scale, outlier_mask, weight, weight_scale, bias, activation, other, binary
    )
    return x.new_empty(shape)


def _linear_quantized_setup_context(ctx, inputs, output):
    _, _, _, _, weight, weight_scale, bias, activation, other, _ = inputs
    _setup_backward("linear_quantized", ctx, output, weight, weight_scale, bias, activation, other)


def _linear_quantized_backward(ctx, grad):
    grad_x, grad_bias = _backward(ctx, grad, bias_at=6)
    return grad_x, None, None, None, None, None, grad_bias, None, None, None


# ---- int8fx::grouped_linear ------------------------------------------------------------------------------------------


def _check_grouped(x, weight, weight_scale, bias, offsets):
    op = "grouped_linear"
    _check_weight(op, x, weight, weight_scale, bias, (3,))
    if x.dim() != 2 or offsets.shape != weight.shape[:1] or offsets.dtype not in (torch.int32, torch.int64):
        found = f"x has shape {tuple(x.shape)}, offsets {tuple(offsets.shape)}, dtype {offsets.dtype}"
        _refuse(op, found, f"[S, K] and one integer end per group, [{weight.shape[0]}]")


def _grouped_linear_kernel(x, weight, weight_scale, bias, offsets, threshold):
    _check_grouped(x, weight, weight_scale, bias, offsets)
    return _kernels(x).grouped_linear(x, weight, weight_scale, bias, offsets, threshold)


def _grouped_linear_fake(x, weight, weight_scale, bias, offsets, threshold):
    _check_grouped(x, weight, weight_scale, bias, offsets)
    return x.new_empty((x.shape[0], weight.shape[1]))


def _grouped_setup_context(ctx, inputs, output):
    _, weight, weight_scale, bias, offsets, _ = inputs
    ctx.save_for_backward(weight, weight_scale, offsets)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _grouped_backward(ctx, grad):
    weight, weight_scale, offsets = ctx.saved_tensors
    E, N, K = weight.shape
    rows = torch.arange(grad.shape[0], device=grad.device)
    group = torch.searchsorted(offsets.to(rows.dtype), rows, right=True)  # E for rows behind the last group
    grad = grad.masked_fill((group == E)[:, None], 0)
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad.new_zeros(grad.shape[0], K)
        for e in range(E):
            part = grad.masked_fill((group != e)[:, None], 0)
            grad_x = grad_x + part @ torch.ops.int8fx.dequantize(weight[e], weight_scale[e], grad.dtype)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[3]:
        grad_bias = grad.new_zeros(E, N).index_add(0, group.clamp(max=E - 1), grad).to(ctx.bias_dtype)
    return grad_x, None, None, grad_bias, None, None


# ---- int8fx::dequantize ----------------------------------------------------------------------------------------------
# How a packed weight reads where no int8 product is known. The threshold does not enter the value: it tells the `lower`
# pass which product to put in the place of a dequantised one.


def _check_dequantize(weight, weight_scale, dtype):
    _check_codes("dequantize", weight, weight_scale)
    if dtype not in _X_DTYPES:
        _refuse("dequantize", f"dtype {dtype}", "float16, bfloat16, float32 or float64")


def _dequantize_kernel(weight, weight_scale, dtype, threshold=6.0):
    _check_dequantize(weight, weight_scale, dtype)
    return _dequantize(weight.contiguous(), weight_scale, dtype)


def _dequantize_fake(weight, weight_scale, dtype, threshold=6.0):
    _check_dequantize(weight, weight_scale, dtype)
    return torch.empty(weight.shape, dtype=dtype, device=weight.device)


# ---- registration ----------------------------------------------------------------------------------------------------

for _key in ("CPU", "CUDA"):  # ROCm's tensors have the key CUDA too
    _LIB.impl("linear", _linear_kernel, _key)
    _LIB.impl("linear_quantized", _linear_quantized_kernel, _key)
    _LIB.impl("quantize_rowwise", _quantize_rowwise_kernel, _key)
    _LIB.impl("grouped_linear", _grouped_linear_kernel, _key)
_LIB.impl("dequantize", _dequantize_kernel, "CompositeExplicitAutograd")

_FAKES: dict[str, Callable] = {
    "linear": _linear_fake,
    "linear_quantized": _linear_quantized_fake,
    "quantize_rowwise": _quantize_rowwise_fake,
    "grouped_linear": _grouped_linear_fake,
    "dequantize": _dequantize_fake,
}
for _name, _fake in _FAKES.items():
    torch.library.register_fake(f"int8fx::{_name}", _fake, lib=_LIB)

for _name, _formula, _setup in (
    ("linear", _linear_backward, _linear_setup_context),
    ("linear_quantized", _linear_quantized_backward, _linear_quantized_setup_context),
    ("quantize_rowwise", _quantize_rowwise_backward, _quantize_rowwise_setup_context),
    ("grouped_linear", _grouped_backward, _grouped_setup_context),
):
    torch.library.register_autograd(f"int8fx::{_name}", _formula, setup_context=_setup, lib=_LIB)


_AUTOCAST_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def _autocast(name: str, device: str):
    """Like ``F.linear`` under autocast: x, bias and other go to the autocast dtype, float64 and scales stay."""
    op = getattr(torch.ops.int8fx, name).default
    floats = {i for i, a in enumerate(op._schema.arguments) if a.name in ("x", "bias", "other")}

    def kernel(*args):
        dtype = torch.get_autocast_dtype(device)
        args = tuple(
            a.to(dtype) if i in floats and isinstance(a, Tensor) and a.dtype in _AUTOCAST_DTYPES else a
            for i, a in enumerate(args)
        )
        with torch.autocast(device, enabled=False):
            return op(*args)

    return kernel


for _name in ("linear", "grouped_linear"):
    for _device in ("cpu", "cuda"):
        _LIB.impl(_name, _autocast(_name, _device), f"Autocast{_device.upper()}")
