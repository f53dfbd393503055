"""Weights in groups and of other formats, on the C++ kernels: against float64, by the bound of `reference.linear`."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.helpers import (
    DTYPES,
    Problem,
    activation,
    assert_within_bound,
    assert_within_budget,
    generator,
    problems_in_groups,
    seeds,
    weight_in_groups,
)
from support.kernels import Kernels

from int8fx import ops
from int8fx.ops import native
from int8fx.ops.rows import WEIGHT_ONLY_ROWS_CPU
from int8fx.schemes import reference
from int8fx.schemes.formats import FORMATS, Grouping
from int8fx.schemes.quantize import dequantize
from int8fx.schemes.weight import Epilogue

NATIVE = Kernels("native")
FORMS = (1, 3, WEIGHT_ONLY_ROWS_CPU, WEIGHT_ONLY_ROWS_CPU + 1, 40)
GROUPINGS = {
    **{name: Grouping(name, 32) for name in FORMATS},
    "int8 of 128": Grouping("int8", 128),
    "int4 of 128": Grouping("int4_clip", 128),
    "asymmetric int8": Grouping("int8", 64, asymmetric=True),
    "asymmetric int4": Grouping("int4_clip", 64, asymmetric=True, scale_dtype=torch.float16),
    "asymmetric int4 in odd groups": Grouping("int4_fullrange", 7, asymmetric=True),
    "nf4 in rows": Grouping("nf4", scale_dtype=torch.bfloat16),
    "double quantisation": Grouping("nf4", 64, double_quant=True),
}


@pytest.fixture(autouse=True)
def loaded():
    assert native.load(), "there is no C++ compiler: this would test torch's operators"


@pytest.fixture(params=GROUPINGS)
def grouping(request) -> Grouping:
    return GROUPINGS[request.param]


@given(problems_in_groups())
def test_native_linear_is_within_the_derived_bound(p):
    y = NATIVE.linear(p)
    assert_within_bound(y, *p)
    assert torch.equal(NATIVE.linear_quantized(p, NATIVE.quantize_rowwise(p)).isnan(), y.isnan())


@given(
    problems_in_groups(values=("normal",)),
    st.sampled_from(list(reference.ACTIVATIONS)),
    st.sampled_from(list(reference.BINARIES)),
    seeds,
)
def test_native_epilogue_is_within_the_references_error(p, activation_name, binary, seed):
    other = torch.randn(len(p.x), len(p.weight.codes), generator=generator(seed)) if binary != "none" else None
    p = p.with_epilogue(activation=activation_name, other=other, binary=binary)
    assert_within_budget(NATIVE.linear(p), *p)


@given(problems_in_groups(values=("nan", "inf"), layouts=("contiguous", "sliced")))
def test_native_nan_and_inf_stay_in_their_rows(p):
    finite = p.x.isfinite().all(-1)
    y = NATIVE.linear(p)
    assert not y[~finite].isfinite().any()
    if p.weight.threshold is None:
        assert torch.equal(y[finite], NATIVE.linear(p.with_x(torch.where(p.x.isfinite(), p.x, 0)))[finite])


@given(problems_in_groups(), st.sampled_from(DTYPES))
def test_native_dequantize_gives_the_bits_of_the_specification(p, dtype):
    assert torch.equal(ops.dequantize(*p.weight, dtype=dtype), dequantize(p.weight, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [None, 0.0, 6.0])
def test_native_all_formats_in_all_forms(grouping, threshold, dtype):
    """K is longer than what the tiles multiply at a time."""
    weight = weight_in_groups(37, 2200, grouping, threshold=threshold, seed=1)
    bias = torch.randn(37, generator=generator(2))
    for M in FORMS:
        p = Problem(activation(M, 2200, outliers="some", dtype=dtype, seed=M), weight, Epilogue(bias))
        y = NATIVE.linear(p)
        assert_within_bound(y, *p)
        assert torch.equal(NATIVE.linear_quantized(p, NATIVE.quantize_rowwise(p)), y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scheme", [{"threshold": None}, {"threshold": 0.0}, {"block": 64}], ids=str)
def test_native_a_rows_result_does_not_depend_on_its_form_mates(grouping, scheme, dtype):
    weight = weight_in_groups(50, 300, grouping, columns=2, seed=3, **scheme)
    x = activation(70, 300, dtype=dtype, seed=4)
    few = WEIGHT_ONLY_ROWS_CPU if weight.block == 1 else 0
    for counts in (range(1, few + 1), (few + 1, few + 2, 33, 70)):
        results = [ops.linear(x[:M], *weight) for M in counts]
        for y in results:
            assert torch.equal(y[: counts[0]], results[0])


@pytest.mark.parametrize("M", FORMS)
def test_native_threads_give_equal_bits(grouping, M):
    weight = weight_in_groups(133, 500, grouping, seed=5)
    x = activation(M, 500, dtype=torch.bfloat16, seed=6)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(ops.linear(x, *weight))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(y, results[0]) for y in results)


@pytest.mark.parametrize("zero", [0, 15, 16, 17, 200, 255])
@pytest.mark.parametrize("size", [None, 32, 128])
@pytest.mark.parametrize("M", FORMS)
def test_native_zero_points_beyond_the_codes(M, size, zero):
    """A packed weight of another tool may have them."""
    for name in ("int4_clip", "int8"):
        weight = weight_in_groups(20, 260, Grouping(name, size, asymmetric=True), seed=7)
        point = zero - 128 if name == "int8" else zero
        weight = weight._replace(zero_point=torch.full_like(weight.zero_point, point))
        for threshold in (None, 0.0):
            x = activation(M, 260, dtype=torch.bfloat16, seed=8)
            p = Problem(x, weight._replace(threshold=threshold))
            assert_within_bound(NATIVE.linear(p), *p)


@pytest.mark.parametrize("M", [1, 6])
def test_native_experts_have_their_own_groups(grouping, M):
    weight = weight_in_groups(21, 90, grouping, experts=3, columns=2, seed=9)
    x, bias = activation(3 * M, 90, seed=10).view(3, M, 90), torch.randn(3, 21, generator=generator(11))
    y = ops.linear(x, *weight, bias)
    grouped = ops.grouped_linear(x.view(3 * M, 90), torch.tensor([M, 2 * M, 3 * M]), *weight, bias)
    for e in range(3):
        assert torch.equal(y[e], ops.linear(x[e], *weight.of_expert(e), bias[e]))
    assert torch.equal(grouped.view(y.shape), y)


@pytest.mark.parametrize("M", [2, 9])
def test_native_linear_passes_opcheck(grouping, M):
    weight = weight_in_groups(8, 40, grouping, seed=12)
    torch.library.opcheck(torch.ops.int8fx.linear, (activation(M, 40, seed=13), *weight))
