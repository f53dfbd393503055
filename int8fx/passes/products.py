"""Reads matrix products out of FX graphs: which node multiplies an activation by (a view of) which weight.

One reader serves three callers: the `lower` pass (weights are ``int8fx::dequantize`` nodes), the conversion of
graphs (weights are ``get_attr`` or placeholder nodes) and the question how a module uses its bare Parameters.
It understands graphs of torch functions and methods (``torch.fx.symbolic_trace``) and of aten ops (``torch.export``,
AOTAutograd), and looks at shapes of weights only: they are static.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

aten = torch.ops.aten
Shape = Sequence[int]

# ---- the weight operand: back through views to its source -----------------------------------------------------------


@dataclass(frozen=True)
class Operand:
    """A weight operand, ``[..]`` a view of ``source``.

    dims: for each dimension of the operand the dimension of the (selected) source it is; None if it has size 1 or is
        a broadcast.
    sizes: the operand's shape; None where it is not known. Rules look at numbers only: comparing a SymInt adds a guard.
    rank: of the source after the selections.
    selections: ``(op, dim, *args)`` applied to the source: experts taken, rows split off; never along its last
        dimension.
    """

    source: Node
    dims: tuple[int | None, ...]
    sizes: tuple[int | None, ...]
    rank: int
    selections: tuple[tuple, ...] = ()


def _identity(operand: Operand, *_: object) -> Operand:
    return operand


def _permute(operand: Operand, *order: int | Sequence[int]) -> Operand | None:
    if len(order) == 1 and isinstance(order[0], (list, tuple)):
        order = tuple(order[0])
    n = len(operand.dims)
    if sorted(o % n for o in order) != list(range(n)):
        return None
    return replace(operand, dims=tuple(operand.dims[o] for o in order), sizes=tuple(operand.sizes[o] for o in order))


def _transpose(operand: Operand, a: int = -2, b: int = -1) -> Operand | None:
    order = list(range(len(operand.dims)))
    if len(order) < 2:
        return None
    order[a], order[b] = order[b], order[a]
    return _permute(operand, order)


def _t(operand: Operand) -> Operand | None:
    return _transpose(operand) if len(operand.dims) == 2 else None


def _unsqueeze(operand: Operand, dim: int) -> Operand:
    dim %= len(operand.dims) + 1
    dims, sizes = list(operand.dims), list(operand.sizes)
    dims.insert(dim, None)
    sizes.insert(dim, 1)
    return replace(operand, dims=tuple(dims), sizes=tuple(sizes))


def _drop(operand: Operand, dim: int) -> Operand:
    keep = [i for i in range(len(operand.dims)) if i != dim % len(operand.dims)]
    return replace(operand, dims=tuple(operand.dims[i] for i in keep), sizes=tuple(operand.sizes[i] for i in keep))


def _squeeze(operand: Operand, dim: int | None = None) -> Operand | None:
    if dim is None or not _is_one(operand.sizes[dim]):
        return None
    return _drop(operand, dim)


def _is_one(size: object) -> bool:
    return isinstance(size, int) and size == 1


def _view(operand: Operand, *shape: int | Sequence[int]) -> Operand | None:
    """Only views that add or remove dimensions of size 1."""
    if len(shape) == 1 and isinstance(shape[0], (list, tuple)):
        shape = tuple(shape[0])
    if not all(isinstance(s, int) for s in (*shape, *operand.sizes)):
        return None
    total = 1
    for s in operand.sizes:
        total *= s
    known = 1
    for s in shape:
        known *= s if s != -1 else 1
    shape = tuple(total // known if s == -1 and known else s for s in shape)
    real = [(d, s) for d, s in zip(operand.dims, operand.sizes, strict=True) if s != 1]
    if [s for s in shape if s != 1] != [s for _, s in real]:
        return None
    rest = iter(real)
    return replace(operand, dims=tuple(next(rest)[0] if s != 1 else None for s in shape), sizes=shape)


def _expand(operand: Operand, *shape: int | Node | Sequence) -> Operand | None:
    if len(shape) == 1 and isinstance(shape[0], (list, tuple)):
        shape = tuple(shape[0])
    new = len(shape) - len(operand.dims)
    dims, sizes = [None] * new + list(operand.dims), [1] * new + list(operand.sizes)
    for i, s in enumerate(shape):
        kept = isinstance(s, int) and (s == -1 or (isinstance(sizes[i], int) and s == sizes[i]))
        if not kept:
            if not _is_one(sizes[i]):
                return None
            dims[i], sizes[i] = None, s if isinstance(s, int) else None
    return replace(operand, dims=tuple(dims), sizes=tuple(sizes))


def _select(operand: Operand, dim: int, index: int | Node) -> Operand | None:
    dim %= len(operand.dims)
    source_dim = operand.dims[dim]
    if source_dim is None or source_dim == operand.rank - 1 or operand.rank < 3:
        return None
    rest = _drop(operand, dim)
    return replace(
        rest,
        dims=tuple(d - 1 if d is not None and d > source_dim else d for d in rest.dims),
        rank=operand.rank - 1,
        selections=(*operand.selections, (aten.select.int, source_dim, index)),
    )


def _slice(operand: Operand, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1):
    dim %= len(operand.dims)
    size, source_dim = operand.sizes[dim], operand.dims[dim]
    bounds = [b for b in (start, end) if b is not None]
    if not all(isinstance(b, int) for b in (size, step, *bounds)):
        return None
    begin, stop, step = slice(start, end, step).indices(size)
    if (begin, stop, step) == (0, size, 1):
        return operand
    if source_dim is None or source_dim == operand.rank - 1 or step != 1:
        return None
    sizes = list(operand.sizes)
    sizes[dim] = max(0, stop - begin)
    return replace(
        operand,
        sizes=tuple(sizes),
        selections=(*operand.selections, (aten.slice.Tensor, source_dim, begin, stop)),
    )


def _index(operand: Operand, indices: Sequence) -> Operand | None:
    """``w[ids]``: a weight for every entry of the 1-D ``ids``."""
    if len(indices) != 1 or not isinstance(indices[0], Node) or operand.dims[0] != 0 or operand.rank != 3:
        return None
    ids = indices[0].meta.get("val")
    if ids is None or ids.dim() != 1 or ids.dtype not in (torch.int64, torch.int32):
        return None
    return replace(
        operand,
        sizes=(ids.shape[0] if isinstance(ids.shape[0], int) else None, *operand.sizes[1:]),
        selections=(*operand.selections, (aten.index.Tensor, 0, indices)),
    )


def _getitem(operand: Operand, index: object) -> Operand | None:
    """``w[i]``, ``w[None]``, ``w[a:b]`` on a tensor."""
    items = index if isinstance(index, tuple) else (index,)
    for i in reversed(range(len(items))):  # from the right, so that the dimensions to the left keep their places
        item, dim = items[i], sum(before is not None for before in items[:i])
        if item is None:
            step: Operand | None = _unsqueeze(operand, dim)
        elif isinstance(item, slice):
            step = _slice(operand, dim, item.start, item.stop, item.step or 1)
        elif isinstance(item, int) and not isinstance(item, bool):
            step = _select(operand, dim, item)
        else:
            return None
        if step is None:
            return None
        operand = step
    return operand


def _cast(operand: Operand, *args: object, dtype: object = None) -> Operand | None:
    """A cast to another float dtype; to integers or to 8 bits would change the values for good."""

    def is_float(a: object) -> bool:
        if isinstance(a, torch.dtype):
            return a.is_floating_point and a.itemsize > 1
        return isinstance(a, Node) and a.target is getattr and a.args[1] == "dtype"

    return operand if all(is_float(a) for a in (*args, *([] if dtype is None else [dtype]))) else None


def _split(operand: Operand, dim: int, sizes: Sequence[int], which: int) -> Operand | None:
    ends = [0, *accumulate(sizes)]
    which = which + len(sizes) if which < 0 else which
    return _slice(operand, dim, ends[which], ends[which + 1]) if which < len(sizes) else None


_VIEWS: dict[object, Callable[..., Operand | None]] = {}
for _targets, _view_rule in (
    ((aten.permute.default, torch.permute, "permute"), _permute),
    ((aten.transpose.int, torch.transpose, torch.swapaxes, "transpose", "swapaxes"), _transpose),
    ((aten.t.default, torch.t, "t"), _t),
    ((aten.numpy_T.default, "T"), _t),
    ((aten.mT.default, torch.adjoint, "mT"), _transpose),
    ((aten.unsqueeze.default, torch.unsqueeze, "unsqueeze"), _unsqueeze),
    ((aten.squeeze.dim, torch.squeeze, "squeeze"), _squeeze),
    ((aten.view.default, aten._unsafe_view.default, aten.reshape.default, torch.reshape, "view", "reshape"), _view),
    ((aten.expand.default, "expand"), _expand),
    ((aten.select.int, torch.select, "select"), _select),
    ((aten.slice.Tensor,), _slice),
    ((aten.index.Tensor,), _index),
    ((operator.getitem, "__getitem__"), _getitem),
    (
        (
            aten.clone.default,
            aten.detach.default,
            aten.alias.default,
            aten.contiguous.default,
            aten.lift_fresh_copy.default,
            torch.detach,
            torch.clone,
            "detach",
            "clone",
            "contiguous",
            "float",
            "half",
            "bfloat16",
        ),
        _identity,
    ),
    ((torch.ops.prims.convert_element_type.default, aten.to.dtype, aten._to_copy.default, "to", "type"), _cast),
):
    for _target in _targets:
        _VIEWS[_target] = _view_rule


def _target_of(node: Node) -> object:
    """A node's function, the name of its method, or the attribute that ``getattr(tensor, "T")`` reads."""
    if node.op == "call_function" and node.target is getattr and len(node.args) == 2:
        return node.args[1]
    return node.target if node.op in ("call_function", "call_method") else None


