"""The ops of the ``int8fx`` library: schemas, fakes, autograd, autocast and the dispatch to kernels.

Every op takes the fields of an `Int8Weight` and of an `Epilogue` in their order: ``linear(x, *weight, *epilogue)``.
No output's shape depends on data, so none depends on the number of outlier columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from ..imports import when_imported
from ..schemes.quantize import compute_dtype
from ..schemes.quantize import dequantize as _dequantize
from ..schemes.weight import Epilogue, Int8Weight
from . import fallback, flops, gpu, native, schemas
from .checks import (
    check_dequantize,
    check_grouped_linear,
    check_linear,
    check_linear_quantized,
    check_quantize_rowwise,
    count_rows,
)
from .onnx import refuse_export
from .rows import Form, form

_LIB = torch.library.Library(schemas.NAMESPACE, "DEF")
schemas.define(_LIB)

linear = torch.ops.int8fx.linear
linear_quantized = torch.ops.int8fx.linear_quantized
quantize_rowwise = torch.ops.int8fx.quantize_rowwise
grouped_linear = torch.ops.int8fx.grouped_linear
dequantize = torch.ops.int8fx.dequantize


# ---- arguments as the dispatcher passes them (trailing defaults omitted) -> types ------------------------------------

_WEIGHT_FIELDS = len(Int8Weight._fields)


def _linear_arguments(x: Tensor, *args: Any) -> tuple[Tensor, Int8Weight, Epilogue]:
    return x, Int8Weight(*args[:_WEIGHT_FIELDS]), Epilogue(*args[_WEIGHT_FIELDS:])


def _linear_quantized_arguments(
    x: Tensor, codes: Tensor, x_scale: Tensor, outlier_mask: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Int8Weight, Epilogue]:
    return x, codes, x_scale, outlier_mask, Int8Weight(*args[:_WEIGHT_FIELDS]), Epilogue(*args[_WEIGHT_FIELDS:])


def _grouped_linear_arguments(
    x: Tensor, offsets: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Int8Weight, Tensor | None]:
    bias = args[_WEIGHT_FIELDS] if len(args) > _WEIGHT_FIELDS else None
    return x, offsets, Int8Weight(*args[:_WEIGHT_FIELDS]), bias


def _weight_in(arguments: tuple) -> Int8Weight:
    return next(a for a in arguments if isinstance(a, Int8Weight))


# ---- kernels and fakes -----------------------------------------------------------------------------------------------


_MATMULS: dict[str, tuple[Callable, Callable]] = {
    "linear": (_linear_arguments, check_linear),
    "linear_quantized": (_linear_quantized_arguments, check_linear_quantized),
    "grouped_linear": (_grouped_linear_arguments, check_grouped_linear),
}
"""Op name -> what turns its arguments into types, and the check of these, which returns the shape of y."""


def _checked_matmul(name: str) -> Callable[..., Tensor]:
    typed, check = _MATMULS[name]

    def run(kernels: ModuleType, *args: Any) -> Tensor:
        arguments = typed(*args)
        check(*arguments)
        return getattr(kernels, name)(*arguments)

    return run


def _fake_matmul(name: str) -> Callable[..., Tensor]:
    typed, check = _MATMULS[name]
    return lambda x, *args: x.new_empty(check(*typed(x, *args)))


def _quantize_rowwise(
    kernels: ModuleType,
    x: Tensor,
    threshold: float | None = None,
    block: int = 1,
    columns: Tensor | None = None,
    for_linear: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """``for_linear``: only `linear_quantized` gets the result, which stays uninitialised if it is not read."""
    check_quantize_rowwise(x, threshold, block, columns)
    if for_linear:
        chosen = form(count_rows(x), x.device.type, threshold, block, columns is not None, is_plain=True)
        if chosen is not Form.QUANTIZED:
            return _empty_quantized(x)
    return kernels.quantize_rowwise(x, threshold, block, columns)


def _quantize_rowwise_fake(x: Tensor, *quantisation: Any, for_linear: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    check_quantize_rowwise(x, *quantisation)
    return _empty_quantized(x)


def _empty_quantized(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    M, K = count_rows(x), x.shape[-1]
    return (
        x.new_empty((M, K), dtype=torch.int8),
        x.new_empty((M,), dtype=compute_dtype(x.dtype)),
        x.new_empty((K,), dtype=torch.bool),
    )


def _dequantize_kernel(*weight: Any, dtype: torch.dtype) -> Tensor:
    """The packed weight as floats, for code that has no int8 matmul.

    The threshold does not change the value. The `lower` pass reads it, to write the int8 matmul that replaces this op.
    """
    int8_weight = Int8Weight(*weight)
    check_dequantize(int8_weight, dtype)
    return _dequantize(int8_weight._replace(codes=int8_weight.codes.contiguous()), dtype)


def _dequantize_fake(*weight: Any, dtype: torch.dtype) -> Tensor:
    int8_weight = Int8Weight(*weight)
    check_dequantize(int8_weight, dtype)
    codes = int8_weight.codes
    return torch.empty((*codes.shape[:-1], int8_weight.K), dtype=dtype, device=codes.device)


# ---- gradients -------------------------------------------------------------------------------------------------------
# x gets a gradient through the dequantised weight, and the bias gets one. Weights are frozen.


def _save_for_backward(ctx, op: str, output: Tensor, weight: Int8Weight, epilogue: Epilogue) -> None:
    ctx.refused = None
    if epilogue.activation != "none" or epilogue.other is not None:
        ctx.refused = RuntimeError(
            f"int8fx::{op} has no gradient through its epilogue (activation, other); the fold pass makes such calls "
            "only in graphs whose backward has been traced"
        )
        if not isinstance(output, FakeTensor):  # AOTInductor calls folded matmuls on fakes, with gradients enabled
            raise ctx.refused
    _save_weight(ctx, weight)
    ctx.bias = None if epilogue.bias is None else (epilogue.bias.shape, epilogue.bias.dtype)


def _save_weight(ctx, weight: Int8Weight, *others: Tensor) -> None:
    """Saves ``others`` and the tensors of ``weight``, in this order. Its threshold does not matter later."""
    tensors = {name: value for name, value in weight._asdict().items() if isinstance(value, Tensor)}
    ctx.save_for_backward(*others, *tensors.values())
    ctx.weight = weight._replace(threshold=None, **dict.fromkeys(tensors))  # type: ignore[arg-type]
    ctx.saved = tuple(tensors)


def _saved_weight(ctx, tensors: Sequence[Tensor]) -> Int8Weight:
    return ctx.weight._replace(**dict(zip(ctx.saved, tensors, strict=True)))


def _times_dequantized(grad: Tensor, weight: Int8Weight) -> Tensor:
    """``grad [..., N] @ W [N, K]``, where W has the dtype of ``grad``.

    Products and sums are in float32, and the result is rounded once, where torch has no fast matmul for that dtype.
    """
    w = torch.ops.int8fx.dequantize(*weight, dtype=grad.dtype)
    return grad @ w if _has_fast_matmul(grad) else (grad.float() @ w.float()).to(grad.dtype)


def _has_fast_matmul(x: Tensor) -> bool:
    """Whether oneDNN multiplies the dtype of ``x`` on this CPU; elsewhere torch's own loops take 30 times as long."""
    if x.device.type != "cpu" or x.dtype not in (torch.bfloat16, torch.float16):
        return True
    if not torch.backends.mkldnn.is_available():
        return False
    mkldnn = torch.ops.mkldnn
    supported = mkldnn._is_mkldnn_bf16_supported if x.dtype == torch.bfloat16 else mkldnn._is_mkldnn_fp16_supported
    return bool(supported())


