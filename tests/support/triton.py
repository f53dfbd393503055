"""What the tests of the Triton kernels share: a small tile, problems whose sizes lie around its edges, launches.

Importing it prepares the interpreter (`support.interpreter`).
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from int8fx.triton_kernels.codes import Coding
from int8fx.triton_kernels.fused_linear import fused_linear
from int8fx.triton_kernels.int8_matmul import int8_matmul
from int8fx.triton_kernels.outliers import extract_outliers, outlier_mask
from int8fx.triton_kernels.quantize_rowwise import quantize_rowwise
from int8fx.triton_kernels.tiles import Tile
from int8fx.triton_kernels.weight_only import weight_only
from support import interpreter  # noqa: F401
from support.helpers import (
    Problem,
    activation,
    assert_within,
    bound,
    generator,
    groupings,
    oracle,
    packed_weight,
    schemes,
    seeds,
    thresholds,
    unit_roundoff,
    weight_in_groups,
    with_layout,
)
from torch import Tensor

from int8fx.schemes import reference
from int8fx.schemes.formats import format_of
from int8fx.schemes.quantize import INT8_MAX, TINY
from int8fx.schemes.weight import Epilogue, Int8Weight

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
CONSTANTS = {"int8_max": INT8_MAX, "tiny": TINY}
TILE = Tile(16, 32, 32, 4, 2)
MATMULS = ("int8_matmul", "fused_linear", "weight_only")

# Fewer examples than elsewhere, and no shrinking: the interpreter is slow.
EXAMPLES = settings(max_examples=settings().max_examples * 5 // 8, phases=(Phase.explicit, Phase.generate))
FEWER_EXAMPLES = settings(EXAMPLES, max_examples=settings().max_examples // 2)

dtypes = st.sampled_from(DTYPES)
rows = st.sampled_from((0, 1, 15, 16, 17, 33))
sizes = st.sampled_from((0, 1, 16, 31, 32, 33, 63, 64, 65, 97))
splits = st.sampled_from((1, 2, 4))
layouts = st.sampled_from(("contiguous", "transposed", "sliced", "expanded", "broadcast"))
llm_int8 = st.just("llm_int8")


@st.composite
def activations(draw, M=rows, K=sizes) -> Tensor:
    """``[M, K]``; some have an outlier in the last column, which is in a partial tile."""
    M, K, dtype = draw(M), draw(K), draw(dtypes)
    outliers = draw(st.sampled_from(("none", "column", "columns", "row", "token", "some", "last")))
    values = draw(st.sampled_from(("normal", "normal", "zero_rows", "nan", "inf", "denormal", "huge")))
    kind = "none" if outliers == "last" else outliers
    x = activation(M, K, outliers=kind, values=values, dtype=dtype, seed=draw(seeds))
    if outliers == "last" and x.numel():
        x[-1, -1] = 50
    return with_layout(x, draw(layouts))


@st.composite
def problems(draw, M=rows, scheme=schemes) -> Problem:
    """A linear layer with any epilogue; weight and ``other`` have any strides."""
    x, name = draw(activations(M=M)), draw(scheme)
    N, K, seed = draw(sizes), x.shape[1], draw(seeds)
    g = generator(seed)
    weight = Int8Weight(*packed_weight(N, K, zero_row=draw(st.booleans()), spread=8.0, seed=seed))
    if "rotated" in name:
        weight = weight._replace(block=draw(st.sampled_from((2, 16, 32, -8, -16, -64))))
    else:
        weight = weight._replace(threshold=draw(thresholds))
    if "columns" in name:
        columns = torch.randperm(K, generator=g)[: draw(st.sampled_from((1, 4, 20)))]
        dtype = draw(st.sampled_from((x.dtype, torch.bfloat16)))
        weight = weight._replace(columns=columns, columns_weight=torch.randn(N, len(columns), generator=g).to(dtype))
    bias_dtype = draw(st.sampled_from((None, x.dtype, torch.float32)))
    bias = None if bias_dtype is None else torch.randn(N, generator=g).to(bias_dtype)
    binary = draw(st.sampled_from(tuple(reference.BINARIES)))
    other = None if binary == "none" else torch.randn(x.shape[0], N, generator=g).to(x.dtype)
    if draw(st.booleans()):
        weight = weight._replace(codes=weight.codes.t().contiguous().t())
        other = None if other is None else other.t().contiguous().t()
    return Problem(x, weight, Epilogue(bias, draw(st.sampled_from(tuple(reference.ACTIVATIONS))), other, binary))


@st.composite
def problems_of_formats(draw, M=rows) -> Problem:
    """`problems` of weights of any format, in groups or not, that are multiplied by x as it is."""
    p = draw(problems(M=M, scheme=llm_int8))
    N, K = len(p.weight.codes), p.x.shape[1]
    weight = weight_in_groups(N, K, draw(groupings()), threshold=0.0, seed=draw(seeds))
    if draw(st.booleans()):
        weight = weight._replace(codes=weight.codes.t().contiguous().t())
    return replace(p, weight=weight)


def experts(E: int, N: int, K: int, seed: int = 0, columns: Tensor | None = None, **fields) -> Int8Weight:
    """The weights of E experts."""
    codes, scale = (torch.stack(t) for t in zip(*(packed_weight(N, K, seed=seed + e) for e in range(E)), strict=True))
    weight = Int8Weight(codes, scale, **fields)
    if columns is None:
        return weight
    return weight._replace(
        columns=columns, columns_weight=torch.randn(E, N, len(columns), generator=generator(seed)).to(torch.bfloat16)
    )


def matmul(kernel: str, p: Problem, tile: Tile = TILE, offsets: Tensor | None = None) -> Tensor:
    """``p`` on one of the `MATMULS`, with what has to run before it; with ``offsets`` x is ``[S, K]``."""
    (x, weight, epilogue) = p
    if weight.codes.dim() == 2:
        weight = weight.of_channels(lambda tensor: tensor[None])
        epilogue = epilogue._replace(bias=None if epilogue.bias is None else epilogue.bias[None])
    x = x if x.dim() == 3 else x[None]
    bias, *after = epilogue
    if kernel == "weight_only":
        coding = coding_of(weight)
        return weight_only(x, weight.codes, weight.scale, bias, *after, coding=coding, offsets=offsets, tile=tile)
    if kernel == "fused_linear":
        return fused_linear(
            x, weight.codes, weight.scale, bias, weight.threshold, *after, **CONSTANTS, offsets=offsets, tile=tile
        )
    codes, x_scale, outliers = quantized(x, weight, offsets)
    unquantised = None if weight.columns is None else (x, weight.columns, weight.columns_weight)
    return int8_matmul(
        codes, x_scale, weight.codes, weight.scale, outliers, bias, x.dtype, *after,
        unquantised=unquantised, offsets=offsets, tile=tile,
    )  # fmt: skip


def coding_of(weight: Int8Weight) -> Coding:
    spec = format_of(weight.format)
    return Coding(weight.group_size, spec.levels, spec.zero_point, weight.zero_point, weight.scale_range)


def quantized(x: Tensor, weight: Int8Weight, offsets: Tensor | None = None):
    """Codes, scale and `extract_outliers` of x ``[E, M, K]``; None for the last without a threshold."""
    mask = None
    if weight.threshold is not None:
        mask = outlier_mask(x, weight.threshold, offsets, len(weight.codes) if weight.codes.dim() == 3 else 1)
        if weight.columns is not None:
            mask.index_fill_(1, weight.columns, False)
    outliers = None if mask is None else extract_outliers(x, mask, offsets)
    codes, scale = quantize_rowwise(x, mask, **CONSTANTS, block=weight.block, columns=weight.columns, offsets=offsets)
    return codes, scale, outliers


def assert_within_fused(y: Tensor, p: Problem, *, splits: int, block: int = 32) -> None:
    """The bound in `fused_linear`'s docstring; ``block``: the tile's BLOCK_K.

    The sums run over the kernel's codes. Their values differ from the scheme's by at most twice what either may differ
    from x, so the magnitude of the sums differs by at most ``2 * Q``.
    """
    slices = math.ceil(p.x.shape[1] / block) + splits
    exact, terms = oracle(p.x, p.weight, p.bias), bound(p.x, p.weight, p.bias, slices)
    n = (p.x.shape[1] + slices + 4) * unit_roundoff(torch.float32)
    terms = type(terms)(terms.codes * (1 + 2 * n), terms.sums, terms.magnitude)
    assert_within(y, exact, terms.total(exact, p.x.dtype), terms.magnitude)
