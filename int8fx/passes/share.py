"""Quantises an activation once for all the linear layers that read it: q, k and v; gate and up.

Before::

    q = int8fx.linear(x, wq, sq, 6.0)
    k = int8fx.linear(x, wk, sk, 6.0)

After::

    codes: i8[M, K], x_scale: f32[M], outlier_mask: b8[K] = int8fx.quantize_rowwise(x, 6.0, for_linear=True)
    q = int8fx.linear_quantized(x, codes, x_scale, outlier_mask, wq, sq, 6.0)
    k = int8fx.linear_quantized(x, codes, x_scale, outlier_mask, wk, sk, 6.0)

x stays an argument: its outlier columns are multiplied in 16 bits. Layers with unquantised columns share if their
columns are one tensor: `convert` ties equal ones. Where a linear layer on so few rows does not quantise x in advance
(`ops.rows.form`), nothing is shared. If the number of rows is a symbol, ``for_linear`` lets quantize_rowwise decide
that when it runs.
"""

from __future__ import annotations

import math
import operator
import sys
from collections import defaultdict
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.fx import Graph, Node

from ..graph.emit import call, call_int8, erase_dead, read_epilogue, read_weight
from ..graph.values import value
from ..graph.verify import verify
from ..ops.rows import Form, form

aten = torch.ops.aten
_SAME_VALUE = (  # with equal arguments they return equal tensors: autocast casts x once per layer
    torch.ops.prims.convert_element_type.default,
    aten._to_copy.default,
    aten.view.default,
    aten.reshape.default,
    aten.permute.default,
    aten.expand.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.select.int,
    aten.slice.Tensor,
    aten.clone.default,
)


class _Quantization(NamedTuple):
    """What `quantize_rowwise` computes, as a key: calls of equal keys give equal results."""

    x: object
    threshold: float | None
    block: int
    columns: Tensor | None  # a Node


def share(graph: Graph) -> int:
    """Rewrites ``graph`` in place; returns how many quantisations it saved."""
    groups: dict[_Quantization, list[Node]] = defaultdict(list)
    for node in graph.find_nodes(op="call_function", target=torch.ops.int8fx.linear.default):
        if _quantizes(node):
            weight = read_weight(node)
            groups[_Quantization(_value_key(_x(node)), *weight[2:5])].append(node)
    saved = 0
    for quantization, nodes in groups.items():
        if len(nodes) > 1:
            _share(graph, quantization, nodes)
            saved += len(nodes) - 1
    return saved


def _x(node: Node) -> Node:
    return cast(Node, node.args[0])


def _quantizes(node: Node) -> bool:
    """Whether this ``linear`` quantises x as `quantize_rowwise` does. A symbolic number of rows may be large.

    Experts do not: outlier columns are chosen for each expert, from its rows.
    """
    weight, x = read_weight(node), value(_x(node))
    if x is None or value(weight.codes) is None or value(weight.codes).dim() != 2:
        return False
    rows = math.prod(x.shape[:-1])
    rows = rows if isinstance(rows, int) else sys.maxsize
    return (
        form(rows, x.device.type, weight.threshold, weight.block, weight.columns is not None, weight.is_plain)
        is Form.QUANTIZED
    )


def _value_key(x: Node) -> object:
    """A key that is equal for nodes that hold equal tensors in a functional graph."""
    if x.op == "call_function" and x.target in _SAME_VALUE and not any(isinstance(a, Node) for a in x.args[1:]):
        return x.target, _value_key(_x(x)), str(x.args[1:]), str(x.kwargs)
    return x


def _share(graph: Graph, quantization: _Quantization, nodes: list[Node]) -> None:
    x = _x(nodes[0])
    with graph.inserting_before(nodes[0]):
        quantize_rowwise = torch.ops.int8fx.quantize_rowwise.default
        quantized = call_int8(graph, quantize_rowwise, x, *quantization[1:], for_linear=True)
        parts = [call(graph, operator.getitem, quantized, i) for i in range(3)]
    for node in nodes:
        with graph.inserting_before(node):
            linear_quantized = torch.ops.int8fx.linear_quantized.default
            new = call_int8(graph, linear_quantized, x, *parts, *read_weight(node), *read_epilogue(node))
        verify(node, new)
        node.replace_all_uses_with(new)
        erase_dead(node)
