from dataclasses import replace

import pytest
import torch
from hypothesis import given
from int8fx.triton_kernels import weight_only
from int8fx.triton_kernels.tiles import Tile
from support.helpers import assert_within_bound, assert_within_budget, problem
from support.triton import EXAMPLES, llm_int8, matmul, problems, splits

from int8fx.schemes.weight import NO_EPILOGUE


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


@pytest.mark.slow
@pytest.mark.parametrize("split", [1, 4])
def test_a_row_depends_on_no_other_row(split):
    p = problem(33, 97, 33, dtype=torch.bfloat16)
    y = matmul("weight_only", p, tile(split))
    assert torch.equal(y, torch.cat([matmul("weight_only", p.with_x(row[None]), tile(split)) for row in p.x]))


def test_splits_are_added_in_order_and_leave_their_counters_at_zero(monkeypatch):
    workspaces = []
    workspace = weight_only.workspace
    monkeypatch.setattr(weight_only, "workspace", lambda *args: workspaces.append(workspace(*args)) or workspaces[-1])
    p = problem(5, 300, 40)
    first, second = (matmul("weight_only", p, tile(4)) for _ in range(2))
    assert torch.equal(first, second)
    assert len(workspaces) == 2
    assert all((counter == 0).all() for _, counter in workspaces)
