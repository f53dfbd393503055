"""`fold`: what follows a matmul goes into its epilogue: same result, count, old nodes gone; and its near misses."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from support.graphs import compiled, count_nodes, dequantized, ops, random, weight
from support.helpers import assert_within_budget
from torch.fx import Graph

from int8fx.graph.emit import read_epilogue
from int8fx.passes import fold, lower, share
from int8fx.schemes.weight import Epilogue, Int8Weight

pytestmark = pytest.mark.usefixtures("served_by")

aten = torch.ops.aten
LINEAR = ops.linear.default
DTYPES = (torch.float32, torch.bfloat16)
ACTIVATIONS = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
}
W, V = weight(6, 24), weight(6, 24, seed=2)


def linear(x, w, bias=None, threshold=6.0):
    """A product that `lower` finds."""
    return F.linear(x, dequantized(w, x.dtype, threshold), bias)


def activations(*lead: int, dtype: torch.dtype) -> torch.Tensor:
    x = random(*lead, 24, dtype=dtype)
    x[..., 3] *= 10
    return x


def pointwise(graph: Graph) -> list[str]:
    """The operations of ``graph`` that are no int8fx ops."""
    calls = [node.target for node in graph.nodes if node.op == "call_function"]
    return [str(target) for target in calls if getattr(target, "namespace", "") != "int8fx"]


def check(f, x, *args, count, epilogue, bias=None, other=None, left=(), dynamic=None) -> Graph:
    """``f(x, *args)`` becomes one product with ``epilogue``, and what is ``left``, after ``count`` folds."""
    run, backend = compiled(f, lower, fold, dynamic=dynamic)
    y = run(x, *args)
    activation, binary = epilogue
    assert_within_budget(y, x, Int8Weight(*W, 6.0), Epilogue(bias, activation, other, binary))
    (after,) = backend.after
    assert [folded for _, folded in backend.counts] == [count]
    assert pointwise(backend.before[0]) != list(left)
    assert pointwise(after) == list(left)
    (product, *_) = after.find_nodes(op="call_function", target=LINEAR)
    folded_epilogue = read_epilogue(product)
    assert (folded_epilogue.activation, folded_epilogue.binary) == epilogue
    assert (folded_epilogue.bias is None, folded_epilogue.other is None) == (bias is None, other is None)
    return after


# ---- what is folded --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation(name, dtype):
    activation = ACTIVATIONS[name]
    check(lambda x: activation(linear(x, W)), activations(5, dtype=dtype), count=1, epilogue=(name, "none"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_and_residual(name, dtype):
    activation, other = ACTIVATIONS[name], random(2, 5, 6, dtype=dtype)

    def f(x, other):
        return other + activation(linear(x, W))

    check(f, activations(2, 5, dtype=dtype), other, count=2, epilogue=(name, "add"), other=other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_step(dtype):
    """Bias, activation, residual: what comes after the residual stays."""
    bias, other = random(6, dtype=dtype), random(5, 6, dtype=dtype)

    def f(x, bias, other):
        return F.silu(linear(x, W) + bias) * other

    check(f, activations(5, dtype=dtype), bias, other, count=3, epilogue=("silu", "mul"), bias=bias, other=other)


def test_bias_of_the_layer_and_activation():
    x, bias = activations(5, dtype=torch.float32), random(6)
    check(lambda x, b: F.gelu(linear(x, W, b)), x, bias, count=1, epilogue=("gelu", "none"), bias=bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("swapped", [False, True], ids=["y + bias", "bias + y"])
def test_bias(swapped, dtype):
    bias = random(6, dtype=dtype)

    def f(x, bias):
        return bias + linear(x, W) if swapped else linear(x, W) + bias

    check(f, activations(2, 5, dtype=dtype), bias, count=1, epilogue=("none", "none"), bias=bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("swapped", [False, True], ids=["y . other", "other . y"])
@pytest.mark.parametrize("binary", ["add", "mul"])
def test_residual_and_gate(binary, swapped, dtype):
    other = random(2, 5, 6, dtype=dtype)

    def f(x, other):
        pair = (other, linear(x, W)) if swapped else (linear(x, W), other)
        return pair[0] + pair[1] if binary == "add" else pair[0] * pair[1]

    check(f, activations(2, 5, dtype=dtype), other, count=1, epilogue=("none", binary), other=other)


def test_residual_of_a_vector_is_no_bias():
    """``[N]`` and ``[N]``: either would do."""
    x, other = activations(dtype=torch.float32), random(6)

    def f(x, other):
        return ops.linear(x, *W, 6.0) + other

    check(f, x, other, count=1, epilogue=("none", "add"), other=other)


def test_matrix_of_addmm():
    x, other = activations(5, dtype=torch.float32), random(5, 6)

    def f(x, other):
        return torch.addmm(other, x, dequantized(W, x.dtype).t())

    check(f, x, other, count=1, epilogue=("none", "add"), other=other)


def test_bias_then_residual_then_no_more():
    bias, other = random(6), random(5, 6)

    def f(x, bias, other):
        return F.relu(linear(x, W) + bias + other)

    x = activations(5, dtype=torch.float32)
    run, backend = compiled(f, lower, fold)
    y = run(x, bias, other)
    assert torch.equal(y, ops.linear(x, *W, 6.0, bias=bias, other=other, binary="add").relu())
    assert backend.counts == [(1, 2)]
    assert pointwise(backend.after[0]) == ["aten.relu.default"]


def test_two_biases_are_a_bias_and_no_residual():
    first, second = random(6), random(6, seed=3)
    left = ("aten.add.Tensor",)
    run, backend = compiled(lambda x, a, b: linear(x, W) + a + b, lower, fold)
    x = activations(5, dtype=torch.float32)
    assert torch.equal(run(x, first, second), ops.linear(x, *W, 6.0, bias=first) + second)
    assert backend.counts == [(1, 1)]
    assert tuple(pointwise(backend.after[0])) == left


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["silu", "gelu_tanh"])
def test_gated_mlp(name, dtype):
    """SwiGLU and GeGLU: the activation and the product with ``up`` go into ``gate``, on one shared quantisation."""
    activation, x = ACTIVATIONS[name], activations(5, dtype=dtype)

    def f(x):
        return activation(linear(x, W)) * linear(x, V)

    run, backend = compiled(f, lower, share, fold)
    y, up = run(x), ops.linear(x, *V, 6.0)
    assert_within_budget(y, x, Int8Weight(*W, 6.0), Epilogue(None, name, up, "mul"))
    (after,) = backend.after
    assert backend.counts == [(2, 1, 2)]
    assert pointwise(after) == ["<built-in function getitem>"] * 3
    epilogues = [read_epilogue(n) for n in after.find_nodes(op="call_function", target=ops.linear_quantized.default)]
    assert sorted((e.activation, e.binary) for e in epilogues) == sorted([("none", "none"), (name, "mul")])


def test_two_products_are_added():
    def f(x, z):
        return linear(x, W) + linear(z, V)

    x, z = activations(5, dtype=torch.float32), activations(5, dtype=torch.float32).flip(0)
    run, backend = compiled(f, lower, fold)
    y = run(x, z)
    one = ops.linear(x, *W, 6.0, other=ops.linear(z, *V, 6.0), binary="add")
    other = ops.linear(z, *V, 6.0, other=ops.linear(x, *W, 6.0), binary="add")
    assert torch.equal(y, one) or torch.equal(y, other)
    assert backend.counts == [(2, 1)]
    assert pointwise(backend.after[0]) == []


def test_clone_in_between():
    """What dropout leaves in eval mode."""
    other = random(5, 6)
    x = activations(5, dtype=torch.float32)
    check(lambda x, o: linear(x, W).clone() + o, x, other, count=1, epilogue=("none", "add"), other=other)
    check(lambda x: F.relu(linear(x, W).clone()), x, count=1, epilogue=("relu", "none"))


def test_a_clone_in_another_memory_format_stays():
    x = activations(2, 3, 5, dtype=torch.float32)
    check(
        lambda x: linear(x, W).clone(memory_format=torch.channels_last), x, count=0, epilogue=("none", "none"),
        left=("aten.clone.default",),
    )  # fmt: skip


@pytest.mark.parametrize("cube", [lambda y: torch.pow(y, 3.0), lambda y: y * y * y], ids=["pow", "products"])
def test_tanh_gelu_by_hand(cube):
    """transformers' NewGELUActivation."""

    def f(x):
        y = linear(x, W)
        return 0.5 * y * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (y + 0.044715 * cube(y))))

    check(f, activations(5, dtype=torch.float32), count=1, epilogue=("gelu_tanh", "none"))


