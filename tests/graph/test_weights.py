"""What writes to a weight keeps its matmul from being lowered; what writes elsewhere does not."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from support.graphs import LEVELS, check_left, check_lowered, integer_weight, integers, ops
from torch import nn

from int8fx.passes import lower

USED_OTHERWISE = ("weight changed in a copy", "weight added to another tensor in place")
ATEN = LEVELS[1:]

LOWERED = {
    "weight changed in a copy": (lambda x, w: ((w * 1).mul_(2), F.linear(x, w))[1], (4, 3), (2, 3)),
    "result changed in place": (lambda x, w: F.linear(x, w).mul_(2), (4, 3), (2, 3)),
    "input changed in place": (lambda x, w: F.linear(x.clone().mul_(2), w), (4, 3), (2, 3)),
    "weight added to another tensor in place": (lambda x, w: F.linear(x.clone().add_(w), w), (2, 3), (2, 3)),
}  # fmt: skip


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", LOWERED)
def test_is_lowered(name, level):
    check_lowered(LOWERED[name], level, dequantized=int(name in USED_OTHERWISE))


LEFT = {
    "scaled": (lambda x, w: F.linear(x, w * 2), (4, 3), (2, 3)),
    "changed in place": (lambda x, w: F.linear(x, w.mul_(2)), (4, 3), (2, 3)),
    "changed in place before": (lambda x, w: (w.mul_(2), F.linear(x, w))[1], (4, 3), (2, 3)),
    "changed by a function": (lambda x, w: (torch.relu_(w), F.linear(x, w))[1], (4, 3), (2, 3)),
    "changed by a keyword": (lambda x, w: (F.relu(w, inplace=True), F.linear(x, w))[1], (4, 3), (2, 3)),
    "changed by an argument": (lambda x, w: (F.relu(w, True), F.linear(x, w))[1], (4, 3), (2, 3)),
    "changed by an operator": (lambda x, w: (operator.itruediv(w, 2), F.linear(x, w))[1], (4, 3), (2, 3), *ATEN),
    "changed by an assignment": (lambda x, w: (operator.setitem(w, 0, 1.0), F.linear(x, w))[1], (4, 3), (2, 3), *ATEN),
    "changed by out": (lambda x, w: (torch.mul(w, 2, out=w), F.linear(x, w))[1], (4, 3), (2, 3)),
    "changed through a transpose": (lambda x, w: (w.t().mul_(2), F.linear(x, w))[1], (4, 3), (2, 3)),
    "changed through a row": (lambda x, w: (w[0].mul_(2), F.linear(x, w))[1], (4, 3), (2, 3)),
    "changed through a part": (lambda x, w: (w.chunk(2)[0].mul_(2), F.linear(x, w))[1], (4, 3), (2, 3)),
    "changed through narrow": (lambda x, w: (w.narrow(0, 0, 1).mul_(2), F.linear(x, w))[1], (4, 3), (2, 3)),
    "changed through data": (lambda x, w: (w.data.mul_(2), F.linear(x, w))[1], (4, 3), (2, 3), "torch", "aten"),
    "a copy changed": (lambda x, w: F.linear(x, w.clone().mul_(2)), (4, 3), (2, 3)),
}  # fmt: skip


@pytest.mark.parametrize(("name", "level"), [(name, level) for name in LEFT for level in LEFT[name][3:] or LEVELS])
def test_near_miss_is_left(name, level):
    check_left(LEFT[name], level)


@pytest.mark.parametrize("change", [operator.itruediv, operator.setitem], ids=["operator", "assignment"])
def test_near_miss_changed_as_dynamo_writes_it(change):
    """What a torch.fx.Proxy cannot record."""
    graph = torch.fx.Graph()
    x, codes, scale = (graph.placeholder(name) for name in ("x", "codes", "scale"))
    w = graph.call_function(ops.dequantize.default, (codes, scale, 0.0), {"dtype": torch.float32})
    w.meta["val"] = torch.empty(2, 3, device="meta")
    graph.call_function(change, (w, 2) if change is operator.itruediv else (w, 0, 1.0))
    graph.output(graph.call_function(F.linear, (x, w)))
    assert lower(graph) == 0
    y = torch.fx.GraphModule({}, graph)(integers(4, 3), *integer_weight(2, 3))
    assert not torch.equal(y, ops.linear(integers(4, 3), *integer_weight(2, 3), 0.0))


@torch.fx.wrap
def somebody_elses(w):
    return w.mul_(2)


class Calls(nn.Module):
    """A module of torch, which torch.fx does not look into, is called with a weight."""

    def __init__(self, called: nn.Module) -> None:
        super().__init__()
        self.called = called

    def forward(self, x, codes, scale):
        w = ops.dequantize.default(codes, scale, 0.0, dtype=torch.float32)
        return self.called(w).sum() * 0 + F.linear(x, w)


def wrapped(x, codes, scale):
    w = ops.dequantize.default(codes, scale, 0.0, dtype=torch.float32)
    return somebody_elses(w).sum() * 0 + F.linear(x, w)


@pytest.mark.parametrize(
    ("root", "count"),
    [(Calls(nn.ReLU(inplace=True)), 0), (Calls(nn.ReLU()), 1), (wrapped, 0)],
    ids=["a module that writes", "a module that does not", "a function of somebody else"],
)
def test_calls_that_torch_fx_does_not_look_into(root, count):
    gm = torch.fx.symbolic_trace(root)
    (w,) = gm.graph.find_nodes(op="call_function", target=ops.dequantize.default)
    w.meta["val"] = torch.empty(2, 3, device="meta")
    assert lower(gm.graph) == count
    gm.recompile()
    arguments = (integers(4, 3), *integer_weight(2, 3))
    assert torch.equal(gm(*arguments), root(*arguments))
