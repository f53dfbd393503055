"""Folds what follows an int8 matmul into its epilogue: bias, activation, skip connection, gate.

Before::

    g = int8fx.linear(x, wg, sg, 6.0)
    u = int8fx.linear(x, wu, su, 6.0)
    h = aten.mul(silu(g), u)                    # silu, gelu, gelu_tanh as their decompositions
    d = int8fx.linear(h, wd, sd, 6.0)
    y = aten.add(skip, aten.add(d, bias))

After::

    g = int8fx.linear(x, wg, sg, 6.0, activation="silu")
    h = int8fx.linear(x, wu, su, 6.0, other=g, binary="mul")
    y = int8fx.linear(h, wd, sd, 6.0, bias=bias, other=skip, binary="add")

An operation is folded only if it is the only use of the matmul's result, and does not broadcast or change the dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from ..graph.emit import erase_dead, read_epilogue, read_weight, with_epilogue
from ..graph.values import sizes, value
from ..graph.verify import verify
from ..schemes.weight import Epilogue

aten = torch.ops.aten
_LINEARS = (torch.ops.int8fx.linear.default, torch.ops.int8fx.linear_quantized.default)
_CASTS = (torch.ops.prims.convert_element_type.default, aten._to_copy.default)
_BINARIES: dict[object, str] = {aten.add.Tensor: "add", aten.mul.Tensor: "mul"}

_Step = tuple[Node, Epilogue]
"""A node that can be folded into a matmul, and the matmul's epilogue that includes it."""


def fold(graph: Graph) -> int:
    """Rewrites ``graph`` in place; returns how many operations it folded."""
    count = 0
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in _LINEARS or value(node) is None:
            continue
        while True:
            _drop_clone(node)
            step = _next(node)
            if step is None:
                break
            node = _replace(graph, node, *step)
            count += 1
    return count


def _replace(graph: Graph, node: Node, old: Node, epilogue: Epilogue) -> Node:
    with graph.inserting_before(old):
        new = with_epilogue(graph, node, epilogue)
    verify(old, new)
    old.replace_all_uses_with(new)
    erase_dead(old)
    return new


def _drop_clone(node: Node) -> None:
    """Replaces ``clone(y)`` by the matmul y if y has no other use. Dropout in eval mode leaves such a clone."""
    user = _only_user(node)
    if user is not None and user.target is aten.clone.default and user.users and value(user).is_contiguous():
        user.replace_all_uses_with(node)
        erase_dead(user)


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


# ---- what may go into an epilogue next, in the order in which a kernel computes it -----------------------------------


def _next(node: Node) -> _Step | None:
    """The operation that can be folded into ``node`` next, and the epilogue that includes it."""
    epilogue = read_epilogue(node)
    if epilogue.other is not None:  # nothing follows the binary operation
        return None
    return _bias(node, epilogue) or _activation(node, epilogue) or _binary(node, epilogue)


def _bias(node: Node, epilogue: Epilogue) -> _Step | None:
    """``y + bias``: a vector ``[N]``, for a matmul with one weight."""
    add, operand = _binary_user(node)
    if add is None or add.target is not aten.add.Tensor or epilogue != Epilogue():
        return None
    y, one_weight = value(node), value(read_weight(node).codes).dim() == 2
    if not one_weight or y.dim() < 2 or sizes(value(operand).shape) != sizes(y.shape[-1:]):
        return None
    return add, epilogue._replace(bias=operand)


def _activation(node: Node, epilogue: Epilogue) -> _Step | None:
    if epilogue.activation != "none":
        return None
    for name, pattern in _ACTIVATIONS:
        root = _match_activation(node, pattern)
        if root is not None:
            return root, epilogue._replace(activation=name)
    return None


def _binary(node: Node, epilogue: Epilogue) -> _Step | None:
    """``y + other`` or ``y * other``: a tensor of y's shape, as a skip connection or a gate is."""
    user, operand = _binary_user(node)
    if user is None or sizes(value(operand).shape) != sizes(value(node).shape):
        return None
    return user, epilogue._replace(other=operand, binary=_BINARIES[user.target])