def test_near_miss_gelu_by_hand_with_a_division():
    """It would be legal to fold; the pattern has a multiplication."""
    x = activations(5, dtype=torch.float32)

    def erf(x):
        y = linear(x, W)
        return y * 0.5 * (1.0 + torch.erf(y / math.sqrt(2.0)))

    run, backend = compiled(erf, lower, fold)
    unfolded, _ = compiled(erf, lower)
    assert torch.equal(run(x), unfolded(x))
    assert backend.counts == [(1, 0)]


def test_dynamic_shapes():
    other = random(2, 5, 6)

    def f(x, other):
        return other + F.silu(linear(x, W))

    x = activations(2, 5, dtype=torch.float32)
    check(f, x, other, count=2, epilogue=("silu", "add"), other=other, dynamic=True)


def test_experts():
    x, other, w = random(3, 5, 24), random(3, 5, 6), weight(3, 6, 24)

    def f(x, other):
        return F.silu(torch.bmm(x, dequantized(w, x.dtype).mT)) * other

    run, backend = compiled(f, lower, fold)
    assert torch.equal(run(x, other), ops.linear(x, *w, 6.0, activation="silu", other=other, binary="mul"))
    assert backend.counts == [(1, 2)]
    assert pointwise(backend.after[0]) == []


def test_wider_cast_around_an_activation():
    x = activations(5, dtype=torch.bfloat16)
    check(lambda x: F.relu(linear(x, W).float()).bfloat16(), x, count=1, epilogue=("relu", "none"))


