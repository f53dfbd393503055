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

Only where the matmul's result has no other use, and nothing broadcasts or changes dtype.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from ..graph.emit import erase_dead, read_epilogue, read_weight, with_epilogue
from ..graph.verify import verify
from ..schemes.weight import Epilogue

aten = torch.ops.aten
_CASTS = (torch.ops.prims.convert_element_type.default, aten._to_copy.default)


def fold(graph: Graph) -> int:
    """Rewrites ``graph`` in place; returns how many operations it folded."""
    targets = (torch.ops.int8fx.linear.default, torch.ops.int8fx.linear_quantized.default)
    count = 0
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in targets and "val" in node.meta:
            while (step := _next(node)) is not None:
                old, epilogue = step
                with graph.inserting_before(old):
                    new = with_epilogue(graph, node, epilogue)
                verify(old, new)
                old.replace_all_uses_with(new)
                erase_dead(old)
                node, count = new, count + 1
    return count


def _next(node: Node) -> tuple[Node, Epilogue] | None:
    """The operation that can be folded into ``node`` next, and the epilogue that does both."""
    epilogue = read_epilogue(node)
    if epilogue.other is not None or not node.users:
        return None
    _drop_clone(node)
    if epilogue.activation == "none":
        for name, pattern in _ACTIVATIONS:
            root = _match_activation(node, pattern)
            if root is not None:
                return root, epilogue._replace(activation=name)
    user = next(iter(node.users))
    binary = {aten.add.Tensor: "add", aten.mul.Tensor: "mul"}.get(user.target)
    if len(node.users) != 1 or binary is None or user.kwargs:
        return None
    operand = user.args[1] if user.args[0] is node else user.args[0]
    if not isinstance(operand, Node) or operand is node or not isinstance(operand.meta.get("val"), torch.Tensor):
        return None
    y, val = node.meta["val"], operand.meta["val"]
    if val.device != y.device or not val.is_floating_point() or user.meta["val"].dtype != y.dtype:
        return None
    operand_shape, y_shape = ([str(s) for s in t.shape] for t in (val, y))  # comparing symbols could add a guard
    if binary == "add" and epilogue.activation == "none" and epilogue.bias is None:
        codes = read_weight(node).codes.meta["val"]
        if codes.dim() == 2 and y.dim() > 1 and operand_shape == y_shape[-1:]:
            return user, epilogue._replace(bias=operand)
    if operand_shape != y_shape:
        return None
    return user, epilogue._replace(other=operand, binary=binary)


def _drop_clone(node: Node) -> None:
    """``clone(y)`` of a product with no other use is y: dropout in eval mode leaves one."""
    user = next(iter(node.users))
    if len(node.users) == 1 and user.target is aten.clone.default and user.users and user.meta["val"].is_contiguous():
        user.replace_all_uses_with(node)
        erase_dead(user)


# ---- activations, as AOTAutograd writes them ------------------------------------------------------------------------
# A pattern is (target, operand, ...); Y is the product's result, numbers match numbers.

Y = "y"
_ERF = (aten.erf.default, (aten.mul.Tensor, Y, 0.7071067811865476))
_CUBE = (aten.mul.Tensor, (aten.mul.Tensor, (aten.mul.Tensor, Y, Y), Y), 0.044715)
_TANH = (aten.tanh.default, (aten.mul.Tensor, (aten.add.Tensor, Y, _CUBE), 0.7978845608028654))
_POWER = (aten.mul.Tensor, (aten.pow.Tensor_Scalar, Y, 3), 0.044715)  # as GPT-2's own code writes it
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
    """The node that computes ``pattern`` of ``y`` and, but for it, is all that ``y`` is used for."""
    reached, frontier = {y}, [y]
    depth = _depth(pattern) + 2  # and a cast to float32 and back
    for _ in range(depth):
        frontier = [u for n in frontier for u in n.users if u not in reached]
        for root in frontier:
            inner: set[Node] = set()
            if _matches(root, pattern, y, inner):
                inner.discard(root)
                if all(user in inner or user is root for n in (y, *inner) for user in n.users):
                    return _cast_back(root, y)
        reached.update(frontier)
    return None


def _cast_back(root: Node, y: Node) -> Node | None:
    if root.meta["val"].dtype == y.meta["val"].dtype:
        return root
    users = list(root.users)
    back = len(users) == 1 and users[0].target in _CASTS and users[0].meta["val"].dtype == y.meta["val"].dtype
    return users[0] if back else None


def _is_wider(cast: Node, y: Node) -> bool:
    """Whether ``cast`` only adds digits: the epilogue computes in float32 and rounds once."""
    new, old = cast.meta["val"], y.meta["val"]
    wider = new.dtype.is_floating_point and torch.promote_types(new.dtype, old.dtype) == new.dtype
    return wider and new.device == old.device


def _depth(pattern: object) -> int:
    return 1 + max(map(_depth, pattern[1:])) if isinstance(pattern, tuple) else 0


def _matches(node: object, pattern: object, y: Node, inner: set[Node]) -> bool:
    if isinstance(pattern, (int, float)):
        return isinstance(node, (int, float)) and abs(node - pattern) <= 1e-9
    if not isinstance(node, Node):
        return False
    if pattern is Y:
        if node is y:
            return True
        if node.target in _CASTS and node.args[0] is y and _is_wider(node, y):
            inner.add(node)
            return True
        return False
    target, *operands = pattern
    if node.target is not target or len(node.args) != len(operands) or node.kwargs:
        return False
    orders = [operands, operands[::-1]] if target in (aten.mul.Tensor, aten.add.Tensor) else [operands]
    for order in orders:
        found: set[Node] = {node}
        if all(_matches(a, p, y, found) for a, p in zip(node.args, order, strict=True)):
            inner |= found
            return True
    return False
