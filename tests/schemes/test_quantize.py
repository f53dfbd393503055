"""Quantisation of rows and weights, outlier columns, and dequantisation."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.helpers import INF, activation, activations, dtypes, generator, seeds, thresholds

from int8fx.schemes.quantize import (
    INT8_MAX,
    MAX_K,
    MAX_THRESHOLD,
    compute_dtype,
    dequantize,
    outlier_mask,
    quantize_rowwise,
    quantize_weight,
)
from int8fx.schemes.rotate import rotation_blocks
from int8fx.schemes.weight import Int8Weight

TINY = torch.finfo(torch.float32).tiny
HALF_STEP = 0.5 * (1 + 2**-16)
rows = st.tuples(st.integers(0, 40))


# ---- rows ------------------------------------------------------------------------------------------------------------


@given(activations(lead=(7,)), thresholds)
def test_error_of_a_row_is_half_a_step(x, threshold):
    mask = outlier_mask(x, threshold)
    codes, scale = quantize_rowwise(x, mask)
    fine = scale.isfinite()
    error = (x.double() - codes.double() * scale.double()[:, None]).abs()
    assert (error <= HALF_STEP * scale.double()[:, None])[fine][:, ~mask].all()


@given(activations(lead=(7,)), thresholds)
def test_codes_span_the_row_and_masked_columns_are_zero(x, threshold):
    mask = outlier_mask(x, threshold)
    codes, scale = quantize_rowwise(x, mask)
    assert codes.dtype == torch.int8
    assert scale.dtype == compute_dtype(x.dtype)
    fine = scale.isfinite()
    assert (codes[fine] >= -INT8_MAX).all()
    assert (codes[fine][:, mask] == 0).all()
    quantised = x.masked_fill(mask, 0).to(scale.dtype).abs()
    absmax = quantised.amax(-1) if x.shape[-1] else quantised.new_zeros(len(quantised))
    ordinary = fine & (absmax / INT8_MAX >= TINY)
    if ordinary.any():
        assert (codes[ordinary].abs().amax(-1) == INT8_MAX).all()
    assert (scale[fine & ~ordinary] == TINY).all()
    assert (scale >= TINY)[fine].all()


@given(activations(lead=(7,)), thresholds)
def test_rows_do_not_depend_on_each_other_under_one_mask(x, threshold):
    mask = outlier_mask(x, threshold)
    codes, scale = quantize_rowwise(x, mask)
    finite = scale.isfinite()
    for m in range(len(x)):
        row_codes, row_scale = quantize_rowwise(x[m : m + 1], mask)
        torch.testing.assert_close(row_scale, scale[m : m + 1], rtol=0, atol=0, equal_nan=True)
        if finite[m]:
            assert torch.equal(row_codes, codes[m : m + 1])


@given(activations(lead=(7,), values=("nan", "inf")))
def test_nan_and_inf_make_the_scale_of_their_row_nan(x):
    _, scale = quantize_rowwise(x)
    assert torch.equal(scale.isnan(), ~x.isfinite().all(-1))


@given(activations(values=("normal", "denormal", "huge"), layouts=("contiguous",), lead=(5,)), seeds)
def test_negated_x_negates_the_codes_and_powers_of_two_scale_the_scale(x, seed):
    codes, scale = quantize_rowwise(x)
    negated, same = quantize_rowwise(-x)
    assert torch.equal(negated, -codes)
    assert torch.equal(same, scale)
    x = x.double()
    if (scale > 2 * TINY).all():
        codes, scale = quantize_rowwise(x)
        doubled, twice = quantize_rowwise(x * 2)
        assert torch.equal(doubled, codes)
        assert torch.equal(twice, scale * 2)


@given(activations(lead=(6,), values=("normal", "zero_rows", "denormal")))
def test_every_layout_gives_the_codes_of_the_contiguous_tensor(x):
    codes, scale = quantize_rowwise(x)
    expected_codes, expected_scale = quantize_rowwise(x.contiguous())
    assert torch.equal(codes, expected_codes)
    assert torch.equal(scale, expected_scale)


def test_rounding_is_half_to_even():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    codes, scale = quantize_rowwise(x)
    assert scale.tolist() == [1.0]
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2, -2]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rows_of_zeros_and_denormals_have_a_scale_that_divides(dtype):
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    x = torch.tensor([[0.0, -0.0, 0.0], [smallest, -smallest, 0.0]], dtype=dtype)
    codes, scale = quantize_rowwise(x)
    assert (scale >= TINY).all()
    assert (codes[0] == 0).all()
    assert ((x.double() - codes * scale.double()[:, None]).abs() <= HALF_STEP * scale.double()[:, None]).all()


def test_no_rows_and_no_columns():
    codes, scale = quantize_rowwise(torch.zeros(0, 5))
    assert codes.shape == (0, 5)
    assert scale.shape == (0,)
    codes, scale = quantize_rowwise(torch.zeros(3, 0))
    assert codes.shape == (3, 0)
    assert (scale == TINY).all()


# ---- outlier columns -------------------------------------------------------------------------------------------------


@given(activations(lead=(7,)), thresholds)
def test_a_column_is_an_outlier_when_any_element_reaches_the_threshold(x, threshold):
    columns = x.double().t().tolist()
    expected = [threshold is not None and any(abs(v) >= threshold for v in column) for column in columns]
    assert outlier_mask(x, threshold).tolist() == expected


@given(activations(lead=(7,)), thresholds, st.integers(0, 5), seeds)
def test_unquantised_columns_are_no_outliers(x, threshold, count, seed):
    columns = torch.randperm(x.shape[-1], generator=generator(seed))[:count]
    expected = outlier_mask(x, threshold)
    expected[columns] = False
    assert torch.equal(outlier_mask(x, threshold, columns), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_threshold_itself_is_an_outlier_and_is_not_rounded_to_16_bits(dtype):
    x = torch.tensor([[6.0, -6.0, 5.9375, float("nan"), INF]], dtype=dtype)
    assert outlier_mask(x, 6.0).tolist() == [True, True, False, False, True]
    assert outlier_mask(x, 6.001).tolist() == [False, False, False, False, True]
    assert outlier_mask(x, 5.99).tolist() == [True, True, False, False, True]


def test_threshold_beyond_float16_and_at_its_limits():
    x = activation(4, 9, outliers="columns", dtype=torch.float16)
    x[0, 0] = INF
    assert outlier_mask(x, 1e5).tolist() == [True] + [False] * 8
    assert outlier_mask(x, MAX_THRESHOLD).tolist() == [True] + [False] * 8
    assert not outlier_mask(x, None).any()
    assert outlier_mask(x, 0.0).all()
    assert not outlier_mask(x[:0], 0.0).any()


# ---- weights ---------------------------------------------------------------------------------------------------------


@given(
    st.one_of(st.tuples(sizes := st.integers(0, 40), sizes), st.tuples(st.integers(0, 3), sizes, sizes)),
    dtypes,
    seeds,
    st.booleans(),
)
def test_weight_is_quantised_per_output_channel(shape, dtype, seed, transposed):
    weight = torch.randn(shape, generator=generator(seed)).to(dtype)
    weight[..., ::3, :] = 0
    if transposed:
        weight = weight.transpose(-1, -2).contiguous().transpose(-1, -2)
    codes, scale = quantize_weight(weight)
    assert codes.shape == weight.shape
    assert codes.is_contiguous()
    assert codes.dtype == torch.int8
    assert scale.shape == weight.shape[:-1]
    assert scale.dtype == torch.float32
    assert (codes >= -INT8_MAX).all()
    assert (codes[..., ::3, :] == 0).all()
    error = (weight.double() - codes.double() * scale.double().unsqueeze(-1)).abs()
    assert (error <= HALF_STEP * scale.double().unsqueeze(-1)).all()


def test_weight_in_blocks_equals_weight_in_one(monkeypatch):
    weight = torch.randn(3, 50, 11, generator=generator(0), dtype=torch.float64)
    at_once = quantize_weight(weight)
    monkeypatch.setattr("int8fx.schemes.quantize._CHUNK", 7 * 11)
    assert all(torch.equal(a, b) for a, b in zip(at_once, quantize_weight(weight), strict=True))


def test_codes_of_a_float64_weight_fit_the_scale_as_stored():
    weight = torch.tensor([[127 * (1 + 2**-26), 0.5 + 2**-28]], dtype=torch.float64)
    codes, scale = quantize_weight(weight)
    assert scale.tolist() == [1.0]
    assert codes.tolist() == [[127, 1]]  # 0 would be nearest for the scale before it was rounded to float32


def test_a_batched_weight_is_quantised_like_its_parts():
    weight = torch.randn(2, 5, 7, generator=generator(1), dtype=torch.float64)
    codes, scale = quantize_weight(weight)
    for e in range(2):
        assert all(torch.equal(a, b) for a, b in zip(quantize_weight(weight[e]), (codes[e], scale[e]), strict=True))


@given(st.integers(1, 9), st.integers(1, 40), seeds)
def test_packing_a_dequantised_weight_again_changes_nothing(N, K, seed):
    codes, scale = quantize_weight(torch.randn(N, K, generator=generator(seed)))
    again, same = quantize_weight(dequantize(Int8Weight(codes, scale), torch.float64))
    assert torch.equal(again, codes)
    assert torch.equal(same, scale)


@pytest.mark.parametrize("bad", [math.nan, INF, -INF])
def test_a_weight_that_is_not_finite_shows_in_its_channels_scale(bad):
    weight = torch.ones(3, 4)
    weight[1, 2] = bad
    _, scale = quantize_weight(weight)
    assert scale.isnan().tolist() == [False, True, False]


@given(st.integers(0, 9), st.integers(0, 40), dtypes, seeds)
def test_dequantize_is_one_product_rounded_once(N, K, dtype, seed):
    codes, scale = quantize_weight(torch.randn(N, K, generator=generator(seed)))
    ct = compute_dtype(dtype)
    exact = codes.double() * scale.double()[:, None]  # 31 bits at most: exact
    assert torch.equal(dequantize(Int8Weight(codes, scale), dtype), exact.to(ct).to(dtype))


@given(st.integers(1, 150), st.integers(1, 20), st.sampled_from((1, 2, 16, 64, 128)), st.integers(0, 5), seeds)
def test_a_rotated_weight_is_read_back_to_half_a_step(K, N, block, count, seed):
    """The rotation keeps lengths: a row's error has the length of its codes' rounding error, spread over its block."""
    weight = torch.randn(N, K, generator=generator(seed), dtype=torch.float64)
    columns = torch.randperm(K, generator=generator(seed))[: min(K, count)]
    codes, scale = quantize_weight(weight, block, columns)
    read = dequantize(Int8Weight(codes, scale, None, block, columns, weight[:, columns]), torch.float64)
    step = scale.double() / 2 * (1 + 2**-16)
    assert torch.equal(read[:, columns], weight[:, columns])
    error = read - weight
    for i, n in rotation_blocks(K, block):
        assert (error[:, i : i + n].norm(dim=-1) <= step * math.sqrt(n)).all()


def test_the_longest_inner_dimension_does_not_overflow_int32():
    assert MAX_K * INT8_MAX**2 <= 2**31 - 1 < (MAX_K + 1) * INT8_MAX**2
    assert MAX_K == 133_144
