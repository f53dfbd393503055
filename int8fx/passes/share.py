"""Quantises an activation once for all the linear layers that read it: q, k and v; gate and up.

Before::

    q = int8fx.linear(x, wq, sq, 6.0)
    k = int8fx.linear(x, wk, sk, 6.0)

After::

    codes: i8[M, K], x_scale: f32[M], outlier_mask: b8[K] = int8fx.quantize_rowwise(x, 6.0, for_linear=True)
    q = int8fx.linear_quantized(x, codes, x_scale, outlier_mask, wq, sq, 6.0)
    k = int8fx.linear_quantized(x, codes, x_scale, outlier_mask, wk, sk, 6.0)

x itself stays an input: the residual multiplies its outlier columns in 16 bits. Layers with unquantised columns share
if these are one tensor: `convert` ties equal ones. Nothing is shared where a layer of so few rows does not quantise x
in advance (`ops.rows.form`).
"""

from __future__ import annotations

import math
import operator
import sys
from collections import defaultdict

import torch
from torch.fx import Graph, Node

from ..graph.emit import call, call_int8, erase_dead, read_epilogue, read_weight
from ..graph.verify import verify
from ..ops.rows import Form, form

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
        weight = read_weight(node)
        val = weight.codes.meta.get("val")
        if val is not None and val.dim() == 2 and "val" in node.args[0].meta:
            groups[_value(node.args[0]), weight.threshold, weight.block, weight.columns].append(node)
    saved = 0
    for (_, threshold, block, columns), nodes in groups.items():
        x = nodes[0].args[0]
        if len(nodes) < 2 or not _reads_codes(x.meta["val"], threshold, block, columns):
            continue
        with graph.inserting_before(nodes[0]):
            quantize_rowwise = torch.ops.int8fx.quantize_rowwise.default
            quantized = call_int8(graph, quantize_rowwise, x, threshold, block, columns, for_linear=True)
            parts = [call(graph, operator.getitem, quantized, i) for i in range(3)]
        for node in nodes:
            with graph.inserting_before(node):
                linear_quantized = torch.ops.int8fx.linear_quantized.default
                new = call_int8(graph, linear_quantized, x, *parts, *read_weight(node), *read_epilogue(node))
            verify(node, new)
            node.replace_all_uses_with(new)
            erase_dead(node)
        saved += len(nodes) - 1
    return saved


def _reads_codes(x: torch.Tensor, threshold: float | None, block: int, columns: Node | None) -> bool:
    """Whether a linear layer on x reads codes that are made in advance; a symbolic number of rows may be large."""
    rows = math.prod(x.shape[:-1])
    if not isinstance(rows, int):
        rows = sys.maxsize
    return form(rows, x.device.type, threshold, block, columns is not None) is Form.QUANTIZED


def _value(x: Node) -> object:
    """A key that is equal for nodes that hold equal tensors in a functional graph."""
    if x.op == "call_function" and x.target in _SAME_VALUE and not any(isinstance(a, Node) for a in x.args[1:]):
        return x.target, _value(x.args[0]), str(x.args[1:]), str(x.kwargs)
    return x
