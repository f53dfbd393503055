"""Writes int8fx ops into a graph, and removes what is then dead."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node

from ..schemes.weight import Epilogue, Int8Weight
from .products import Product

aten = torch.ops.aten


def call(graph: Graph, target: Callable, *args: Any, **kwargs: Any) -> Node:
    """A new node at the graph's insertion point, with ``meta["val"]`` computed from its arguments' if they have it."""
    node = graph.call_function(target, args, kwargs)
    inputs = node.all_input_nodes
    if inputs and all("val" in i.meta for i in inputs):
        with torch.no_grad():
            node.meta["val"] = target(
                *torch.fx.map_arg(args, lambda n: n.meta["val"]), **torch.fx.map_arg(kwargs, lambda n: n.meta["val"])
            )
    return node


def call_int8(graph: Graph, op: Any, *args: Any, **kwargs: Any) -> Node:
    """`call` of an int8fx op without the trailing arguments that are its defaults, as AOTAutograd writes calls."""
    defaults = [a.default_value if a.has_default_value() else ... for a in op._schema.arguments if not a.kwarg_only]
    n = len(args)
    while n and not isinstance(args[n - 1], Node) and args[n - 1] == defaults[n - 1]:
        n -= 1
    return call(graph, op, *args[:n], **kwargs)


def _arguments(node: Node) -> dict[str, Any]:
    """Argument name -> value of an op's call, defaults included."""
    values = {a.name: a.default_value if a.has_default_value() else None for a in node.target._schema.arguments}
    return values | dict(zip(values, node.args, strict=False)) | node.kwargs


def read_weight(node: Node) -> Int8Weight:
    """The packed weight that a call of an int8fx op takes; Nodes stand for its tensors."""
    arguments = _arguments(node)
    names = ("weight", "weight_scale", "threshold", "block", "columns", "columns_weight")
    return Int8Weight(*(arguments[name] for name in names))


def read_epilogue(node: Node) -> Epilogue:
    """The epilogue of a call of ``linear`` or ``linear_quantized``; Nodes stand for its tensors."""
    arguments = _arguments(node)
    return Epilogue(*(arguments[name] for name in Epilogue._fields))


def with_epilogue(graph: Graph, node: Node, epilogue: Epilogue) -> Node:
    """A call of ``node``'s op on its arguments and ``epilogue``, at the graph's insertion point."""
    arguments = _arguments(node) | epilogue._asdict()
    return call_int8(graph, node.target, *arguments.values())


def emit(graph: Graph, product: Product) -> Node:
    """int8fx ops for ``product``, whose source is an ``int8fx::dequantize``, at the graph's insertion point."""
    ops = torch.ops.int8fx
    weight = read_weight(product.w.source)
    for op, dim, *args in product.w.selections:
        selection = args if op is aten.index.Tensor else (dim, *args)
        codes, scale = (call(graph, op, t, *selection) for t in (weight.codes, weight.scale))
        weight = weight._replace(codes=codes, scale=scale)
        if weight.columns_weight is not None:
            weight = weight._replace(columns_weight=call(graph, op, weight.columns_weight, *selection))
    if product.form == "grouped":
        return call_int8(graph, ops.grouped_linear.default, product.x, product.offsets, *weight)
    x = product.x
    if product.form == "left":
        x = _swap_last(graph, x)
    elif product.form == "einsum" and product.x_order != tuple(range(len(product.x_order))):
        x = call(graph, aten.permute.default, x, list(product.x_order))
    bias = product.bias
    per_channel = bias is None or _is_vector(bias, product)
    y = call_int8(graph, ops.linear.default, x, *weight, bias if per_channel else None)
    if not per_channel:  # addmm with a matrix: as an add, which `fold` takes into the epilogue
        y = call(graph, aten.add.Tensor, y, bias)
    swapped = product.form == "left"
    if swapped:
        y = _swap_last(graph, y)
    elif product.form == "einsum" and product.y_order != tuple(range(len(product.y_order))):
        y, swapped = call(graph, aten.permute.default, y, list(product.y_order)), True
    if swapped:  # views of the product, in this graph or in later code, count on its strides
        y = call(graph, aten.clone.default, y, memory_format=torch.contiguous_format)
    return y


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