def _backward(op: str) -> Callable:
    """The backward of `linear` or `linear_quantized`: one gradient for each argument of the op."""
    names = [argument.name for argument in getattr(torch.ops.int8fx, op).default._schema.arguments]
    x_at, bias_at = names.index("x"), names.index("bias")

    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.refused is not None:
            raise ctx.refused
        grads: list[Tensor | None] = [None] * len(names)
        if ctx.needs_input_grad[x_at]:
            weight = _saved_weight(ctx, ctx.saved_tensors)
            grads[x_at] = _times_dequantized(grad, weight)
        if ctx.bias is not None and ctx.needs_input_grad[bias_at]:
            shape, dtype = ctx.bias
            lead = tuple(range(len(shape) - 1, grad.dim() - 1))
            grads[bias_at] = (grad.sum(lead) if lead else grad).to(dtype)
        return tuple(grads)

    return backward


def _linear_setup_context(ctx, inputs, output):
    _, weight, epilogue = _linear_arguments(*inputs)
    _save_for_backward(ctx, "linear", output, weight, epilogue)


def _linear_quantized_setup_context(ctx, inputs, output):
    *_, weight, epilogue = _linear_quantized_arguments(*inputs)
    _save_for_backward(ctx, "linear_quantized", output, weight, epilogue)


