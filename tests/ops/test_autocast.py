"""The ops under autocast: x is cast as for `F.linear`; scales and float64 are not cast."""

import pytest
import torch
from support.samples import N, make_bias, make_other, make_weight, make_x, overload

from int8fx import ops
from int8fx.schemes.weight import Int8Weight

AUTOCAST = ("linear", "grouped_linear")
SCHEMES = {"llm_int8": {}, "rotated columns": {"block": 8, "columns": True}}


@pytest.fixture(params=SCHEMES)
def weight_of(request):
    """The weight for an op: of two experts for ``grouped_linear``."""
    return lambda name: make_weight(experts=2 if name == "grouped_linear" else None, **SCHEMES[request.param])


def call(name: str, x, weight: Int8Weight, bias):
    offsets = (torch.tensor([2, 6]),) if name == "grouped_linear" else ()
    return overload(name)(x, *offsets, *weight, bias)


def bias_of(name: str, **options) -> torch.Tensor:
    return make_bias(*([N] if name == "linear" else [2, N]), **options)


@pytest.mark.parametrize("name", AUTOCAST)
@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_autocast_casts_x_and_bias_and_leaves_the_scale(weight_of, name, to, dtype):
    x, weight, bias = make_x(6, dtype=dtype), weight_of(name), bias_of(name)
    with torch.autocast("cpu", to):
        y = call(name, x, weight, bias)
    assert y.dtype == to
    assert torch.equal(y, call(name, x.to(to), weight, bias.to(to)))
    assert not torch.equal(y, call(name, x.to(to), weight._replace(scale=weight.scale.to(to).float()), bias.to(to)))


@pytest.mark.parametrize("name", AUTOCAST)
def test_autocast_leaves_float64(weight_of, name):
    x, weight, bias = make_x(6, dtype=torch.float64), weight_of(name), bias_of(name, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        y = call(name, x, weight, bias)
    assert y.dtype == torch.float64
    assert torch.equal(y, call(name, x, weight, bias))


def test_autocast_casts_other_like_x(weight_of):
    weight, x, other = weight_of("linear"), make_x(6), make_other(6)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.linear(x, *weight, None, "silu", other, "mul")
    assert torch.equal(y, ops.linear(x.bfloat16(), *weight, None, "silu", other.bfloat16(), "mul"))


def test_autocast_that_is_off_does_nothing():
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert ops.linear(make_x(6), *make_weight()).dtype == torch.float32


def test_autocast_refuses_what_is_refused_without():
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="x has dtype"):
        ops.linear(make_x(6).long(), *make_weight())


def test_gradients_through_autocast_have_the_dtype_of_their_tensor(weight_of):
    weight, x, bias = weight_of("linear"), make_x(6, grad=True), make_bias(N, grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.linear(x, *weight, bias)
    grad = make_other(6, dtype=torch.bfloat16)
    computed = torch.autograd.grad(y, (x, bias), grad)
    x16, bias16 = x.detach().bfloat16().requires_grad_(), bias.detach().bfloat16().requires_grad_()
    expected = torch.autograd.grad(ops.linear(x16, *weight, bias16), (x16, bias16), grad)
    for a, b in zip(computed, expected, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b.float())
