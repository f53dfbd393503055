"""`lower` on AOTAutograd's graphs: same answer, count, old matmul gone, int8 matmul there; and its near misses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.graphs import (
    INT8_PRODUCTS,
    PRODUCTS,
    Case,
    compiled,
    count_nodes,
    dequantized,
    exact,
    ops,
    random,
    weight,
)

from int8fx.graph.emit import read_epilogue
from int8fx.passes import lower

pytestmark = pytest.mark.usefixtures("served_by")

aten = torch.ops.aten
IDS = torch.tensor([2, 0, 2, 1])

# name: f(x, *weights, *extra), shape of x, shapes of weights, shapes of extra (or tensors).
# K = 24, since Inductor has tiny products decomposed into sums.
LOWERED = {
    "linear": (lambda x, w: F.linear(x, w), (3, 5, 24), [(6, 24)]),
    "linear with bias": (lambda x, w, b: F.linear(x, w, b), (3, 5, 24), [(6, 24)], (6,)),
    "linear 2-D with bias": (lambda x, w, b: F.linear(x, w, b), (5, 24), [(6, 24)], (6,)),
    "linear 1-D": (lambda x, w: F.linear(x, w), (24,), [(6, 24)]),
    "linear 1-D with bias": (lambda x, w, b: F.linear(x, w, b), (24,), [(6, 24)], (6,)),
    "linear of one row": (lambda x, w: F.linear(x, w), (1, 24), [(6, 24)]),
    "linear of one row with bias": (lambda x, w, b: F.linear(x, w, b), (1, 24), [(6, 24)], (6,)),
    "linear of no row": (lambda x, w, b: F.linear(x, w, b), (0, 24), [(6, 24)], (6,)),
    "square": (lambda x, w: F.linear(x, w), (24, 24), [(24, 24)]),
    "@ t": (lambda x, w: x @ w.t(), (3, 5, 24), [(6, 24)]),
    "@ T": (lambda x, w: x @ w.T, (5, 24), [(6, 24)]),
    "@ mT": (lambda x, w: x @ w.mT, (2, 3, 5, 24), [(6, 24)]),
    "1-D @ t": (lambda x, w: x @ w.t(), (24,), [(6, 24)]),
    "@ of a weight stored transposed": (lambda x, w: x @ w.transpose(0, 1).clone(), (5, 24), [(6, 24)]),
    "matmul": (lambda x, w: torch.matmul(x, w.permute(1, 0)), (3, 5, 24), [(6, 24)]),
    "mm": (lambda x, w: torch.mm(x, w.t()), (5, 24), [(6, 24)]),
    "addmm": (lambda x, w, b: torch.addmm(b, x, w.t()), (5, 24), [(6, 24)], (6,)),
    "weight on the left": (lambda x, w: w @ x, (24, 5), [(6, 24)]),
    "weight on the left of a batch": (lambda x, w: w @ x, (3, 24, 5), [(6, 24)]),
    "weight on the left, then a view": (lambda x, w: (w @ x).view(3, -1), (24, 5), [(6, 24)]),
    "mm with the weight on the left": (lambda x, w: torch.mm(w, x), (24, 5), [(6, 24)]),
    "einsum nk": (lambda x, w: torch.einsum("bsk,nk->bsn", x, w), (2, 5, 24), [(6, 24)]),
    "einsum kn": (lambda x, w: torch.einsum("bsk,kn->bsn", x, w.t()), (2, 5, 24), [(6, 24)]),
    "einsum to another order": (lambda x, w: torch.einsum("nk,bsk->nbs", w, x), (2, 5, 24), [(6, 24)]),
    "bmm of experts": (lambda x, w: torch.bmm(x, w.mT), (3, 5, 24), [(3, 6, 24)]),
    "bmm of experts on the left": (lambda x, w: torch.bmm(w, x), (3, 24, 5), [(3, 6, 24)]),
    "matmul of experts": (lambda x, w: x @ w.mT, (3, 5, 24), [(3, 6, 24)]),
    "matmul of a matrix with experts": (lambda x, w: x @ w.mT, (5, 24), [(3, 6, 24)]),
    "einsum of experts": (lambda x, w: torch.einsum("emk,enk->emn", x, w), (3, 5, 24), [(3, 6, 24)]),
    "bmm of one weight": (lambda x, w: torch.bmm(x, w.t().expand(3, 24, 6)), (3, 5, 24), [(6, 24)]),
    "bmm of one weight, unsqueezed": (lambda x, w: torch.bmm(x, w.t()[None]), (1, 5, 24), [(6, 24)]),
    "baddbmm": (lambda x, w, b: torch.baddbmm(b, x, w.mT), (3, 5, 24), [(3, 6, 24)], (3, 1, 6)),
    "baddbmm with one bias for all": (lambda x, w, b: torch.baddbmm(b, x, w.mT), (3, 5, 24), [(3, 6, 24)], (6,)),
    "one expert": (lambda x, w: F.linear(x, w[1]), (5, 24), [(3, 6, 24)]),
    "the last expert": (lambda x, w: x @ w[-1].t(), (5, 24), [(3, 6, 24)]),
    "some experts": (lambda x, w: torch.bmm(x, w[1:3].mT), (2, 5, 24), [(3, 6, 24)]),
    "one output channel of each expert": (lambda x, w: F.linear(x, w[:, 2]), (5, 24), [(3, 6, 24)]),
    "experts by ids": (lambda x, w, ids: torch.bmm(x, w[ids].mT), (4, 5, 24), [(3, 6, 24)], IDS),
    "experts by 32-bit ids": (lambda x, w, ids: torch.bmm(x, w[ids].mT), (4, 5, 24), [(3, 6, 24)], IDS.int()),
    "experts by ids on the left": (lambda x, w, ids: (w[ids] @ x[:, :, None])[..., 0], (4, 24), [(3, 6, 24)], IDS),
    "rows": (lambda x, w: F.linear(x, w[2:5]), (5, 24), [(6, 24)]),
    "rows but the last": (lambda x, w: F.linear(x, w[:-2]), (5, 24), [(6, 24)]),
    "squeezed": (lambda x, w: F.linear(x, w[:, None][None].squeeze(2).squeeze(0)), (5, 24), [(6, 24)]),
    "viewed with dimensions of 1": (lambda x, w: F.linear(x, w.view(6, 1, 24, 1).view(6, 24)), (5, 24), [(6, 24)]),
    "contiguous": (lambda x, w: torch.mm(x, w.t().contiguous()), (5, 24), [(6, 24)]),
    "viewed otherwise": (lambda x, w: torch.mm(x.view(6, 24), w.t()).view(3, 2, 6), (2, 3, 24), [(6, 24)]),
    "viewed and summed": (
        lambda x, w: (lambda y: y.view(2, 3, 6) + y.sum())(torch.mm(x.view(6, 24), w.t())), (2, 3, 24), [(6, 24)]
    ),
    "two in a row": (lambda x, w, v: F.linear(F.linear(x, w), v), (5, 24), [(20, 24), (4, 20)]),
}  # fmt: skip


def case(f, x, weights, *extra, dtype=torch.float32, threshold=0.0, rounding=None) -> Case:
    packed = [weight(*w, seed=3 + i) for i, w in enumerate(weights)]
    extra = [e if isinstance(e, torch.Tensor) else random(*e, seed=2, dtype=dtype) for e in extra]
    return Case(f, random(*x, dtype=dtype), packed, extra, threshold, rounding)


@pytest.mark.parametrize("name", LOWERED)
def test_is_lowered(name):
    case(*LOWERED[name]).check_lowered(2 if name == "two in a row" else 1)


@pytest.mark.parametrize(
    ("dtype", "threshold"),
    [
        (torch.float64, 2.0),
        (torch.float32, 6.0),
        (torch.float32, None),
        (torch.bfloat16, 0.0),
        (torch.bfloat16, 2.0),
        (torch.float16, 2.0),
    ],
)
def test_every_dtype_and_threshold(dtype, threshold):
    f, *shapes = LOWERED["linear with bias"]
    case(f, *shapes, dtype=dtype, threshold=threshold).check_lowered()


@pytest.mark.parametrize("threshold", [0.0, 2.0])
def test_every_expert_has_its_outliers(threshold):
    x = random(3, 5, 24)
    x[0, :, 4] = 40.0
    x[2, 3, 7] = -60.0
    w = weight(3, 6, 24)
    c = Case(lambda x, w: torch.bmm(x, w.mT), x, [w], threshold=threshold)
    c.check_lowered()
    run, _ = c.compile(lower)
    for e in range(3):
        assert torch.equal(run(x)[e], ops.linear(x[e], w[0][e], w[1][e], threshold))


def test_experts_with_a_bias_each():
    """As a bias ``[E, 1, N]`` is added after the product, not by it."""
    after = case(*LOWERED["baddbmm"]).check_lowered()
    (product,) = after.find_nodes(op="call_function", target=ops.linear.default)
    assert read_epilogue(product).bias is None
    assert count_nodes(after, aten.add.Tensor) == 1


@pytest.mark.parametrize("shape", [(5, 6), (1, 6), (5, 1), (1,), ()])
def test_addmm_with_a_bias_of_another_shape_keeps_an_add(shape):
    after = case(lambda x, w, b: torch.addmm(b, x, w.t()), (5, 24), [(6, 24)], shape).check_lowered()
    (product,) = after.find_nodes(op="call_function", target=ops.linear.default)
    assert read_epilogue(product).bias is None
    assert count_nodes(after, aten.add.Tensor) == 1


def test_views_around_a_linear_layer_go():
    after = case(lambda x, w: F.linear(x, w), (2, 3, 24), [(6, 24)]).check_lowered()
    assert [node.op for node in after.nodes] == ["placeholder"] * 3 + ["call_function", "output"]


def test_dynamic_shapes_compile_once():
    c = case(lambda x, w, b: F.linear(x, w, b), (2, 5, 24), [(6, 24)], (6,))
    run, backend = c.compile(lower, dynamic=True)
    for lead in [(2, 5), (3, 7), (9, 4)]:
        c.x = random(*lead, 24)
        c.assert_right(run(c.x, *c.extra))
    (after,) = backend.after
    assert backend.counts == [(1,)]
    assert count_nodes(after, *PRODUCTS, ops.dequantize.default, aten.view.default) == 0
    assert count_nodes(after, ops.linear.default) == 1


def test_dynamic_number_of_expert_ids():
    f = lambda x, w, ids: torch.bmm(x, w[ids].mT)  # noqa: E731
    c = Case(f, random(4, 5, 24), [weight(3, 6, 24)], [IDS])
    run, backend = c.compile(lower, dynamic=True)
    for ids in (IDS, torch.tensor([1, 1]), torch.tensor([0, 1, 2, 0, 2])):
        c.x, c.extra = random(len(ids), 5, 24), [ids]
        c.assert_right(run(c.x, ids))
    assert backend.counts == [(1,)]
    assert count_nodes(backend.after[0], ops.linear.default) == 1
    assert count_nodes(backend.after[0], *PRODUCTS, ops.dequantize.default) == 0


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_cast_between_weight_and_product(stored):
    def f(x, w):
        return F.linear(x.bfloat16(), w.to(stored).to(torch.bfloat16)).float()

    case(f, (5, 24), [(6, 24)], rounding=torch.bfloat16).check_lowered()


@pytest.mark.parametrize("cast", [torch.float8_e4m3fn, torch.int32], ids=str)
def test_near_miss_cast_that_loses_the_weight(cast):
    x, (codes, _) = random(5, 24), weight(6, 24)
    w = codes, torch.full((6,), 0.25)  # so that a cast to integers loses something

    def f(x, codes, scale):
        return F.linear(x, dequantized((codes, scale)).to(cast).float())

    run, backend = compiled(f, lower)
    y = run(x, *w)
    assert torch.equal(y, f(x, *w))
    assert (y - ops.linear(x, *w, 0.0)).abs().max() > 0.1
    assert backend.counts == [(0,)]
    assert count_nodes(backend.after[0], *INT8_PRODUCTS) == 0


def test_autocast_inside():
    def f(x, w):
        with torch.autocast("cpu", torch.bfloat16):
            return F.linear(x, w)

    c = case(f, (5, 24), [(6, 24)], rounding=torch.bfloat16)
    run, backend = c.compile(lower)
    y = run(c.x)
    c.f = lambda x, w: F.linear(x, w)
    c.assert_right(y, torch.bfloat16)
    assert backend.counts == [(1,)]
    assert count_nodes(backend.after[0], *PRODUCTS, ops.dequantize.default) == 0
    assert count_nodes(backend.after[0], ops.linear.default) == 1


def test_autocast_around_a_product_that_stays_in_float32():
    def f(x, w, v):
        with torch.autocast("cpu", enabled=False):
            y = F.linear(x, w)
        return y, F.linear(x, v)

    x, w, v = random(5, 24), weight(6, 24), weight(4, 24, seed=9)

    def with_dequantized(x, w, v):
        return f(x, dequantized(w), dequantized(v))

    run, backend = compiled(with_dequantized, lower)
    with torch.autocast("cpu", torch.bfloat16):
        a, b = run(x, w, v)
    assert (a.dtype, b.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(a, ops.linear(x, *w, 6.0))
    assert torch.equal(b, ops.linear(x.bfloat16(), *v, 6.0))
    assert backend.counts == [(2,)]
    assert count_nodes(backend.after[0], *PRODUCTS, ops.dequantize.default) == 0


@pytest.mark.parametrize("spelling", ["grouped_mm", "_grouped_mm"])
def test_grouped_product(spelling):
    offsets = torch.tensor([4, 4, 9], dtype=torch.int32)

    def f(x, w):
        if x.dtype == torch.float64:  # for the exact result
            return torch.cat([x[:4] @ w[0].t(), x[4:4] @ w[1].t(), x[4:] @ w[2].t()])
        if spelling == "grouped_mm":
            return F.grouped_mm(x, w.mT, offs=offsets)
        return torch._grouped_mm(x, w.mT, offsets)

    c = case(f, (9, 32), [(3, 16, 32)], dtype=torch.bfloat16, threshold=2.0)
    c.check_lowered(there=ops.grouped_linear.default, dynamo=True)


def test_near_miss_grouped_product_of_a_transposed_weight():
    offsets = torch.tensor([4, 4, 9], dtype=torch.int32)

    def f(x, w):
        if x.dtype == torch.float64:
            return torch.cat([x[:4] @ w[0], x[4:4] @ w[1], x[4:] @ w[2]])
        return torch._grouped_mm(x, w, offsets)

    case(f, (9, 16), [(3, 16, 32)], dtype=torch.bfloat16).check_left(dynamo=True)


@pytest.mark.parametrize("parts", ["split", "chunk"])
def test_parts_of_one_weight(parts):
    """Cross-attention: q from one tensor, k and v from another, with one weight in one Parameter."""

    def f(x, w, memory):
        q, kv = w.split([4, 8]) if parts == "split" else w.chunk(2)
        return torch.cat([F.linear(x, q), F.linear(memory, kv)], -1)

    after = case(f, (5, 24), [(12, 24)], (5, 24)).check_lowered(2)
    assert count_nodes(after, aten.slice.Tensor) == 4  # of int8 codes and scales


def test_near_miss_grouped_products_of_one_expert_or_of_parts_of_a_weight():
    offsets = torch.tensor([4, 4, 16], dtype=torch.int32)

    def one_expert(x, w):
        if x.dtype == torch.float64:
            return x @ w[0].t()
        return torch._grouped_mm(x, w.expand(3, 16, 32).mT, offsets)

    case(one_expert, (16, 32), [(1, 16, 32)], dtype=torch.bfloat16).check_left(dynamo=True)

    def parts(x, w):
        if x.dtype == torch.float64:
            return torch.cat([x[0] @ w[:4].t(), x[1] @ w[4:4].t(), x[2] @ w[4:].t()], -1)
        return torch._grouped_mm(x, w.t(), offsets)

    case(parts, (3, 8, 32), [(16, 32)], dtype=torch.bfloat16).check_left(dynamo=True)


def test_two_products_of_one_weight():
    c = case(lambda x, w, z: F.linear(x, w) + F.linear(z, w), (5, 24), [(6, 24)], (5, 24))
    c.check_lowered(2)


def test_training_lowers_the_forward_and_not_the_gradient():
    x, w = random(5, 24), weight(6, 24)

    def f(x, codes, scale):
        return F.linear(x, dequantized((codes, scale), threshold=0.0)).sin().sum()

    run, backend = compiled(f, lower)
    for _ in range(2):
        x.grad = None
        run(x.requires_grad_(), *w).backward()
    x64 = x.detach().double().requires_grad_()
    F.linear(x64, exact(w)).sin().sum().backward()
    assert (x.grad - x64.grad).abs().max() <= 40 * 2**-24 * 24 * exact(w).abs().max() * 6
    (before,), (after,) = backend.before, backend.after
    assert backend.counts == [(1,)]
    assert count_nodes(before, aten.mm.default) == 2
    assert count_nodes(after, aten.mm.default) == 1
    assert count_nodes(after, ops.linear.default) == 1
    assert count_nodes(after, ops.dequantize.default) == 1


def test_dequantised_weight_that_is_also_returned():
    x, w = random(5, 24), weight(6, 24)

    def f(x, codes, scale):
        w = dequantized((codes, scale))
        return F.linear(x, w), w

    run, backend = compiled(f, lower)
    y, returned = run(x, *w)
    assert torch.equal(y, ops.linear(x, *w, 6.0))
    assert torch.equal(returned, dequantized(w))
    (after,) = backend.after
    assert backend.counts == [(1,)]
    assert count_nodes(after, *PRODUCTS) == 0
    assert count_nodes(after, ops.linear.default) == count_nodes(after, ops.dequantize.default) == 1


def test_weight_used_both_ways_is_lowered_one_way():
    c = case(lambda x, w: x @ w.t() @ w, (5, 24), [(6, 24)])
    run, backend = c.compile(lower)
    y, (w,) = run(c.x), c.weights
    assert torch.equal(y, ops.linear(c.x, *w, 0.0) @ dequantized(w))
    assert backend.counts == [(1,)]
    assert count_nodes(backend.after[0], aten.mm.default) == count_nodes(backend.after[0], ops.linear.default) == 1


NEAR_MISSES = {
    "transposed": (lambda x, w: x @ w, (5, 20), [(20, 24)]),
    "transposed and square": (lambda x, w: x @ w, (5, 24), [(24, 24)]),
    "transposed on the left": (lambda x, w: w.t() @ x, (20, 5), [(20, 24)]),
    "transposed experts": (lambda x, w: torch.bmm(x, w), (3, 5, 20), [(3, 20, 24)]),
    "transposed einsum": (lambda x, w: torch.einsum("mk,kn->mn", x, w), (5, 20), [(20, 24)]),
    "two activations": (lambda x, w: (x @ x.mT) * w[:5, :5], (5, 24), [(6, 24)]),
    "multiplied": (lambda x, w: F.linear(x, w * 2), (5, 24), [(6, 24)]),
    "added to": (lambda x, w: F.linear(x, w + 1), (5, 24), [(6, 24)]),
    "multiplied in place": (lambda x, w: F.linear(x, w.mul_(2)), (5, 24), [(6, 24)]),
    "multiplied in place through a view": (lambda x, w: (w.t().mul_(2), F.linear(x, w))[1], (5, 24), [(6, 24)]),
    "multiplied in place in part": (lambda x, w: (w[:2].mul_(2), F.linear(x, w))[1], (5, 24), [(6, 24)]),
    "written to by out": (lambda x, w: (torch.mul(w, 2, out=w), F.linear(x, w))[1], (5, 24), [(6, 24)]),
    "assigned to": (lambda x, w: (w.__setitem__(0, 1.0), F.linear(x, w))[1], (5, 24), [(6, 24)]),
    "a slice of K": (lambda x, w: F.linear(x, w[:, :20]), (5, 20), [(6, 24)]),
    "one input channel": (lambda x, w: x @ w[..., 0].t(), (5, 6), [(3, 6, 24)]),
    "every second row": (lambda x, w: F.linear(x, w[::2]), (5, 24), [(6, 24)]),
    "rows in another order": (lambda x, w: F.linear(x, w.flip(0)), (5, 24), [(6, 24)]),
    "N merged with K": (lambda x, w: F.linear(x, w.reshape(8, 18)), (5, 18), [(6, 24)]),
    "N split": (lambda x, w: torch.bmm(x, w.view(2, 3, 24).mT), (2, 5, 24), [(6, 24)]),
    "K split": (lambda x, w: torch.bmm(x, w.view(6, 2, 12).transpose(0, 1).mT), (2, 5, 12), [(6, 24)]),
    "experts merged": (lambda x, w: F.linear(x, w.view(18, 24)), (5, 24), [(3, 6, 24)]),
    "experts split": (lambda x, w: torch.bmm(x, w.permute(1, 2, 0)), (6, 5, 24), [(3, 6, 24)]),
    "experts summed": (lambda x, w: F.linear(x, w.sum(0)), (5, 24), [(3, 6, 24)]),
    "N of 1 expanded": (lambda x, w: F.linear(x, w.expand(6, 24)), (5, 24), [(1, 24)]),
    "K of 1 expanded": (lambda x, w: F.linear(x, w.expand(6, 24)), (5, 24), [(6, 1)]),
    "addmm with beta": (lambda x, w, b: torch.addmm(b, x, w.t(), beta=2), (5, 24), [(6, 24)], (6,)),
    "addmm with alpha": (lambda x, w, b: torch.addmm(b, x, w.t(), alpha=3), (5, 24), [(6, 24)], (6,)),
    "baddbmm with alpha": (lambda x, w, b: torch.baddbmm(b, x, w.mT, alpha=3), (3, 5, 24), [(3, 6, 24)], (6,)),
    "einsum over two labels": (lambda x, w: torch.einsum("bnk,nk->b", x, w), (5, 6, 24), [(6, 24)]),
    "einsum over no label": (lambda x, w: torch.einsum("bk,nk->bnk", x, w), (5, 24), [(6, 24)]),
    "einsum of a diagonal": (lambda x, w: torch.einsum("bk,kk->bk", x, w), (5, 24), [(24, 24)]),
    "einsum that sums the weight alone": (lambda x, w: torch.einsum("bk,nk->bk", x, w), (5, 24), [(6, 24)]),
    "einsum with two batch labels": (lambda x, w: torch.einsum("enk,enk->en", x, w), (3, 6, 24), [(3, 6, 24)]),
    "experts by a table of ids": (lambda x, w, ids: x @ w[ids].mT, (2, 2, 5, 24), [(3, 6, 24)], IDS.view(2, 2)),
    "rows by ids": (lambda x, w, ids: F.linear(x, w[ids]), (5, 24), [(6, 24)], IDS),
    "an embedding": (lambda x, w, ids: F.embedding(ids, w) * x, (4, 24), [(6, 24)], IDS),
    "a product with K = 1, which is none": (lambda x, w: F.linear(x, w), (5, 1), [(6, 1)]),
    "a vector on the right": (lambda x, w: w @ x, (24,), [(6, 24)]),
    "experts of a batch": (lambda x, w: x @ w.mT, (2, 3, 5, 24), [(3, 6, 24)]),
    "einsum of a matrix with experts": (lambda x, w: torch.einsum("mk,enk->emn", x, w), (5, 24), [(3, 6, 24)]),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_miss_is_left(name):
    case(*NEAR_MISSES[name]).check_left()
