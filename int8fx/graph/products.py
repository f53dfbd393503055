"""Reads matrix products out of FX graphs: which node multiplies an activation by (a view of) which weight.

One reader serves three callers: the `lower` pass (weights are ``int8fx::dequantize`` nodes), the conversion of
graphs (weights are ``get_attr`` or placeholder nodes) and the question how a module uses its bare Parameters.
It understands graphs of torch functions and methods (``torch.fx.symbolic_trace``) and of aten ops (``torch.export``,
AOTAutograd), and looks at shapes of weights only: they are static.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.fx import Node

from .views import Operand, Shape, target_of
from .weights import follow

aten = torch.ops.aten


@dataclass(frozen=True)
class Product:
    """``node`` is a product of the activation ``x`` with the weight ``w``.

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
        """Whether x has the shape that `int8fx::linear` takes, where ``matmul`` and ``einsum`` would broadcast it.

        Without ``meta["val"]``, shapes are known as far as the operation tells; an einsum's label is taken to have one
        size, though torch would broadcast a 1.
        """
        x, y = self.x.meta.get("val"), self.node.meta.get("val")
        sizes = dict(zip(self.w.dims, self.w.sizes, strict=True))
        if self.node.target in _MATMUL and (len(self.w.dims) == 3 or (self.form == "left" and x is None)):
            return x is not None and y is not None and x.dim() == 3 and str(x.shape[0]) == str(y.shape[0])
        if self.form == "einsum" and x is not None:
            x_sizes = [str(x.shape[i]) for i in self.x_order]
            batch = [] if self.batch is None else [str(sizes[self.batch])]
            return x_sizes[-1] == str(sizes[self.k]) and (batch in ([], ["None"]) or x_sizes[0] == batch[0])
        return True

    @property
    def layout(self) -> str | None:
        """``NK`` or ``KN``: how the product reads the last two dimensions of its source; None for any other way."""
        last = (self.w.rank - 2, self.w.rank - 1)
        if self.batch not in (None, 0) or self.w.rank != (2 if self.batch is None else 3):
            return None
        return {last: "NK", last[::-1]: "KN"}.get((self.n, self.k))


_LINEAR = (F.linear, torch._C._nn.linear, aten.linear.default)
_MM = (torch.mm, aten.mm.default, "mm")
_MATMUL = (operator.matmul, torch.matmul, aten.matmul.default, "matmul", "__matmul__")
_BMM = (torch.bmm, aten.bmm.default, "bmm")
_ADDMM = (torch.addmm, aten.addmm.default, "addmm")
_BADDBMM = (torch.baddbmm, aten.baddbmm.default, "baddbmm")
_MV = (torch.mv, aten.mv.default, "mv")
_EINSUM = (torch.einsum, aten.einsum.default)


def _grouped_targets() -> tuple:
    targets = [aten._grouped_mm.default, getattr(F, "grouped_mm", None), getattr(torch, "_grouped_mm", None)]
    fallback = getattr(torch.ops.transformers, "grouped_mm_fallback", None)  # transformers' own op, if it is loaded
    return tuple(t for t in (*targets, fallback, getattr(fallback, "default", None)) if t is not None)


def _matrix(
    node: Node, x: object, w: Operand | None, left: bool, batched: bool, bias: Node | None = None
) -> Product | None:
    """A product with a ``[..., K, N]`` operand on the right or a ``[..., N, K]`` operand on the left."""
    if w is None or not isinstance(x, Node) or len(w.dims) != (3 if batched else 2):
        return None
    n, k = (w.dims[-2], w.dims[-1]) if left else (w.dims[-1], w.dims[-2])
    if n is None or k is None:
        return None
    return Product(node, x, w, n, k, w.dims[0] if batched else None, bias, "left" if left else "right")


