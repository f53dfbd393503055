import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from int8fx.triton_kernels import weight_only
from int8fx.triton_kernels.tiles import Tile
from support.helpers import (
    Problem,
    activation,
    assert_within_bound,
    assert_within_budget,
    generator,
    groupings,
    problem,
    seeds,
    weight_in_groups,
)
from support.triton import (
    DTYPES,
    EXAMPLES,
    FEWER_EXAMPLES,
    TILE,
    dtypes,
    llm_int8,
    matmul,
    problems,
    problems_of_formats,
    sizes,
    splits,
)

from int8fx.schemes.formats import FORMATS, Grouping
from int8fx.schemes.quantize import dequantize
from int8fx.schemes.weight import NO_EPILOGUE, Epilogue

GROUPINGS = {
    **{name: Grouping(name, 32) for name in FORMATS},
    "int4 in rows": Grouping("int4_clip"),
    "nf4 in rows": Grouping("nf4", scale_dtype=torch.bfloat16),
    "asymmetric int8": Grouping("int8", 64, asymmetric=True),
    "asymmetric int4 in odd groups": Grouping("int4_clip", 7, asymmetric=True, scale_dtype=torch.float16),
    "double quantisation": Grouping("nf4", 64, double_quant=True),
}


def tile(split: int) -> Tile:
    return Tile(16, 32, 32, 4, 2, SPLIT_K=split)


@EXAMPLES
@given(problems(scheme=llm_int8), splits)
def test_it_rounds_its_sums_and_nothing_else(p, split):
    p = replace(p, weight=p.weight._replace(threshold=0.0))
    y = matmul("weight_only", p, tile(split))
    assert_within_budget(y, *p, slices=8)
    if p.epilogue._replace(bias=None) == NO_EPILOGUE:
        assert_within_bound(y, *p)


@EXAMPLES
@given(problems_of_formats(), splits, st.sampled_from((32, 64)))
def test_weights_of_every_format_are_as_exact(p, split, step):
    y = matmul("weight_only", p, replace(tile(split), BLOCK_K=step))
    assert_within_budget(y, *p, slices=8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("K", [1, 2, 131])
def test_the_bound_in_the_docstring(grouping, dtype, K):
    """``(K + splits + 3) * 2**-24``, and what codebooks and quantised scales add: without room for more products."""
    weight = weight_in_groups(21, K, GROUPINGS[grouping], threshold=0.0, seed=K)
    p = Problem(activation(9, K, outliers="some", dtype=dtype, seed=K), weight)
    exact = p.x.double() @ weights_of(p).T
    magnitude = p.x.double().abs() @ weights_of(p).abs().T
    y = matmul("weight_only", p.with_x(p.x.float()), TILE).double()
    factor = K + 1 + 3 + 3 * (grouping in CODEBOOKS) + (weight.scale_range is not None)
    assert ((y - exact).abs() <= factor * 2.0**-24 * magnitude).all()
    y = matmul("weight_only", p, TILE)
    rounding = torch.finfo(dtype).eps / 2 * (exact.abs() + 2 * factor * 2.0**-24 * magnitude)
    assert ((y.double() - exact).abs() <= factor * 2.0**-24 * magnitude + rounding).all()


CODEBOOKS = {name for name, grouping in GROUPINGS.items() if FORMATS[grouping.format].levels is not None}


def weights_of(p: Problem) -> torch.Tensor:
    return dequantize(p.weight, torch.float64)


@FEWER_EXAMPLES
@given(groupings(), st.integers(1, 3), st.sampled_from((1, 5, 17)), sizes, sizes, dtypes, splits, seeds)
def test_a_batch_of_weights_of_any_format(grouping, E, M, N, K, dtype, split, seed):
    x = activation(E * M, K, outliers="some", dtype=dtype, seed=seed).reshape(E, M, K)
    bias = torch.randn(E, N, generator=generator(seed))
    p = Problem(x, weight_in_groups(N, K, grouping, experts=E, threshold=0.0, seed=seed), Epilogue(bias))
    y = matmul("weight_only", p, tile(split)).view(E, M, N)
    for e in range(E if N else 0):
        assert_within_budget(y[e], x[e], p.weight.of_expert(e), p.epilogue.of_expert(e), slices=8)


@FEWER_EXAMPLES
@given(
    groupings(),
    st.lists(st.integers(0, 20), min_size=1, max_size=4),
    st.integers(0, 3),
    st.sampled_from((1, 16, 33)),
    st.sampled_from((1, 31, 65)),
    dtypes,
    seeds,
)
def test_rows_of_groups_meet_the_weight_of_their_group(grouping, counts, rows_after, N, K, dtype, seed):
    E, offsets = len(counts), torch.tensor(counts).cumsum(0)
    x = activation(sum(counts) + rows_after, K, dtype=dtype, seed=seed)
    weight = weight_in_groups(N, K, grouping, experts=E, threshold=0.0, seed=seed)
    y = matmul("weight_only", Problem(x, weight), tile(2), offsets)
    begin = 0
    for e, end in enumerate(offsets.tolist()):
        if end > begin:
            assert_within_budget(y[begin:end], x[begin:end], weight.of_expert(e), slices=8)
        begin = end
    assert (y[begin:] == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("split", [1, 4])
@pytest.mark.parametrize("grouping", [None, *GROUPINGS])
def test_a_row_depends_on_no_other_row(grouping, split):
    p = problem(19, 97, 33, dtype=torch.bfloat16)
    if grouping is not None:
        p = replace(p, weight=weight_in_groups(33, 97, GROUPINGS[grouping], threshold=0.0))
    y = matmul("weight_only", p, tile(split))
    assert torch.equal(y, torch.cat([matmul("weight_only", p.with_x(row[None]), tile(split)) for row in p.x]))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("grouping", GROUPINGS)
def test_nan_and_inf_stay_in_their_row(grouping, value):
    """Also in the last column, which is alone in its byte: neither other columns' codes nor code 0 hide it."""
    p = problem(5, 65, 33, dtype=torch.float16)
    p = replace(p, weight=weight_in_groups(33, 65, GROUPINGS[grouping], threshold=0.0))
    clean, dirty = p.x.clone(), p.x.clone()
    dirty[2, 64] = value
    y, expected = matmul("weight_only", p.with_x(dirty), TILE), matmul("weight_only", p.with_x(clean), TILE)
    others = torch.arange(5) != 2
    assert torch.equal(y[others], expected[others])
    assert not y[2].isfinite().any()


def test_splits_are_added_in_order_and_leave_their_counters_at_zero(monkeypatch):
    workspaces = []
    workspace = weight_only.workspace
    monkeypatch.setattr(weight_only, "workspace", lambda *args: workspaces.append(workspace(*args)) or workspaces[-1])
    p = problem(5, 300, 40)
    first, second = (matmul("weight_only", p, tile(4)) for _ in range(2))
    assert torch.equal(first, second)
    assert len(workspaces) == 2
    assert all((counter == 0).all() for _, counter in workspaces)
