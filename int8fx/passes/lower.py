"""Replaces matmuls with dequantised weights by int8 ones.

Before::

    w: bf16[N, K] = int8fx.dequantize(weight, weight_scale, 6.0, dtype=bfloat16)
    t: bf16[K, N] = aten.permute(w, [1, 0])
    x2: bf16[B*S, K] = aten.view(x, [B*S, K])
    y2: bf16[B*S, N] = aten.addmm(bias, x2, t)
    y: bf16[B, S, N] = aten.view(y2, [B, S, N])

After::

    y: bf16[B, S, N] = int8fx.linear(x, weight, weight_scale, 6.0, bias=bias)

The same for mm, bmm (experts, or a broadcast weight), baddbmm, matmul, linear, einsum and grouped_mm, with the
weight on either side, through any views of it that only permute, add or remove dimensions of size 1, pick an expert or
split the output channels (cross-attention's q and kv). What is not matched stays a product with a dequantised weight:
right, and slower.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from ..graph.emit import call, emit, erase_dead
from ..graph.products import read_product
from ..graph.verify import verify

aten = torch.ops.aten
_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


def lower(graph: Graph) -> int:
    """Rewrites ``graph`` in place; returns how many products it replaced."""
    dequantize = torch.ops.int8fx.dequantize.default

    def shape_of(node: Node):
        if node.op != "call_function" or node.target is not dequantize:
            return None
        val = node.meta.get("val")
        return None if val is None else tuple(val.shape)

    count = 0
    for node in list(graph.nodes):
        if node.op not in ("call_function", "call_method") or node.target is dequantize:
            continue
        product = read_product(node, shape_of)
        if product is None or product.layout != "NK" or not product.fits():
            continue
        with graph.inserting_before(node):
            replaced = [(node, emit(graph, product))]
        replaced = _without_views(graph, *replaced[0]) or replaced
        for old, new in replaced:
            verify(old, new)
            old.replace_all_uses_with(new)
        for old, _ in replaced:
            erase_dead(old)
        count += 1
    return count


def _without_views(graph: Graph, old: Node, new: Node) -> list[tuple[Node, Node]] | None:
    """``view(linear(view(x, [M, K])), [..., N])`` -> ``linear(x)``, if that is what every use of the product does."""
    if new.target is not torch.ops.int8fx.linear.default or "val" not in new.meta:
        return None
    x2d, weight = new.args[:2]
    if x2d.op != "call_function" or x2d.target not in _VIEWS or weight.meta["val"].dim() != 2 or not old.users:
        return None
    x = x2d.args[0]

    def sizes(*shape: int | torch.SymInt) -> list[str]:  # to compare symbols themselves could add a guard
        return [str(s) for s in shape]

    *lead, K = x.meta["val"].shape
    wanted = sizes(*lead, new.meta["val"].shape[-1])
    if not lead or sizes(K) != sizes(x2d.meta["val"].shape[-1]):
        return None
    if not all(user.target in _VIEWS and sizes(*user.meta["val"].shape) == wanted for user in old.users):
        return None
    with graph.inserting_before(new):
        whole = call(graph, new.target, x, *new.args[1:])
    replaced = [(user, whole) for user in list(old.users)]
    graph.erase_node(new)
    return replaced
