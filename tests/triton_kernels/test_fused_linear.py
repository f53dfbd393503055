from dataclasses import replace

import pytest
import torch
from hypothesis import given
from int8fx.triton_kernels.tiles import Tile
from support.helpers import assert_within_budget, oracle, problem
from support.triton import DTYPES, EXAMPLES, assert_within_fused, llm_int8, matmul, problems, splits

from int8fx.schemes import reference
from int8fx.schemes.weight import NO_EPILOGUE


def tile(split: int) -> Tile:
    return Tile(64, 32, 32, 4, 2, SPLIT_K=split)


@EXAMPLES
@given(problems(scheme=llm_int8), splits)
def test_it_is_within_the_bound_of_the_scheme(p, split):
    p = replace(p, epilogue=NO_EPILOGUE._replace(bias=p.bias))
    assert_within_fused(matmul("fused_linear", p, tile(split)), p, splits=split)


@EXAMPLES
@given(problems(scheme=llm_int8), splits)
def test_its_epilogue_is_that_of_the_other_kernels(p, split):
    """With threshold 0 nothing is quantised, and the reference's budget holds element by element."""
    p = replace(p, weight=p.weight._replace(threshold=0.0))
    assert_within_budget(matmul("fused_linear", p, tile(split)), *p, slices=8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("outliers", ["none", "some", "token"])
def test_scales_per_block_are_more_exact_than_the_scheme(dtype, outliers):
    """In the sum of squares, since steps per block are never coarser. A single element may be less exact by chance."""
    p = problem(16, 512, 64, outliers=outliers, dtype=dtype)
    exact = oracle(p.x, p.weight, p.bias)
    y = matmul("fused_linear", p, Tile(16, 64, 64, 4, 2))
    assert (y - exact).square().sum() < (reference.linear(*p) - exact).square().sum()


def test_a_row_depends_on_no_other_row_without_outliers():
    p = problem(33, 97, 33, outliers="columns", dtype=torch.float16, threshold=None)
    y = matmul("fused_linear", p, tile(1))
    assert torch.equal(y, torch.cat([matmul("fused_linear", p.with_x(row[None]), tile(1)) for row in p.x]))


def test_rows_that_one_tile_cannot_hold_are_refused():
    with pytest.raises(ValueError, match="x has 17 rows; legal: at most 16"):
        matmul("fused_linear", problem(17, 32, 8))
