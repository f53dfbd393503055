"""Rules for views of a weight: what a transpose, an expand, a slice or a cast makes of a product's operand."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch.fx import Node

aten = torch.ops.aten
Shape = Sequence[int]


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


def identity(operand: Operand, *_: object) -> Operand:
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


def view(operand: Operand, *shape: int | Sequence[int]) -> Operand | None:
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


def expand(operand: Operand, *shape: int | Node | Sequence) -> Operand | None:
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


def select(operand: Operand, dim: int, index: int | Node) -> Operand | None:
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


def getitem(operand: Operand, index: object) -> Operand | None:
    """``w[i]``, ``w[None]``, ``w[a:b]`` on a tensor."""
    items = index if isinstance(index, tuple) else (index,)
    for i in reversed(range(len(items))):  # from the right, so that the dimensions to the left keep their places
        item, dim = items[i], sum(before is not None for before in items[:i])
        if item is None:
            step: Operand | None = _unsqueeze(operand, dim)
        elif isinstance(item, slice):
            step = _slice(operand, dim, item.start, item.stop, item.step or 1)
        elif isinstance(item, int) and not isinstance(item, bool):
            step = select(operand, dim, item)
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


def split(operand: Operand, dim: int, sizes: Sequence[int], which: int) -> Operand | None:
    ends = [0, *accumulate(sizes)]
    which = which + len(sizes) if which < 0 else which
    return _slice(operand, dim, ends[which], ends[which + 1]) if which < len(sizes) else None


VIEWS: dict[object, Callable[..., Operand | None]] = {}
for _targets, _view_rule in (
    ((aten.permute.default, torch.permute, "permute"), _permute),
    ((aten.transpose.int, torch.transpose, torch.swapaxes, "transpose", "swapaxes"), _transpose),
    ((aten.t.default, torch.t, "t"), _t),
    ((aten.numpy_T.default, "T"), _t),
    ((aten.mT.default, torch.adjoint, "mT"), _transpose),
    ((aten.unsqueeze.default, torch.unsqueeze, "unsqueeze"), _unsqueeze),
    ((aten.squeeze.dim, torch.squeeze, "squeeze"), _squeeze),
    ((aten.view.default, aten._unsafe_view.default, aten.reshape.default, torch.reshape, "view", "reshape"), view),
    ((aten.expand.default, "expand"), expand),
    ((aten.select.int, torch.select, "select"), select),
    ((aten.slice.Tensor,), _slice),
    ((aten.index.Tensor,), _index),
    ((operator.getitem, "__getitem__"), getitem),
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
        identity,
    ),
    ((torch.ops.prims.convert_element_type.default, aten.to.dtype, aten._to_copy.default, "to", "type"), _cast),
):
    for _target in _targets:
        VIEWS[_target] = _view_rule


def target_of(node: Node) -> object:
    """A node's function, the name of its method, or the attribute that ``getattr(tensor, "T")`` reads."""
    if node.op == "call_function" and node.target is getattr and len(node.args) == 2:
        return node.args[1]
    return node.target if node.op in ("call_function", "call_method") else None
