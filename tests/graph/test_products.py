"""The reader of products: whatever stands between a weight and a product, the rewritten graph gives the same answer.

The weights and inputs are small integers and the scales powers of two, so that with ``threshold=0.0`` every way to
compute a product is exact: the same answer means equal.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.graphs import INT8_PRODUCTS, LEVELS, Packed, count_nodes, graph_of, ops
from torch import Tensor

from int8fx.graph.weights import follow
from int8fx.passes import lower

aten = torch.ops.aten


def integers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).float()


def integer_weight(*shape: int, seed: int = 1) -> Packed:
    codes = torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    scale = torch.randint(-2, 2, shape[:-1], generator=torch.Generator().manual_seed(seed)).float().exp2()
    return Packed(codes, scale)


def dequantized_first(f: Callable) -> Callable:
    """``f(x, w, *extra)`` as a function of (x, codes, scale, *extra)."""

    def with_dequantized(x, codes, scale, *extra):
        return f(x, ops.dequantize.default(codes, scale, torch.float32, 0.0), *extra)

    # fx.symbolic_trace does not take *args apart
    return {0: lambda x, c, s: with_dequantized(x, c, s), 1: lambda x, c, s, a: with_dequantized(x, c, s, a)}[
        f.__code__.co_argcount - 2
    ]


def lowered(f: Callable, level: str, x: Tensor, w: Packed, *extra: Tensor) -> tuple[int, torch.fx.GraphModule]:
    """The count that `lower` returned and the rewritten graph, whose answer is checked: value, shape, contiguity."""
    g = dequantized_first(f)
    gm = graph_of(g, level, x, *w, *extra)
    count = lower(gm.graph)
    gm.graph.lint()
    gm.recompile()
    found, expected = gm(x, *w, *extra), g(x, *w, *extra)  # in place changes reach dequantised weights only
    assert torch.equal(found, expected)
    assert found.dtype == expected.dtype
    assert found.is_contiguous() or not expected.is_contiguous()
    assert count == count_nodes(gm.graph, *INT8_PRODUCTS)
    return count, gm


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
def products(draw, v: Tensor, level: str) -> tuple[Callable, tuple[int, ...]]:
    """A product ``f(x, v)`` and the shape of x."""
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
        return w if x is None else product(x, w)

    for _ in range(data.draw(st.integers(0, 4))):
        steps.append(data.draw(views(f(None, w.exact()))))
        if not is_legal(f, None, w.exact()):
            steps.pop()
    product, x_shape = data.draw(products(f(None, w.exact()), level))
    x = integers(*x_shape)
    if is_legal(f, x.double(), w.exact()):
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


# ---- one by one: what is read as a product, and what is not ----------------------------------------------------------

LOWERED = {
    "linear": (lambda x, w: F.linear(x, w), (4, 3), (2, 3)),
    "linear by keyword": (lambda x, w: F.linear(x, weight=w), (4, 3), (2, 3)),
    "linear of a vector": (lambda x, w: F.linear(x, w), (3,), (2, 3)),
    "operator": (lambda x, w: x @ w.t(), (2, 4, 3), (2, 3)),
    "method matmul": (lambda x, w: x.matmul(w.T), (4, 3), (2, 3)),
    "torch.matmul": (lambda x, w: torch.matmul(x, w.mT), (4, 3), (2, 3)),
    "method mm": (lambda x, w: x.mm(w.transpose(0, 1)), (4, 3), (2, 3)),
    "torch.mm on the left": (lambda x, w: torch.mm(w, x), (3, 4), (2, 3)),
    "addmm": (lambda x, w: torch.addmm(x[:, :2], x, w.t()), (4, 3), (2, 3)),
    "mv": (lambda x, w: torch.mv(w, x), (3,), (2, 3)),
    "bmm": (lambda x, w: torch.bmm(x, w.mT), (2, 4, 3), (2, 2, 3)),
    "method bmm on the left": (lambda x, w: w.bmm(x), (2, 3, 4), (2, 2, 3)),
    "baddbmm": (lambda x, w: torch.baddbmm(x[:, :, :2], x, w.permute(0, 2, 1)), (2, 4, 3), (2, 2, 3)),
    "einsum": (lambda x, w: torch.einsum("mk,nk->mn", x, w), (4, 3), (2, 3)),
    "einsum with a list": (lambda x, w: torch.einsum("mk,nk->mn", [x, w]), (4, 3), (2, 3)),
    "einsum of experts": (lambda x, w: torch.einsum("emk,enk->emn", x, w), (2, 4, 3), (2, 2, 3)),
    "expert": (lambda x, w: F.linear(x, w[1]), (4, 3), (2, 2, 3)),
    "expert behind a new dimension": (lambda x, w: F.linear(x, w[None, 1].squeeze(0)), (4, 3), (2, 2, 3)),
    "expert by unbind": (lambda x, w: F.linear(x, w.unbind(0)[-1]), (4, 3), (2, 2, 3)),
    "chunk": (lambda x, w: F.linear(x, w.chunk(2)[1]), (4, 3), (5, 3)),
    "split": (lambda x, w: F.linear(x, w.split(2)[2]), (4, 3), (5, 3)),
    "split by sizes": (lambda x, w: F.linear(x, w.split([1, 4])[1]), (4, 3), (5, 3)),
    "rows": (lambda x, w: F.linear(x, w[1:3]), (4, 3), (5, 3)),
    "weight changed in a copy": (lambda x, w: ((w * 1).mul_(2), F.linear(x, w))[1], (4, 3), (2, 3)),
    "result changed in place": (lambda x, w: F.linear(x, w).mul_(2), (4, 3), (2, 3)),
    "input changed in place": (lambda x, w: F.linear(x.clone().mul_(2), w), (4, 3), (2, 3)),
    "weight added to another tensor in place": (lambda x, w: F.linear(x.clone().add_(w), w), (2, 3), (2, 3)),
}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", LOWERED)
def test_is_read_as_a_product(name, level):
    f, x, w = LOWERED[name]
    count, gm = lowered(f, level, integers(*x), integer_weight(*w))
    assert count == 1
    assert count_nodes(gm.graph, ops.dequantize.default) == (name in USED_OTHERWISE)


USED_OTHERWISE = ("weight changed in a copy", "weight added to another tensor in place")
ATEN, COMPOSITE = LEVELS[1:], LEVELS[:2]

LEFT = {
    "transposed": (lambda x, w: x @ w, (4, 3), (3, 3)),
    "a product of activations": (lambda x, w: (x @ x.mT) * w[0, 0], (4, 3), (2, 3)),
    "scaled": (lambda x, w: F.linear(x, w * 2), (4, 3), (2, 3)),
    "changed in place": (lambda x, w: F.linear(x, w.mul_(2)), (4, 3), (2, 3)),
    "changed in place before": (lambda x, w: (w.mul_(2), F.linear(x, w))[1], (4, 3), (2, 3)),
    "changed by a function": (lambda x, w: (torch.relu_(w), F.linear(x, w))[1], (4, 3), (2, 3)),
    "changed by a keyword": (lambda x, w: (F.relu(w, inplace=True), F.linear(x, w))[1], (4, 3), (2, 3)),
    "changed by an argument": (lambda x, w: (F.relu(w, True), F.linear(x, w))[1], (4, 3), (2, 3)),
    "changed by an operator": (lambda x, w: (operator.itruediv(w, 2), F.linear(x, w))[1], (4, 3), (2, 3), *ATEN),
    "changed by an assignment": (lambda x, w: (operator.setitem(w, 0, 1.0), F.linear(x, w))[1], (4, 3), (2, 3), *ATEN),
    "changed by out": (lambda x, w: (torch.mul(w, 2, out=w), F.linear(x, w))[1], (4, 3), (2, 3)),
    "changed through a transpose": (lambda x, w: (w.t().mul_(2), F.linear(x, w))[1], (4, 3), (2, 3)),
    "changed through a row": (lambda x, w: (w[0].mul_(2), F.linear(x, w))[1], (4, 3), (2, 3)),
    "changed through a part": (lambda x, w: (w.chunk(2)[0].mul_(2), F.linear(x, w))[1], (4, 3), (2, 3)),
    "changed through narrow": (lambda x, w: (w.narrow(0, 0, 1).mul_(2), F.linear(x, w))[1], (4, 3), (2, 3)),
    "changed through data": (lambda x, w: (w.data.mul_(2), F.linear(x, w))[1], (4, 3), (2, 3), "torch", "aten"),
    "a copy changed": (lambda x, w: F.linear(x, w.clone().mul_(2)), (4, 3), (2, 3)),
    "cast to integers": (lambda x, w: F.linear(x, w.int().float()), (4, 3), (2, 3)),
    "cast to integers by keyword": (lambda x, w: F.linear(x, w.to(dtype=torch.int8).float()), (4, 3), (2, 3)),
    "columns": (lambda x, w: F.linear(x[:, 1:], w[:, 1:]), (4, 3), (2, 3)),
    "an input channel of each expert": (lambda x, w: F.linear(x, w[..., 0]), (4, 2), (2, 2, 3)),
    "merged": (lambda x, w: F.linear(x, w.reshape(3, 2)), (4, 2), (2, 3)),
    "expanded": (lambda x, w: F.linear(x, w.expand(2, 3)), (4, 3), (1, 3)),
    "alpha": (lambda x, w: torch.addmm(x[:, :2], x, w.t(), alpha=2), (4, 3), (2, 3)),
    "beta": (lambda x, w: torch.addmm(x[:, :2], x, w.t(), beta=2), (4, 3), (2, 3)),
    "an embedding": (lambda x, w: F.embedding(x.long().abs() % 2, w), (4, 3), (2, 3)),
    "rows by ids": (lambda x, w: F.linear(x, w[torch.tensor([1, 0])]), (4, 3), (2, 3)),
    "einsum of a diagonal": (lambda x, w: torch.einsum("mk,kk->mk", x, w), (4, 3), (3, 3)),
    "einsum of a diagonal of x": (lambda x, w: torch.einsum("mmk,nk->mn", x, w), (4, 4, 3), (2, 3), *COMPOSITE),
    "einsum over two labels": (lambda x, w: torch.einsum("mnk,nk->m", x, w), (4, 2, 3), (2, 3)),
    "einsum that sums x first": (lambda x, w: torch.einsum("mjk,nk->mn", x, w), (4, 2, 3), (2, 3), *COMPOSITE),
    "einsum of a row for each expert": (
        lambda x, w: torch.einsum("ek,enk->en", x, w), (2, 3), (2, 2, 3), *COMPOSITE
    ),
    "einsum of a table for each expert": (
        lambda x, w: torch.einsum("eabk,enk->eabn", x, w), (2, 2, 4, 3), (2, 2, 3), *COMPOSITE
    ),
    "einsum with an ellipsis": (lambda x, w: torch.einsum("...k,kn->...n", x, w), (4, 3), (3, 3)),
    "einsum without an arrow": (lambda x, w: torch.einsum("mk,kn", x, w), (4, 3), (3, 3)),
    "split by a number that is computed": (lambda x, w: F.linear(x, w.split(x.shape[0])[0]), (4, 3), (2, 3), "torch"),
    "experts of a matrix of unknown rank": (lambda x, w: x @ w.mT, (4, 3), (2, 2, 3), "torch"),
    "on the left of an unknown rank": (lambda x, w: w @ x, (3,), (2, 3), "torch"),
    "into a given tensor": (lambda x, w: torch.mm(x, w.t(), out=torch.empty(4, 2)), (4, 3), (2, 3), "torch"),
}  # fmt: skip


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", LEFT)
def test_near_miss_is_no_product(name, level):
    f, x, w, *only = LEFT[name]
    if level in (only or LEVELS):
        count, gm = lowered(f, level, integers(*x), integer_weight(*w))
        assert count == 0
        assert count_nodes(gm.graph, ops.dequantize.default) == 1


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


@pytest.mark.parametrize("change", [operator.itruediv, operator.setitem], ids=["operator", "assignment"])
def test_near_miss_changed_as_dynamo_writes_it(change):
    """What a torch.fx.Proxy cannot record."""
    graph = torch.fx.Graph()
    x, codes, scale = (graph.placeholder(name) for name in ("x", "codes", "scale"))
    w = graph.call_function(ops.dequantize.default, (codes, scale, torch.float32, 0.0))
    w.meta["val"] = torch.empty(2, 3, device="meta")
    graph.call_function(change, (w, 2) if change is operator.itruediv else (w, 0, 1.0))
    graph.output(graph.call_function(F.linear, (x, w)))
    assert lower(graph) == 0
    y = torch.fx.GraphModule({}, graph)(integers(4, 3), *integer_weight(2, 3))
    assert not torch.equal(y, ops.linear(integers(4, 3), *integer_weight(2, 3), None, 0.0))


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


def test_bias_of_a_linear_that_is_no_vector_is_added():
    x, w, bias = integers(4, 3), integer_weight(2, 3), integers(1)[0]
    count, gm = lowered(lambda x, w, b: F.linear(x, w, b), "torch", x, w, bias)
    (product,) = gm.graph.find_nodes(op="call_function", target=ops.linear.default)
    assert count == count_nodes(gm.graph, aten.add.Tensor) == 1
    assert product.args[3] is None


def test_bias_known_as_a_vector_goes_into_the_product():
    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = torch.nn.Parameter(integers(2))

        def forward(self, x, codes, scale):
            return F.linear(x, ops.dequantize.default(codes, scale, torch.float32, 0.0), self.bias)

    x, w, module = integers(4, 3), integer_weight(2, 3), Module()
    gm = torch.fx.symbolic_trace(module)
    (read,) = gm.graph.find_nodes(op="call_function", target=ops.dequantize.default)
    read.meta["val"] = torch.empty(2, 3, device="meta")
    assert lower(gm.graph) == 1
    gm.recompile()
    assert torch.equal(gm(x, *w), module(x, *w))
    (product,) = gm.graph.find_nodes(op="call_function", target=ops.linear.default)
    assert product.args[3].op == "get_attr"
    assert count_nodes(gm.graph, aten.add.Tensor, ops.dequantize.default) == 0


def test_dead_nodes_take_their_assertions_with_them():
    def f(x, w):
        aten._assert_tensor_metadata.default(w, dtype=torch.float32)
        return F.linear(x, w)

    count, gm = lowered(f, "aten", integers(4, 3), integer_weight(2, 3))
    assert count == 1
    assert count_nodes(gm.graph, aten._assert_tensor_metadata.default, ops.dequantize.default) == 0
