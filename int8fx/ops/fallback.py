"""CPU kernels of the int8fx ops, made of torch's own operators."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..schemes.quantize import INT8_MAX, compute_dtype, dequantize, outlier_mask, rotate
from ..schemes.quantize import quantize_rowwise as _quantize_rowwise

_EXACT_K = 2**24 // INT8_MAX**2  # integers up to 2**24 are exact in float32: 1040 products
_TILE = 1 << 16  # elements of y that stay in the second-level cache while columns are added to them
_PIECE = 1 << 14  # elements: a multiple of every SIMD width, below torch's 32,768 for a second thread
_BLOCK = 1 << 20  # weight codes widened to float32 at a time: 4 MiB


@cache
def has_fast_int_mm() -> bool:
    """Whether ``aten::_int_mm`` runs on int8 dot-product instructions here, and sums without saturating.

    Without AVX512-VNNI it is a scalar loop (29x slower than float32 on an AMD EPYC 7003, torch 2.13), and
    oneDNN's int8 kernels for AVX2 saturate 16-bit partial sums.
    """
    if not torch.cpu.get_capabilities().get("avx512_vnni", False):
        return False
    full = torch.full((32, 64), INT8_MAX, dtype=torch.int8)
    return bool((torch._int_mm(full, full.t()) == 64 * INT8_MAX**2).all())


def int8_matmul(codes: Tensor, weight: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``codes[M, K] @ weight[N, K].T`` of int8 codes as ``[M, N]`` of ``dtype``, float32 or float64.

    With VNNI or AMX: ``aten::_int_mm``, int32 sums. Without: the integers are multiplied by the float GEMM,
    for float32 in slices of 1040 columns, in which every partial sum is an integer below 2**24 and so
    exact in whatever order it is made; the slices' sums are added one after the other in float32, as an int32 sum is
    rounded to float32 anyway.
    """
    if has_fast_int_mm():
        return torch._int_mm(codes, weight.t()).to(dtype)
    M, K = codes.shape
    N = weight.shape[0]
    y = torch.empty(M, N, dtype=dtype)
    x = codes.to(dtype)
    step = max(1, _BLOCK // max(K, 1))
    exact = _EXACT_K if dtype == torch.float32 else max(K, 1)
    widened = torch.empty(min(step, N), K, dtype=dtype)  # one buffer: a fresh one per block costs its page faults
    for n in range(0, N, step):
        block = widened[: min(step, N - n)].copy_(weight[n : n + step])
        out = y[:, n : n + step] if step < N else y
        torch.mm(x[:, :exact], block[:, :exact].t(), out=out)
        for k in range(exact, K, exact):  # not addmm_: it may add parts of a slice to y, in an order that depends on M
            out += torch.mm(x[:, k : k + exact], block[:, k : k + exact].t())
    return y


def quantize_rowwise(
    x: Tensor, threshold: float, block: int = 1, columns: Tensor | None = None, top: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    x = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).contiguous()
    if columns is not None:
        x = x.index_fill(1, columns, 0)
    mask = outlier_mask(x, threshold, columns, top)
    found = mask if mask.any() else None
    if block == 1:
        return *_quantize_rowwise(x, found), mask
    if found is not None:
        x = x.masked_fill(found, 0)
    return *_quantize_rowwise(rotate(x.to(compute_dtype(x.dtype)), block)), mask


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
    ct = compute_dtype(x.dtype)
    N = weight.shape[0]
    weight_scale = weight_scale.to(ct)
    y = int8_matmul(codes, weight, ct)
    y.mul_(x_scale[:, None]).mul_(weight_scale)
    outliers = mask.nonzero().squeeze(-1)
    if outliers.numel():
        kept = x.reshape(codes.shape).index_select(1, outliers).to(ct)
        for n in range(0, N, step := max(1, _BLOCK // (outliers.numel() if block == 1 else mask.numel()))):
            rows = slice(n, n + step)
            if block == 1:
                kept_weight = dequantize(weight[rows].index_select(1, outliers), weight_scale[rows], ct)
            else:
                kept_weight = dequantize(weight[rows], weight_scale[rows], ct, block).index_select(1, outliers)
            y[:, rows].addmm_(kept, kept_weight.t())
    if columns is not None and columns_weight is not None:
        _add_columns(y, x.reshape(codes.shape).index_select(1, columns).to(ct), columns_weight.to(ct))
    if bias is not None:
        y.add_(bias)
    if activation != "none":
        _activate(y.view(-1), _ACTIVATIONS[activation])
    y = y.view(*x.shape[:-1], N)
    if other is not None:
        y = y.add_(other) if binary == "add" else y.mul_(other)
    return y.to(x.dtype)


def _add_columns(y: Tensor, x: Tensor, weight: Tensor) -> None:
    """``y[M, N] += x[M, C] @ weight[N, C].T``, column after column, each product and each sum rounded once.

    So a row's result depends on nothing but that row: a GEMM sums in an order that depends on M.
    """
    step = max(1, _TILE // max(y.shape[1], 1))
    weight = weight.t().contiguous()
    for m in range(0, y.shape[0], step):
        rows, product = y[m : m + step], torch.empty_like(y[m : m + step])
        for c in range(x.shape[1]):
            rows += torch.mul(x[m : m + step, c : c + 1], weight[c], out=product)


def _activate(y: Tensor, function: Callable[[Tensor], Tensor]) -> None:
    """``y[:] = function(y)`` in pieces of one size, the last one padded.

    torch computes what does not fill a SIMD register, at the end of a tensor and of each thread's part, by scalar code
    that may round differently: a row's result would depend on where in the batch the row stands.
    """
    for piece in y.split(_PIECE):
        whole = piece if piece.numel() == _PIECE else F.pad(piece, (0, _PIECE - piece.numel()))
        function(whole)
        if whole is not piece:
            piece.copy_(whole[: piece.numel()])


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu_,
    "silu": lambda y: F.silu(y, inplace=True),
    "gelu": torch.ops.aten.gelu_,
    "gelu_tanh": lambda y: torch.ops.aten.gelu_(y, approximate="tanh"),
}


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
    if weight.dim() == 2:
        quantized = quantize_rowwise(x, threshold, block, columns, top)
        return linear_quantized(
            x, *quantized, weight, weight_scale, bias, activation, other, binary, block, columns, columns_weight
        )
    y = x.new_empty(*x.shape[:-1], weight.shape[-2])
    for e in range(weight.shape[0]):
        bias_e, other_e, columns_e = (None if t is None else t[e] for t in (bias, other, columns_weight))
        rotation = (block, columns, columns_e, top)
        y[e] = linear(x[e], weight[e], weight_scale[e], bias_e, threshold, activation, other_e, binary, *rotation)
    return y


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
    y = x.new_zeros(x.shape[0], weight.shape[-2])
    begin = 0
    for e, end in enumerate(offsets.tolist()):
        if end > begin:
            bias_e, columns_e = (None if t is None else t[e] for t in (bias, columns_weight))
            product = (weight[e], weight_scale[e], bias_e, threshold, "none", None, "none")
            y[begin:end] = linear(x[begin:end], *product, block, columns, columns_e, top)
        begin = end
    return y