def _quantize_rowwise_setup_context(ctx, inputs, keyword_only_inputs, output):
    ctx.mark_non_differentiable(*output)


def _quantize_rowwise_backward(ctx, *grads):
    return (None,) * 4


def _grouped_linear_setup_context(ctx, inputs, output):
    _, offsets, weight, bias = _grouped_linear_arguments(*inputs)
    _save_weight(ctx, weight, offsets)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _grouped_linear_backward(ctx, grad):
    offsets, *tensors = ctx.saved_tensors
    weight = _saved_weight(ctx, tensors)
    E, N, K = *weight.codes.shape[:2], weight.K
    rows = torch.arange(grad.shape[0], device=grad.device)
    group = torch.searchsorted(offsets.to(rows.dtype), rows, right=True)  # E for rows after the last group
    grad = grad.masked_fill((group == E)[:, None], 0)
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad.new_zeros(grad.shape[0], K)
        for e in range(E):
            part = grad.masked_fill((group != e)[:, None], 0)
            grad_x = grad_x + _times_dequantized(part, weight.of_expert(e))
    if ctx.bias_dtype is not None and ctx.needs_input_grad[2 + _WEIGHT_FIELDS]:
        grad_bias = grad.new_zeros(E, N).index_add(0, group.clamp(max=E - 1), grad).to(ctx.bias_dtype)
    return grad_x, None, *[None] * _WEIGHT_FIELDS, grad_bias


# ---- registration ----------------------------------------------------------------------------------------------------


def kernel_on(kernels: ModuleType, name: str) -> Callable:
    """The op ``name`` on the kernels of one module, `fallback` or `gpu`, with its checks.

    On a GPU, what no Triton kernel takes (`gpu.serves`) runs `fallback`.
    """
    checked, typed = _CHECKED[name], _MATMULS.get(name)

    def run(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        serving = kernels
        if kernels is gpu and not gpu.serves(x, _weight_in(typed[0](x, *args)) if typed else None):
            serving = fallback
        return checked(serving, x, *args, **kwargs)

    return run


def _without_library(name: str) -> Callable:
    """The kernel of CPU tensors until the C++ kernels are loaded: loads them, or runs `fallback` if that fails."""
    op, kernel = getattr(torch.ops.int8fx, name).default, kernel_on(fallback, name)

    def run(x, *args, **kwargs):
        if x.device.type != "cpu" or x.layout is not torch.strided:
            raise NotImplementedError(
                f"int8fx::{name}: no kernel for x {x.layout} on {x.device}; legal: dense tensors on cpu, cuda"
            )
        return op(x, *args, **kwargs) if native.load() else kernel(x, *args, **kwargs)

    return run


_CHECKED: dict[str, Callable] = {
    **{_name: _checked_matmul(_name) for _name in _MATMULS},
    "quantize_rowwise": _quantize_rowwise,
}
for _name in _CHECKED:
    # An alias key. The C++ kernels are registered for the key CPU, which takes precedence.
    _LIB.impl(_name, _without_library(_name), "CompositeExplicitAutograd")
    _LIB.impl(_name, kernel_on(gpu, _name), "CUDA")  # and ROCm
_LIB.impl("dequantize", _dequantize_kernel, "CompositeExplicitAutograd")


def _refusing_onnx(name: str, fake: Callable) -> Callable:
    def run(*args: Any, **kwargs: Any) -> Any:
        refuse_export(name)
        return fake(*args, **kwargs)

    return run


_FAKES: dict[str, Callable] = {
    **{_name: _fake_matmul(_name) for _name in _MATMULS},
    "quantize_rowwise": _quantize_rowwise_fake,
    "dequantize": _dequantize_fake,
}
for _name, _fake in _FAKES.items():
    torch.library.register_fake(f"int8fx::{_name}", _refusing_onnx(_name, _fake), lib=_LIB)

for _name, _formula, _setup in (
    ("linear", _backward("linear"), _linear_setup_context),
    ("linear_quantized", _backward("linear_quantized"), _linear_quantized_setup_context),
    ("quantize_rowwise", _quantize_rowwise_backward, _quantize_rowwise_setup_context),
    ("grouped_linear", _grouped_linear_backward, _grouped_linear_setup_context),
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

when_imported("torch.utils.flop_counter", flops.register)
