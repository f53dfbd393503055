"""The ops in torch's operators, for any device and dtype: used without a C++ compiler, and for float64 on GPUs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..schemes.quantize import INT8_MAX, compute_dtype, dequantize, outlier_mask
from ..schemes.quantize import quantize_rowwise as quantize_rows
from ..schemes.rotate import rotate
from ..schemes.weight import Epilogue, Int8Weight
from .checks import check_columns
from .rows import Form, form

_EXACT_K = 2**24 // INT8_MAX**2  # integers up to 2**24 are exact in float32: 1040 products
_TILE = 1 << 16  # elements of y that stay in the second-level cache while columns are added to them
_PIECE = 1 << 14  # elements: a multiple of every SIMD width, below torch's 32,768 for a second thread
_BLOCK = 1 << 20  # int8 weights widened to float32 at a time: 4 MiB


@cache
def has_fast_int_mm() -> bool:
    """Whether ``aten::_int_mm`` runs on int8 dot-product instructions on this CPU, and sums without saturating.

    Without AVX512-VNNI it is a scalar loop (29x slower than float32 on an AMD EPYC 7003, torch 2.13), and
    oneDNN's int8 kernels for AVX2 saturate 16-bit partial sums.
    """
    if not torch.cpu.get_capabilities().get("avx512_vnni", False):
        return False
    full = torch.full((32, 64), INT8_MAX, dtype=torch.int8)
    return bool((torch._int_mm(full, full.t()) == 64 * INT8_MAX**2).all())


def int8_matmul(codes: Tensor, weight: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``codes[M, K] @ weight[N, K].T`` of int8 codes as ``[M, N]`` of ``dtype``, float32 or float64.

    With VNNI or AMX it is ``aten::_int_mm``, with int32 sums. (Not for K = 1, where torch 2.13 with VNNI returns
    uninitialised memory.) Without, the integers are multiplied by the float GEMM. For float32 that is done in slices of
    1040 columns. Every partial sum of a slice is an integer below 2**24, and so exact in any order. The slices' sums
    are added one after the other in float32. (An int32 sum is rounded to float32 as well.)
    """
    K = codes.shape[1]
    if codes.device.type == "cpu" and K > 1 and has_fast_int_mm():
        return torch._int_mm(codes, weight.t()).to(dtype)
    return _float_matmul(codes.to(dtype), weight, _EXACT_K if dtype == torch.float32 else K)


def _float_matmul(x: Tensor, weight: Tensor, step: int) -> Tensor:
    """``x[M, K] @ weight[N, K].T`` with int8 codes widened to x's dtype, a block of channels at a time.

    Slices of ``step`` columns are multiplied, and their products are added one after the other.
    """
    (M, K), N = x.shape, weight.shape[0]
    if weight.numel() <= _BLOCK and step >= K:
        return torch.mm(x, weight.to(x.dtype).t())
    y = x.new_empty(M, N)
    for n, block in _widened(weight, x.dtype):
        out = y if len(block) == N else y[:, n : n + len(block)]
        torch.mm(x[:, :step], block[:, :step].t(), out=out)
        for k in range(step, K, step):  # not addmm_: it may add parts of a slice to y, in an order that depends on M
            out += torch.mm(x[:, k : k + step], block[:, k : k + step].t())
    return y