def test_training_folds_what_the_backward_does_not_read():
    """relu's gradient reads its result; silu's reads its input, which then has to be there."""

    def f(x, other):
        return (F.relu(linear(x, W)) + F.silu(linear(x, V)) + other).sin().sum()

    x, other, gradients = activations(5, dtype=torch.float32), random(5, 6), []
    for passes in ([lower], [lower, fold]):
        leaf = x.clone().requires_grad_()
        run, backend = compiled(f, *passes)
        run(leaf, other).backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)
    assert backend.counts == [(2, 1)]
    activations_left = [
        read_epilogue(n).activation for n in backend.after[0].find_nodes(op="call_function", target=LINEAR)
    ]
    assert sorted(activations_left) == ["none", "relu"]


# ---- near misses: the graph stays as `lower` left it -----------------------------------------------------------------


def y_of(x):
    return linear(x, W, threshold=0.0)


def tanh_gelu(y, slope):
    return 0.5 * y * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (y + slope * y * y * y)))


NEAR_MISSES = {
    "a row is broadcast": (lambda x, o: y_of(x) + o, (1, 6)),
    "a column is broadcast": (lambda x, o: y_of(x) + o, (5, 1)),
    "a number": (lambda x: y_of(x) + 2.0,),
    "a tensor without dimensions": (lambda x, o: y_of(x) + o, ()),
    "a product by a vector": (lambda x, o: y_of(x) * o, (6,)),
    "y is broadcast": (lambda x, o: y_of(x) + o, (2, 5, 6)),
    "alpha": (lambda x, o: torch.add(y_of(x), o, alpha=2), (5, 6)),
    "a difference": (lambda x, o: y_of(x) - o, (5, 6)),
    "a quotient": (lambda x, o: y_of(x) / o, (5, 6)),
    "y twice": (lambda x, o: (lambda y: (y + o) * y)(y_of(x)), (5, 6)),
    "y + y": (lambda x: (lambda y: y + y)(y_of(x)),),
    "y * y": (lambda x: (lambda y: y * y)(y_of(x)),),
    "y is also returned": (lambda x, o: (lambda y: (y + o, y))(y_of(x)), (5, 6)),
    "silu, whose input is also returned": (lambda x: (lambda y: (F.silu(y), y))(y_of(x)),),
    "silu, whose sigmoid is also returned": (lambda x: (lambda y: (F.silu(y), torch.exp(-y)))(y_of(x)),),
    "silu of something else": (lambda x, o: y_of(x) / (1 + torch.exp(-o)), (5, 6)),
    "sigmoid of y, times something else": (lambda x, o: torch.sigmoid(y_of(x)) * o, (5, 6)),
    "gelu of another slope": (lambda x: tanh_gelu(y_of(x), 0.0447),),
    "a view in between": (lambda x, o: y_of(x).view(6, 5) + o, (6, 5)),
    "another activation": (lambda x: F.leaky_relu(y_of(x)),),
    "relu6": (lambda x: F.relu6(y_of(x)),),
    "a mask of booleans": (lambda x, o: y_of(x) * (o > 0), (5, 6)),
    "an integer matrix": (lambda x, o: y_of(x) + (o * 9).int(), (5, 6)),
    "an integer vector": (lambda x, o: y_of(x) + (o * 9).int(), (6,)),
    "a wider matrix": (lambda x, o: y_of(x) + o.double(), (5, 6)),
    "a wider vector": (lambda x, o: y_of(x) + o.double(), (6,)),
    "relu of integers": (lambda x: F.relu(y_of(x).int()).float(),),
    "relu of fewer digits": (lambda x: F.relu(y_of(x).bfloat16()).float(),),
    "relu that stays wider": (lambda x: F.relu(y_of(x).double()),),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_miss_is_left(name):
    f, *shapes = NEAR_MISSES[name]
    args = [activations(5, dtype=torch.float32), *(random(*shape, seed=7) for shape in shapes)]
    lowered: list[str] = []

    def note(graph: Graph) -> int:
        lowered.append(str(graph))
        return len(lowered)

    run, backend = compiled(f, lower, note, fold)
    expected, found = ((t,) if isinstance(t, torch.Tensor) else t for t in (f(*args), run(*args)))
    for e, y in zip(expected, found, strict=True):
        assert e.dtype == y.dtype
        assert (e - y).norm() <= 2**-8 * e.norm()  # bfloat16's, in one of the cases
    assert backend.counts == [(1, 1, 0)]
    assert [str(graph) for graph in backend.after] == lowered
    assert pointwise(backend.after[0])


@pytest.mark.parametrize("shape", [(6,), (3, 1, 6)], ids=["a vector", "one for each expert"])
def test_near_miss_bias_of_experts(shape):
    x, bias, w = random(3, 5, 24), random(*shape), weight(3, 6, 24)

    def f(x, bias):
        return torch.bmm(x, dequantized(w, x.dtype).mT) + bias

    run, backend = compiled(f, lower, fold)
    assert torch.equal(run(x, bias), ops.linear(x, *w, 6.0) + bias)
    assert backend.counts == [(1, 0)]
    assert count_nodes(backend.after[0], aten.add.Tensor) == 1


def test_near_miss_16_bits_and_a_wider_residual():
    x, other = activations(5, dtype=torch.bfloat16), random(5, 6)
    run, backend = compiled(lambda x, o: linear(x, W) + o, lower, fold)
    assert torch.equal(run(x, other), ops.linear(x, *W, 6.0) + other)
    assert backend.counts == [(1, 0)]


@torch.library.custom_op("int8fx_test::pair", mutates_args=())
def pair(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return a + 1, b + 1


@pair.register_fake
def _(a, b):
    return torch.empty_like(a), torch.empty_like(b)


def test_near_miss_someone_elses_op_with_two_results():
    x, other = activations(5, dtype=torch.float32), random(5, 6)
    run, backend = compiled(lambda x, o: torch.ops.int8fx_test.pair(linear(x, W), o), lower, fold)
    assert torch.equal(run(x, other)[0], ops.linear(x, *W, 6.0) + 1)
    assert backend.counts == [(1, 0)]
