"""With any views between a weight and a matmul, the rewritten graph gives the same result."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.graphs import (
    LEVELS,
    aten,
    check_left,
    check_lowered,
    count_nodes,
    exact,
    integer_weight,
    integers,
    lowered,
    ops,
)
from torch import Tensor

from int8fx.graph.weights import follow

# ---- views of a weight, drawn ----------------------------------------------------------------------------------------


@st.composite
def views(draw, v: Tensor) -> Callable[[Tensor], Tensor]:
    """One step from a weight (or a view of it, of the shape of ``v``), mostly a view, as functions and methods."""
    n = v.dim()
    dim = st.integers(-n, n - 1) if n else st.just(0)
    kind = draw(st.sampled_from(_STEPS))
    if kind == "permute":
        order = draw(st.permutations(range(n)))
        order = [o - n if draw(st.booleans()) else o for o in order]
        forms = [lambda v: v.permute(order), lambda v: v.permute(*order), lambda v: torch.permute(v, order)]
        return draw(st.sampled_from(forms))
    if kind == "transpose":
        a, b = draw(dim), draw(dim)
        forms = [lambda v: v.transpose(a, b), lambda v: torch.swapaxes(v, a, b)]
        forms += [lambda v: v.mT, lambda v: torch.adjoint(v)] if n > 1 else []
        forms += [lambda v: v.t(), lambda v: v.T, lambda v: torch.t(v)] if n == 2 else []
        return draw(st.sampled_from(forms))
    if kind == "unsqueeze":
        a = draw(st.integers(-n - 1, n))
        return draw(st.sampled_from([lambda v: v.unsqueeze(a), lambda v: torch.unsqueeze(v, dim=a)]))
    if kind == "squeeze":
        a = draw(dim)
        return draw(st.sampled_from([lambda v: v.squeeze(a), lambda v: torch.squeeze(v, a), lambda v: v.squeeze()]))
    if kind == "reshape":
        shape = draw(_shapes(list(v.shape)))
        if shape and draw(st.booleans()):
            shape[draw(st.integers(0, len(shape) - 1))] = -1
        return draw(st.sampled_from([lambda v: v.reshape(shape), lambda v: torch.reshape(v, shape)]))
    if kind == "expand":
        shape = [draw(st.sampled_from([-1, s, *([2, 3] if s == 1 else [])])) for s in v.shape]
        shape = [*draw(st.lists(st.integers(1, 3), max_size=1)), *shape]
        return draw(st.sampled_from([lambda v: v.expand(shape), lambda v: v.expand(*shape)]))
    if kind == "select":
        a = draw(dim)
        i = draw(st.integers(-v.shape[a], v.shape[a] - 1)) if n and v.shape[a] else 0
        return draw(st.sampled_from([lambda v: v.select(a, i), lambda v: torch.select(v, a, i)]))
    if kind == "getitem":
        items: list = []
        for s in v.shape[: draw(st.integers(0, n))]:
            items += [None] * draw(st.integers(0, 1))
            ends = st.none() | st.integers(-s - 1, s + 1)
            items.append(draw(st.integers(-s, s - 1) if s else st.just(slice(None)) | st.just(slice(None))))
            if draw(st.booleans()):
                items[-1] = slice(draw(ends), draw(ends), draw(st.sampled_from([None, 1, 2])))
        items += [None] * draw(st.integers(0, 1))
        index = items[0] if len(items) == 1 and draw(st.booleans()) else tuple(items)
        return lambda v: v[index]
    if kind == "split":
        a, size = draw(dim), draw(st.integers(1, 3))
        parts = [max(1, v.shape[a] - 1), v.shape[a] - max(1, v.shape[a] - 1)] if n else []
        i = draw(st.sampled_from([0, -1]))
        forms = [lambda v: v.split(size, a)[i], lambda v: torch.split(v, size, dim=a)[i], lambda v: v.chunk(size, a)[i]]
        forms += [lambda v: torch.chunk(v, size, a)[i], lambda v: v.unbind(a)[i], lambda v: v.split(parts, a)[i]]
        return draw(st.sampled_from(forms))
    if kind == "copy":
        forms = [lambda v: v.clone(), lambda v: v.contiguous(), lambda v: v.detach(), lambda v: v.float()]
        return draw(st.sampled_from([*forms, lambda v: v.to(torch.float32), lambda v: v.double().float()]))
    if kind == "narrow":
        a, size = draw(dim), draw(st.integers(0, 2))
        return draw(st.sampled_from([lambda v: v.narrow(a, 0, size), lambda v: torch.narrow(v, a, size, 1)]))
    if kind == "change":
        a = draw(dim)
        forms = [lambda v: v * 2, lambda v: v.flip(a), lambda v: v.roll(1, a), lambda v: v.int().float()]
        forms += [lambda v: v.mul_(2), lambda v: v.add_(1), lambda v: torch.relu_(v), lambda v: -v]
        forms += [lambda v: F.relu(v, inplace=True), lambda v: F.relu(v, True)]
        forms += [lambda v: v.to(dtype=torch.int32).float(), lambda v: v.type(torch.int16).float()]
        return draw(st.sampled_from(forms))
    assert kind == "change aside"  # of a view or a copy; the weight goes on

    def aside(v: Tensor) -> Tensor:
        step(v).mul_(2)
        return v

    step = draw(views(v))
    return aside


_STEPS = ("permute", "transpose", "unsqueeze", "squeeze", "reshape", "expand", "select", "getitem", "split", "copy",
          "narrow", "change", "change aside", "permute", "transpose", "unsqueeze", "squeeze", "getitem")  # fmt: skip


@st.composite
def _shapes(draw, shape: list[int]) -> list[int]:
    """Another shape with as many elements: with or without 1s, merged, split."""
    for _ in range(draw(st.integers(0, 3))):
        i = draw(st.integers(0, len(shape)))
        change = draw(st.sampled_from(["add 1", "drop 1", "merge", "split"]))
        if change == "add 1":
            shape.insert(i, 1)
        elif change == "drop 1":
            shape = [s for s in shape if s != 1]
        elif change == "merge" and i + 1 < len(shape):
            shape[i : i + 2] = [shape[i] * shape[i + 1]]
        elif change == "split" and i < len(shape) and shape[i] % 2 == 0:
            shape[i : i + 1] = [2, shape[i] // 2]
    return shape


@st.composite
def matmuls(draw, v: Tensor, level: str) -> tuple[Callable, tuple[int, ...]]:
    """A matmul ``f(x, v)`` and the shape of x."""
    m, b = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    if v.dim() == 2:
        p, q = v.shape
        forms = [
            (lambda x, v: F.linear(x, v), (m, q)),
            (lambda x, v: F.linear(x, v), (q,)),
            (lambda x, v: F.linear(x, v, x[0, 0, 0]), (b, m, q)),
            (lambda x, v: x @ v, (m, p)),
            (lambda x, v: x @ v, (b, m, p)),
            (lambda x, v: torch.matmul(x, v), (p,)),
            (lambda x, v: v @ x, (q, m)),
            (lambda x, v: v @ x, (b, q, m)),
            (lambda x, v: v.matmul(x), (q,)),
            (lambda x, v: torch.mm(x, v), (m, p)),
            (lambda x, v: v.mm(x).view(-1), (q, m)),
            (lambda x, v: torch.mv(v, x), (q,)),
            (lambda x, v: torch.addmm(x[:, :1], x, v), (m, p)),
            (lambda x, v: torch.addmm(x[0, 0], x, v), (m, p)),
            (lambda x, v: torch.addmm(x[:, :1], x, v, alpha=2), (m, p)),
            (lambda x, v: torch.einsum("mk,nk->mn", x, v), (m, q)),
            (lambda x, v: torch.einsum("mk,nk->nm", x, v), (1, q)),
            (lambda x, v: torch.einsum("kn,abk->nba", v, x), (b, m, p)),
            (lambda x, v: torch.einsum("mk,nk->m", x, v), (m, q)),
            (lambda x, v: torch.einsum("mnk,nk->m", x, v), (m, p, q)),
        ]
        if level != "torch":  # without shapes, a label of an einsum is taken to have one size
            forms.append((lambda x, v: torch.einsum("mk,nk->mn", x, v), (m, 1)))
    elif v.dim() == 3:
        e, p, q = v.shape
        forms = [
            (lambda x, v: torch.bmm(x, v), (e, m, p)),
            (lambda x, v: v.bmm(x), (e, q, m)),
            (lambda x, v: torch.baddbmm(x[:, :, :1], x, v), (e, m, p)),
            (lambda x, v: torch.baddbmm(x[0, 0, :1], x, v), (e, m, p)),
            (lambda x, v: x @ v, (e, m, p)),
            (lambda x, v: x @ v, (1, m, p)),
            (lambda x, v: x @ v, (m, p)),
            (lambda x, v: x @ v, (p,)),
            (lambda x, v: x @ v, (b, e, m, p)),
            (lambda x, v: v @ x, (e, q, m)),
            (lambda x, v: v @ x, (q, m)),
            (lambda x, v: v @ x, (q,)),
            (lambda x, v: torch.einsum("emk,enk->emn", x, v), (e, m, q)),
            (lambda x, v: torch.einsum("mk,ekn->men", x, v), (m, p)),
            (lambda x, v: torch.einsum("emk,ekn->nem", x, v), (e, m, p)),
        ]
        if level != "torch":
            forms.append((lambda x, v: torch.einsum("emk,enk->emn", x, v), (1, m, q)))
    else:
        p = v.shape[-2] if v.dim() > 1 else v.shape[0] if v.dim() else 1
        forms = [(lambda x, v: x @ v, (p,)), (lambda x, v: x @ v, (m, p))]
    return draw(st.sampled_from(forms))


def chain_of_views(data: st.DataObject, level: str) -> None:
    shape = data.draw(st.lists(st.integers(1, 4), min_size=2, max_size=3))
    w = integer_weight(*shape)
    steps: list[Callable] = []

    def f(x, w):
        for step in steps:
            w = step(w)
        return w if x is None else matmul(x, w)

    for _ in range(data.draw(st.integers(0, 4))):
        steps.append(data.draw(views(f(None, exact(w)))))
        if not is_legal(f, None, exact(w)):
            steps.pop()
    matmul, x_shape = data.draw(matmuls(f(None, exact(w)), level))
    x = integers(*x_shape)
    if is_legal(f, x.double(), exact(w)):
        lowered(f, level, x, w)


def is_legal(f: Callable, *args: Tensor | None) -> bool:
    try:
        f(*args)
    except (RuntimeError, IndexError, TypeError):
        return False
    return True


@settings(max_examples=6 * settings().max_examples)
@given(st.data())
def test_any_chain_of_views_gives_the_same_answer_in_graphs_of_torch_functions(data):
    chain_of_views(data, "torch")


@pytest.mark.parametrize("level", ["export", "aten"])
@settings(max_examples=2 * settings().max_examples)
@given(data=st.data())
def test_any_chain_of_views_gives_the_same_answer_in_graphs_of_aten_operations(level, data):
    chain_of_views(data, level)


# ---- one by one ------------------------------------------------------------------------------------------------------

LOWERED = {
    "expert": (lambda x, w: F.linear(x, w[1]), (4, 3), (2, 2, 3)),
    "expert after a new dimension": (lambda x, w: F.linear(x, w[None, 1].squeeze(0)), (4, 3), (2, 2, 3)),
    "expert by unbind": (lambda x, w: F.linear(x, w.unbind(0)[-1]), (4, 3), (2, 2, 3)),
    "chunk": (lambda x, w: F.linear(x, w.chunk(2)[1]), (4, 3), (5, 3)),
    "split": (lambda x, w: F.linear(x, w.split(2)[2]), (4, 3), (5, 3)),
    "split by sizes": (lambda x, w: F.linear(x, w.split([1, 4])[1]), (4, 3), (5, 3)),
    "rows": (lambda x, w: F.linear(x, w[1:3]), (4, 3), (5, 3)),
}  # fmt: skip


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", LOWERED)
def test_is_lowered(name, level):
    check_lowered(LOWERED[name], level)


LEFT = {
    "cast to integers": (lambda x, w: F.linear(x, w.int().float()), (4, 3), (2, 3)),
    "cast to integers by keyword": (lambda x, w: F.linear(x, w.to(dtype=torch.int8).float()), (4, 3), (2, 3)),
    "columns": (lambda x, w: F.linear(x[:, 1:], w[:, 1:]), (4, 3), (2, 3)),
    "an input channel of each expert": (lambda x, w: F.linear(x, w[..., 0]), (4, 2), (2, 2, 3)),
    "merged": (lambda x, w: F.linear(x, w.reshape(3, 2)), (4, 2), (2, 3)),
    "expanded": (lambda x, w: F.linear(x, w.expand(2, 3)), (4, 3), (1, 3)),
    "rows by ids": (lambda x, w: F.linear(x, w[torch.tensor([1, 0])]), (4, 3), (2, 3)),
    "split by a number that is computed": (lambda x, w: F.linear(x, w.split(x.shape[0])[0]), (4, 3), (2, 3), "torch"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "level"), [(name, level) for name in LEFT for level in LEFT[name][3:] or LEVELS])
def test_near_miss_is_left(name, level):
    check_left(LEFT[name], level)


@pytest.mark.parametrize("ids", [torch.tensor([1, 0, 1]), torch.tensor([1], dtype=torch.int32)], ids=["int64", "int32"])
def test_experts_by_ids(ids):
    x, w = integers(len(ids), 4, 3), integer_weight(2, 2, 3)
    count, gm = lowered(lambda x, w, i: torch.bmm(x, w[i].mT), "aten", x, w, ids)
    assert count == 1
    assert count_nodes(gm.graph, aten.index.Tensor) == 2
    assert count_nodes(gm.graph, ops.dequantize.default, aten.bmm.default) == 0


def test_near_miss_rows_by_a_table_of_ids():
    x, w, ids = integers(3, 4, 3), integer_weight(2, 2, 3), torch.tensor([[1, 0, 1]])
    count, _ = lowered(lambda x, w, i: torch.bmm(x, w[i][0].mT), "aten", x, w, ids)
    assert count == 0


def test_near_miss_rows_by_a_mask():
    """Not ids, although one dimension of booleans: read from a node that says so."""
    graph = torch.fx.Graph()
    w, mask = graph.placeholder("w"), graph.placeholder("mask")
    mask.meta["val"] = torch.tensor([True, False])
    indexed = graph.call_function(aten.index.Tensor, (w, [mask]))
    shape_of = {w: (2, 2, 3)}.get
    assert follow(indexed, shape_of) is None
    mask.meta["val"] = torch.tensor([1, 0])
    operand = follow(indexed, shape_of)
    assert (operand.dims, operand.sizes, operand.rank) == ((0, 1, 2), (2, 2, 3), 3)
    assert operand.selections == ((aten.index.Tensor, 0, [mask]),)
