"""`share`: one quantisation for all the products of one activation, bit-equal to one for each; and its near misses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.graphs import Packed, compiled, count_nodes, ops, random, weight
from torch.fx import Graph

from int8fx.passes import lower, share

LINEAR, SHARED, QUANTIZE = ops.linear.default, ops.linear_quantized.default, ops.quantize_rowwise.default


def check(f, *args, count: int, quantizations: int | None = None, dynamic: bool | None = None) -> Graph:
    """``f(*args)`` with `share` is bit-equal to f without, and saves ``count`` quantisations; the graph after.

    ``quantizations`` are left for the shared products: by default one if any was saved.
    """
    plain, _ = compiled(f, lower)
    expected = plain(*args)
    shared, backend = compiled(f, lower, share, dynamic=dynamic)
    found = shared(*args)
    before = backend.before[0]
    for y, other in zip(found, expected, strict=True):
        assert y.dtype == other.dtype
        assert torch.equal(y, other)
    quantizations = (count > 0) if quantizations is None else quantizations
    (after,) = backend.after
    products = count_nodes(before, LINEAR) + backend.counts[0][0]
    assert [saved for _, saved in backend.counts] == [count]
    assert count_nodes(after, QUANTIZE) == quantizations
    assert count_nodes(after, SHARED) == count + quantizations
    assert count_nodes(after, LINEAR) == products - count - quantizations
    return after


def read(w: Packed | tuple, dtype: torch.dtype = torch.float32, threshold: float = 6.0) -> torch.Tensor:
    return ops.dequantize(*w, dtype, threshold)


def weights(n: int, N: int = 6) -> list[tuple]:
    return [tuple(weight(N, 24, seed=i)) for i in range(n)]


def outliers(*lead: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = random(*lead, 24, dtype=dtype)
    x[..., 3] *= 20
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lead", [(2, 5), (5,), (1,)], ids=str)
def test_q_k_v(lead, dtype):
    def f(x, q, k, v, bias):
        return F.linear(x, read(q, dtype)), F.linear(x, read(k, dtype), bias), x @ read(v, dtype).t()

    check(f, outliers(*lead, dtype=dtype), *weights(3), random(6, dtype=dtype), count=2)


def test_a_vector():
    check(lambda x, q, k: (F.linear(x, read(q)), F.linear(x, read(k))), outliers(), *weights(2), count=1)


def test_gate_and_up():
    def f(x, gate, up, down):
        return (F.linear(F.silu(F.linear(x, read(gate))) * F.linear(x, read(up)), read(down)),)

    down = tuple(weight(24, 20))
    after = check(f, outliers(2, 5), *weights(2, 20), down, count=1)
    assert count_nodes(after, LINEAR) == 1


def test_dynamic_shapes():
    def f(x, q, k):
        return F.linear(x, read(q)), F.linear(x, read(k))

    check(f, outliers(3, 5), *weights(2), count=1, dynamic=True)


def test_two_groups():
    def f(x, z, q, k, v, o):
        return F.linear(x, read(q)), F.linear(z, read(k)), F.linear(x, read(v)), F.linear(z, read(o))

    check(f, outliers(5), outliers(5).flip(0), *weights(4), count=2, quantizations=2)


def test_the_same_weight_twice():
    def f(x, q):
        return F.linear(x, read(q)), F.linear(x, read(q))

    check(f, outliers(5), *weights(1), count=1)


def test_different_sizes_of_weights():
    def f(x, q, k):
        return F.linear(x, read(q)), F.linear(x, read(k))

    check(f, outliers(5), tuple(weight(6, 24)), tuple(weight(2, 24)), count=1)


def test_equal_casts_of_one_activation():
    """Autocast casts x once for each layer."""

    def f(x, q, k):
        with torch.autocast("cpu", torch.bfloat16):
            return F.linear(x, read(q)), F.linear(x, read(k))

    check(f, outliers(2, 5), *weights(2), count=1)


def test_equal_views_of_one_activation():
    def f(x, q, k):
        return F.linear(x[:, -1], read(q)), F.linear(x[:, -1], read(k))

    check(f, outliers(2, 5), *weights(2), count=1)

    def f(x, q, k):
        views = [x.transpose(0, 1).reshape(10, 24).clone() for _ in range(2)]
        return F.linear(views[0], read(q)), F.linear(views[1], read(k))

    check(f, outliers(2, 5), *weights(2), count=1)


def test_the_saved_quantisation_stands_before_its_first_use():
    def f(x, q, k):
        first = F.linear(x, read(q))
        return first, F.linear(x, read(k)) + first

    after = check(f, outliers(5), *weights(2), count=1)
    after.lint()


def test_epilogues_stay():
    """A graph that `fold` saw first."""

    def f(x, q, k, other):
        return ops.linear(x, *q, None, 6.0, "silu", other, "mul"), ops.linear(x, *k, None, 6.0)

    check(f, outliers(5), *weights(2), random(5, 6), count=1)


def test_training():
    def f(x, q, k):
        return (F.linear(x, read(q)) * F.linear(x, read(k))).sin().sum()

    x, gradients = outliers(5), []
    for passes in ([lower], [lower, share]):
        leaf = x.clone().requires_grad_()
        run, backend = compiled(f, *passes)
        run(leaf, *weights(2)).backward()
        gradients.append(leaf.grad)
    assert backend.counts == [(2, 1)]
    assert torch.equal(*gradients)
    assert count_nodes(backend.after[0], SHARED) == 2


# ---- near misses -----------------------------------------------------------------------------------------------------


def test_near_miss_one_consumer():
    after = check(lambda x, q: (F.linear(x, read(q)), x + 1), outliers(5), *weights(1), count=0)
    assert count_nodes(after, LINEAR) == 1


def test_near_miss_different_activations():
    def f(x, z, q, k):
        return F.linear(x, read(q)), F.linear(z, read(k))

    check(f, outliers(5), outliers(5).flip(0), *weights(2), count=0)


def test_near_miss_different_thresholds():
    def f(x, q, k):
        return F.linear(x, read(q, threshold=6.0)), F.linear(x, read(k, threshold=2.0))

    check(f, outliers(5), *weights(2), count=0)


def test_near_miss_x_changed_in_between():
    def f(x, q, k):
        x = x.clone()
        first = F.linear(x, read(q))
        x.mul_(2)
        return first, F.linear(x, read(k))

    check(f, outliers(5), *weights(2), count=0)


def test_near_miss_different_views():
    def f(x, q, k):
        return F.linear(x.view(10, 24), read(q)), F.linear(x.transpose(0, 1).reshape(10, 24), read(k))

    check(f, outliers(2, 5), *weights(2), count=0)


def test_near_miss_different_rows():
    def f(x, q, k):
        return F.linear(x[:, 0], read(q)), F.linear(x[:, 1], read(k))

    check(f, outliers(2, 5), *weights(2), count=0)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.float16, torch.bfloat16)], ids=str)
def test_near_miss_different_casts(dtypes):
    def f(x, q, k):
        return tuple(F.linear(x.to(dtype), read(w, dtype)) for dtype, w in zip(dtypes, (q, k), strict=True))

    check(f, outliers(5), *weights(2), count=0)


def test_near_miss_experts_quantise_each_their_own_rows():
    def f(x, w, v):
        return torch.bmm(x, read(w).mT), torch.bmm(x, read(v).mT)

    check(f, outliers(3, 5), *(tuple(weight(3, 6, 24, seed=i)) for i in range(2)), count=0)


def test_near_miss_random_casts_are_not_equal():
    """Only what gives equal tensors for equal arguments counts as a view or a cast."""

    def f(x, q, k):
        return F.linear(F.dropout(x), read(q)), F.linear(F.dropout(x), read(k))

    run, backend = compiled(f, lower, share)
    run(outliers(5), *weights(2))
    assert backend.counts == [(2, 0)]
    assert count_nodes(backend.after[0], LINEAR) == 2