def _binary_user(node: Node) -> tuple[Node, Any] | tuple[None, None]:
    """``y + operand`` or ``y * operand`` if it is y's only use and its result has y's dtype; the operand, a Node."""
    user = _only_user(node)
    if user is None or user.target not in _BINARIES or user.kwargs:  # a keyword is alpha
        return None, None
    operand = user.args[1] if user.args[0] is node else user.args[0]
    y, val = value(node), value(operand)
    if operand is node or not isinstance(val, Tensor) or not val.is_floating_point():
        return None, None
    return (user, operand) if val.device == y.device and value(user).dtype == y.dtype else (None, None)


# ---- activations, as AOTAutograd writes them ------------------------------------------------------------------------
# A pattern is (target, operand, ...). Y is the matmul's result, numbers match numbers.

Y = "y"
_ERF = (aten.erf.default, (aten.mul.Tensor, Y, 0.7071067811865476))
_CUBE = (aten.mul.Tensor, (aten.mul.Tensor, (aten.mul.Tensor, Y, Y), Y), 0.044715)
_TANH = (aten.tanh.default, (aten.mul.Tensor, (aten.add.Tensor, Y, _CUBE), 0.7978845608028654))
_POWER = (aten.mul.Tensor, (aten.pow.Tensor_Scalar, Y, 3), 0.044715)  # as the code of GPT-2 writes it
_POWER_TANH = (aten.tanh.default, (aten.mul.Tensor, (aten.add.Tensor, Y, _POWER), 0.7978845608028654))
_HALF = (aten.mul.Tensor, Y, 0.5)
_ACTIVATIONS = (
    ("relu", (aten.relu.default, Y)),
    ("silu", (aten.div.Tensor, Y, (aten.add.Tensor, (aten.exp.default, (aten.neg.default, Y)), 1))),
    ("gelu", (aten.mul.Tensor, _HALF, (aten.add.Tensor, _ERF, 1))),
    ("gelu_tanh", (aten.mul.Tensor, _HALF, (aten.add.Tensor, _TANH, 1))),
    ("gelu_tanh", (aten.mul.Tensor, _HALF, (aten.add.Tensor, _POWER_TANH, 1))),
)


def _match_activation(y: Node, pattern: tuple) -> Node | None:
    """The node that computes ``pattern`` of ``y``, if ``y`` has no use outside the pattern."""
    reached, frontier = {y}, [y]
    for _ in range(_depth(pattern) + 2):  # and a cast to float32 and back
        frontier = [user for node in frontier for user in node.users if user not in reached]
        for root in frontier:
            inner: set[Node] = set()
            if _matches(root, pattern, y, inner):
                inner.discard(root)
                if all(user in inner or user is root for node in (y, *inner) for user in node.users):
                    return _cast_back(root, y)
        reached.update(frontier)
    return None


def _depth(pattern: object) -> int:
    return 1 + max(map(_depth, pattern[1:])) if isinstance(pattern, tuple) else 0


def _matches(node: object, pattern: Any, y: Node, inner: set[Node]) -> bool:
    """Whether ``node`` computes ``pattern`` of ``y``; adds the nodes that do so to ``inner``."""
    if isinstance(pattern, (int, float)):
        return isinstance(node, (int, float)) and abs(node - pattern) <= 1e-9
    if not isinstance(node, Node):
        return False
    if pattern is Y:
        if node.target in _CASTS and node.args[0] is y and _is_wider(node, y):
            inner.add(node)
            return True
        return node is y
    target, *operands = pattern
    if node.target is not target or len(node.args) != len(operands) or node.kwargs:
        return False
    orders = [operands, operands[::-1]] if target in _BINARIES else [operands]  # addition and multiplication commute
    for order in orders:
        inside = {node}
        if all(_matches(a, p, y, inside) for a, p in zip(node.args, order, strict=True)):
            inner |= inside
            return True
    return False


def _is_wider(cast: Node, y: Node) -> bool:
    """Whether ``cast`` only adds digits: the epilogue computes in float32 and rounds once."""
    new, old = value(cast), value(y)
    wider = new.dtype.is_floating_point and torch.promote_types(new.dtype, old.dtype) == new.dtype
    return wider and new.device == old.device


def _cast_back(root: Node, y: Node) -> Node | None:
    """``root``, or the cast that gives its result y's dtype and is its only use."""
    if value(root).dtype == value(y).dtype:
        return root
    user = _only_user(root)
    back = user is not None and user.target in _CASTS and value(user).dtype == value(y).dtype
    return user if back else None