def read_product(node: Node, shape_of: Callable[[Node], Shape | None]) -> Product | None:
    """The product that ``node`` computes with a weight, or None.

    Products of two activations are None by construction: neither operand leads to a source. Of two weights,
    the one on the right counts as the weight.
    """
    target, args = target_of(node), node.args
    if target is None or "out" in node.kwargs:
        return None
    if target in _LINEAR:
        w = follow(args[1], shape_of) if len(args) > 1 else follow(node.kwargs.get("weight"), shape_of)
        bias = args[2] if len(args) > 2 else node.kwargs.get("bias")
        if w is None or len(w.dims) != 2 or None in w.dims or not args:
            return None
        return Product(node, args[0], w, w.dims[0], w.dims[1], bias=bias)
    if target in _EINSUM:
        return _einsum(node, shape_of)
    if target in _grouped_targets():
        w = follow(args[1], shape_of) if len(args) > 1 else None
        rest = dict(zip(("offs", "bias", "out_dtype"), args[2:], strict=False)) | node.kwargs
        offsets = rest.pop("offs", None)
        if w is None or w.dims not in ((0, 2, 1), (0, 1, 2)) or offsets is None or set(rest.values()) - {None}:
            return None
        return Product(node, args[0], w, w.dims[2], w.dims[1], 0, form="grouped", offsets=offsets)
    if target in _ADDMM or target in _BADDBMM:
        if len(args) != 3 or node.kwargs.get("beta", 1) != 1 or node.kwargs.get("alpha", 1) != 1:
            return None
        return _matrix(node, args[1], follow(args[2], shape_of), False, target in _BADDBMM, bias=args[0])
    if len(args) != 2:
        return None
    if target in _MV:
        w = follow(args[0], shape_of)
        if w is None or len(w.dims) != 2 or None in w.dims:
            return None
        return Product(node, args[1], w, w.dims[0], w.dims[1])
    if target in (*_MM, *_MATMUL, *_BMM):
        for left in (False, True):
            w = follow(args[0 if left else 1], shape_of)
            batched = target in _BMM or (target in _MATMUL and w is not None and len(w.dims) == 3)
            product = _matrix(node, args[1 if left else 0], w, left, batched)
            if product is not None:
                return product
    return None


def _einsum(node: Node, shape_of: Callable[[Node], Shape | None]) -> Product | None:
    """``einsum`` of two operands that sums over one label of the weight and keeps another."""
    args = node.args[1:]
    if len(args) == 1 and isinstance(args[0], (list, tuple)):
        args = tuple(args[0])
    equation = node.args[0]
    if len(args) != 2 or not isinstance(equation, str) or "." in equation or "->" not in equation:
        return None
    inputs, out = equation.replace(" ", "").split("->")
    labels = inputs.split(",")
    for i in (1, 0):
        w, x = follow(args[i], shape_of), args[1 - i]
        if w is None or not isinstance(x, Node) or len(labels) != 2:
            continue
        w_labels, x_labels = labels[i], labels[1 - i]
        if any(len(set(ls)) != len(ls) for ls in (w_labels, x_labels, out)) or len(w_labels) != len(w.dims):
            return None
        k = [c for c in w_labels if c in x_labels and c not in out]
        n = [c for c in w_labels if c not in x_labels and c in out]
        batch = [c for c in w_labels if c in x_labels and c in out]
        m = [c for c in x_labels if c in out and c not in batch]
        if len(k) != 1 or len(n) != 1 or len(batch) > 1 or len(w_labels) != 2 + len(batch):
            return None
        if len(x_labels) != len(batch) + len(m) + 1 or (batch and len(m) != 1):
            return None
        dims = {c: w.dims[w_labels.index(c)] for c in w_labels}
        if None in dims.values():
            return None
        y_labels = [*batch, *m, *n]
        return Product(
            node, x, w, dims[n[0]], dims[k[0]], dims[batch[0]] if batch else None, form="einsum",
            x_order=tuple(x_labels.index(c) for c in [*batch, *m, *k]),
            y_order=tuple(y_labels.index(c) for c in out),
        )  # fmt: skip
    return None