def _widened(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """``weight[N, K]`` in blocks of channels as ``dtype``, each with its first channel.

    All blocks are in one buffer, which the caches hold; new ones would cost page faults.
    """
    N, K = weight.shape
    step = min(N, max(1, _BLOCK // max(K, 1)))
    buffer = weight.new_empty(step, K, dtype=dtype)
    for n in range(0, N, step or 1):
        yield n, buffer[: min(step, N - n)].copy_(weight[n : n + step])


def quantize_rowwise(
    x: Tensor, threshold: float | None, block: int = 1, columns: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes ``[M, K]``, scale ``[M]`` and outlier mask ``[K]`` of x, as `reference.linear` computes them."""
    x = _without_columns(_rows(x), columns)
    outliers = _find_outliers(x, threshold, columns)
    if outliers is not None:
        x = x.index_fill(1, outliers, 0)
    codes, scale = quantize_rows(rotate(x, block))
    mask = x.new_zeros(x.shape[1], dtype=torch.bool)
    return codes, scale, mask if outliers is None else mask.index_fill_(0, outliers, True)


def _rows(x: Tensor) -> Tensor:
    """x as ``[M, K]``, in the dtype of sums."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).to(compute_dtype(x.dtype))


def _find_outliers(x: Tensor, threshold: float | None, columns: Tensor | None) -> Tensor | None:
    """The outlier columns of x ``[M, K]``, None if there are none. One comparison suffices for most inputs."""
    if threshold is None or x.numel() == 0 or bool(x.abs().amax() < threshold):  # NaN is not less
        return None
    return outlier_mask(x, threshold, columns).nonzero().squeeze(-1)


def _without_columns(x: Tensor, columns: Tensor | None) -> Tensor:
    """x ``[M, K]`` with zeros in its unquantised columns."""
    check_columns(columns, x.shape[1])
    return x if columns is None else x.index_fill(1, columns, 0)


def linear(x: Tensor, weight: Int8Weight, epilogue: Epilogue) -> Tensor:
    """`reference.linear`."""
    if weight.codes.dim() == 3:
        y = x.new_empty(*x.shape[:-1], weight.codes.shape[-2])
        for e in range(weight.codes.shape[0]):
            y[e] = linear(x[e], weight.of_expert(e), epilogue.of_expert(e))
        return y
    if not weight.is_plain:
        return _linear_in_groups(x, weight, epilogue)
    x2d = _rows(x)
    if _form(x, weight) is not Form.WEIGHT_ONLY:
        codes, x_scale, mask = quantize_rowwise(x2d, weight.threshold, weight.block, weight.columns)
        y = _multiply_codes(x2d, codes, x_scale, mask, weight)
    else:
        y = _float_matmul(_without_columns(x2d, weight.columns), weight.codes, x2d.shape[1])
        y.mul_(weight.scale.to(y.dtype))
    return _finish(y, x, x2d, weight, epilogue)


def linear_quantized(
    x: Tensor, codes: Tensor, x_scale: Tensor, mask: Tensor, weight: Int8Weight, epilogue: Epilogue
) -> Tensor:
    """`linear` of x, given what `quantize_rowwise` returned for it. Only the form QUANTIZED reads that."""
    if _form(x, weight) is not Form.QUANTIZED or not weight.is_plain:
        return linear(x, weight, epilogue)
    check_columns(weight.columns, x.shape[-1])
    x2d = _rows(x)
    return _finish(_multiply_codes(x2d, codes, x_scale, mask, weight), x, x2d, weight, epilogue)


def _linear_in_groups(x: Tensor, weight: Int8Weight, epilogue: Epilogue) -> Tensor:
    """`reference.linear` with a weight of any format: blocks of channels are dequantised and multiplied in floats."""
    check_columns(weight.columns, x.shape[-1])
    x2d, ct = _rows(x), compute_dtype(x.dtype)
    if _form(x, weight) is Form.WEIGHT_ONLY:
        rounded = _without_columns(x2d, weight.columns)
    else:
        codes, x_scale, mask = quantize_rowwise(x2d, weight.threshold, weight.block, weight.columns)
        rounded = torch.where(mask, x2d, codes.to(ct) * x_scale[:, None])
    stored = weight._replace(block=1, columns=None, columns_weight=None)
    N = weight.codes.shape[0]
    y = x2d.new_empty(len(x2d), N)
    for n in range(0, N, step := max(1, _BLOCK // max(weight.K, 1))):
        channels = slice(n, n + step)
        torch.mm(rounded, dequantize(stored.of_channels(lambda t, c=channels: t[c]), ct).t(), out=y[:, channels])  # type: ignore[misc]
    return _finish(y, x, x2d, weight, epilogue)


def _multiply_codes(x2d: Tensor, codes: Tensor, x_scale: Tensor, mask: Tensor, weight: Int8Weight) -> Tensor:
    """``codes @ weight.codes.T * scales + x_outlier @ (weight.codes * weight.scale)[:, outliers].T`` as ``[M, N]``."""
    weight_scale = weight.scale.to(x2d.dtype)
    y = int8_matmul(codes, weight.codes, x2d.dtype).mul_(x_scale.unsqueeze(-1)).mul_(weight_scale)
    if weight.threshold is not None and bool(mask.any()):
        outliers = mask.nonzero().squeeze(-1)
        x_outliers = x2d.index_select(1, outliers)
        for n in range(0, y.shape[1], step := max(1, _BLOCK // outliers.numel())):
            channels = slice(n, n + step)
            residual_weight = weight.codes[channels].index_select(1, outliers).to(y.dtype)
            y[:, channels].addmm_(x_outliers, residual_weight.mul_(weight_scale[channels, None]).t())
    return y


def grouped_linear(x: Tensor, offsets: Tensor, weight: Int8Weight, bias: Tensor | None) -> Tensor:
    """`reference.grouped_linear`."""
    y = x.new_zeros(x.shape[0], weight.codes.shape[-2])
    begin = 0
    for e, end in enumerate(offsets.tolist()):
        if end > begin:
            y[begin:end] = linear(x[begin:end], weight.of_expert(e), Epilogue(bias).of_expert(e))
        begin = max(begin, end)
    return y


def _form(x: Tensor, weight: Int8Weight) -> Form:
    """What `form` says; not quantised if the threshold makes every column an outlier."""
    if weight.threshold == 0:
        return Form.WEIGHT_ONLY
    rows = math.prod(x.shape[:-1])
    return form(rows, x.device.type, weight.threshold, weight.block, weight.columns is not None, weight.is_plain)


def _finish(y: Tensor, x: Tensor, x2d: Tensor, weight: Int8Weight, epilogue: Epilogue) -> Tensor:
    """Adds the unquantised columns and the epilogue to ``y [M, N]``, and rounds it to x's shape and dtype."""
    if weight.columns is not None and weight.columns_weight is not None:
        _add_columns(y, x2d.index_select(1, weight.columns), weight.columns_weight.to(y.dtype))
    if epilogue.bias is not None:
        y.add_(epilogue.bias)
    if epilogue.activation != "none":
        _activate(y.view(-1), _ACTIVATIONS[epilogue.activation])
    y = y.view(*x.shape[:-1], y.shape[1])
    if epilogue.other is not None:
        y = y.add_(epilogue.other) if epilogue.binary == "add" else y.mul_(epilogue.other)
    return y.to(x.dtype)


def _add_columns(y: Tensor, x: Tensor, weight: Tensor) -> None:
    """``y[M, N] += x[M, C] @ weight[N, C].T``, column after column, each product and each sum rounded once.

    So a row's result depends on that row only. A GEMM would sum in an order that depends on M.
    """
    step = max(1, _TILE // max(y.shape[1], 1))
    channels = weight.t().contiguous().unbind()
    for rows, x_rows in zip(y.split(step), x.split(step), strict=True):
        product = torch.empty_like(rows)
        for x_column, w_column in zip(x_rows.t().unsqueeze(-1), channels, strict=True):
            rows += torch.mul(x_column, w_column, out=product)


def _activate(y: Tensor, function: Callable[[Tensor], Tensor]) -> None:
    """``y[:] = function(y)`` in pieces of one size, the last one padded.

    At the end of a tensor, and of each thread's part of it, torch computes elements that do not fill a SIMD register by
    scalar code, which may round differently. A row's result would then depend on its position in the batch.
    """
    for piece in y.split(_PIECE):
        padded = piece if piece.numel() == _PIECE else F.pad(piece, (0, _PIECE - piece.numel()))
        function(padded)
        if padded is not piece:
            piece.copy_(padded[: piece.numel()])


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu_,
    "silu": lambda y: F.silu(y, inplace=True),
    "gelu": torch.ops.aten.gelu_,
    "gelu_tanh": lambda y: torch.ops.aten.gelu_(y, approximate="tanh"),
}
