"""`count_ops` counts int8fx ops, by name."""

from support.graphs import aten, ops
from torch.fx import Graph

from int8fx.graph.count import count_ops


def test_only_int8fx_ops_are_counted():
    graph = Graph()
    x, codes, scale = (graph.placeholder(name) for name in ("x", "codes", "scale"))
    y = graph.call_function(ops.linear.default, (x, codes, scale))
    y = graph.call_function(ops.linear.default, (y, codes, scale))
    graph.call_function(ops.quantize_rowwise.default, (graph.call_function(aten.neg.default, (y,)),))
    graph.call_method("neg", (y,))
    assert count_ops(graph) == {"linear": 2, "quantize_rowwise": 1}
    assert count_ops(Graph()) == {}
