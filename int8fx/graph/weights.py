"""Finds the weight that an argument of a matmul is a view of, unless something writes to the weight.

A weight that nothing writes to may count as written to: its matmul is then not rewritten. The opposite error must not
happen, as a write to the float weight would not change the int8 codes.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch._ops import OpOverload, OpOverloadPacket
from torch.fx import Node

from .values import sizes, value
from .views import VIEWS, Operand, Shape, expand, getitem, identity, select, split, target_of, view

aten = torch.ops.aten

_IN_PLACE = {"setitem", *(f"i{op}" for op in ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow"))}
_OTHER_VIEWS = ("H", "mH", "data", "real", "imag")  # attributes
_SAME_VALUES = ("memory_format", "layout", "pin_memory", "copy")  # keywords that do not change what a view holds


def _first(node: Node) -> tuple:
    """The first argument of ``node``, one tensor or several, as a tuple."""
    first = node.args[0] if node.args else node.kwargs.get("input")
    return tuple(first) if isinstance(first, (list, tuple)) else (first,)


def _name(node: Node) -> str:
    target = target_of(node)
    return target if isinstance(target, str) else getattr(target, "__name__", "")


def _writes(user: Node, node: Node) -> bool:
    """Whether ``user`` may change its argument ``node`` in place.

    The schema of an aten operator says so. torch's functions and methods have no schema, but they follow conventions: a
    result that is written to an argument is called ``out``; a function that writes to its first argument has a name
    that ends in ``_``, or is an in-place operator; a function that may do so has a parameter ``inplace``, and any True
    among its arguments counts as this one. Functions from elsewhere follow no convention, and count as writing.
    """
    if isinstance(user.target, OpOverload):
        return _schema_writes(user, user.target, node)
    if user.op == "call_module":
        module = user.graph.owning_module
        return module is None or getattr(module.get_submodule(str(user.target)), "inplace", False)
    if "out" in user.kwargs:
        return True
    name = _name(user).removeprefix("__").removesuffix("__")
    if name in _IN_PLACE or name.endswith("_"):
        return node in _first(user)
    if isinstance(user.target, FunctionType):  # written in Python
        if str(user.target.__module__).partition(".")[0] != "torch":
            return True
        if "inplace" in user.target.__code__.co_varnames:
            return user.kwargs.get("inplace", False) is not False or any(a is True for a in user.args)
    return False


def _schema_writes(user: Node, op: OpOverload, node: Node) -> bool:
    arguments = op._schema.arguments
    given = [*zip(arguments, user.args, strict=False), *((a, user.kwargs.get(a.name)) for a in arguments)]
    written = [v for a, v in given if a.alias_info is not None and a.alias_info.is_write]
    return any(v is node or (isinstance(v, (list, tuple)) and node in v) for v in written)


def _is_view(user: Node, node: Node) -> bool:
    """Whether ``user`` may be a view of its argument ``node``."""
    if user.op == "call_module":
        return True
    if node not in _first(user):
        return False
    target, name = target_of(user), _name(user)
    if target in VIEWS or (user.target is getattr and name in _OTHER_VIEWS):
        return True
    returns = [r.alias_info for overload in _overloads(target, name) for r in overload._schema.returns]
    return any(alias is not None and not alias.is_write for alias in returns)


def _overloads(target: object, name: str) -> list[OpOverload]:
    """The aten operators that ``target`` may run: itself, or all operators with the name of a function or method."""
    if isinstance(target, OpOverload):
        return [target]
    packet = getattr(aten, name, None) if name else None
    return [getattr(packet, o) for o in packet.overloads()] if isinstance(packet, OpOverloadPacket) else []


def _changed_in_place(node: Node) -> bool:
    """Whether anything may write to ``node`` or to a view of it."""
    users = [user for user in node.users if user.op.startswith("call_")]
    return any(_writes(user, node) or (_is_view(user, node) and _changed_in_place(user)) for user in users)


def follow(node: object, shape_of: Callable[[Node], Shape | None]) -> Operand | None:
    """The weight that ``node`` is a view of, or None.

    Args:
        node: an argument of a matmul.
        shape_of: the shape of a source node, None for any other node.
    """
    if not isinstance(node, Node):
        return None
    shape = shape_of(node)
    if shape is not None:
        return None if _changed_in_place(node) else Operand(node, tuple(range(len(shape))), tuple(shape), len(shape))
    rule = VIEWS.get(target_of(node))
    if rule is None or not node.args:
        return None
    source, *args = node.args
    if rule is getitem and isinstance(source, Node) and isinstance(args[0], int):
        part = _follow_split(source, args[0], shape_of)
        if part is not None:
            return part
    operand = follow(source, shape_of)
    if operand is None or rule is identity or (rule in (view, expand) and _same_shape(node, source)):
        return operand
    kwargs: dict[str, Any] = {k: v for k, v in node.kwargs.items() if k not in _SAME_VALUES}
    if kwargs.pop("device", None) is not None:
        return None
    try:
        return rule(operand, *([] if node.target is getattr else args), **kwargs)
    except (TypeError, IndexError):  # arguments of another overload, or Nodes where numbers are needed
        return None


def _same_shape(a: object, b: object) -> bool:
    """Whether both have recorded shapes, and these are equal, symbols included."""
    vals = value(a), value(b)
    return None not in vals and sizes(vals[0].shape) == sizes(vals[1].shape)


_UNBIND = (aten.unbind.int, torch.unbind, "unbind")
_SPLIT = (aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes, torch.split, "split")
_CHUNK = (aten.chunk.default, torch.chunk, "chunk")


def _follow_split(node: Node, which: int, shape_of: Callable[[Node], Shape | None]) -> Operand | None:
    """Part ``which`` of the result of ``node``, a ``split``, ``chunk`` or ``unbind``."""
    target = target_of(node)
    if target not in (*_UNBIND, *_SPLIT, *_CHUNK) or not node.args:
        return None
    operand = follow(node.args[0], shape_of)
    at = 1 if target in _UNBIND else 2
    dim = node.args[at] if len(node.args) > at else node.kwargs.get("dim", 0)
    if operand is None or not isinstance(dim, int):
        return None
    if target in _UNBIND:
        return select(operand, dim, which)
    size, total = node.args[1] if len(node.args) > 1 else None, operand.sizes[dim]
    if isinstance(size, (list, tuple)) and all(isinstance(s, int) for s in size):
        return split(operand, dim, size, which)
    if not isinstance(size, int) or size < 1 or not isinstance(total, int) or not total:
        return None
    step = -(-total // size) if target in _CHUNK else size
    return split(operand, dim, [min(step, total - i) for i in range(0, total, step)], which)
