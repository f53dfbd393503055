"""The specification: within the bound that its docstring derives, for every scheme."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.helpers import (
    DTYPES,
    INF,
    activation,
    assert_within_bound,
    bound,
    generator,
    oracle,
    output_rounding,
    packed_weight,
    problem,
    problems,
    seeds,
)

from int8fx.schemes import reference
from int8fx.schemes.quantize import compute_dtype, dequantize
from int8fx.schemes.weight import Epilogue, Int8Weight

unrotated = st.sampled_from(("llm_int8", "columns"))
no_columns = st.just("llm_int8")


@given(problems(batched=None))
def test_error_is_within_the_derived_bound(p):
    y = reference.linear(*p)
    assert_within_bound(y, *p)


@given(problems(values=("normal", "zero_rows"), scheme=unrotated))
def test_threshold_0_is_exact_up_to_the_weights(p):
    weight = p.weight._replace(threshold=0.0)
    y = reference.linear(p.x, weight, p.epilogue)
    terms = bound(p.x, weight, p.bias)
    exact = oracle(p.x, weight, p.bias)
    if weight.columns is None:  # (the bound counts unquantised columns among the rounded ones)
        assert (terms.codes == 0).all()
    assert ((y.double() - exact).abs() <= terms.sums + output_rounding(exact.abs() + terms.sums, y.dtype)).all()


@given(problems(values=("normal", "zero_rows"), scheme=no_columns))
def test_without_a_threshold_it_is_plain_int8(p):
    x, (codes, scale, *_), bias = p.x, p.weight, p.bias
    y = reference.linear(x, Int8Weight(codes, scale), p.epilogue)
    ct = compute_dtype(x.dtype)
    x2d = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).to(ct)
    x_scale = (x2d.abs().amax(-1) if x.shape[-1] else x2d.new_zeros(len(x2d))) / 127
    x_scale = x_scale.clamp_min(torch.finfo(torch.float32).tiny)
    x_codes = (x2d / x_scale[:, None]).round()
    plain = (x_codes.long() @ codes.long().t()).to(ct) * x_scale[:, None] * scale.to(ct)
    plain = plain if bias is None else plain + bias.to(ct)
    assert torch.equal(y, plain.to(x.dtype).reshape(y.shape))


@given(problems(values=("nan", "inf"), layouts=("contiguous",)))
def test_nan_and_inf_stay_in_their_rows(p):
    y = reference.linear(*p)
    finite = p.x.isfinite().all(-1)
    assert not y[~finite].isfinite().any()
    largest = oracle(p.x, p.weight, p.bias)[finite].abs()
    assert y[finite].isfinite().all() or largest.max() > torch.finfo(y.dtype).max / 2


@given(problems(values=("normal", "zero_rows", "denormal"), batched=True))
def test_batched_weight_is_one_product_per_expert(p):
    y = reference.linear(*p)
    for e in range(p.x.shape[0]):
        assert torch.equal(y[e], reference.linear(p.x[e], p.weight.of_expert(e), p.epilogue.of_expert(e)))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=4), st.integers(0, 3), problems(batched=True), seeds)
def test_grouped_linear_is_linear_per_group(sizes, after, p, seed):
    E, K = len(p.weight.codes), p.x.shape[-1]
    ends = torch.tensor((sizes * E)[:E]).cumsum(0)
    x = activation(int(ends[-1]) + after, K, outliers="some", dtype=p.x.dtype, seed=seed)
    y = reference.grouped_linear(x, ends, p.weight, p.bias)
    begin = 0
    for e, end in enumerate(ends.tolist()):
        expected = reference.linear(x[begin:end], p.weight.of_expert(e), p.epilogue.of_expert(e))
        assert torch.equal(y[begin:end], expected)
        begin = end
    assert y.shape == (len(x), p.weight.codes.shape[1])
    assert (y[begin:] == 0).all()


@given(problems(scheme=st.sampled_from(("columns", "rotated columns"))))
def test_unquantised_columns_are_multiplied_in_floating_point(p):
    """The oracle has them: x with zeros in all other columns gives their float matmul."""
    columns, columns_weight = p.weight.columns, p.weight.columns_weight
    x = torch.zeros(p.x.shape, dtype=torch.float64)
    x[..., columns] = torch.where(p.x.isfinite(), p.x, 1).double()[..., columns]
    exact = x[..., columns] @ columns_weight.double().T
    scale = x[..., columns].abs() @ columns_weight.double().abs().T
    assert ((oracle(x, p.weight) - exact).abs() <= (x.shape[-1] + 4) * 2**-53 * scale).all()
    assert ((reference.linear(x, p.weight) - exact).abs() <= (x.shape[-1] + 4) * 2**-53 * scale).all()


@given(problems(values=("normal", "zero_rows")))
def test_leading_dimensions_are_flattened(p):
    rows = math.prod(p.x.shape[:-1])
    flat = reference.linear(*p.with_x(p.x.reshape(rows, p.x.shape[-1])))
    assert torch.equal(reference.linear(*p), flat.reshape(*p.x.shape[:-1], p.weight.codes.shape[0]))


def test_the_row_absmax_leaves_out_outlier_columns():
    x = torch.tensor([[10.0, 1.0, 2.0], [5.0, 1.0, 2.0]])
    codes, scale = torch.tensor([[0, 127, 0], [0, 0, 127]], dtype=torch.int8), torch.ones(2) / 127
    y = reference.linear(x, Int8Weight(codes, scale, 6.0))
    x_scale = torch.tensor(2.0) / 127
    expected = torch.tensor([64.0, 127.0]) * x_scale * (127 * scale)  # of both rows: their outlier column is out
    torch.testing.assert_close(y, expected.expand(2, 2), rtol=2**-22, atol=0)


def test_an_outlier_column_is_multiplied_for_every_row():
    """Also for the rows in which it is small, or the result would depend on which rows are outliers."""
    x = activation(8, 64, outliers="none", seed=1) / 10
    weight = Int8Weight(*packed_weight(16, 64, seed=2), 6.0)
    x[0, 5] = 300.0
    y = reference.linear(x, weight)
    without = x.clone()
    without[:, 5] = 0
    others = reference.linear(without, weight)
    column = x[:, 5:6].double() * (weight.codes[:, 5].double() * weight.scale.double())
    assert ((y.double() - others.double() - column).abs() <= 2 * bound(x, weight).sums).all()


def test_outliers_make_plain_int8_worse_and_leave_llm_int8_alone():
    p = problem(64, 256, 64, outliers="column", seed=3)

    def error(x, threshold):
        y = reference.linear(x, p.weight._replace(threshold=threshold), p.epilogue)
        return (y.double() - oracle(x, p.weight, p.bias)).square().mean().sqrt()

    calm = p.x.clone()
    calm[:, (p.x.abs() >= 6).any(0)] = 0
    assert error(p.x, 6.0) <= 1.05 * error(calm, 6.0)
    assert error(p.x, None) > 3 * error(calm, 6.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_float16_overflow_is_inf_and_only_in_the_output(dtype):
    """Sums are float32: terms beyond float16 that cancel give a finite result."""
    x = torch.full((1, 4), 60000.0).to(dtype)
    codes = torch.tensor([[127, 127, 127, 127], [127, 127, -127, -127]], dtype=torch.int8)
    y = reference.linear(x, Int8Weight(codes, torch.full((2,), 1 / 127), 6.0))
    assert y[0, 0].item() == (INF if dtype == torch.float16 else pytest.approx(240000, rel=2**-7))
    assert y[0, 1].item() == 0


@pytest.mark.parametrize("activation_name", list(reference.ACTIVATIONS))
@pytest.mark.parametrize("binary", list(reference.BINARIES))
@pytest.mark.parametrize("batched", [False, True])
def test_epilogue_is_applied_before_the_one_rounding(activation_name, binary, batched):
    p = problem(6, 32, 10, dtype=torch.bfloat16, seed=4)
    x, (codes, scale, threshold, *_), bias = p.x, p.weight, p.bias
    if batched:
        x, codes, scale, bias = (torch.stack([t, t]) for t in (x, codes, scale, bias))
    weight, other = Int8Weight(codes, scale, threshold), None
    if binary != "none":
        other = torch.randn(*x.shape[:-1], 10, generator=generator(5)).to(torch.bfloat16)
    y = reference.linear(x, weight, Epilogue(bias, activation_name, other, binary))
    plain = reference.linear(x.float(), weight, Epilogue(bias))
    functions = {
        "none": lambda v: v,
        "relu": F.relu,
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda v: F.gelu(v, approximate="tanh"),
    }
    expected = functions[activation_name](plain)
    expected = {"none": lambda: expected, "add": lambda: expected + other, "mul": lambda: expected * other}[binary]()
    assert y.dtype == torch.bfloat16
    # the batched reference rounds each expert to x's dtype, as this does
    assert torch.equal(y, expected.to(torch.bfloat16))


def test_residual_weights_are_the_dequantised_codes():
    x = activation(3, 8, outliers="columns", seed=6)
    weight = Int8Weight(*packed_weight(5, 8, seed=7), 6.0)
    y = reference.linear(x, weight)
    assert_within_bound(y, x, weight._replace(threshold=0.0))
    torch.testing.assert_close(y, x @ dequantize(weight).t())
