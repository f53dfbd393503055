import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
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
)

from int8fx.schemes import LLMInt8, llm_int8, reference
from int8fx.schemes.quantize import compute_dtype, dequantize


@given(problems(batched=None))
def test_error_is_within_the_derived_bound(p):
    y = reference.linear(*p)
    assert_within_bound(y, *p)


@given(problems(values=("normal", "zero_rows")))
def test_threshold_0_is_exact_up_to_the_weights(p):
    y = reference.linear(p.x, p.codes, p.scale, p.bias, 0.0)
    terms = bound(p.x, p.codes, p.scale, p.bias, 0.0)
    exact = oracle(p.x, p.codes, p.scale, p.bias)
    assert (terms.codes == 0).all()
    assert ((y.double() - exact).abs() <= terms.sums + output_rounding(exact.abs() + terms.sums, y.dtype)).all()


@given(problems(values=("normal", "zero_rows")))
def test_threshold_inf_is_plain_int8(p):
    x, codes, scale, bias, _ = p
    y = reference.linear(x, codes, scale, bias, INF)
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
    clean = p.x.isfinite().all(-1)
    assert not y[~clean].isfinite().any()
    largest = oracle(p.x, p.codes, p.scale, p.bias)[clean].abs()
    assert y[clean].isfinite().all() or largest.max() > torch.finfo(y.dtype).max / 2


@given(problems(values=("normal", "zero_rows", "denormal"), batched=True))
def test_batched_weight_is_one_product_per_expert(p):
    y = reference.linear(*p)
    for e in range(p.x.shape[0]):
        bias = None if p.bias is None else p.bias[e]
        assert torch.equal(y[e], reference.linear(p.x[e], p.codes[e], p.scale[e], bias, p.threshold))


@given(problems(values=("normal", "zero_rows")))
def test_leading_dimensions_are_flattened(p):
    rows = math.prod(p.x.shape[:-1])
    flat = reference.linear(p.x.reshape(rows, p.x.shape[-1]), p.codes, p.scale, p.bias, p.threshold)
    assert torch.equal(reference.linear(*p), flat.reshape(*p.x.shape[:-1], p.codes.shape[0]))


def test_the_row_absmax_leaves_out_outlier_columns():
    x = torch.tensor([[10.0, 1.0, 2.0], [5.0, 1.0, 2.0]])
    codes, scale = torch.tensor([[0, 127, 0], [0, 0, 127]], dtype=torch.int8), torch.ones(2) / 127
    y = reference.linear(x, codes, scale, None, 6.0)
    x_scale = torch.tensor(2.0) / 127
    expected = torch.tensor([64.0, 127.0]) * x_scale * (127 * scale)  # of both rows: their outlier column is out
    torch.testing.assert_close(y, expected.expand(2, 2), rtol=2**-22, atol=0)


def test_an_outlier_column_is_multiplied_for_every_row():
    """Also for the rows in which it is small, or the result would depend on which rows are outliers."""
    x = activation(8, 64, outliers="none", seed=1) / 10
    codes, scale = packed_weight(16, 64, seed=2)
    x[0, 5] = 300.0
    y = reference.linear(x, codes, scale, None, 6.0)
    without = x.clone()
    without[:, 5] = 0
    rest = reference.linear(without, codes, scale, None, 6.0)
    column = x[:, 5:6].double() * (codes[:, 5].double() * scale.double())
    terms = bound(x, codes, scale, None, 6.0)
    assert ((y.double() - rest.double() - column).abs() <= 2 * terms.sums).all()


def test_outliers_make_plain_int8_worse_and_leave_llm_int8_alone():
    p = problem(64, 256, 64, outliers="column", seed=3)
    exact = oracle(p.x, p.codes, p.scale, p.bias)

    def error(threshold):
        y = reference.linear(p.x, p.codes, p.scale, p.bias, threshold)
        return (y.double() - exact).square().mean().sqrt()

    calm = p.x.clone()
    calm[:, (p.x.abs() >= 6).any(0)] = 0
    y = reference.linear(calm, p.codes, p.scale, p.bias, 6.0)
    calm_error = (y.double() - oracle(calm, p.codes, p.scale, p.bias)).square().mean().sqrt()
    assert error(6.0) <= 1.05 * calm_error
    assert error(INF) > 3 * calm_error


@pytest.mark.parametrize("dtype", DTYPES)
def test_float16_overflow_is_inf_and_only_in_the_output(dtype):
    """Sums are float32: terms beyond float16 that cancel give a finite result."""
    x = torch.full((1, 4), 60000.0).to(dtype)
    codes = torch.tensor([[127, 127, 127, 127], [127, 127, -127, -127]], dtype=torch.int8)
    y = reference.linear(x, codes, torch.full((2,), 1 / 127), None, 6.0)
    assert y[0, 0].item() == (INF if dtype == torch.float16 else pytest.approx(240000, rel=2**-7))
    assert y[0, 1].item() == 0


@pytest.mark.parametrize("activation_name", list(reference.ACTIVATIONS))
@pytest.mark.parametrize("binary", list(reference.BINARIES))
@pytest.mark.parametrize("batched", [False, True])
def test_epilogue_is_applied_before_the_one_rounding(activation_name, binary, batched):
    p = problem(6, 32, 10, dtype=torch.bfloat16, seed=4)
    x, codes, scale, bias, threshold = p
    if batched:
        x, codes, scale, bias = (torch.stack([t, t]) for t in (x, codes, scale, bias))
    other = None
    if binary != "none":
        other = torch.randn(*x.shape[:-1], 10, generator=generator(5)).to(torch.bfloat16)
    y = reference.linear(x, codes, scale, bias, threshold, activation_name, other, binary)
    plain = reference.linear(x.float(), codes, scale, bias, threshold)
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
    codes, scale = packed_weight(5, 8, seed=7)
    y = reference.linear(x, codes, scale, None, 6.0)
    assert_within_bound(y, x, codes, scale, None, 0.0)
    torch.testing.assert_close(y, x @ dequantize(codes, scale).t())


# ---- the scheme -----------------------------------------------------------------------------------------------------


def test_the_default_threshold_is_the_papers():
    assert llm_int8() == LLMInt8(6.0) == llm_int8(threshold=6)
    assert llm_int8(threshold=INF).threshold == INF
    assert isinstance(llm_int8(6).threshold, float)


@pytest.mark.parametrize("threshold", [-1.0, -INF, math.nan, None, "6", True, torch.tensor(6.0)])
def test_a_threshold_that_is_no_number_from_0_up_is_refused(threshold):
    with pytest.raises(ValueError, match="threshold must be a number >= 0"):
        llm_int8(threshold)
