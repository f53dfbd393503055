"""Finds the weight behind an argument of a product, through its views, unless something writes to it in between."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx import Node

from .views import VIEWS, Operand, Shape, expand, getitem, identity, select, split, target_of, view

aten = torch.ops.aten

_IN_PLACE = {"setitem", *(f"i{op}" for op in ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow"))}
_OTHER_VIEWS = ("H", "mH", "data", "real", "imag")  # attributes


def _first(node: Node) -> tuple:
    """What ``node`` takes as ``self``: a tensor or several."""
    first = node.args[0] if node.args else node.kwargs.get("input")
    return tuple(first) if isinstance(first, (list, tuple)) else (first,)


def _name(node: Node) -> str:
    target = target_of(node)
    return target if isinstance(target, str) else getattr(target, "__name__", "")


def _writes(user: Node, node: Node) -> bool:
    """Whether ``user`` changes its argument ``node`` in place."""
    if isinstance(user.target, torch._ops.OpOverload):
        arguments = user.target._schema.arguments
        given = [*zip(arguments, user.args, strict=False), *((a, user.kwargs.get(a.name)) for a in arguments)]
        written = [v for a, v in given if a.alias_info is not None and a.alias_info.is_write]
        return any(v is node or (isinstance(v, (list, tuple)) and node in v) for v in written)
    if "out" in user.kwargs:
        return True
    name = _name(user).removeprefix("__").removesuffix("__")
    if name in _IN_PLACE or name.endswith("_"):
        return node in _first(user)
    if user.op == "call_function" and "inplace" in getattr(getattr(user.target, "__code__", None), "co_varnames", ()):
        return user.kwargs.get("inplace", False) is not False or any(a is True for a in user.args)
    return False


def _is_view(user: Node, node: Node) -> bool:
    """Whether ``user`` may be a view of its argument ``node``."""
    if node not in _first(user):
        return False
    target, name = target_of(user), _name(user)
    if target in VIEWS or (user.target is getattr and name in _OTHER_VIEWS):
        return True
    if isinstance(target, torch._ops.OpOverload):
        overloads = [target]
    else:
        packet = getattr(aten, name, None) if name else None
        known = isinstance(packet, torch._ops.OpOverloadPacket)
        overloads = [getattr(packet, overload) for overload in packet.overloads()] if known else []
    returns = [r.alias_info for overload in overloads for r in overload._schema.returns]
    return any(alias is not None and not alias.is_write for alias in returns)


def _changed_in_place(node: Node) -> bool:
    """Whether anything writes to ``node`` or to a view of it."""
    users = [user for user in node.users if user.op in ("call_function", "call_method")]
    return any(_writes(user, node) or (_is_view(user, node) and _changed_in_place(user)) for user in users)


def follow(node: object, shape_of: Callable[[Node], Shape | None]) -> Operand | None:
    """The weight that ``node`` is a view of, or None.

    Args:
        node: an argument of a product.
        shape_of: the shape of a source node, None for any other node.
    """
    if not isinstance(node, Node):
        return None
    shape = shape_of(node)
    if shape is not None:
        return None if _changed_in_place(node) else Operand(node, tuple(range(len(shape))), tuple(shape), len(shape))
    target = target_of(node)
    rule = VIEWS.get(target)
    if rule is None or not node.args:
        return None
    if rule is getitem and isinstance(node.args[0], Node) and isinstance(node.args[1], int):
        part = _follow_split(node.args[0], node.args[1], shape_of)
        if part is not None:
            return part
    operand = follow(node.args[0], shape_of)
    if operand is None:
        return None
    args = node.args[1:] if node.target is not getattr else ()
    kwargs = {k: v for k, v in node.kwargs.items() if k not in ("memory_format", "layout", "pin_memory", "copy")}
    if rule is identity or (rule in (view, expand) and _same_shape(node, node.args[0])):
        return operand
    if kwargs.pop("device", None) is not None:
        return None
    try:
        return rule(operand, *args, **kwargs)
    except (TypeError, IndexError):  # arguments of another overload, or Nodes where numbers are needed
        return None


def _same_shape(a: Node, b: Node) -> bool:
    """Whether both are known to have one shape, symbols included."""
    vals = [n.meta.get("val") for n in (a, b)]
    return None not in vals and [str(s) for s in vals[0].shape] == [str(s) for s in vals[1].shape]


def _follow_split(node: Node, which: int, shape_of: Callable[[Node], Shape | None]) -> Operand | None:
    """One part of ``split``/``chunk``/``unbind``."""
    target = target_of(node)
    if target in (aten.unbind.int, torch.unbind, "unbind"):
        operand = follow(node.args[0], shape_of)
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        return None if operand is None else select(operand, dim, which)
    by_size = target in (aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes, torch.split, "split")
    by_count = target in (aten.chunk.default, torch.chunk, "chunk")
    if not (by_size or by_count) or len(node.args) < 2:
        return None
    operand = follow(node.args[0], shape_of)
    if operand is None:
        return None
    size = node.args[1]
    dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    total = operand.sizes[dim] if isinstance(dim, int) else None
    if isinstance(size, (list, tuple)) and all(isinstance(s, int) for s in size):
        return split(operand, dim, size, which)
    if not isinstance(size, int) or size < 1 or not isinstance(total, int) or not total:
        return None
    step = size if by_size else -(-total // size)
    return split(operand, dim, [min(step, total - i) for i in range(0, total, step)], which)
