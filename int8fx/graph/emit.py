"""Puts int8fx ops in the place of a product that was read out of a graph, and takes out what is then dead."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch.fx import Graph, Node

from .products import Product

aten = torch.ops.aten


def call(graph: Graph, target: Callable, *args: object, **kwargs: object) -> Node:
    """A new node at the graph's insertion point, with ``meta["val"]`` computed from its arguments' if they have it."""
    node = graph.call_function(target, args, kwargs)
    inputs = node.all_input_nodes
    if inputs and all("val" in i.meta for i in inputs):
        with torch.no_grad():
            node.meta["val"] = target(*torch.fx.map_arg(args, lambda n: n.meta["val"]), **kwargs)
    return node


def emit(graph: Graph, product: Product) -> Node:
    """int8fx ops for ``product``, whose source is an ``int8fx::dequantize``, at the graph's insertion point."""
    ops = torch.ops.int8fx
    source, arguments = product.w.source, ops.dequantize.default._schema.arguments
    given = dict(zip((a.name for a in arguments), source.args, strict=False)) | source.kwargs
    codes, scale, _, threshold, block, columns, columns_weight, top = (
        given.get(a.name, a.default_value) for a in arguments
    )
    for op, dim, *args in product.w.selections:
        inserted = args if op is aten.index.Tensor else (dim, *args)
        codes, scale = (call(graph, op, t, *inserted) for t in (codes, scale))
        if columns_weight is not None:
            columns_weight = call(graph, op, columns_weight, *inserted)
    rotation = without_defaults((block, columns, columns_weight, top), NO_ROTATION)
    if product.form == "grouped":
        products = (product.x, codes, scale, None, product.offsets, threshold, *rotation)
        return call(graph, ops.grouped_linear.default, *products)
    x = product.x
    if product.form == "left":
        x = _swap_last(graph, x)
    elif product.form == "einsum" and product.x_order != tuple(range(len(product.x_order))):
        x = call(graph, aten.permute.default, x, list(product.x_order))
    bias = product.bias
    per_channel = bias is None or _is_vector(bias, product)
    epilogue = ("none", None, "none", *rotation) if rotation else ()
    y = call(graph, ops.linear.default, x, codes, scale, bias if per_channel else None, threshold, *epilogue)
    if not per_channel:  # addmm with a matrix: as an add, which `fold` takes into the epilogue
        y = call(graph, aten.add.Tensor, y, bias)
    swapped = product.form == "left"
    if swapped:
        y = _swap_last(graph, y)
    elif product.form == "einsum" and product.y_order != tuple(range(len(product.y_order))):
        y, swapped = call(graph, aten.permute.default, y, list(product.y_order)), True
    if swapped:  # views of the product, in the graph or behind it, count on its strides
        y = call(graph, aten.clone.default, y, memory_format=torch.contiguous_format)
    return y


NO_ROTATION = (1, None, None, 0)  # block, columns, columns_weight, top


def without_defaults(args: tuple, defaults: tuple) -> tuple:
    """``args`` up to the last that is not its default: as AOTAutograd writes calls."""
    n = len(args)
    while n and args[n - 1] == defaults[n - 1]:
        n -= 1
    return args[:n]


def _swap_last(graph: Graph, x: Node) -> Node:
    val = x.meta.get("val")
    if val is None:
        return call(graph, aten.transpose.int, x, -1, -2)
    order = list(range(val.dim()))  # Inductor has no lowering for transpose: AOTAutograd writes permute
    order[-2:] = order[:-3:-1]
    return call(graph, aten.permute.default, x, order)


def _is_vector(bias: Node, product: Product) -> bool:
    """Whether ``bias`` is known to be ``[N]``, for one weight: what `int8fx::linear` takes."""
    val = bias.meta.get("val")
    if val is None and bias.op == "get_attr" and bias.graph.owning_module is not None:
        val = operator.attrgetter(bias.target)(bias.graph.owning_module)
    n = product.w.sizes[product.w.dims.index(product.n)]
    return val is not None and product.batch is None and val.dim() == 1 and str(val.shape[0]) == str(n)


def erase_dead(node: object) -> None:
    """Erases ``node`` and what only it used, as far as nothing reads it.

    Assertions about its metadata go with it, and parts of it that nothing reads.
    """

    def reads_nothing(user: Node) -> bool:
        dead_part = user.target is operator.getitem and not user.users
        return dead_part or user.target is aten._assert_tensor_metadata.default

    if not isinstance(node, Node) or node.op == "placeholder" or node._erased:
        return
    if all(map(reads_nothing, node.users)):
        for user in list(node.users):
            node.graph.erase_node(user)
        inputs = node.all_input_nodes
        node.graph.erase_node(node)
        for i in inputs:
            erase_dead(i)
