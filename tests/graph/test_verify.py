"""`verify` stops a rewrite that changes a shape, a dtype or a device."""

from __future__ import annotations

import pytest
import torch
from support.graphs import aten
from torch._subclasses import FakeTensorMode
from torch.fx import Graph

from int8fx.graph.verify import verify


def nodes(old: torch.Tensor | None, new: torch.Tensor | None) -> list[torch.fx.Node]:
    graph, results = Graph(), []
    x = graph.placeholder("x")
    for val in (old, new):
        node = graph.call_function(aten.neg.default if val is old else aten.relu.default, (x,))
        if val is not None:
            node.meta["val"] = val
        results.append(node)
    return results


@pytest.mark.parametrize(
    "new",
    [
        torch.empty(2, 3, 5),
        torch.empty(2, 3, 4, 1),
        torch.empty(24),
        torch.empty(2, 3, 4, dtype=torch.bfloat16),
        torch.empty(2, 3, 4, device="meta"),
    ],
    ids=["shape", "rank", "flattened", "dtype", "device"],
)
def test_verify_names_the_node(new):
    old, new = nodes(torch.empty(2, 3, 4), new)
    with pytest.raises(RuntimeError, match=r"int8fx: %relu_default .* instead of neg_default"):
        verify(old, new)


def test_verify_compares_symbols_without_a_guard():
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    env = ShapeEnv(duck_shape=False)
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * 2)
    val = FakeTensorMode(shape_env=env).from_tensor(torch.empty(4, 4), symbolic_context=context)
    verify(*nodes(val, val.relu()))
    with pytest.raises(RuntimeError, match="%relu"):
        verify(*nodes(val, val.t()))
    assert not env.guards


def test_verify_has_nothing_to_say_without_values():
    verify(*nodes(None, torch.empty(1)))
    verify(*nodes(torch.empty(1), None))
    verify(*nodes(torch.empty(1), torch.ones(1)))
