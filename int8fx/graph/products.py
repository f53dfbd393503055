"""Reads matmuls out of FX graphs: which node multiplies an activation by (a view of) which weight.

One reader serves three callers: the `lower` pass (weights are ``int8fx::dequantize`` nodes), the conversion of
graphs (weights are ``get_attr`` or placeholder nodes), and `conversion.usage`, which examines bare Parameters of a
module. It understands graphs of torch functions and methods (``torch.fx.symbolic_trace``) and of aten operators
(``torch.export``, AOTAutograd). It reads only the shapes of weights, which are static.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from .values import sizes, value
from .views import Operand, Shape, target_of
from .weights import follow

aten = torch.ops.aten


@dataclass(frozen=True)
class Product:
    """``node`` is a matmul of the activation ``x`` with the weight ``w``.

    n, k: dimensions of the (selected) source along the output and the summed channels; batch: that of the experts.
    form: how x and y are laid out: ``right`` (x [..., K], y [..., N]), ``left`` (x [..., K, M], y [..., N, M]),
        ``einsum`` (permuted as ``x_order`` and ``y_order`` say), ``grouped`` (x [S, K], with ``offsets``).
    """

    node: Node
    x: Node
    w: Operand
    n: int
    k: int
    batch: int | None = None
    bias: Node | None = None
    form: str = "right"
    offsets: Node | None = None
    x_order: tuple[int, ...] = ()
    y_order: tuple[int, ...] = ()

    def fits(self) -> bool:
        """Whether x has the shape that `int8fx::linear` takes. ``matmul`` and ``einsum`` also broadcast other shapes.

        Without ``meta["val"]``, only what the operation implies about shapes is used. A label of an einsum is then
        assumed to have one size, although torch would broadcast a 1.
        """
        x, y = value(self.x), value(self.node)
        size_of = dict(zip(self.w.dims, sizes(self.w.sizes), strict=True))
        batch = "None" if self.batch is None else size_of[self.batch]  # "None" also if their number is unknown
        if target_of(self.node) in _MATMUL:
            if len(self.w.dims) == 2:
                return x is not None or self.form == "right"  # on the right, x could be a vector
            if x is None or y is None or x.dim() != 3:
                return False
            x_batch, y_batch = sizes((x.shape[0], y.shape[0]))
            return x_batch == y_batch and batch in ("None", x_batch)
        if self.form == "einsum" and x is not None:
            x_sizes = sizes(x.shape[i] for i in self.x_order)
            return x_sizes[-1] == size_of[self.k] and batch in ("None", x_sizes[0])
        return True

    @property
    def layout(self) -> str | None:
        """``NK`` or ``KN``: the order of the source's last two dimensions in this matmul. None if it is neither."""
        last = (self.w.rank - 2, self.w.rank - 1)
        if self.batch not in (None, 0) or self.w.rank != (2 if self.batch is None else 3):
            return None
        return {last: "NK", last[::-1]: "KN"}.get((self.n, self.k))


def read_product(node: Node, shape_of: Callable[[Node], Shape | None]) -> Product | None:
    """The matmul that ``node`` computes with a weight, or None.

    A matmul of two activations gives None, as neither operand is a view of a source. If both operands are weights, the
    right one counts as the weight.

    Args:
        node: any node.
        shape_of: the shape of a source node, None for any other node.
    """
    target = target_of(node)
    read = _READERS.get(target, _grouped if target in _transformers_grouped_mm() else None)
    if read is None or "out" in node.kwargs:
        return None
    return read(node, lambda argument: follow(argument, shape_of))


# ---- readers: a node of one kind of operation -> its matmul or None --------------------------------------------------

_Follow = Callable[[object], Operand | None]


def _product(node: Node, x: object, w: Operand, n: int | None, k: int | None, **fields: Any) -> Product | None:
    """The matmul; None if x is no node, or if n or k is a broadcast dimension."""
    if not isinstance(x, Node) or n is None or k is None:
        return None
    return Product(node, x, w, n, k, **fields)


def _arguments(node: Node, *names: str) -> list[Any]:
    """The arguments called ``names``, by position or by keyword; None for those that are not given."""
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    return [given.get(name) for name in names]


def _linear(node: Node, follow: _Follow) -> Product | None:
    x, weight, bias = _arguments(node, "input", "weight", "bias")
    w = follow(weight)
    if w is None or len(w.dims) != 2:
        return None
    return _product(node, x, w, *w.dims, bias=bias)


def _mv(node: Node, follow: _Follow) -> Product | None:
    w = follow(node.args[0]) if len(node.args) == 2 else None
    if w is None or len(w.dims) != 2:
        return None
    return _product(node, node.args[1], w, *w.dims)


def _mm(node: Node, follow: _Follow) -> Product | None:
    return _on_either_side(node, follow, ranks=(2,))


def _bmm(node: Node, follow: _Follow) -> Product | None:
    return _on_either_side(node, follow, ranks=(3,))


def _matmul(node: Node, follow: _Follow) -> Product | None:
    return _on_either_side(node, follow, ranks=(2, 3))


def _on_either_side(node: Node, follow: _Follow, ranks: tuple[int, ...]) -> Product | None:
    if len(node.args) != 2:
        return None
    left, right = node.args
    return _on_the_right(node, left, follow(right), ranks) or _on_the_left(node, follow(left), right, ranks)


