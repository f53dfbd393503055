"""Replaces matmuls with dequantised weights by int8 ones.

Before::

    w: bf16[N, K] = int8fx.dequantize(weight, weight_scale, 6.0, dtype=bfloat16)
    t: bf16[K, N] = aten.permute(w, [1, 0])
    x2: bf16[B*S, K] = aten.view(x, [B*S, K])
    y2: bf16[B*S, N] = aten.addmm(bias, x2, t)
    y: bf16[B, S, N] = aten.view(y2, [B, S, N])

After::

    y: bf16[B, S, N] = int8fx.linear(x, weight, weight_scale, 6.0, bias=bias)

The same for mm, bmm (experts, or a broadcast weight), baddbmm, matmul, linear, einsum and grouped_mm, with the weight
on either side. A view of the weight may permute dimensions, add or remove dimensions of size 1, pick an expert, or
split the output channels (cross-attention's q and kv). A matmul that does not match keeps its dequantised weight: its
result is correct, and it is slower.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Graph, Node

from ..graph.emit import call, emit, erase_dead
from ..graph.products import Product, read_product
from ..graph.values import sizes, value
from ..graph.verify import verify
from ..graph.views import Size

aten = torch.ops.aten
_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


def lower(graph: Graph) -> int:
    """Rewrites ``graph`` in place; returns how many matmuls it replaced."""
    count = 0
    for node in list(graph.nodes):
        product = read_product(node, _shape_of_dequantized)
        if product is not None and product.layout == "NK" and product.fits():
            _replace(graph, product)
            count += 1
    return count


def _shape_of_dequantized(node: Node) -> Sequence[Size] | None:
    """The shape of a dequantised weight, None for any other node."""
    if node.target is not torch.ops.int8fx.dequantize.default:
        return None
    val = value(node)
    return None if val is None else tuple(val.shape)


def _replace(graph: Graph, product: Product) -> None:
    with graph.inserting_before(product.node):
        new = emit(graph, product)
    olds = [product.node]
    if _only_viewed(product.node, new):
        olds, new = list(product.node.users), _without_view(graph, new)
    for old in olds:
        verify(old, new)
        old.replace_all_uses_with(new)
    for old in olds:
        erase_dead(old)


def _only_viewed(old: Node, new: Node) -> bool:
    """Whether ``new`` is ``linear(view(x, [M, K]))``, and all uses of ``old`` are views with x's leading dimensions."""
    if new.target is not torch.ops.int8fx.linear.default or value(new) is None or not old.users:
        return False
    x2d, codes = new.args[:2]
    if not isinstance(x2d, Node) or x2d.target not in _VIEWS or value(codes).dim() != 2:
        return False
    *lead, K = value(x2d.args[0]).shape
    if not lead or sizes([K]) != sizes(value(x2d).shape[-1:]):
        return False
    y_sizes = sizes([*lead, value(new).shape[-1]])
    return all(user.target in _VIEWS and sizes(value(user).shape) == y_sizes for user in old.users)


def _without_view(graph: Graph, new: Node) -> Node:
    """``linear(x)`` for ``new``, which is ``linear(view(x))``."""
    x2d, *others = new.args
    assert isinstance(x2d, Node)
    with graph.inserting_before(new):
        direct = call(graph, torch.ops.int8fx.linear.default, x2d.args[0], *others)
    graph.erase_node(new)
    return direct
