"""The three passes one after the other over one graph: report, verification of every replaced node."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from support.graphs import INT8_PRODUCTS, compiled, dequantized, ops, random, weight
from torch.fx import Graph

from int8fx.graph.count import count_ops
from int8fx.graph.verify import verify
from int8fx.passes import Report, fold, lower, run_passes, share


def gated_mlp(x, skip, gate, up, down):
    w, v, u = (dequantized(packed, x.dtype) for packed in (gate, up, down))
    return skip + F.linear(F.silu(F.linear(x, w)) * F.linear(x, v), u)


def mlp_arguments() -> list:
    packed = [weight(20, 24, seed=1), weight(20, 24, seed=2), weight(24, 20, seed=3)]
    return [random(2, 5, 24), random(2, 5, 24, seed=4), *packed]


def test_report():
    reports = []
    args = mlp_arguments()
    f, backend = compiled(gated_mlp, lambda graph: reports.append(run_passes(graph)) or 0)
    y = f(*args)
    assert reports == [Report(lowered=3, shared=1, folded=3, linears=3, dequantized=0)]
    (after,) = backend.after
    assert count_ops(after) == {"quantize_rowwise": 1, "linear_quantized": 2, "linear": 1}
    x, skip, gate, up, down = args
    g = ops.linear(x, *gate, 6.0, activation="silu", other=ops.linear(x, *up, 6.0), binary="mul")
    assert torch.equal(y, ops.linear(g, *down, 6.0, other=skip, binary="add"))


def test_every_replaced_node_is_verified(monkeypatch):
    verified: dict[str, list[str]] = {}
    for name in ("lower", "share", "fold"):
        seen = verified[name] = []

        def note(old, new, seen=seen):
            seen.append(old.name)
            verify(old, new)

        monkeypatch.setattr(sys.modules[f"int8fx.passes.{name}"], "verify", note)
    replaced = []

    def watched(rewrite):
        def run(graph: Graph) -> int:
            before = {node.name for node in graph.nodes}
            count = rewrite(graph)
            replaced.append(before - {node.name for node in graph.nodes})
            return count

        return run

    f, backend = compiled(gated_mlp, *map(watched, (lower, share, fold)))
    f(*mlp_arguments())
    assert backend.counts == [(3, 1, 3)]
    assert {name: len(seen) for name, seen in verified.items()} == {"lower": 3, "share": 2, "fold": 3}
    for seen, gone in zip(verified.values(), replaced, strict=True):
        assert set(seen) <= gone


@pytest.mark.parametrize("name", ["lower", "share", "fold"])
def test_a_wrong_rewrite_is_stopped(monkeypatch, name):
    """Each pass, if it built a matmul of another dtype."""
    module = sys.modules[f"int8fx.passes.{name}"]
    function = {"lower": "emit", "share": "call_int8", "fold": "with_epilogue"}[name]
    build = getattr(module, function)

    def wrong(*args, **kwargs):
        node = build(*args, **kwargs)
        if node.target in INT8_PRODUCTS:
            node.meta["val"] = node.meta["val"].double()
        return node

    monkeypatch.setattr(module, function, wrong)
    f, _ = compiled(gated_mlp, lower, share, fold)
    x, skip, *packed = mlp_arguments()
    with pytest.raises(Exception, match=r"int8fx: %linear\w* : .* instead of"):
        f(x[0], skip[0], *packed)