def _on_the_right(
    node: Node, x: object, w: Operand | None, ranks: tuple[int, ...], bias: object = None
) -> Product | None:
    """``x @ w``, w ``[..., K, N]``."""
    if w is None or len(w.dims) not in ranks:
        return None
    *batch, k, n = w.dims
    return _product(node, x, w, n, k, batch=batch[0] if batch else None, bias=bias)


def _on_the_left(node: Node, w: Operand | None, x: object, ranks: tuple[int, ...]) -> Product | None:
    """``w @ x``, w ``[..., N, K]``."""
    if w is None or len(w.dims) not in ranks:
        return None
    *batch, n, k = w.dims
    return _product(node, x, w, n, k, batch=batch[0] if batch else None, form="left")


def _addmm(node: Node, follow: _Follow) -> Product | None:
    return _bias_and_matmul(node, follow, ranks=(2,))


def _baddbmm(node: Node, follow: _Follow) -> Product | None:
    return _bias_and_matmul(node, follow, ranks=(3,))


def _bias_and_matmul(node: Node, follow: _Follow, ranks: tuple[int, ...]) -> Product | None:
    if len(node.args) != 3 or node.kwargs.get("beta", 1) != 1 or node.kwargs.get("alpha", 1) != 1:
        return None
    bias, x, weight = node.args
    return _on_the_right(node, x, follow(weight), ranks, bias)


def _grouped(node: Node, follow: _Follow) -> Product | None:
    """``grouped_mm(x [S, K], w [E, K, N], offsets)``."""
    x, weight, *others = node.args if len(node.args) > 1 else (None, None)
    w = follow(weight)
    options = dict(zip(("offs", "bias", "out_dtype"), others, strict=False)) | node.kwargs
    offsets = options.pop("offs", None)
    if w is None or w.dims not in ((0, 2, 1), (0, 1, 2)) or offsets is None or set(options.values()) - {None}:
        return None
    return _product(node, x, w, w.dims[2], w.dims[1], batch=0, form="grouped", offsets=offsets)


def _einsum(node: Node, follow: _Follow) -> Product | None:
    """``einsum`` of two operands, one of them a weight."""
    equation, *operands = node.args or (None,)
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    if len(operands) != 2 or not isinstance(equation, str) or "." in equation or "->" not in equation:
        return None
    inputs, out = equation.replace(" ", "").split("->")
    labels = inputs.split(",")
    for i in (1, 0):
        w, x = follow(operands[i]), operands[1 - i]
        if w is not None and isinstance(x, Node) and len(labels) == 2:
            return _einsum_of(node, x, w, labels[1 - i], labels[i], out)
    return None


def _einsum_of(node: Node, x: Node, w: Operand, x_labels: str, w_labels: str, out: str) -> Product | None:
    """A matmul sums over one label of the weight, keeps another, and has at most one that both operands keep."""
    if any(len(set(labels)) != len(labels) for labels in (w_labels, x_labels, out)) or len(w_labels) != len(w.dims):
        return None
    k = [c for c in w_labels if c in x_labels and c not in out]
    n = [c for c in w_labels if c not in x_labels and c in out]
    batch = [c for c in w_labels if c in x_labels and c in out]
    m = [c for c in x_labels if c in out and c not in batch]
    if len(k) != 1 or len(n) != 1 or len(batch) > 1 or len(w_labels) != 2 + len(batch):
        return None
    if len(x_labels) != len(batch) + len(m) + 1 or (batch and len(m) != 1):
        return None
    dim_of = dict(zip(w_labels, w.dims, strict=True))
    if None in dim_of.values():
        return None
    return _product(
        node, x, w, dim_of[n[0]], dim_of[k[0]], batch=dim_of[batch[0]] if batch else None, form="einsum",
        x_order=_order([*batch, *m, *k], x_labels), y_order=_order(out, [*batch, *m, *n]),
    )  # fmt: skip


def _order(labels: Sequence[str], of: Sequence[str]) -> tuple[int, ...]:
    return tuple(of.index(label) for label in labels)


_MATMUL = (operator.matmul, torch.matmul, aten.matmul.default, "matmul", "__matmul__")
_READERS: dict[object, Callable[[Node, _Follow], Product | None]] = {
    target: reader
    for reader, targets in (
        (_linear, (F.linear, torch._C._nn.linear, aten.linear.default)),
        (_mm, (torch.mm, aten.mm.default, "mm")),
        (_matmul, _MATMUL),
        (_bmm, (torch.bmm, aten.bmm.default, "bmm")),
        (_addmm, (torch.addmm, aten.addmm.default, "addmm")),
        (_baddbmm, (torch.baddbmm, aten.baddbmm.default, "baddbmm")),
        (_mv, (torch.mv, aten.mv.default, "mv")),
        (_einsum, (torch.einsum, aten.einsum.default)),
        (_grouped, (aten._grouped_mm.default, F.grouped_mm, torch._grouped_mm)),
    )
    for target in targets
}
"""Function or name of a method -> the reader for it."""


def _transformers_grouped_mm() -> tuple[object, ...]:
    """The op that transformers calls if torch has no grouped matmul. Empty until transformers has defined it."""
    fallback = getattr(torch.ops.transformers, "grouped_mm_fallback", None)
    return () if fallback is None else (fallback, fallback.default)
