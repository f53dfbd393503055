"""Quantises an activation once for all the products that read it: q, k and v; gate and up.

Before::

    q = int8fx.linear(x, wq, sq, None, 6.0)
    k = int8fx.linear(x, wk, sk, None, 6.0)

After::

    codes: i8[M, K], x_scale: f32[M], outlier_mask: b8[K] = int8fx.quantize_rowwise(x, 6.0)
    q = int8fx.linear_quantized(x, codes, x_scale, outlier_mask, wq, sq, None)
    k = int8fx.linear_quantized(x, codes, x_scale, outlier_mask, wk, sk, None)

x itself stays an input: the residual multiplies its outlier columns in 16 bits. Products that keep columns share if
these are one tensor: `convert` ties equal ones. On a GPU, products of few rows are left alone: see `gpu.linear`.
"""

from __future__ import annotations

import math
import operator
from collections import defaultdict

import torch
from torch.fx import Graph, Node

from ..graph.emit import NO_ROTATION, call, erase_dead, without_defaults
from ..graph.verify import verify
from ..ops.gpu import EXACT_ROWS

aten = torch.ops.aten
_SAME_VALUE = (  # of equal arguments, these give equal tensors: autocast casts x once per layer
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


def share(graph: Graph) -> int:
    """Rewrites ``graph`` in place; returns how many quantisations it saved."""
    groups: dict[tuple, list[Node]] = defaultdict(list)
    for node in graph.find_nodes(op="call_function", target=torch.ops.int8fx.linear.default):
        weight = node.args[1].meta.get("val")
        if weight is not None and weight.dim() == 2 and "val" in node.args[0].meta:
            block, columns, _, top = (*node.args[8:], *NO_ROTATION[len(node.args[8:]) :])
            groups[_value(node.args[0]), node.args[4], block, columns, top].append(node)
    saved = 0
    for (_, threshold, block, columns, top), nodes in groups.items():
        x = nodes[0].args[0]
        if len(nodes) < 2 or not _quantised(x.meta["val"], threshold, block, columns):
            continue
        with graph.inserting_before(nodes[0]):
            rotation = without_defaults((block, columns, top), (1, None, 0))
            quantized = call(graph, torch.ops.int8fx.quantize_rowwise.default, x, threshold, *rotation)
            parts = [call(graph, operator.getitem, quantized, i) for i in range(3)]
        for node in nodes:
            _, weight, scale, bias, _, *rest = node.args
            if len(rest) > 6:  # linear_quantized has no top
                rest.pop()
            with graph.inserting_before(node):
                new = call(graph, torch.ops.int8fx.linear_quantized.default, x, *parts, weight, scale, bias, *rest)
            verify(node, new)
            node.replace_all_uses_with(new)
            erase_dead(node)
        saved += len(nodes) - 1
    return saved


def _quantised(x: torch.Tensor, threshold: float, block: int, columns: Node | None) -> bool:
    """Whether a product of x quantises it in a launch of its own: on a GPU some do not, and would share nothing."""
    rows = math.prod(x.shape[:-1])
    few = isinstance(rows, int) and rows <= EXACT_ROWS  # a symbol may be many
    return x.device.type != "cuda" or block > 1 or columns is not None or not (few or threshold == 0)


def _value(x: Node) -> object:
    """A key that is equal for nodes that hold equal tensors in a functional graph."""
    if x.op == "call_function" and x.target in _SAME_VALUE and not any(isinstance(a, Node) for a in x.args[1:]):
        return x.target, _value(x.args[0]), str(x.args[1:]), str(x.kwargs)
    return x
