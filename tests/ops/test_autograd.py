"""Gradients of the ops: those of the linear layer with the dequantised weight, for every scheme."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.helpers import (
    DTYPES,
    Problem,
    activation,
    dtypes,
    generator,
    problems,
    rotation_error,
    seeds,
    stored_rows,
    unit_roundoff,
    weights,
)
from support.samples import K, N, make_bias, make_other, make_weight, make_x, overload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from int8fx import ops
from int8fx.schemes.quantize import dequantize
from int8fx.schemes.weight import Epilogue, Int8Weight

SCHEMES = {
    "llm_int8": {},
    "plain": {"threshold": None},
    "columns": {"columns": True},
    "rotated": {"block": 8},
    "rotated columns": {"block": 8, "columns": True},
}
finite_problems = problems(values=("normal", "zero_rows"), layouts=("contiguous", "transposed", "sliced"), batched=None)


@pytest.fixture(params=SCHEMES)
def weight(request) -> Int8Weight:
    return make_weight(**SCHEMES[request.param])


def gradients(y, inputs, grad):
    return torch.autograd.grad(y, [t for t in inputs if t is not None], grad)


def requiring_gradients(p: Problem) -> Problem:
    bias = None if p.bias is None else p.bias.detach().requires_grad_()
    return p.with_x(p.x.detach().requires_grad_()).with_epilogue(bias=bias)


@given(finite_problems, seeds)
def test_gradients_are_those_of_the_dequantised_linear(p, seed):
    p = requiring_gradients(p)
    x, bias, weight = p.x, p.bias, p.weight
    y = ops.linear(*p.args)
    assert y.requires_grad
    grad = torch.randn(y.shape, generator=generator(seed)).to(y.dtype)
    computed = gradients(y, (x, bias), grad)
    w = ops.dequantize(*weight, dtype=grad.dtype)
    once = (grad.float() @ w.float()).to(grad.dtype)  # of 16 bits, on CPUs without instructions for them
    assert torch.equal(computed[0], grad @ w) or (grad.dtype.itemsize == 2 and torch.equal(computed[0], once))

    x64 = x.detach().double().requires_grad_()
    bias64 = None if bias is None else bias.detach().double().requires_grad_()
    w = dequantize(weight, torch.float64).transpose(-1, -2)
    y64 = x64 @ w
    if bias is not None:
        y64 = y64 + (bias64 if weight.codes.dim() == 2 else bias64.unsqueeze(-2))
    exact = gradients(y64, (x64, bias64), grad.double())

    # A float sum of n products, of factors rounded to the dtype, may err by (n + 3) units of roundoff per term.
    u = unit_roundoff(x.dtype) * (2 if x.dtype == torch.float64 else 1)
    terms_x = grad.double().abs() @ w.abs().transpose(-1, -2)
    smallest = torch.finfo(x.dtype).smallest_normal
    budget = (y.shape[-1] + 3) * (u * terms_x + smallest)
    if weight.block != 1:  # and the weight is rotated in the sums' dtype
        v = stored_rows(weight)
        ct = torch.float64 if x.dtype == torch.float64 else torch.float32
        budget = budget + 2 * grad.double().abs() @ rotation_error(v, weight.block, ct)
    assert (computed[0].dtype, computed[0].shape) == (x.dtype, x.shape)
    assert ((computed[0].double() - exact[0]).abs() <= budget).all()
    if bias is not None:
        lead = tuple(range(bias.dim() - 1, y.dim() - 1))
        terms_bias = grad.double().abs().sum(lead) if lead else grad.double().abs()
        assert (computed[1].dtype, computed[1].shape) == (bias.dtype, bias.shape)
        rows = math.prod(y.shape[d] for d in lead)
        budget = ((rows + 3) * u + unit_roundoff(bias.dtype)) * terms_bias
        assert ((computed[1].double() - exact[1]).abs() <= budget).all()


@pytest.mark.parametrize("lead", [(), (0,), (5,), (2, 3), (2, 1, 2, 2)])
def test_float32_gradients_equal_autograd_of_the_dequantised_linear(weight, lead):
    x, bias, grad = make_x(*lead, grad=True), make_bias(N, grad=True), make_other(*lead)
    computed = gradients(ops.linear(x, *weight, bias), (x, bias), grad)
    expected = gradients(F.linear(x, ops.dequantize(*weight, dtype=x.dtype), bias), (x, bias), grad)
    for a, b in zip(computed, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-20, atol=0)


@given(problems(values=("normal",), layouts=("contiguous", "sliced")), seeds)
def test_quantising_first_has_the_gradients_of_linear(p, seed):
    p = requiring_gradients(p)
    y = ops.linear(*p.args)
    grad = torch.randn(y.shape, generator=generator(seed)).to(y.dtype)
    quantized = ops.quantize_rowwise(*p.quantize_args)
    assert not any(t.requires_grad for t in quantized)
    again = ops.linear_quantized(p.x, *quantized, *p.weight, *p.epilogue)
    for a, b in zip(gradients(again, (p.x, p.bias), grad), gradients(y, (p.x, p.bias), grad), strict=True):
        assert torch.equal(a, b)


def test_weights_are_frozen(weight):
    weight = weight._replace(scale=weight.scale.clone().requires_grad_())
    if weight.columns_weight is not None:
        weight = weight._replace(columns_weight=weight.columns_weight.clone().requires_grad_())
    x = make_x(5, grad=True)
    ops.linear(x, *weight).sum().backward()
    assert x.grad is not None
    assert weight.scale.grad is None
    assert weight.columns_weight is None or weight.columns_weight.grad is None
    with torch.no_grad():
        assert not ops.linear(x, *weight).requires_grad


def test_the_formula_of_plain_linear_calls_is_cpp(weight):
    """And that of others Python: it knows about tracing and torch.func. Both are tested for the same gradients here."""
    x = make_x(5, grad=True)
    assert type(ops.linear(x, *weight).grad_fn).__name__ == "CppFunction"
    quantized = ops.quantize_rowwise(x, *weight[2:5])
    assert type(ops.linear_quantized(x, *quantized, *weight).grad_fn).__name__ != "CppFunction"
    mode = FakeTensorMode()
    fakes = tree_map_only(torch.Tensor, mode.from_tensor, (x, *weight))
    with mode:
        assert type(ops.linear(*fakes).grad_fn).__name__ != "CppFunction"


def test_forward_mode_is_refused(weight):
    x = make_x(5)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(RuntimeError, match=r"(?i)jvp|forward"):
            ops.linear(dual.requires_grad_(), *weight)


def test_gradient_of_a_gradient(weight):
    x, v = make_x(5, grad=True), torch.ones(5, N, requires_grad=True)
    (first,) = torch.autograd.grad(ops.linear(x, *weight), x, v, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), v)
    torch.testing.assert_close(second, ops.dequantize(*weight, dtype=torch.float32).sum(1).expand(5, N))


# ---- epilogues -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear", "linear_quantized"])
@pytest.mark.parametrize(
    ("activation_name", "binary", "grad_of"),
    [
        *(("silu", "none", of) for of in ("x", "bias")),
        *(("none", "add", of) for of in ("x", "bias", "other")),
        *(("gelu", "mul", of) for of in ("x", "bias", "other")),
    ],
)
def test_no_gradient_through_an_epilogue(name, grad_of, activation_name, binary):
    weight, x, bias, other = make_weight(), make_x(5), make_bias(N), None if binary == "none" else make_other(5)
    quantized = () if name == "linear" else ops.quantize_rowwise(x, weight.threshold)
    {"x": x, "bias": bias, "other": other}[grad_of].requires_grad_()
    args = (x, *quantized, *weight, bias, activation_name, other, binary)
    with pytest.raises(RuntimeError, match=f"int8fx::{name} has no gradient through its epilogue"):
        overload(name)(*args)
    with torch.no_grad():
        overload(name)(*args)


@pytest.mark.parametrize("name", ["linear", "linear_quantized"])
def test_no_gradient_through_an_epilogue_of_fakes(name):
    weight, x = make_weight(), make_x(5, grad=True)
    quantized = () if name == "linear" else ops.quantize_rowwise(x.detach(), weight.threshold)
    args = (x, *quantized, *weight, *Epilogue(activation="silu"))
    mode = FakeTensorMode()
    fakes = tree_map_only(torch.Tensor, mode.from_tensor, args)
    with mode, pytest.raises(RuntimeError, match="no gradient through its epilogue"):
        overload(name)(*fakes).sum().backward()


# ---- grouped_linear --------------------------------------------------------------------------------------------------


@given(st.data())
def test_grouped_gradients_are_those_of_linear_per_group(data):
    sizes = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=4))
    after, dtype, seed = data.draw(st.integers(0, 3)), data.draw(dtypes), data.draw(seeds)
    E, S = len(sizes), sum(sizes) + after
    weight = data.draw(weights(K, E, dtype=dtype))
    channels = weight.codes.shape[1]
    x = activation(S, K, outliers="some", dtype=dtype, seed=seed).requires_grad_()
    bias = make_bias(E, channels, dtype=dtype, grad=True)
    offsets = torch.tensor(sizes).cumsum(0)
    y = ops.grouped_linear(x, offsets, *weight, bias)
    grad = torch.randn(S, channels, generator=generator(seed)).to(dtype)
    grad_x, grad_bias = gradients(y, (x, bias), grad)
    assert (grad_x[sum(sizes) :] == 0).all()
    u = unit_roundoff(dtype) * (2 if dtype == torch.float64 else 1)
    begin = 0
    for e, end in enumerate(offsets.tolist()):
        g, w = grad[begin:end].double(), ops.dequantize(*weight.of_expert(e), dtype=torch.float64)
        v = stored_rows(weight.of_expert(e))
        ct = torch.float64 if dtype == torch.float64 else torch.float32
        slack = (channels + 3 + E) * (u * (g.abs() @ w.abs()) + torch.finfo(dtype).smallest_normal)
        slack = slack + 2 * g.abs() @ rotation_error(v, weight.block, ct)
        assert ((grad_x[begin:end].double() - g @ w).abs() <= slack).all()
        assert ((grad_bias[e].double() - g.sum(0)).abs() <= (end - begin + 3) * u * g.abs().sum(0)).all()
        begin = end


@pytest.mark.parametrize("dtype", DTYPES)
def test_grouped_rows_are_rows_of_linear(dtype):
    """Forward and backward of one group is `linear`, bit for bit."""
    weight = make_weight(experts=1, block=8, columns=True, dtype=dtype)
    x, grad = make_x(6, dtype=dtype, grad=True), make_other(6, dtype=dtype)
    y, alone = ops.grouped_linear(x, torch.tensor([6]), *weight), ops.linear(x, *weight.of_expert(0))
    assert torch.equal(y, alone)
    for a, b in zip(gradients(y, (x,), grad), gradients(alone, (x,), grad), strict=True):
        assert torch.equal(a, b)
