"""A matmul gives the same result eager, exported and compiled, and the reference's within its error."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.compiled import without_cpp
from support.graphs import dequantized
from support.helpers import (
    DTYPES,
    OUTLIERS,
    VALUES,
    Problem,
    activation,
    assert_within_budget,
    generator,
    packed_weight,
    seeds,
)
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor import metrics
from torch.export import Dim, export

import int8fx
from int8fx import ops
from int8fx.passes.inductor import install
from int8fx.schemes import reference
from int8fx.schemes.weight import Epilogue, Int8Weight

sizes = st.integers(2, 70)  # sizes of 0 and 1 are graphs of their own to Dynamo; eager tests have them
CASES = [(threshold, with_bias) for threshold in (6.0, None, 0.0) for with_bias in (False, True)]


def assert_same_bits(y: Tensor, expected: Tensor) -> None:
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)


@pytest.fixture(autouse=True, scope="module")
def _fresh():
    install()
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# ---- matmuls --------------------------------------------------------------------------------------------------------


class Linears(nn.Module):
    """One x, one weight, every threshold, with a bias and without; and a weight per row of a batch."""

    def forward(self, x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor, experts: Tensor, scales: Tensor):
        linears = [ops.linear(x, codes, scale, threshold, bias=bias if b else None) for threshold, b in CASES]
        return *linears, ops.linear(_batch(x, experts), experts, scales, 6.0)


class Dequantized(Linears):
    """The same as it stands in a graph before `lower`, `share` and `fold`."""

    def forward(self, x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor, experts: Tensor, scales: Tensor):
        weights = {threshold: ops.dequantize(codes, scale, threshold, dtype=x.dtype) for threshold, _ in CASES}
        linears = [F.linear(x, weights[threshold], bias if b else None) for threshold, b in CASES]
        return *linears, _batch(x, experts) @ ops.dequantize(experts, scales, 6.0, dtype=x.dtype).mT


def _batch(x: Tensor, experts: Tensor) -> Tensor:
    return torch.stack([x, x.flip(0), x / 2])[: experts.shape[0]]


E = 3


def arguments(M: int, K: int, N: int, dtype: torch.dtype, outliers: str, values: str, seed: int) -> tuple[Tensor, ...]:
    x = activation(M, K, outliers=outliers, values=values, dtype=dtype, seed=seed)
    packed = [packed_weight(N, K, zero_row=e == 0, spread=4.0 * e, seed=seed + e) for e in range(E)]
    codes, scales = (torch.stack(parts) for parts in zip(*packed, strict=True))
    bias = torch.randn(N, generator=generator(seed)).to(dtype)
    return x, codes[0], scales[0], bias, codes, scales


@cache
def ways(dtype: torch.dtype) -> dict[str, Callable]:
    """Exported and compiled, once: every size but the number of experts is dynamic."""
    sample = arguments(5, 7, 11, dtype, "column", "normal", 0)
    dims = ({0: "M", 1: "K"}, {0: "N", 1: "K"}, {0: "N"}, {0: "N"}, {1: "N", 2: "K"}, {1: "N"})
    dynamic = tuple({i: Dim(name, min=2, max=1 << 16) for i, name in d.items()} for d in dims)
    before = len(int8fx.reports())
    with torch.no_grad():
        exported = export(Linears(), sample, dynamic_shapes=dynamic).module()
        compiled = torch.compile(Dequantized(), fullgraph=True, dynamic=True, backend=without_cpp)
        compiled(*sample)
    [report] = int8fx.reports()[before:]
    assert (report.lowered, report.linears, report.dequantized) == (len(CASES) + 1, len(CASES) + 1, 0)
    assert report.shared == len(CASES) - 3  # one quantisation per threshold
    return {"exported": exported, "compiled": compiled}


@pytest.mark.slow
@given(
    sizes, sizes, sizes, st.sampled_from(DTYPES), st.sampled_from(OUTLIERS), st.sampled_from(VALUES), seeds
)  # fmt: skip
@torch.no_grad()
def test_eager_exported_compiled_and_reference(M, K, N, dtype, outliers, values, seed):
    run = ways(dtype)
    given_arguments = arguments(M, K, N, dtype, outliers, values, seed)
    eager = Linears()(*given_arguments)
    graphs = counters["stats"]["unique_graphs"]
    for way in run.values():
        for y, expected in zip(way(*given_arguments), eager, strict=True):
            assert_same_bits(y, expected)
    assert counters["stats"]["unique_graphs"] == graphs, "recompiled"
    x, codes, scale, bias, experts, scales = given_arguments
    problems = [
        Problem(x, Int8Weight(codes, scale, threshold), Epilogue(bias if with_bias else None))
        for threshold, with_bias in CASES
    ]
    problems.append(Problem(_batch(x, experts), Int8Weight(experts, scales, 6.0)))
    for y, problem in zip(eager, problems, strict=True):
        assert_within_budget(y, *problem)
        assert_within_budget(reference.linear(*problem), *problem)


# ---- epilogues ------------------------------------------------------------------------------------------------------

EPILOGUES = [(name, binary) for name in reference.ACTIVATIONS for binary in reference.BINARIES]


def epilogues(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor, other: Tensor) -> list[Tensor]:
    """As a model spells them. Every matmul has what follows it for itself, so that `fold` can take it."""
    spelled = {"none": lambda y: y, "relu": F.relu, "silu": F.silu, "gelu": F.gelu}
    spelled["gelu_tanh"] = lambda y: F.gelu(y, approximate="tanh")
    results = []
    for name, binary in EPILOGUES:
        y = spelled[name](ops.linear(x, codes, scale, 6.0, bias=bias))
        results.append(y if binary == "none" else y + other if binary == "add" else other * y)
    return results


@cache
def folded(dtype: torch.dtype) -> Callable:
    x, codes, scale, bias, *_ = arguments(5, 7, 11, dtype, "column", "normal", 0)
    compiled = torch.compile(epilogues, fullgraph=True, dynamic=True, backend=without_cpp)
    before = len(int8fx.reports())
    with torch.no_grad():
        compiled(x, codes, scale, bias, x.new_ones(5, 11))
    [report] = int8fx.reports()[before:]
    assert report.linears == len(EPILOGUES)
    assert report.folded == sum((name != "none") + (binary != "none") for name, binary in EPILOGUES)
    return compiled


@given(sizes, sizes, sizes, st.sampled_from(DTYPES[:3]), st.sampled_from(OUTLIERS), seeds)
@torch.no_grad()
def test_folded_epilogues_are_within_the_error_of_the_reference(M, K, N, dtype, outliers, seed):
    compiled = folded(dtype)
    x, codes, scale, bias, *_ = arguments(M, K, N, dtype, outliers, "normal", seed)
    other = torch.randn(M, N, generator=generator(seed + 1)).to(dtype)
    for y, (name, binary) in zip(compiled(x, codes, scale, bias, other), EPILOGUES, strict=True):
        epilogue = Epilogue(bias, name, None if binary == "none" else other, binary)
        problem = Problem(x, Int8Weight(codes, scale, 6.0), epilogue)
        assert_same_bits(y, ops.linear(*problem.args))
        assert_within_budget(y, *problem)


# ---- Inductor's code ------------------------------------------------------------------------------------------------


def _before(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, x / 2)


def _after(y: Tensor) -> Tensor:
    return torch.maximum(y, -y)


def network(x: Tensor, up: tuple, gate: tuple, down: tuple, bias: Tensor) -> Tensor:
    """Between the matmuls everything is exact or rounded once, so that the order in which code does it cannot show."""
    up_weight, gate_weight, down_weight = (dequantized(packed, x.dtype) for packed in (up, gate, down))
    h = _before(x)
    return _after(x + F.linear(torch.relu(F.linear(h, gate_weight, bias)) * F.linear(h, up_weight), down_weight))


@pytest.fixture(scope="module")
def compiled_network() -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """What Inductor's code gives, and what the rewritten matmuls give."""
    weights = (packed_weight(40, 24, seed=1), packed_weight(40, 24, seed=2), packed_weight(24, 40, seed=3))
    bias = torch.randn(40, generator=generator(4))
    before, compiled = len(int8fx.reports()), torch.compile(network, fullgraph=True, dynamic=True)
    metrics.reset()
    inductor, functorch = torch._inductor.config, torch._functorch.config
    with inductor.patch(fx_graph_cache=False), functorch.patch(enable_autograd_cache=False), torch.no_grad():
        compiled(torch.ones(3, 24), *weights, bias)
    assert metrics.generated_cpp_vec_kernel_count + metrics.generated_kernel_count > 0
    [report] = int8fx.reports()[before:]
    assert (report.lowered, report.shared, report.linears) == (3, 1, 3)

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        (up, gate, down), h = weights, _before(x)
        hidden = ops.linear(h, *gate, 6.0, bias=bias, activation="relu") * ops.linear(h, *up, 6.0)
        return compiled(x, *weights, bias), _after(x + ops.linear(hidden, *down, 6.0))

    return both


@given(st.integers(2, 200), st.sampled_from(OUTLIERS), st.sampled_from(VALUES), seeds)
@torch.no_grad()
def test_one_compiled_function_serves_every_number_of_rows(compiled_network, M, outliers, values, seed):
    graphs = counters["stats"]["unique_graphs"]
    y, expected = compiled_network(activation(M, 24, outliers=outliers, values=values, seed=seed))
    assert_same_bits(y, expected)
    assert counters["stats"]["unique_graphs"] == graphs, "recompiled"
