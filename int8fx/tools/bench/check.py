"""The Triton kernels against the reference, on the device that they are to be timed on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...ops import gpu
from ...schemes import quantize, reference
from ...schemes.quantize import NO_THRESHOLD, dequantize, quantize_weight

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROWS = (1, 5, 64, 100, 600)
SIZES = ((200, 300), (512, 4096))  # N, K
EXPERTS = 3
U = 2.0**-24  # of float32, that sums are carried in
SLOPE = 1.13  # of the steepest activation


@dataclass(frozen=True)
class Check:
    """One path through the kernels, in one case. worst: the largest error, as a multiple of what is legal."""

    name: str
    worst: float

    @property
    def right(self) -> bool:
        return self.worst <= 1  # not NaN


def checks(device: str, rows: tuple[int, ...] = ROWS, sizes: tuple[tuple[int, int], ...] = SIZES) -> Iterator[Check]:
    """Every kernel, each dtype, number of ``rows`` M and size (N, K): its result beside the reference's on the CPU.

    Codes, scales and masks must be equal. Products of the same codes may differ by what float32 sums and the last
    rounding may: ``2 * (K + 32) * u * sum(abs(x * w)) + 2 * U * abs(y)``, with u and U half the machine epsilons of
    float32 and x's dtype. Where nothing of x is quantised, the reference is float64's product; where a row has scales
    of its own per block of K, the error against that may beside be what the scheme's codes may add,
    ``Q = x_scale / 2 * (1 + 2**-16) * sum_in(abs(w))`` of `reference.linear`.
    """
    for dtype in DTYPES:
        for N, K in sizes:
            for M in rows:
                where = f"{str(dtype).removeprefix('torch.')}, M = {M}, N = {N}, K = {K}"
                yield from _case(device, where, dtype, M, N, K)


def _codes_of(M: int, threshold: float, rotated_or_kept: bool = False) -> str:
    """What `gpu.linear` quantises x to, for M rows."""
    if threshold == 0 or (1 < M <= gpu.EXACT_ROWS and not rotated_or_kept):
        return "none"
    return "scales per block" if M == 1 and not rotated_or_kept else "the scheme's"


def _case(device: str, where: str, dtype: torch.dtype, M: int, N: int, K: int) -> Iterator[Check]:
    g = torch.Generator().manual_seed(M + N + K)
    x = torch.randn(M, K, generator=g)
    x[:, :: max(2, K // 7)] *= 9  # outliers
    x = x.to(dtype)
    columns = torch.randperm(K, generator=g)[: math.ceil(K / 100)]
    w = torch.randn(N, K, generator=g) / math.sqrt(K)
    bias = torch.randn(N, generator=g).to(dtype)
    plain, kept = quantize_weight(w), w[:, columns].to(dtype)
    rotated, rotated_kept = quantize_weight(w, 64), quantize_weight(w, 64, columns)
    other = torch.randn(M, N, generator=g).to(dtype)
    cases = {
        "threshold 6": (x, *plain, bias, 6.0),
        "no outliers": (x, *plain, bias, NO_THRESHOLD),
        "weights only": (x, *plain, bias, 0.0),
        "epilogue": (x, *plain, bias, 6.0, "gelu", other, "mul"),
        "rotated": (x, *rotated, bias, NO_THRESHOLD, "none", None, "none", 64),
        "rotated, columns kept": (x, *rotated_kept, bias, NO_THRESHOLD, "silu", other, "add", 64, columns, kept),
        "threshold 6, columns kept": (x, *plain, None, 6.0, "none", None, "none", 1, columns, kept),
    }
    for what, args in cases.items():
        yield Check(f"linear, {what}: {where}", _worst(gpu.linear(*_to(device, args)), args))
    quantizations: dict[str, tuple] = {"threshold 6": (6.0,), "rotated, columns kept": (NO_THRESHOLD, 64, columns)}
    for what, options in quantizations.items():
        found = gpu.quantize_rowwise(*_to(device, (x, *options)))
        yield Check(f"quantize_rowwise, {what}: {where}", 0.0 if _same_codes(found, x, *options) else math.inf)
        args = cases[what]
        quantized = gpu.linear_quantized(*_to(device, (x, *found, *args[1:4], *args[5:11])))
        codes_of = "the scheme's" if M == 1 else _codes_of(M, options[0], what != "threshold 6")
        yield Check(f"linear_quantized, {what}: {where}", _worst(quantized, args, codes_of))
    yield from _tiles(device, where, x, *plain, bias)
    weights = [quantize_weight(torch.randn(N, K, generator=g) / math.sqrt(K)) for _ in range(EXPERTS)]
    codes, scale = (torch.stack(parts) for parts in zip(*weights, strict=True))
    batch = torch.stack([x] * EXPERTS)
    y = gpu.linear(*_to(device, (batch, codes, scale, None, 6.0)))
    parts = [_worst(y[e], (x, codes[e], scale[e], None, 6.0)) for e in range(EXPERTS)]
    yield Check(f"linear, a batch of weights: {where}", max(parts))
    offsets = torch.tensor([M // 3, M // 3, M])
    for threshold in (6.0, 0.0):
        y = gpu.grouped_linear(*_to(device, (x, codes, scale, None, offsets, threshold)))
        parts = [
            _worst(y[begin:end], (x[begin:end], codes[e], scale[e], None, threshold), _codes_of(M, threshold))
            for e, (begin, end) in enumerate(zip([0, *offsets.tolist()], offsets.tolist(), strict=False))
            if end > begin
        ]
        yield Check(f"grouped_linear, threshold {threshold:g}: {where}", max(parts))


def _tiles(device: str, where: str, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Iterator[Check]:
    """Every tile of the product of quantised rows, whichever the sizes would choose."""
    from ...triton_kernels import configs
    from ...triton_kernels.int8_matmul import int8_matmul
    from ...triton_kernels.outliers import extract_outliers

    one = _to(device, (x, weight, scale, bias))
    codes, x_scale, mask = gpu.quantize_rowwise(one[0], 6.0)
    outliers = extract_outliers(one[0][None], mask[None])
    for tile in configs.tiles(x.dtype, configs.target_of(one[0].device), epilogue=False):
        packed = (t[None] for t in one[1:3])
        y = int8_matmul(codes, x_scale, *packed, outliers, one[3][None], x.dtype, config=tile)
        name = f"int8_matmul {tile.BLOCK_M}x{tile.BLOCK_N}x{tile.BLOCK_K}, {tile.num_warps} warps"
        yield Check(f"{name}: {where}", _worst(y, (x, weight, scale, bias, 6.0), "the scheme's"))


def _to(device: str, args: tuple) -> tuple:
    return tuple(a.to(device) if isinstance(a, Tensor) else a for a in args)


def _same_codes(found: tuple[Tensor, ...], x: Tensor, threshold: float, block: int = 1, columns: Tensor | None = None):
    rest = x.float() if columns is None else x.float().index_fill(1, columns, 0)
    mask = quantize.outlier_mask(rest, threshold, columns)
    expected = (*quantize.quantize_rowwise(quantize.rotate(rest.masked_fill(mask, 0), block)), mask)
    return all(torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True))


def _worst(y: Tensor, args: tuple, codes: str = "") -> float:
    """``y`` beside ``reference.linear(*args)``; ``codes``: what x was quantised to, if not by its number of rows."""
    x, weight, scale, _, threshold = args[:5]
    defaults: tuple = ("none", None, "none", 1, None, None)
    activation, other, binary, block, columns, kept = args[5:] + defaults[len(args) - 5 :]
    codes = codes or _codes_of(len(x), threshold, block > 1 or columns is not None)
    wide = (x.double(), weight, scale, None if args[3] is None else args[3].double())
    y, expected = y.cpu().double(), reference.linear(x.float(), *args[1:]).double()
    U_out = torch.finfo(x.dtype).eps / 2
    w = dequantize(weight, scale, torch.float64, block, columns, kept).abs()
    sums = (len(w[0]) + 32) * U * (x.double().abs() @ w.t())
    if codes != "the scheme's":
        expected = reference.linear(*wide, 0.0, activation, other, binary, block, columns, kept)
    if codes == "scales per block":
        mask = quantize.outlier_mask(x, threshold)
        scale_of_x = quantize.quantize_rowwise(x, mask)[1].double().unsqueeze(-1)
        sums = sums + scale_of_x / 4 * (1 + 2**-16) * (1 + 2 * U_out) * w[:, ~mask].sum(-1)
    if other is not None and binary == "mul":
        sums = sums * other.double().abs()
    legal = 2 * SLOPE * sums + 2 * U_out * expected.abs() + torch.finfo(x.dtype).smallest_normal
    return float(((y - expected).abs() / legal).nan_to_num(math.inf).max())
