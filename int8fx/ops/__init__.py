"""The ops of the ``int8fx`` library: schemas, fakes, autograd, autocast and the dispatch to kernels.

No output's shape depends on data: the number of outlier columns never leaves an op.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from ..schemes.quantize import compute_dtype
from ..schemes.quantize import dequantize as _dequantize
from . import fallback as cpu
from . import gpu, native
from .checks import check_dequantize, check_grouped, check_linear, check_linear_quantized, check_quantize

_LIB = torch.library.Library("int8fx", "DEF")
_EPILOGUE = "str activation='none', Tensor? other=None, str binary='none'"
_ROTATION = "int block=1, Tensor? columns=None, Tensor? columns_weight=None"
_LIB.define(
    f"linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, float threshold, {_EPILOGUE}, {_ROTATION}, "
    "int top=0) -> Tensor"
)
_LIB.define(
    "linear_quantized(Tensor x, Tensor codes, Tensor x_scale, Tensor outlier_mask, Tensor weight, Tensor weight_scale, "
    f"Tensor? bias, {_EPILOGUE}, {_ROTATION}) -> Tensor"
)
_LIB.define(
    "quantize_rowwise(Tensor x, float threshold, int block=1, Tensor? columns=None, int top=0) "
    "-> (Tensor, Tensor, Tensor)"
)
_LIB.define(
    "grouped_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, Tensor offsets, float threshold, "
    f"{_ROTATION}, int top=0) -> Tensor"
)
_LIB.define(
    "dequantize(Tensor weight, Tensor weight_scale, ScalarType dtype, float threshold=6.0, "
    f"{_ROTATION}, int top=0) -> Tensor"
)

linear = torch.ops.int8fx.linear
linear_quantized = torch.ops.int8fx.linear_quantized
quantize_rowwise = torch.ops.int8fx.quantize_rowwise
grouped_linear = torch.ops.int8fx.grouped_linear
dequantize = torch.ops.int8fx.dequantize


# ---- int8fx::linear --------------------------------------------------------------------------------------------------


def _linear(kernels, x, weight, weight_scale, bias, threshold, activation="none", other=None, binary="none", *rotation):
    check_linear(x, weight, weight_scale, bias, activation, other, binary, *rotation)
    return kernels.linear(x, weight, weight_scale, bias, threshold, activation, other, binary, *rotation)


def _linear_fake(x, weight, weight_scale, bias, threshold, activation="none", other=None, binary="none", *rotation):
    return x.new_empty(check_linear(x, weight, weight_scale, bias, activation, other, binary, *rotation))


def _setup_backward(op, ctx, output, weight, weight_scale, bias, activation, other, block, columns, columns_weight):
    ctx.refused = None
    if activation != "none" or other is not None:
        ctx.refused = RuntimeError(
            f"int8fx::{op} has no gradient through its epilogue (activation, other); the fold pass makes such calls "
            "only in graphs whose backward has been traced"
        )
        if not isinstance(output, FakeTensor):  # AOTInductor calls folded products on fakes, with gradients enabled
            raise ctx.refused
    ctx.save_for_backward(weight, weight_scale, columns, columns_weight)
    ctx.block = block
    ctx.bias = None if bias is None else (bias.shape, bias.dtype)


def _backward(ctx, grad, bias_at):
    """The gradients of x, through the dequantised weight, and of the bias."""
    if ctx.refused is not None:
        raise ctx.refused
    weight, weight_scale, *kept = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad @ torch.ops.int8fx.dequantize(weight, weight_scale, grad.dtype, 6.0, ctx.block, *kept)
    if ctx.bias is not None and ctx.needs_input_grad[bias_at]:
        shape, dtype = ctx.bias
        lead = tuple(range(len(shape) - 1, grad.dim() - 1))
        grad_bias = (grad.sum(lead) if lead else grad).to(dtype)
    return grad_x, grad_bias


def _linear_setup_context(ctx, inputs, output):
    _, weight, weight_scale, bias, _, activation, other, _, *rotation, _ = inputs
    _setup_backward("linear", ctx, output, weight, weight_scale, bias, activation, other, *rotation)


def _linear_backward(ctx, grad):
    grad_x, grad_bias = _backward(ctx, grad, bias_at=3)
    return grad_x, None, None, grad_bias, *[None] * 8


# ---- int8fx::quantize_rowwise and int8fx::linear_quantized -----------------------------------------------------------


def _quantize_rowwise(kernels, x, threshold, *rotation):
    check_quantize(x, *rotation)
    return kernels.quantize_rowwise(x, threshold, *rotation)


def _quantize_rowwise_fake(x, threshold, *rotation):
    check_quantize(x, *rotation)
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
    return (None,) * 5


def _linear_quantized(kernels, *args):
    check_linear_quantized(*args)
    return kernels.linear_quantized(*args)


def _linear_quantized_fake(x, *args):
    return x.new_empty(check_linear_quantized(x, *args))


def _linear_quantized_setup_context(ctx, inputs, output):
    _, _, _, _, weight, weight_scale, bias, activation, other, _, *rotation = inputs
    _setup_backward("linear_quantized", ctx, output, weight, weight_scale, bias, activation, other, *rotation)


def _linear_quantized_backward(ctx, grad):
    grad_x, grad_bias = _backward(ctx, grad, bias_at=6)
    return grad_x, None, None, None, None, None, grad_bias, *[None] * 6


# ---- int8fx::grouped_linear ------------------------------------------------------------------------------------------


def _grouped_linear(kernels, x, weight, weight_scale, bias, offsets, threshold, *rotation):
    check_grouped(x, weight, weight_scale, bias, offsets, *rotation)
    return kernels.grouped_linear(x, weight, weight_scale, bias, offsets, threshold, *rotation)


def _grouped_linear_fake(x, weight, weight_scale, bias, offsets, threshold, *rotation):
    check_grouped(x, weight, weight_scale, bias, offsets, *rotation)
    return x.new_empty((x.shape[0], weight.shape[1]))


def _grouped_setup_context(ctx, inputs, output):
    _, weight, weight_scale, bias, offsets, _, block, columns, columns_weight, _ = inputs
    ctx.save_for_backward(weight, weight_scale, offsets, columns, columns_weight)
    ctx.block = block
    ctx.bias_dtype = None if bias is None else bias.dtype


def _grouped_backward(ctx, grad):
    weight, weight_scale, offsets, columns, columns_weight = ctx.saved_tensors
    E, N, K = weight.shape
    rows = torch.arange(grad.shape[0], device=grad.device)
    group = torch.searchsorted(offsets.to(rows.dtype), rows, right=True)  # E for rows behind the last group
    grad = grad.masked_fill((group == E)[:, None], 0)
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad.new_zeros(grad.shape[0], K)
        for e in range(E):
            part = grad.masked_fill((group != e)[:, None], 0)
            kept = (columns, None if columns_weight is None else columns_weight[e])
            w = torch.ops.int8fx.dequantize(weight[e], weight_scale[e], grad.dtype, 6.0, ctx.block, *kept)
            grad_x = grad_x + part @ w
    if ctx.bias_dtype is not None and ctx.needs_input_grad[3]:
        grad_bias = grad.new_zeros(E, N).index_add(0, group.clamp(max=E - 1), grad).to(ctx.bias_dtype)
    return grad_x, None, None, grad_bias, *[None] * 6


# ---- int8fx::dequantize ----------------------------------------------------------------------------------------------
# How a packed weight reads where no int8 product is known. The threshold and top do not enter the value: they tell the
# `lower` pass which product to put in the place of a dequantised one.


def _dequantize_kernel(
    weight, weight_scale, dtype, threshold=6.0, block=1, columns=None, columns_weight=None, top=0
):  # fmt: skip
    check_dequantize(weight, weight_scale, dtype, threshold, block, columns, columns_weight, top)
    return _dequantize(weight.contiguous(), weight_scale, dtype, block, columns, columns_weight)


def _dequantize_fake(weight, weight_scale, dtype, *scheme):
    check_dequantize(weight, weight_scale, dtype, *scheme)
    return torch.empty(weight.shape, dtype=dtype, device=weight.device)


# ---- registration ----------------------------------------------------------------------------------------------------


def kernel_on(kernels: ModuleType, name: str) -> Callable:
    """The op ``name`` on the kernels of one module, `cpu` or `gpu`, with its checks."""
    checked = _CHECKED[name]
    return lambda *args: checked(kernels, *args)


def _without_library(name: str) -> Callable:
    """What CPU tensors reach until the C++ kernels are loaded: loads them, or runs `cpu` if that fails."""
    op, kernel = getattr(torch.ops.int8fx, name).default, kernel_on(cpu, name)

    def run(x, *args):
        if x.device.type != "cpu":
            raise NotImplementedError(f"int8fx::{name}: no kernel for tensors on {x.device}; legal: cpu, cuda")
        return op(x, *args) if native.load() else kernel(x, *args)

    return run


_CHECKED: dict[str, Callable] = {
    "linear": _linear,
    "linear_quantized": _linear_quantized,
    "quantize_rowwise": _quantize_rowwise,
    "grouped_linear": _grouped_linear,
}
for _name in _CHECKED:
    # An alias key: the library's kernels, for the key CPU, go before it.
    _LIB.impl(_name, _without_library(_name), "CompositeExplicitAutograd")
    _LIB.impl(_name, kernel_on(gpu, _name), "CUDA")  # and ROCm
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
