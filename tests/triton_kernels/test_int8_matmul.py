from dataclasses import replace

import pytest
import torch
from hypothesis import given
from int8fx.triton_kernels.tiles import Tile
from support.helpers import assert_within_budget, problem
from support.triton import DTYPES, EXAMPLES, experts, matmul, problems

INVARIANT = {"plain": {"threshold": None}, "rotated": {"block": 64}, "rotated columns": {"block": 64, "columns": 20}}
"""Schemes in which a row depends on no other row."""


@EXAMPLES
@given(problems())
def test_it_is_as_exact_as_the_reference(p):
    assert_within_budget(matmul("int8_matmul", p), *p)


@pytest.mark.slow
@pytest.mark.parametrize("K", [64, 1100])
@pytest.mark.parametrize("outliers", ["some", "columns", "none"])
def test_many_rows_gather_the_weight_of_their_outliers_once(K, outliers, monkeypatch):
    """With K = 64 there are more outliers than are gathered: the matmul fetches the others."""
    p = problem(33, K, 40, outliers=outliers, dtype=torch.bfloat16)
    expected = matmul("int8_matmul", p)
    monkeypatch.setattr("int8fx.triton_kernels.int8_matmul.GATHER_ROWS", 1)
    assert torch.equal(matmul("int8_matmul", p), expected)
    assert_within_budget(expected, *p)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns_dtype", [None, torch.float32])
@pytest.mark.parametrize("grouped", [False, True])
def test_many_rows_gather_unquantised_columns_once(dtype, columns_dtype, grouped, monkeypatch):
    """The same bits as without: 20 columns, which is no multiple of what a dot takes."""
    p = problem(33, 100, 19, dtype=dtype, block=64, columns=20, bias=False)
    offsets = None
    if grouped:
        offsets = torch.tensor([5, 5, 30])
        weight = experts(3, 19, 100, columns=p.weight.columns, block=64)
        p = replace(p, weight=weight._replace(columns_weight=weight.columns_weight.to(dtype)))
    if columns_dtype is not None:
        p = replace(p, weight=p.weight._replace(columns_weight=p.weight.columns_weight.to(columns_dtype)))
    expected = matmul("int8_matmul", p, offsets=offsets)
    monkeypatch.setattr("int8fx.triton_kernels.int8_matmul.GATHER_COLUMNS_ROWS", 1)
    assert torch.equal(matmul("int8_matmul", p, offsets=offsets), expected)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", INVARIANT)
def test_a_row_depends_on_no_other_row_and_no_split(scheme, dtype):
    p = problem(19, 100, 33, dtype=dtype, **INVARIANT[scheme])
    y = matmul("int8_matmul", p)
    assert torch.equal(y, torch.cat([matmul("int8_matmul", p.with_x(row[None])) for row in p.x]))
    tiles = [Tile(16, 32, 32, 4, 2, SPLIT_K=split) for split in (2, 4, 8)] + [Tile(16, 32, 64, 4, 2, SPLIT_K=2)]
    assert all(torch.equal(matmul("int8_matmul", p, tile), y) for tile in tiles)
    assert_within_budget(y, *p)