_IN_PLACE = {"setitem", *(f"i{op}" for op in ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow"))}
_OTHER_VIEWS = ("H", "mH", "data", "real", "imag")  # attributes


def _first(node: Node) -> tuple:
    """What ``node`` takes as ``self``: a tensor or several."""
    first = node.args[0] if node.args else node.kwargs.get("input")
    return tuple(first) if isinstance(first, (list, tuple)) else (first,)


def _name(node: Node) -> str:
    target = _target_of(node)
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
    target, name = _target_of(user), _name(user)
    if target in _VIEWS or (user.target is getattr and name in _OTHER_VIEWS):
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
    target = _target_of(node)
    rule = _VIEWS.get(target)
    if rule is None or not node.args:
        return None
    if rule is _getitem and isinstance(node.args[0], Node) and isinstance(node.args[1], int):
        split = _follow_split(node.args[0], node.args[1], shape_of)
        if split is not None:
            return split
    operand = follow(node.args[0], shape_of)
    if operand is None:
        return None
    args = node.args[1:] if node.target is not getattr else ()
    kwargs = {k: v for k, v in node.kwargs.items() if k not in ("memory_format", "layout", "pin_memory", "copy")}
    if rule is _identity or (rule in (_view, _expand) and _same_shape(node, node.args[0])):
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
    target = _target_of(node)
    if target in (aten.unbind.int, torch.unbind, "unbind"):
        operand = follow(node.args[0], shape_of)
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        return None if operand is None else _select(operand, dim, which)
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
        return _split(operand, dim, size, which)
    if not isinstance(size, int) or size < 1 or not isinstance(total, int) or not total:
        return None
    step = size if by_size else -(-total // size)
    return _split(operand, dim, [min(step, total - i) for i in range(0, total, step)], which)


# ---- products -------------------------------------------------------------------------------------------------------


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
    target, args = _target_of(node), node.args
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


# ---- putting int8fx ops in a product's place ------------------------------------------------------------------------


def call(graph: Graph, target: Callable, *args: object, **kwargs: object) -> Node:
    """A new node at the graph's insertion point, with ``meta["val"]`` computed from its arguments' if they have it."""
    node = graph.call_function(target, args, kwargs)
    inputs = node.all_input_nodes
    if inputs and all("val" in i.meta for i in inputs):
        with torch.no_grad():
            node.meta["val"] = target(*torch.fx.map_arg(args, lambda n: n.meta["val"]), **kwargs)
    return node


def emit(graph: Graph, product: Product, codes: Node, scale: Node, threshold: float) -> Node:
    """int8fx ops for ``product`` at the graph's insertion point.

    ``codes [..., N, K]`` and ``scale [..., N]`` are those of its source.
    """
    ops = torch.ops.int8fx
    for op, dim, *args in product.w.selections:
        inserted = args if op is aten.index.Tensor else (dim, *args)
        codes, scale = (call(graph, op, t, *inserted) for t in (codes, scale))
    if product.form == "grouped":
        return call(graph, ops.grouped_linear.default, product.x, codes, scale, None, product.offsets, threshold)
    x = product.x
    if product.form == "left":
        x = _swap_last(graph, x)
    elif product.form == "einsum" and product.x_order != tuple(range(len(product.x_order))):
        x = call(graph, aten.permute.default, x, list(product.x_order))
    bias = product.bias
    per_channel = bias is None or _is_vector(bias, product)
    y = call(graph, ops.linear.default, x, codes, scale, bias if per_channel else None, threshold)
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
