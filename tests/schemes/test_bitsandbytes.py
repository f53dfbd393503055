"""Where int8fx and bitsandbytes agree to the bit, and where they differ."""

import bitsandbytes
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.helpers import activation, generator, oracle

from int8fx import ops
from int8fx.schemes.quantize import INT8_MAX, dequantize, quantize_weight
from int8fx.schemes.weight import Int8Weight

bnb = torch.ops.bitsandbytes
seeds = st.integers(0, 2**31 - 1)


def bitsandbytes_linear(weight: torch.Tensor, bias: torch.Tensor | None, threshold: float) -> torch.nn.Module:
    N, K = weight.shape
    linear = bitsandbytes.nn.Linear8bitLt(K, N, bias=bias is not None, has_fp16_weights=False, threshold=threshold)
    state = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    linear.load_state_dict(state)
    return linear.to("cpu").eval()  # .to quantises; a layer that trains does not multiply in int8 on the CPU


def test_row_absmax_leaves_out_columns_here_and_elements_there():
    x = torch.tensor([[10.0, 1.0, 2.0], [5.0, 1.0, 2.0]], dtype=torch.float16)
    their_codes, their_absmax, their_columns = bnb.int8_vectorwise_quant(x, threshold=6.0)
    codes, scale, mask = ops.quantize_rowwise(x, 6.0)
    assert their_absmax.tolist() == [2.0, 5.0]  # the 5.0 stands in the outlier column
    assert torch.equal(scale, torch.tensor([2.0, 2.0]) / 127)
    assert their_codes.tolist() == [[0, 64, 127], [0, 25, 51]]
    assert codes.tolist() == [[0, 64, 127], [0, 64, 127]]
    assert their_columns.tolist() == mask.nonzero().flatten().tolist() == [0]


@given(st.integers(1, 20), st.integers(1, 130), seeds)
def test_without_outliers_codes_and_scales_are_equal(M, K, seed):
    x = activation(M, K, dtype=torch.float16, seed=seed)
    their_codes, their_absmax, columns = bnb.int8_vectorwise_quant(x, threshold=6.0)
    codes, scale, mask = ops.quantize_rowwise(x, 6.0)
    assert not mask.any()
    assert columns is None or columns.numel() == 0
    assert torch.equal(scale, their_absmax / INT8_MAX)
    assert_equal_codes(codes, their_codes, x, scale)


@given(st.integers(2, 20), st.integers(1, 130), st.sampled_from(("column", "columns", "row", "token", "some")), seeds)
def test_outlier_columns_are_the_same(M, K, outliers, seed):
    x = activation(M, K, outliers=outliers, dtype=torch.float16, seed=seed)
    _, their_absmax, columns = bnb.int8_vectorwise_quant(x, threshold=6.0)
    _, scale, mask = ops.quantize_rowwise(x, 6.0)
    assert mask.nonzero().flatten().tolist() == ([] if columns is None else columns.tolist())
    assert (scale * INT8_MAX <= their_absmax.clamp_min(1e-30) * (1 + 2**-22)).all()  # ours is never the coarser


@given(st.integers(1, 40), st.integers(1, 130), seeds)
def test_weight_codes_and_scales_are_equal(N, K, seed):
    weight = torch.randn(N, K, generator=generator(seed)).half()
    their_codes, absmax, _ = bnb.int8_vectorwise_quant(weight, threshold=0.0)
    codes, scale = quantize_weight(weight)
    assert torch.equal(scale, absmax / INT8_MAX)
    assert_equal_codes(codes, their_codes, weight, scale)


def assert_equal_codes(codes, theirs, x, scale):
    """Equal, but where ``x / scale`` lies so near to a half that ``x / scale`` and ``127 / absmax * x`` may part."""
    step = x.double() / scale.double()[:, None]
    tie = ((step - step.floor() - 0.5).abs() <= 127 * 2**-22) & ((codes.int() - theirs.int()).abs() == 1)
    assert ((codes == theirs) | tie).all()


@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("bias", [True, False])
def test_layer_holds_the_same_weight(threshold, bias):
    weight = torch.randn(24, 64, generator=generator(1)).half()
    b = torch.randn(24, generator=generator(2)).half() if bias else None
    layer = bitsandbytes_linear(weight, b, threshold)
    codes, scale = quantize_weight(weight)
    assert torch.equal(layer.weight.CB, codes)
    assert torch.equal(layer.weight.SCB / INT8_MAX, scale)
    theirs = bnb.int8_vectorwise_dequant(layer.weight.CB, layer.weight.SCB)
    torch.testing.assert_close(theirs, dequantize(Int8Weight(codes, scale)), rtol=2**-22, atol=0)


@pytest.mark.parametrize("outliers", ["none", "column", "columns", "row", "token", "some"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
def test_error_is_not_larger_than_that_of_bitsandbytes(outliers, dtype, bias):
    ours = theirs = 0.0
    for seed in range(4):
        weight = torch.randn(64, 256, generator=generator(seed)).half() / 16
        b = torch.randn(64, generator=generator(seed + 10)).to(dtype) if bias else None
        x = activation(32, 256, outliers=outliers, dtype=dtype, seed=seed)
        layer = bitsandbytes_linear(weight, b, 6.0)
        int8_weight = Int8Weight(*quantize_weight(weight), 6.0)
        exact = oracle(x, int8_weight, b)
        ours += (ops.linear(x, *int8_weight, b).double() - exact).square().sum().item()
        theirs += (layer(x).double() - exact).square().sum().item()
    assert 0 < ours <= theirs


def test_threshold_0_means_other_things():
    """There: no outliers. Here: every column is one, and None is their 0."""
    x = activation(8, 64, outliers="some", dtype=torch.float16, seed=3)
    _, absmax, columns = bnb.int8_vectorwise_quant(x, threshold=0.0)
    assert columns is None
    assert torch.equal(ops.quantize_rowwise(x)[1], absmax / INT8_MAX)
    assert ops.quantize_rowwise(x, 0.0)[2].all()


def test_nan_is_in_its_row_and_no_outlier_in_both():
    x = activation(4, 16, dtype=torch.float16, seed=4)
    x[1, 3] = float("nan")
    _, absmax, columns = bnb.int8_vectorwise_quant(x, threshold=6.0)
    _, scale, mask = ops.quantize_rowwise(x, 6.0)
    assert columns is None or columns.numel() == 0
    assert not mask.any()
    assert scale.isnan().tolist() == absmax.isnan().tolist() == [False, True, False, False]


def test_one_row_that_is_all_outliers_keeps_its_codes_there_and_not_here():
    """bitsandbytes zeroes outlier columns only when there is more than one row; the elements are out of both absmax."""
    x = torch.tensor([[10.0, 1.0, 2.0]], dtype=torch.float16)
    their_codes, absmax, _ = bnb.int8_vectorwise_quant(x, threshold=6.0)
    codes, scale, _ = ops.quantize_rowwise(x, 6.0)
    assert absmax.tolist() == [2.0]
    assert torch.equal(scale, absmax / INT8_MAX)
    assert codes.tolist() == their_codes.tolist() == [[0, 64, 127]]
