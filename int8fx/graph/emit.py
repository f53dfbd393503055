"""Reads and writes calls of int8fx ops in a graph, and erases nodes that are no longer used."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, cast

import torch
from torch._ops import OpOverload
from torch.fx import Graph, Node

from ..schemes.weight import Epilogue, Int8Weight
from .products import Product
from .values import value

aten = torch.ops.aten


def call(graph: Graph, target: Callable, *args: Any, **kwargs: Any) -> Node:
    """A new node at the graph's insertion point, with ``meta["val"]`` computed from its arguments' if they have it."""
    node = graph.call_function(target, args, kwargs)
    inputs = node.all_input_nodes
    if inputs and all("val" in i.meta for i in inputs):
        with torch.no_grad():
            node.meta["val"] = target(*torch.fx.map_arg(args, value), **torch.fx.map_arg(kwargs, value))
    return node


def call_int8(graph: Graph, op: OpOverload, *args: Any, **kwargs: Any) -> Node:
    """`call` of an int8fx op without the trailing arguments that are its defaults, as AOTAutograd writes calls."""
    defaults = [a.default_value if a.has_default_value() else ... for a in op._schema.arguments if not a.kwarg_only]
    n = len(args)
    while n and not isinstance(args[n - 1], Node) and args[n - 1] == defaults[n - 1]:
        n -= 1
    return call(graph, op, *args[:n], **kwargs)


# ---- reading a call of an op -----------------------------------------------------------------------------------------


def _arguments(node: Node) -> dict[str, Any]:
    """Argument name -> value of an op's call, defaults included."""
    schema = cast(OpOverload, node.target)._schema
    defaults = {a.name: a.default_value if a.has_default_value() else None for a in schema.arguments}
    return defaults | dict(zip(defaults, node.args, strict=False)) | node.kwargs


def read_weight(node: Node) -> Int8Weight:
    """The packed weight that a call of an int8fx op takes; Nodes stand for its tensors."""
    arguments = _arguments(node)
    names = {"codes": "weight", "scale": "weight_scale"}
    return Int8Weight(*(arguments[names.get(field, field)] for field in Int8Weight._fields))


def read_epilogue(node: Node) -> Epilogue:
    """The epilogue of a call of ``linear`` or ``linear_quantized``; Nodes stand for its tensors."""
    arguments = _arguments(node)
    return Epilogue(*(arguments[name] for name in Epilogue._fields))


# ---- writing calls of ops --------------------------------------------------------------------------------------------


def with_epilogue(graph: Graph, node: Node, epilogue: Epilogue) -> Node:
    """A call of ``node``'s op on its arguments and ``epilogue``, at the graph's insertion point."""
    arguments = _arguments(node) | epilogue._asdict()
    return call_int8(graph, cast(OpOverload, node.target), *arguments.values())


def emit(graph: Graph, product: Product) -> Node:
    """int8fx ops for ``product``, whose source is an ``int8fx::dequantize``, at the graph's insertion point."""
    weight = _selected(graph, product)
    write = {"right": _right, "left": _left, "einsum": _einsum, "grouped": _grouped}[product.form]
    return write(graph, product, weight)


def _selected(graph: Graph, product: Product) -> Int8Weight:
    """The packed weight, with the selections applied to its tensors."""
    weight = read_weight(product.w.source)
    for op, dim, *args in product.w.selections:
        selection = args if op is aten.index.Tensor else (dim, *args)
        weight = weight.of_channels(lambda tensor, op=op, by=selection: call(graph, op, tensor, *by))  # type: ignore[misc]
    return weight


def _right(graph: Graph, product: Product, weight: Int8Weight) -> Node:
    return _linear(graph, product, product.x, weight)


def _left(graph: Graph, product: Product, weight: Int8Weight) -> Node:
    y = _linear(graph, product, _swap_last(graph, product.x), weight)
    return _contiguous(graph, _swap_last(graph, y))


def _einsum(graph: Graph, product: Product, weight: Int8Weight) -> Node:
    y = _linear(graph, product, _permuted(graph, product.x, product.x_order), weight)
    permuted = _permuted(graph, y, product.y_order)
    return y if permuted is y else _contiguous(graph, permuted)


def _grouped(graph: Graph, product: Product, weight: Int8Weight) -> Node:
    return call_int8(graph, torch.ops.int8fx.grouped_linear.default, product.x, product.offsets, *weight)


def _linear(graph: Graph, product: Product, x: Node, weight: Int8Weight) -> Node:
    """``int8fx::linear`` with the bias. A matrix as bias, as in addmm, becomes an add, which `fold` may fold."""
    bias = product.bias
    per_channel = bias is None or _is_vector(bias, product)
    y = call_int8(graph, torch.ops.int8fx.linear.default, x, *weight, bias if per_channel else None)
    return y if per_channel else call(graph, aten.add.Tensor, y, bias)


def _is_vector(bias: Node, product: Product) -> bool:
    """Whether ``bias`` is certainly ``[N]`` and there is one weight, as `int8fx::linear` requires."""
    val = value(bias)
    if val is None and bias.op == "get_attr" and bias.graph.owning_module is not None:
        val = operator.attrgetter(str(bias.target))(bias.graph.owning_module)
    n = product.w.sizes[product.w.dims.index(product.n)]
    return val is not None and product.batch is None and val.dim() == 1 and str(val.shape[0]) == str(n)


def _permuted(graph: Graph, node: Node, order: tuple[int, ...]) -> Node:
    return node if order == tuple(range(len(order))) else call(graph, aten.permute.default, node, list(order))


def _swap_last(graph: Graph, node: Node) -> Node:
    val = value(node)
    if val is None:
        return call(graph, aten.transpose.int, node, -1, -2)
    order = list(range(val.dim()))  # Inductor has no lowering for transpose: AOTAutograd writes permute
    order[-2:] = order[:-3:-1]
    return call(graph, aten.permute.default, node, order)


def _contiguous(graph: Graph, y: Node) -> Node:
    """y in the memory format of the matmul that it replaces: views of it, here or in later code, rely on the format."""
    return call(graph, aten.clone.default, y, memory_format=torch.contiguous_format)


# ---- erasing unused nodes --------------------------------------------------------------------------------------------


def erase_dead(node: object) -> None:
    """Erases ``node`` if nothing uses it, and then its inputs in the same way.

    Assertions about its metadata, and elements of its result that nothing uses, are no uses. They are erased too.
    """

    def is_no_use(user: Node) -> bool:
        unused_element = user.target is operator.getitem and not user.users
        return unused_element or user.target is aten._assert_tensor_metadata.default

    if not isinstance(node, Node) or node.op == "placeholder" or node._erased:
        return
    if all(map(is_no_use, node.users)):
        for user in list(node.users):
            node.graph.erase_node(user)
        inputs = node.all_input_nodes
        node.graph.erase_node(node)
        for i in inputs:
            erase_dead(i)
