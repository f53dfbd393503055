"""Rows are multiplied by the weight of their group, with its outliers, and do not depend on other groups."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from int8fx.triton_kernels.tiles import Tile
from support.helpers import Problem, activation, assert_within_budget, generator, problem, seeds, with_layout
from support.triton import (
    EXAMPLES,
    TILE,
    assert_within_fused,
    dtypes,
    experts,
    layouts,
    matmul,
    sizes,
)

from int8fx.schemes.weight import Epilogue

SCHEMES = {
    "llm_int8": {"threshold": 6.0},
    "rotated": {"block": 32},
    "rotated columns": {"block": 32, "columns": [50, 3]},
}
KERNELS = [("fused_linear", "llm_int8"), ("weight_only", "llm_int8"), *(("int8_matmul", name) for name in SCHEMES)]
kernels = st.sampled_from(KERNELS)


def weights(scheme: str, E: int, N: int, K: int, seed: int):
    fields = dict(SCHEMES[scheme])
    columns = fields.pop("columns", None)
    return experts(E, N, K, seed, None if columns is None else torch.tensor(columns), **fields)


def assert_right(kernel: str, y: torch.Tensor, p: Problem, splits: int) -> None:
    if kernel == "fused_linear":
        assert_within_fused(y, p, splits=splits)
        return
    if kernel == "weight_only":
        p = replace(p, weight=p.weight._replace(threshold=0.0))
    assert_within_budget(y, *p, slices=8)


@EXAMPLES
@given(kernels, st.lists(st.integers(0, 20), min_size=1, max_size=4), st.integers(0, 3), sizes, dtypes, seeds)
def test_rows_of_groups_meet_the_weight_and_outliers_of_their_group(kernel, counts, rows_after, N, dtype, seed):
    kernel, scheme = kernel
    E, K, offsets = len(counts), 65, torch.tensor(counts).cumsum(0)
    x = activation(sum(counts) + rows_after, K, outliers="some", dtype=dtype, seed=seed)
    bias = torch.randn(E, N, generator=generator(seed))
    p = Problem(x, weights(scheme, E, N, K, seed), Epilogue(bias))
    y = matmul(kernel, p, Tile(128 if kernel == "fused_linear" else 16, 32, 32, 4, 2, SPLIT_K=2), offsets)
    begin = 0
    for e, end in enumerate(offsets.tolist()):
        if end > begin and N:
            part = Problem(x[begin:end], p.weight.of_expert(e), p.epilogue.of_expert(e))
            assert_right(kernel, y[begin:end], part, splits=2)
        begin = end
    assert (y[begin:] == 0).all()


@EXAMPLES
@given(kernels, st.integers(1, 3), st.sampled_from((1, 16, 19)), sizes, dtypes, layouts, seeds)
def test_a_batch_of_weights_is_a_matmul_each(kernel, E, M, N, dtype, layout, seed):
    kernel, scheme = kernel
    K = 65
    x = with_layout(activation(E * M, K, outliers="some", dtype=dtype, seed=seed).reshape(E, M, K), layout)
    p = Problem(x, weights(scheme, E, N, K, seed))
    y = matmul(kernel, p, Tile(32 if kernel == "fused_linear" else 16, 32, 32, 4, 2)).view(E, M, N)
    for e in range(E if N else 0):
        assert_right(kernel, y[e], Problem(x[e], p.weight.of_expert(e)), splits=1)


@pytest.mark.slow
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("kernel", "fields"),
    [
        ("fused_linear", {"threshold": 6.0}),
        ("fused_linear", {"threshold": None}),
        ("int8_matmul", {"threshold": 6.0}),
        ("int8_matmul", {"threshold": None}),
        ("int8_matmul", {"block": 64}),
        ("int8_matmul", {"block": 64, "columns": 5}),
    ],
)
def test_nan_and_inf_stay_in_their_row(kernel, fields, value):
    """In a column that is an outlier and in one that is not: 0 * weight hides neither."""
    p = problem(5, 65, 33, dtype=torch.float16, **fields)
    codes = p.weight.codes.clone()
    codes[0] = 0
    p = replace(p, weight=p.weight._replace(codes=codes))
    dirty, clean = p.x.clone(), p.x.clone()
    dirty[2, 64] = value
    # The other rows see the same outlier columns: inf is an outlier, NaN is none.
    clean[2, 64] = 0.0 if math.isnan(value) and p.weight.threshold is not None else 7.0
    y, expected = matmul(kernel, p.with_x(dirty), TILE), matmul(kernel, p.with_x(clean), TILE)
    others = torch.arange(5) != 2
    assert torch.equal(y[others], expected[others])
    assert not y[2].isfinite().any()
