"""Whichever way a product is run, it is the same product: eager, exported, compiled; and the reference, within its error."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    INF,
    Problem,
    activation,
    assert_within_budget,
    generator,
    packed_weight,
    problems,
    seeds,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from test_compile import without_cpp
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.export import Dim, export

import int8fx
from int8fx import ops, reference
from int8fx.passes import PASSES, Report, install

EXAMPLES = max(10, settings.default.max_examples // 2)  # each of them is traced twice


@pytest.fixture(autouse=True, scope="module")
def _room_for_many_graphs():
    """Graphs for every dtype, rank and size of 0 or 1 that is drawn; Dynamo gives up at 8 of them."""
    install()
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=10_000, accumulated_recompile_limit=10_000):
        yield
    torch._dynamo.reset()


def assert_same_bits(y: Tensor, expected: Tensor) -> None:
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)


# ---- one product ----------------------------------------------------------------------------------------------------


class Product(nn.Module):
    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        return ops.linear(x, codes, scale, bias, self.threshold)


def dequantized(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
    """How a product stands in a model's graph before `lower`."""
    weight = ops.dequantize(codes, scale, x.dtype, threshold)
    return F.linear(x, weight, bias) if codes.dim() == 2 else torch.bmm(x, weight.transpose(1, 2))


_compiled = torch.compile(dequantized, fullgraph=True, dynamic=True, backend=without_cpp)


@settings(max_examples=EXAMPLES)
@given(problems(batched=None))
@torch.no_grad()
def test_eager_exported_compiled_and_reference(p: Problem):
    x, codes, scale, bias, threshold = p
    bias = None if codes.dim() == 3 else bias
    eager = ops.linear(x, codes, scale, bias, threshold)
    assert_within_budget(eager, x, codes, scale, bias, threshold)
    assert_within_budget(reference.linear(x, codes, scale, bias, threshold), x, codes, scale, bias, threshold)

    arguments = (x, codes, scale, bias)
    dynamic = tuple(None if a is None else dict.fromkeys(range(a.dim()), Dim.AUTO) for a in arguments)
    program = export(Product(threshold), arguments, dynamic_shapes=dynamic)
    assert_same_bits(program.module()(*arguments), eager)

    same_dtype = bias if bias is None or bias.dtype == x.dtype else bias.to(x.dtype)  # F.linear takes no other
    PASSES.reports.clear()
    compiled = _compiled(x, codes, scale, same_dtype, threshold)
    assert_same_bits(compiled, ops.linear(x, codes, scale, same_dtype, threshold))
    assert all(report.linears == 1 and report.dequantized == 0 for report in PASSES.reports)
