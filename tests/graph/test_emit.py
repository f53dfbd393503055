"""Calls of int8fx ops in a graph, and the removal of unused nodes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.graphs import aten, count_nodes, graph_of, integer_weight, integers, lowered, ops, random, weight
from torch.fx import Graph

from int8fx.graph.emit import call, call_int8, read_epilogue, read_weight, with_epilogue
from int8fx.passes import lower
from int8fx.schemes.weight import Epilogue, Int8Weight


def test_bias_of_a_linear_that_is_no_vector_is_added():
    x, w, bias = integers(4, 3), integer_weight(2, 3), integers(1)[0]
    count, gm = lowered(lambda x, w, b: F.linear(x, w, b), "torch", x, w, bias)
    (product,) = gm.graph.find_nodes(op="call_function", target=ops.linear.default)
    assert count == count_nodes(gm.graph, aten.add.Tensor) == 1
    assert read_epilogue(product).bias is None


def test_bias_known_as_a_vector_goes_into_the_matmul():
    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = torch.nn.Parameter(integers(2))

        def forward(self, x, codes, scale):
            return F.linear(x, ops.dequantize.default(codes, scale, 0.0, dtype=torch.float32), self.bias)

    x, w, module = integers(4, 3), integer_weight(2, 3), Module()
    gm = torch.fx.symbolic_trace(module)
    (read,) = gm.graph.find_nodes(op="call_function", target=ops.dequantize.default)
    read.meta["val"] = torch.empty(2, 3, device="meta")
    assert lower(gm.graph) == 1
    gm.recompile()
    assert torch.equal(gm(x, *w), module(x, *w))
    (product,) = gm.graph.find_nodes(op="call_function", target=ops.linear.default)
    assert read_epilogue(product).bias.op == "get_attr"
    assert count_nodes(gm.graph, aten.add.Tensor, ops.dequantize.default) == 0


def test_dead_nodes_take_their_assertions_with_them():
    def f(x, w):
        aten._assert_tensor_metadata.default(w, dtype=torch.float32)
        return F.linear(x, w)

    count, gm = lowered(f, "aten", integers(4, 3), integer_weight(2, 3))
    assert count == 1
    assert count_nodes(gm.graph, aten._assert_tensor_metadata.default, ops.dequantize.default) == 0


# ---- calls -----------------------------------------------------------------------------------------------------------


def placeholder(graph: Graph, name: str, val: torch.Tensor) -> torch.fx.Node:
    node = graph.placeholder(name)
    node.meta["val"] = val
    return node


def call_of_linear(graph: Graph, *args: object, **kwargs: object) -> torch.fx.Node:
    codes, scale = weight(6, 24)
    tensors = [placeholder(graph, *named) for named in (("x", random(5, 24)), ("codes", codes), ("scale", scale))]
    return call_int8(graph, ops.linear.default, *tensors, *args, **kwargs)


def test_arguments_that_are_defaults_are_left_out():
    graph = Graph()
    node = call_of_linear(graph, 6.0, 1, *[None] * 8, "none", None, "none")
    assert node.args[3:] == (6.0,)
    assert node.meta["val"].shape == (5, 6)


def test_a_call_is_read_with_its_defaults():
    graph = Graph()
    node = call_of_linear(graph, 6.0, activation="relu")
    _, codes, scale, _ = node.args
    assert read_weight(node) == Int8Weight(codes, scale, 6.0)
    assert read_epilogue(node) == Epilogue(activation="relu")
    bias = placeholder(graph, "bias", random(6))
    other = with_epilogue(graph, node, Epilogue(bias, "silu"))
    assert read_weight(other) == read_weight(node)
    assert read_epilogue(other) == Epilogue(bias, "silu")
    assert other.args[0] is node.args[0]


def test_without_values_there_is_no_value():
    graph = Graph()
    node = call(graph, aten.neg.default, graph.placeholder("x"))
    assert "val" not in node.meta


def test_selections_reach_every_tensor_of_a_weight():
    """An expert whose weight has unquantised columns, and a part of its output channels."""
    x, (codes, scale) = random(5, 24), weight(3, 6, 24)
    columns, columns_weight = torch.tensor([4, 9]), random(3, 6, 2)

    def f(x, codes, scale, columns, columns_weight):
        w = ops.dequantize.default(codes, scale, 6.0, 1, columns, columns_weight, dtype=torch.float32)
        return F.linear(x, w[1][2:5])

    gm = graph_of(f, "aten", x, codes, scale, columns, columns_weight)
    assert lower(gm.graph) == 1
    gm.recompile()
    part = Int8Weight(codes[1, 2:5], scale[1, 2:5], 6.0, 1, columns, columns_weight[1, 2:5])
    assert torch.equal(gm(x, codes, scale, columns, columns_weight), ops.linear(x, *part))
    assert count_nodes(gm.graph, aten.select.int, aten.slice.Tensor) == 3 * 2


@pytest.mark.parametrize("block", [16, 64])
def test_rotated_weights_stay_rotated(block):
    x, (codes, scale) = random(5, 24), weight(6, 24)

    def f(x, codes, scale):
        return x @ ops.dequantize.default(codes, scale, None, block, dtype=torch.float32).mT

    gm = graph_of(f, "aten", x, codes, scale)
    assert lower(gm.graph) == 1
    gm.recompile()
    assert torch.equal(gm(x, codes, scale), ops.linear(x, codes, scale, None, block))
