"""The ops of the ``int8fx`` library: schemas, checks, fakes, autograd, autocast and the dispatch to kernels.

No output's shape depends on data: the number of outlier columns never leaves an op.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import cpu, reference
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


# ---- checks, shared by the kernels and the fakes ------------------------------------------------------------------


def _check_weight(op: str, x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dims: str) -> None:
    def need(ok: bool, what: str, legal: str) -> None:
        if not ok:
            raise ValueError(f"int8fx::{op}: {what}; legal: {legal}")

    need(x.is_floating_point(), f"x has dtype {x.dtype}", "float16, bfloat16, float32 or float64")
    need(weight.dtype == torch.int8, f"weight has dtype {weight.dtype}", "int8 codes")
    need(str(weight.dim()) in dims, f"weight has {weight.dim()} dimensions", f"{' or '.join(dims)}")
    need(
        weight_scale.shape == weight.shape[:-1],
        f"weight_scale has shape {tuple(weight_scale.shape)} for a weight {tuple(weight.shape)}",
        "one scale per output channel",
    )
    K = weight.shape[-1]
    need(K <= MAX_K, f"K = {K}", f"K <= {MAX_K}, or int32 sums could overflow")
    need(x.dim() > 0 and x.shape[-1] == K, f"x has shape {tuple(x.shape)}", f"[..., {K}] for K = {K}")
    if bias is not None:
        need(
            bias.shape == weight.shape[:-1],
            f"bias has shape {tuple(bias.shape)}",
            f"one value per output channel, {tuple(weight.shape[:-1])}",
        )


def _check_epilogue(op: str, shape: tuple, activation: str, other: Tensor | None, binary: str) -> None:
    if activation not in reference.ACTIVATIONS:
        raise ValueError(f"int8fx::{op}: activation {activation!r}; legal: {', '.join(reference.ACTIVATIONS)}")
    if binary not in reference.BINARIES or (binary == "none") != (other is None):
        raise ValueError(f"int8fx::{op}: binary {binary!r}; legal: add or mul with other, none without")
    if other is not None and other.shape != shape:
        raise ValueError(f"int8fx::{op}: other has shape {tuple(other.shape)}; legal: that of y, {tuple(shape)}")


def _check_linear(op, x, weight, weight_scale, bias, activation, other, binary):
    _check_weight(op, x, weight, weight_scale, bias, "23")
    if weight.dim() == 3 and (x.dim() != 3 or x.shape[0] != weight.shape[0]):
        raise ValueError(f"int8fx::{op}: x has shape {tuple(x.shape)}; legal: [{weight.shape[0]}, M, K] for a 3-D weight")
    shape = (*x.shape[:-1], weight.shape[-2])
    _check_epilogue(op, shape, activation, other, binary)
    return shape


# ---- int8fx::linear ---------------------------------------------------------------------------------------------------


def _linear_cpu(x, weight, weight_scale, bias, threshold, activation="none", other=None, binary="none"):
    _check_linear("linear", x, weight, weight_scale, bias, activation, other, binary)
    return cpu.linear(x, weight, weight_scale, bias, threshold, activation, other, binary)


def _linear_fake(x, weight, weight_scale, bias, threshold, activation="none", other=None, binary="none"):
    return x.new_empty(_check_linear("linear", x, weight, weight_scale, bias, activation, other, binary))


def _linear_setup_context(ctx, inputs, output):
    x, weight, weight_scale, bias, _, activation, other, _ = inputs
    if activation != "none" or other is not None:
        raise RuntimeError("int8fx::linear has no gradient through its epilogue (activation, other); the fold pass "
                           "makes such calls only in graphs whose backward has been traced")  # fmt: skip
    ctx.save_for_backward(weight, weight_scale)
    ctx.x_shape, ctx.bias = x.shape, None if bias is None else (bias.shape, bias.dtype)


def _linear_backward(ctx, grad):
    weight, weight_scale = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad @ torch.ops.int8fx.dequantize(weight, weight_scale, grad.dtype)
    if ctx.bias is not None and ctx.needs_input_grad[3]:
        shape, dtype = ctx.bias
        lead = tuple(range(len(shape) - 1, grad.dim() - 1))
        grad_bias = (grad.sum(lead) if lead else grad).to(dtype)
    return grad_x, None, None, grad_bias, None, None, None, None


# ---- int8fx::quantize_rowwise and int8fx::linear_quantized ------------------------------------------------------------


def _quantize_rowwise_fake(x, threshold):
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


def _check_linear_quantized(x, codes, weight, weight_scale, bias, activation, other, binary):
    _check_weight("linear_quantized", x, weight, weight_scale, bias, "2")
    shape = (*x.shape[:-1], weight.shape[0])
    _check_epilogue("linear_quantized", shape, activation, other, binary)
    return shape


def _linear_quantized_cpu(
    x, codes, x_scale, outlier_mask, weight, weight_scale, bias, activation="none", other=None, binary="none"
):
    _check_linear_quantized(x, codes, weight, weight_scale, bias, activation, other, binary)
    return cpu.linear_quantized(x, codes, x_scale, outlier_mask, weight, weight_scale, bias, activation, other, binary)


def _linear_quantized_fake(
    x, codes, x_scale, outlier_mask, weight, weight_scale, bias, activation="none", other=None, binary="none"
):
    return x.new_empty(_check_linear_quantized(x, codes, weight, weight_scale, bias, activation, other, binary))


# ---- int8fx::grouped_linear -------------------------------------------------------------------------------------------


def _check_grouped(x, weight, weight_scale, bias, offsets):
    _check_weight("grouped_linear", x, weight, weight_scale, bias, "3")
    if x.dim() != 2 or offsets.shape != weight.shape[:1]:
        raise ValueError(
            f"int8fx::grouped_linear: x has shape {tuple(x.shape)}, offsets {tuple(offsets.shape)}; legal: [S, K] and "
            f"one end per group, [{weight.shape[0]}]"
        )


def _grouped_linear_cpu(x, weight, weight_scale, bias, offsets, threshold):
    _check_grouped(x, weight, weight_scale, bias, offsets)
    return cpu.grouped_linear(x, weight, weight_scale, bias, offsets, threshold)


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


# ---- int8fx::dequantize -----------------------------------------------------------------------------------------------
# How a packed weight reads where no int8 product is known. The threshold does not enter the value: it tells the `lower`
# pass which product to put in the place of a dequantised one.


def _dequantize_kernel(weight, weight_scale, dtype, threshold=6.0):
    return _dequantize(weight, weight_scale, dtype)


def _dequantize_fake(weight, weight_scale, dtype, threshold=6.0):
    return torch.empty(weight.shape, dtype=dtype, device=weight.device)


# ---- registration -----------------------------------------------------------------------------------------------------

_LIB.impl("linear", _linear_cpu, "CPU")
_LIB.impl("linear_quantized", _linear_quantized_cpu, "CPU")
_LIB.impl("quantize_rowwise", cpu.quantize_rowwise, "CPU")
_LIB.impl("grouped_linear", _grouped_linear_cpu, "CPU")
_LIB.impl("dequantize", _dequantize_kernel, "CompositeExplicitAutograd")

for _name, _fake in {
    "linear": _linear_fake,
    "linear_quantized": _linear_quantized_fake,
    "quantize_rowwise": _quantize_rowwise_fake,
    "grouped_linear": _grouped_linear_fake,
    "dequantize": _dequantize_fake,
}.items():
    torch.library.register_fake(f"int8fx::{_name}", _fake, lib=_LIB)

torch.library.register_autograd("int8fx::linear", _linear_backward, setup_context=_linear_setup_context, lib=_LIB)
torch.library.register_autograd(
    "int8fx::grouped_linear", _grouped_backward, setup_context=_grouped_setup_context, lib=_LIB
)


def _autocast(name: str, device: str):
    """Like ``F.linear`` under autocast: x, bias and other in the autocast dtype (not float64); codes and scales stay."""
    op = getattr(torch.ops.int8fx, name).default
    floats = {i for i, a in enumerate(op._schema.arguments) if a.name in ("x", "bias", "other")}

    def kernel(*args):
        dtype = torch.get_autocast_dtype(device)
        args = tuple(
            a.to(dtype) if i in floats and isinstance(a, Tensor) and a.dtype != torch.float64 else a
            for i, a in enumerate(args)
        )
        with torch.autocast(device, enabled=False):
            return op(*args)

    return kernel


for _name in ("linear", "grouped_linear"):
    for _device in ("cpu", "cuda"):
        _LIB.impl(_name, _autocast(_name, _device), f"Autocast{_device.upper()}")
