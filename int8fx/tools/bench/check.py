"""The Triton kernels against the reference, on the device that they are to be timed on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from rich.console import Console
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ...ops import gpu
from ...ops.rows import Form, form
from ...schemes import quantize, reference
from ...schemes.formats import Grouping
from ...schemes.quantize import DEFAULT_THRESHOLD, pack_weight, quantize_weight
from ...schemes.rotate import rotate
from ...schemes.weight import Epilogue, Int8Weight

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROWS = (1, 5, 64, 100, 600)
SIZES = ((200, 300), (512, 4096))  # N, K
EXPERTS = 3
U = torch.finfo(torch.float32).eps / 2  # of the sums
GROUPINGS = {
    "int4": Grouping("int4_clip", 32, asymmetric=True, scale_dtype=torch.float16),
    "int4 in rows": Grouping("int4_fullrange"),
    "int4 in groups of 7": Grouping("int4_clip", 7),
    "nf4": Grouping("nf4", 64),
    "nf4, double quantisation": Grouping("nf4", 64, double_quant=True),
    "fp4": Grouping("fp4_e2m1_bnb", 128),
    "int8 in groups": Grouping("int8", 128, asymmetric=True),
}
SLOPE = 1.13  # of the steepest activation


@dataclass(frozen=True)
class Check:
    """One path through the kernels, in one case. worst: the largest error, as a multiple of what is legal."""

    name: str
    worst: float

    @property
    def right(self) -> bool:
        """Whether the error is legal; NaN is not."""
        return self.worst <= 1


def show(console: Console, device: str) -> bool:
    """Runs `checks` and prints those that fail; returns whether all pass."""
    done = list(checks(device))
    wrong = [check for check in done if not check.right]
    for check in wrong:
        console.print(f"wrong: {check.name}: {check.worst:.3g} times the error that is legal", soft_wrap=True)
    console.print(f"{len(done) - len(wrong)} of {len(done)} checks of the kernels agree with the reference")
    return not wrong


def checks(
    device: str,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    rows: tuple[int, ...] = ROWS,
    sizes: tuple[tuple[int, int], ...] = SIZES,
) -> Iterator[Check]:
    """Every kernel on ``device`` against the reference on the CPU, for each dtype, M of ``rows`` and size (N, K).

    Codes, scales and masks must be equal. Results from the same codes may differ by the rounding of float32 sums and of
    the result: ``2 * (K + 32) * u * sum(abs(x * w)) + 2 * U * abs(y)``, with u and U half the machine epsilons of
    float32 and of x's dtype. The reference depends on the form of the call (`rows.form`):

    * WEIGHT_ONLY: the reference is the float64 matmul, since x is not quantised.
    * FUSED: each block of K has its scales. The reference is again the float64 matmul. The error may include the
      scheme's rounding of x, ``x_scale / 2 * (1 + 2**-16) * sum_in(abs(w))`` of `reference.linear`.
    * QUANTIZED: the reference is `reference.linear`.
    """
    for dtype in dtypes:
        for N, K in sizes:
            for M in rows:
                yield from _case(device, dtype, M, N, K)


def _case(device: str, dtype: torch.dtype, M: int, N: int, K: int) -> Iterator[Check]:
    where = f"{str(dtype).removeprefix('torch.')}, M = {M}, N = {N}, K = {K}"
    g = torch.Generator().manual_seed(M + N + K)
    x = torch.randn(M, K, generator=g)
    x[:, :: max(2, K // 7)] *= 9  # outliers
    x = x.to(dtype)
    columns = torch.randperm(K, generator=g)[: math.ceil(K / 100)]
    w = torch.randn(N, K, generator=g) / math.sqrt(K)
    bias = Epilogue(torch.randn(N, generator=g).to(dtype))
    other = torch.randn(M, N, generator=g).to(dtype)
    weight = Int8Weight(*quantize_weight(w), threshold=DEFAULT_THRESHOLD)
    columns_weight = w[:, columns].to(dtype)
    rotated = Int8Weight(*quantize_weight(w, 64), block=64)
    rotated_with_columns = Int8Weight(*quantize_weight(w, 64, columns), None, 64, columns, columns_weight)
    cases = {
        "threshold 6": (weight, bias),
        "no outliers": (weight._replace(threshold=None), bias),
        "weights only": (weight._replace(threshold=0.0), bias),
        "epilogue": (weight, bias._replace(activation="gelu", other=other, binary="mul")),
        "rotated": (rotated, bias),
        "rotated, columns": (rotated_with_columns, bias._replace(activation="silu", other=other, binary="add")),
        "threshold 6, columns": (weight._replace(columns=columns, columns_weight=columns_weight), Epilogue()),
        **{name: (_in_groups(w, grouping), bias) for name, grouping in GROUPINGS.items()},
    }
    for name, (packed, epilogue) in cases.items():
        y = gpu.linear(*_to(device, (x, packed, epilogue)))
        yield Check(f"linear, {name}: {where}", _worst(y, x, packed, epilogue))
    for name in ("threshold 6", "rotated, columns"):
        packed, epilogue = cases[name]
        quantized = gpu.quantize_rowwise(*_to(device, (x, packed.threshold, packed.block, packed.columns)))
        same = _same_codes(quantized, x, packed)
        yield Check(f"quantize_rowwise, {name}: {where}", 0.0 if same else math.inf)
        y = gpu.linear_quantized(*_to(device, (x, *quantized, packed, epilogue)))
        yield Check(f"linear_quantized, {name}: {where}", _worst(y, x, packed, epilogue))
    yield from _tiles(device, where, x, weight, bias)
    of_experts = [quantize_weight(torch.randn(N, K, generator=g) / math.sqrt(K)) for _ in range(EXPERTS)]
    codes, scale = (torch.stack(tensors) for tensors in zip(*of_experts, strict=True))
    experts = Int8Weight(codes, scale, DEFAULT_THRESHOLD)
    y = gpu.linear(*_to(device, (torch.stack([x] * EXPERTS), experts, Epilogue())))
    worst = max(_worst(y[e], x, experts.of_expert(e), Epilogue()) for e in range(EXPERTS))
    yield Check(f"linear, a batch of weights: {where}", worst)
    ends = [M // 3, M // 3, M]
    for threshold in (DEFAULT_THRESHOLD, 0.0):
        packed = experts._replace(threshold=threshold)
        y = gpu.grouped_linear(*_to(device, (x, torch.tensor(ends), packed, None)))
        worst = max(
            _worst(y[begin:end], x[begin:end], packed.of_expert(e), Epilogue(), _form(M, packed))
            for e, (begin, end) in enumerate(zip([0, *ends], ends, strict=False))
            if end > begin
        )
        yield Check(f"grouped_linear, threshold {threshold:g}: {where}", worst)


def _in_groups(w: Tensor, grouping: Grouping) -> Int8Weight:
    packed, is_int8 = pack_weight(w, grouping), grouping.format == "int8"
    return Int8Weight(
        packed.codes,
        packed.scale,
        threshold=0.0,
        format=None if is_int8 else grouping.format,
        group_size=grouping.size,
        in_features=None if is_int8 else w.shape[1],
        zero_point=packed.zero_point,
        scale_range=packed.scale_range,
    )


def _tiles(device: str, where: str, x: Tensor, weight: Int8Weight, epilogue: Epilogue) -> Iterator[Check]:
    """Every tile of `int8_matmul`, not only the one that would be chosen for these sizes."""
    from ...triton_kernels.int8_matmul import int8_matmul
    from ...triton_kernels.outliers import extract_outliers
    from ...triton_kernels.tiles import int8_matmul_tiles, target_of

    x_there, weight_there, (bias, *_) = _to(device, (x, weight, epilogue))
    codes, x_scale, mask = gpu.quantize_rowwise(x_there, weight.threshold)
    outliers = extract_outliers(x_there[None], mask[None])
    for tile in int8_matmul_tiles(x.dtype, target_of(x_there.device), epilogue=False):
        weights = weight_there.codes[None], weight_there.scale[None]
        y = int8_matmul(codes, x_scale, *weights, outliers, bias[None], x.dtype, tile=tile)
        name = f"int8_matmul {tile.BLOCK_M}x{tile.BLOCK_N}x{tile.BLOCK_K}, {tile.num_warps} warps"
        yield Check(f"{name}: {where}", _worst(y, x, weight, epilogue, Form.QUANTIZED))


def _to(device: str, args: tuple) -> tuple:
    return tree_map_only(Tensor, lambda t: t.to(device), args)


def _form(M: int, weight: Int8Weight) -> Form:
    return form(M, "cuda", weight.threshold, weight.block, weight.columns is not None, weight.is_plain)


def _same_codes(quantized: tuple[Tensor, ...], x: Tensor, weight: Int8Weight) -> bool:
    x = x.float()
    if weight.columns is not None:
        x = x.index_fill(1, weight.columns, 0)
    mask = quantize.outlier_mask(x, weight.threshold, weight.columns)
    expected = (*quantize.quantize_rowwise(rotate(x.masked_fill(mask, 0), weight.block)), mask)
    return all(torch.equal(a.cpu(), b) for a, b in zip(quantized, expected, strict=True))


def _worst(y: Tensor, x: Tensor, weight: Int8Weight, epilogue: Epilogue, called_as: Form | None = None) -> float:
    """The largest error of ``y`` as a multiple of what `checks` calls legal.

    Args:
        called_as: the form of the call; None: the one of x's number of rows.
    """
    called_as = called_as or _form(len(x), weight)
    U_out = torch.finfo(x.dtype).eps / 2
    w = quantize.dequantize(weight, torch.float64).abs()
    sums = (w.shape[1] + 32) * U * (x.double().abs() @ w.t())
    if called_as is Form.QUANTIZED:
        expected = reference.linear(x.float(), weight, epilogue).double()
    else:
        bias = None if epilogue.bias is None else epilogue.bias.double()
        expected = reference.linear(x.double(), weight._replace(threshold=0.0), epilogue._replace(bias=bias))
    if called_as is Form.FUSED:
        mask = quantize.outlier_mask(x, weight.threshold)
        x_scale = quantize.quantize_rowwise(x, mask)[1].double().unsqueeze(-1)
        sums = sums + x_scale / 4 * (1 + 2**-16) * (1 + 2 * U_out) * w[:, ~mask].sum(-1)
    if epilogue.other is not None and epilogue.binary == "mul":
        sums = sums * epilogue.other.double().abs()
    legal = 2 * SLOPE * sums + 2 * U_out * expected.abs() + torch.finfo(x.dtype).smallest_normal
    return float(((y.cpu().double() - expected).abs() / legal).nan_to_num(math.inf).max())
