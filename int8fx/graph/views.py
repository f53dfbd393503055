"""Rules for views of a weight: how a transpose, an expand, a slice or a cast changes a matmul's operand."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch.fx import Node

from .values import value

aten = torch.ops.aten
Size = int | torch.SymInt
Shape = Sequence[Size]


@dataclass(frozen=True)
class Operand:
    """A matmul's operand that is a view of a weight, ``source``.

    dims: ``dims[i]`` is the dimension of the selected source that the operand's dimension i comes from. None if
        dimension i has size 1 or is a broadcast.
    sizes: the operand's shape, None for an unknown size. Rules compare numbers only: comparing a SymInt could add a
        guard.
    rank: of the source after the selections.
    selections: ``(op, dim, *args)`` to apply to the source, which select experts or split output channels. No selection
        is along the source's last dimension.
    """

    source: Node
    dims: tuple[int | None, ...]
    sizes: tuple[Size | None, ...]
    rank: int
    selections: tuple[tuple, ...] = ()


def _unpacked(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """``(2, 3)`` of both ``f(2, 3)`` and ``f([2, 3])``."""
    return tuple(args[0]) if len(args) == 1 and isinstance(args[0], (list, tuple)) else args


# ---- the rules: an operand and a view's arguments -> the operand that the view is, or None ---------------------------


def identity(operand: Operand, *_: object) -> Operand:
    """A copy, or a view that changes nothing."""
    return operand


def _permute(operand: Operand, *order: Any) -> Operand | None:
    order = _unpacked(order)
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
    remaining = [i for i in range(len(operand.dims)) if i != dim % len(operand.dims)]
    return replace(
        operand, dims=tuple(operand.dims[i] for i in remaining), sizes=tuple(operand.sizes[i] for i in remaining)
    )


def _squeeze(operand: Operand, dim: int | None = None) -> Operand | None:
    return _drop(operand, dim) if dim is not None and _is_one(operand.sizes[dim]) else None


def _is_one(size: object) -> bool:
    return isinstance(size, int) and size == 1


def view(operand: Operand, *shape: Any) -> Operand | None:
    """A view that only adds or removes dimensions of size 1."""
    new_sizes = _unpacked(shape)
    old_sizes = [size for size in operand.sizes if isinstance(size, int)]
    if len(old_sizes) != len(operand.sizes) or not all(isinstance(size, int) for size in new_sizes):
        return None
    given = math.prod(size for size in new_sizes if size != -1)
    new_sizes = tuple(math.prod(old_sizes) // given if size == -1 and given else size for size in new_sizes)
    if [size for size in new_sizes if size != 1] != [size for size in old_sizes if size != 1]:
        return None
    dims = iter(dim for dim, size in zip(operand.dims, old_sizes, strict=True) if size != 1)
    return replace(operand, dims=tuple(next(dims) if size != 1 else None for size in new_sizes), sizes=new_sizes)


def expand(operand: Operand, *shape: Any) -> Operand | None:
    """A view that repeats dimensions of size 1, or adds dimensions on the left."""
    shape = _unpacked(shape)
    added = len(shape) - len(operand.dims)
    dims: list[int | None] = [*[None] * added, *operand.dims]
    sizes: list[Size | None] = [*[1] * added, *operand.sizes]
    for i, (new_size, size) in enumerate(zip(shape, sizes, strict=True)):
        number = new_size if isinstance(new_size, int) else None
        if number == -1 or (number is not None and isinstance(size, int) and number == size):
            continue
        if not _is_one(size):
            return None
        dims[i], sizes[i] = None, number
    return replace(operand, dims=tuple(dims), sizes=tuple(sizes))


def select(operand: Operand, dim: int, index: int | Node) -> Operand | None:
    """One expert, or one output channel of each expert. Not one input channel: scales belong to output channels."""
    source_dim = operand.dims[dim]
    if source_dim is None or source_dim == operand.rank - 1 or operand.rank < 3:
        return None
    remaining = _drop(operand, dim)
    return replace(
        remaining,
        dims=tuple(d - 1 if d is not None and d > source_dim else d for d in remaining.dims),
        rank=operand.rank - 1,
        selections=(*operand.selections, (aten.select.int, source_dim, index)),
    )


def _slice(
    operand: Operand, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Operand | None:
    size, source_dim = operand.sizes[dim], operand.dims[dim]
    bounds = [bound for bound in (start, end, step) if bound is not None]
    if not isinstance(size, int) or not all(isinstance(bound, int) for bound in bounds):
        return None
    begin, stop, step = slice(start, end, step).indices(size)
    if (begin, stop, step) == (0, size, 1):
        return operand
    if source_dim is None or source_dim == operand.rank - 1 or step != 1:
        return None
    sizes = list(operand.sizes)
    sizes[dim] = max(0, stop - begin)
    selection = (aten.slice.Tensor, source_dim, begin, stop)
    return replace(operand, sizes=tuple(sizes), selections=(*operand.selections, selection))


def _index(operand: Operand, indices: Sequence[Any]) -> Operand | None:
    """``w[ids]``: a weight for every entry of the 1-D ``ids``."""
    if len(indices) != 1 or not isinstance(indices[0], Node) or operand.dims[0] != 0 or operand.rank != 3:
        return None
    ids = value(indices[0])
    if ids is None or ids.dim() != 1 or ids.dtype not in (torch.int64, torch.int32):
        return None
    count = ids.shape[0] if isinstance(ids.shape[0], int) else None
    selection = (aten.index.Tensor, 0, indices)
    return replace(operand, sizes=(count, *operand.sizes[1:]), selections=(*operand.selections, selection))


def getitem(operand: Operand, index: object) -> Operand | None:
    """``w[i]``, ``w[None]``, ``w[a:b]`` on a tensor."""
    items = index if isinstance(index, tuple) else (index,)
    step: Operand | None = operand
    for i in reversed(range(len(items))):  # from the right, so that dimensions to the left keep their index
        item, dim = items[i], sum(before is not None for before in items[:i])
        if step is None:
            return None
        if item is None:
            step = _unsqueeze(step, dim)
        elif isinstance(item, slice):
            step = _slice(step, dim, item.start, item.stop, 1 if item.step is None else item.step)
        elif isinstance(item, int) and not isinstance(item, bool):
            step = select(step, dim, item)
        else:
            return None
    return step


def _cast(operand: Operand, *args: object, dtype: object = None) -> Operand | None:
    """A cast to another float dtype. Casts to integers or 8 bits give None: they would lose digits that the codes have.

    In a graph without dtypes, ``w.to(x.dtype)`` is assumed to be a cast to a float dtype: x is multiplied with ``w``.
    """

    def is_float(a: object) -> bool:
        if isinstance(a, torch.dtype):
            return a.is_floating_point and a.itemsize > 1
        return isinstance(a, Node) and a.target is getattr and a.args[1] == "dtype"

    return operand if all(is_float(a) for a in (*args, *([] if dtype is None else [dtype]))) else None


def split(operand: Operand, dim: int, sizes: Sequence[int], which: int) -> Operand | None:
    """Part ``which`` of a split into parts of ``sizes``."""
    ends = [0, *accumulate(sizes)]
    which = which + len(sizes) if which < 0 else which
    return _slice(operand, dim, ends[which], ends[which + 1]) if which < len(sizes) else None


VIEWS: dict[object, Callable[..., Operand | None]] = {
    target: rule
    for targets, rule in (
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
    )
    for target in targets
}
"""Function, or name of a method or an attribute -> the rule for it."""


def target_of(node: Node) -> object:
    """A node's function, the name of its method, or the attribute that ``getattr(tensor, "T")`` reads."""
    if node.op == "call_function" and node.target is getattr and len(node.args) == 2:
        return node.args[1]
    return node.target if node.op in ("call_function", "call_method") else None
