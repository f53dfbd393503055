"""The CPU kernels, C++ and torch's operators, for every scheme: against float64, and against each other."""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from support.helpers import (
    DTYPES,
    OUTLIERS,
    Problem,
    activation,
    assert_within_bound,
    assert_within_budget,
    bound,
    form_of,
    generator,
    oracle,
    output_rounding,
    packed_weight,
    problem,
    problems,
    seeds,
    weights,
)
from support.kernels import Kernels, torch_kernels

from int8fx import ops
from int8fx.ops import fallback, rows
from int8fx.ops.rows import WEIGHT_ONLY_ROWS_CPU, Form
from int8fx.schemes import reference
from int8fx.schemes.quantize import MAX_K, dequantize, quantize_weight
from int8fx.schemes.weight import Epilogue, Int8Weight

epilogues = st.tuples(st.sampled_from(list(reference.ACTIVATIONS)), st.sampled_from(list(reference.BINARIES)))
SCHEME_ARGUMENTS = {
    "llm_int8": {},
    "plain": {"threshold": None},
    "columns": {"columns": 3},
    "rotated": {"block": 64},
    "rotated columns": {"block": 64, "columns": 3},
}
"""The schemes as arguments of `problem`."""


@pytest.fixture(params=SCHEME_ARGUMENTS)
def scheme(request) -> dict:
    return SCHEME_ARGUMENTS[request.param]


@pytest.fixture
def set_threads():
    """`torch.set_num_threads`; the number is restored after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def with_epilogue(p: Problem, activation_name: str, binary: str, seed: int) -> Problem:
    other = None
    if binary != "none":
        other = torch.randn(*p.x.shape[:-1], p.weight.codes.shape[-2], generator=generator(seed)).to(p.x.dtype)
    return p.with_epilogue(activation=activation_name, other=other, binary=binary)


def equal(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


# ---- linear ----------------------------------------------------------------------------------------------------------


@given(problems(batched=None))
def test_linear_is_within_the_references_error(kernels, p):
    assert_within_budget(kernels.linear(p), *p)


@given(problems(batched=None))
def test_linear_is_within_the_derived_bound(kernels, p):
    assert_within_bound(kernels.linear(p), *p)


@given(problems(batched=None, values=("normal", "zero_rows")), epilogues, seeds)
def test_epilogue_is_within_the_references_error(kernels, p, names, seed):
    p = with_epilogue(p, *names, seed)
    other = p.epilogue.other
    before = None if other is None else other.clone()
    y = kernels.linear(p)
    assert_within_budget(y, *p)
    if other is not None:
        assert torch.equal(other, before)
    if p.weight.codes.dim() == 2:
        assert torch.equal(kernels.linear_quantized(p, kernels.quantize_rowwise(p)), y)


@given(problems())
def test_quantising_first_and_multiplying_later_is_linear(kernels, p):
    equal(kernels.linear_quantized(p, kernels.quantize_rowwise(p)), kernels.linear(p))


@given(problems(values=("normal", "zero_rows", "denormal", "huge")))
def test_quantize_rowwise_is_the_references(kernels, p):
    codes, scale, mask = kernels.quantize_rowwise(p)
    returned = []
    with pytest.MonkeyPatch.context() as patch:
        quantize_rowwise, outlier_mask = reference.quantize_rowwise, reference.outlier_mask
        patch.setattr(reference, "quantize_rowwise", lambda x: returned.append(quantize_rowwise(x)) or returned[-1])
        patch.setattr(reference, "outlier_mask", lambda *args: returned.append(outlier_mask(*args)) or returned[-1])
        reference.linear(*p)
    expected_mask, (expected_codes, expected_scale) = returned
    assert torch.equal(mask, expected_mask)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(codes, expected_codes)
    if p.weight.columns is not None:
        assert not mask[p.weight.columns].any()


@given(problems(values=("nan", "inf"), layouts=("contiguous", "transposed", "sliced")))
def test_nan_and_inf_stay_in_their_rows(kernels, p):
    finite = p.x.isfinite().all(-1)
    y = kernels.linear(p)
    assert not y[~finite].isfinite().any()
    if p.weight.threshold is None:  # then not even through the choice of outlier columns
        healthy = p.with_x(torch.where(p.x.isfinite(), p.x, 0))
        assert torch.equal(y[finite], kernels.linear(healthy)[finite])


@given(problems(values=("normal", "zero_rows")))
def test_inputs_are_left_as_they_were(kernels, p):
    tensors = [t for t in p.args if isinstance(t, torch.Tensor)]
    before = [t.clone() for t in tensors]
    kernels.linear(p)
    kernels.linear_quantized(p, kernels.quantize_rowwise(p))
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", [3, 6])
def test_long_inner_dimension(kernels, scheme, dtype, M):
    for outliers in OUTLIERS:
        p = problem(M, 2081, 5, outliers=outliers, dtype=dtype, seed=9, **scheme)
        y = kernels.linear(p)
        assert_within_budget(y, *p)
        assert_within_bound(y, *p)


@pytest.mark.parametrize("M", [2, 5])
def test_the_longest_inner_dimension(kernels, M):
    p = Problem(activation(M, MAX_K, seed=1), Int8Weight(*packed_weight(1, MAX_K, seed=2), 6.0))
    assert_within_budget(kernels.linear(p), *p)


@pytest.mark.parametrize("K", [0, 1, 2])
@pytest.mark.parametrize("M", [0, 1, WEIGHT_ONLY_ROWS_CPU, WEIGHT_ONLY_ROWS_CPU + 1, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_shortest_dimensions(kernels, scheme, dtype, M, K):
    """With one column, `torch._int_mm` must not be called: `support.kernels` fails if it is, on any CPU."""
    for N in (0, 1, 5):
        columns = min(K, scheme.get("columns", 0))
        p = problem(M, K, N, dtype=dtype, seed=M, **{**scheme, "columns": columns})
        y = kernels.linear(p)
        assert y.shape == (M, N)
        assert_within_budget(y, *p)
        equal(kernels.linear_quantized(p, kernels.quantize_rowwise(p)), y)


@pytest.mark.parametrize(("dtype", "K"), [*((dtype, 65) for dtype in DTYPES), (torch.float64, 4097)])
def test_representable_inputs_give_the_exact_product(kernels, dtype, K):
    """Rows that are multiples of 1/127 of their maximum lose nothing to int8: only the last rounding is left."""
    x = torch.randint(100, 128, (7, K), generator=generator(3)).double()
    x[:, 0] = 127
    codes = torch.randint(0, 128, (9, K), dtype=torch.int8, generator=generator(4))
    weight = Int8Weight(codes, torch.exp2(-torch.arange(9.0)))
    y = kernels.linear(Problem((x / 64).to(dtype), weight))
    assert torch.equal(y, oracle(x / 64, weight).to(dtype))


def test_an_outlier_costs_a_rotated_weight_little_and_an_unquantised_column_nothing():
    x = activation(64, 256, outliers="none", seed=3)
    weight = torch.randn(64, 256, generator=generator(4))
    x[:, 17] *= 60
    exact = x.double() @ weight.double().T

    def error(block: int, with_column: bool) -> float:
        columns = torch.tensor([17]) if with_column else None
        columns_weight = weight[:, columns] if with_column else None
        int8_weight = Int8Weight(*quantize_weight(weight, block, columns), None, block, columns, columns_weight)
        return float((ops.linear(x, *int8_weight).double() - exact).square().mean().sqrt())

    plain, rotated, column, both = error(1, False), error(64, False), error(1, True), error(64, True)
    assert rotated < plain / 2
    assert column < rotated
    assert both < 1.1 * column


@given(problems(batched=None), st.sampled_from(DTYPES))
def test_dequantize_gives_the_bits_of_the_specification(p, dtype):
    w = ops.dequantize(*p.weight, dtype=dtype)
    assert torch.equal(w, dequantize(p.weight, dtype))
    if p.weight.columns is not None:
        assert torch.equal(w[..., p.weight.columns], p.weight.columns_weight.to(dtype))


@pytest.mark.parametrize("shape", [(24,), (0, 24), (5, 0), (2, 3, 5, 24)])
@pytest.mark.parametrize("scale_dtype", DTYPES)
def test_dequantize_of_other_shapes_strides_and_scales(shape, scale_dtype):
    g = generator(0)
    codes = torch.randint(-127, 128, shape, generator=g).to(torch.int8)
    scale = torch.rand(shape[:-1], generator=g).to(scale_dtype)
    for block in (1, 16):
        weight = Int8Weight(codes, scale, None, block)
        w = ops.dequantize(*weight, dtype=torch.float32)
        assert torch.equal(w, dequantize(weight, torch.float32))
        strided = Int8Weight(codes.mT.contiguous().mT if codes.dim() > 1 else codes, scale, None, block)
        assert torch.equal(ops.dequantize(*strided, dtype=torch.float32), w)


def test_dequantize_keeps_scales_that_are_not_finite_to_their_row():
    codes, scale = torch.ones(3, 8, dtype=torch.int8), torch.tensor([math.nan, 2.0, math.inf])
    for block in (1, 8):
        w = ops.dequantize(codes, scale, None, block, dtype=torch.bfloat16)
        assert torch.equal(w[1], dequantize(Int8Weight(codes, scale, None, block), torch.bfloat16)[1])
        assert w[1].isfinite().all()
        assert not w[0].isfinite().any()


# ---- few rows --------------------------------------------------------------------------------------------------------

FORMS = [(name, M) for name in SCHEME_ARGUMENTS for M in range(1, 2 * WEIGHT_ONLY_ROWS_CPU + 1)]


def error_of_codes(y: torch.Tensor, p: Problem) -> float:
    """How far y is from the exact matmul, in units of what is allowed without rounding x to codes: 1 at most then."""
    exact, terms = oracle(p.x, p.weight, p.bias), bound(p.x, p.weight._replace(threshold=0.0), p.bias, slices=200)
    allowed = terms.sums + output_rounding(exact.abs() + terms.sums, p.x.dtype)
    return float(((y.double() - exact).abs() / allowed).max())


@given(
    st.sampled_from(DTYPES),
    st.integers(1, WEIGHT_ONLY_ROWS_CPU),
    st.sampled_from((1, 63, 64, 128, 1100)),
    st.integers(0, 100),
    seeds,
)
def test_few_rows_are_as_exact_beside_a_large_value_whose_weight_is_zero(dtype, M, K, exponent, seed):
    """A kernel that multiplies x as fixed-point numbers has the resolution of the largest value."""
    p = problem(M, K, 19, dtype=dtype, outliers="none", seed=seed)
    p.x[:, 0] = 2.0 ** min(exponent, math.floor(math.log2(torch.finfo(dtype).max)))
    p.weight.codes[:, 0] = 0
    assert_within_bound(ops.linear(*p.args), *p)
    without = replace(p, x=p.x.clone())
    without.x[:, 0] = 0
    if exponent <= 16:  # four times the resolution of bfloat16 sums
        assert error_of_codes(ops.linear(*p.args), without) <= 1


@pytest.mark.parametrize(("name", "M"), FORMS)
def test_x_is_quantised_where_the_table_of_forms_has_it_and_nowhere_else(kernels, name, M):
    """The C++ kernels and `fallback` alike. No outliers, so that all of x would be rounded."""
    p = problem(M, 300, 40, outliers="none", seed=M, **SCHEME_ARGUMENTS[name])
    error = error_of_codes(kernels.linear(p), p) if p.weight.block == 1 else math.inf
    assert (error <= 1) == (form_of(p.x, p.weight) is Form.WEIGHT_ONLY)
    assert error <= 1 or error > 10, "the two kinds cannot be told apart"


@given(st.integers(1, WEIGHT_ONLY_ROWS_CPU), problems(batched=None))
def test_few_rows_agree_on_all_kernels(M, p):
    assume(p.x.shape[-1] > 0)
    experts = p.x.shape[:1] if p.weight.codes.dim() == 3 else ()
    p = p.with_x(p.x.reshape(*experts, math.prod(p.x.shape[len(experts) : -1]), p.x.shape[-1])[..., :M, :])
    assert_within_budget(ops.linear(*p.args), *p)
    for name in ("float_gemm", "int_mm"):
        with torch_kernels(name):
            assert_within_budget(Kernels(name).linear(p), *p)


GARBAGE = (  # codes, scale, mask: a layer of which all columns are outliers would read neither codes nor scale
    lambda t: torch.full_like(t, 99),
    lambda t: torch.full_like(t, float("nan")),
    lambda t: torch.arange(t.numel()) % 2 == 0,
)


@pytest.mark.parametrize(("name", "M"), [*FORMS, ("llm_int8", 0)])
def test_what_is_quantised_for_linear_alone_is_computed_where_linear_quantized_reads_it(kernels, name, M):
    """Elsewhere `linear_quantized` reads nothing of it: any values give what `linear` gives."""
    p = problem(M, 60, 11, seed=M, **SCHEME_ARGUMENTS[name])
    quantized = ops.quantize_rowwise(*p.quantize_args, for_linear=True)
    equal(kernels.linear_quantized(p, quantized), kernels.linear(p))
    full = ops.quantize_rowwise(*p.quantize_args)
    assert [(t.shape, t.dtype) for t in quantized] == [(t.shape, t.dtype) for t in full]
    garbage = tuple(make(t) for make, t in zip(GARBAGE, full, strict=True))
    if form_of(p.x, p.weight) is Form.WEIGHT_ONLY:
        equal(kernels.linear_quantized(p, garbage), kernels.linear(p))
    else:
        assert all(torch.equal(a, b) for a, b in zip(quantized, full, strict=True))
        assert kernels.linear_quantized(p, garbage).isnan().all()


@pytest.mark.parametrize("threshold", [None, 6.0, 0.0])
@pytest.mark.parametrize("M", [1, 2, 33])
def test_a_form_that_quantises_in_its_launch_reads_no_codes_in_fallback_either(monkeypatch, threshold, M):
    """float64 on a GPU runs `fallback`: what was quantised for linear alone may hold anything."""
    monkeypatch.setattr(fallback, "form", lambda M, device_type, *args: rows.form(M, "cuda", *args))
    p = problem(M, 60, 11, dtype=torch.float64, threshold=threshold, seed=M)
    garbage = tuple(make(t) for make, t in zip(GARBAGE, fallback.quantize_rowwise(*p.quantize_args), strict=True))
    chosen = rows.form(M, "cuda", threshold, 1, False, is_plain=True)
    y = fallback.linear_quantized(p.x, *garbage, p.weight, p.epilogue)
    if chosen is not Form.QUANTIZED:
        equal(y, fallback.linear(*p))
    else:
        assert y.isnan().all()


# ---- grouped_linear --------------------------------------------------------------------------------------------------


@given(st.data())
def test_grouped_linear_is_linear_per_group(kernels, data):
    sizes = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=5))
    after, K, seed = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 60)), data.draw(seeds)
    dtype, offset_dtype = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from((torch.int32, torch.int64)))
    weight = data.draw(weights(K, len(sizes), dtype=dtype))
    bias = (
        torch.randn(weight.codes.shape[:-1], generator=generator(seed)).to(dtype) if data.draw(st.booleans()) else None
    )
    x = activation(sum(sizes) + after, K, outliers="some", dtype=dtype, seed=seed)
    offsets = torch.tensor(sizes).cumsum(0).to(offset_dtype)
    y = kernels.grouped_linear(x, offsets, weight, bias)
    assert y.shape == (len(x), weight.codes.shape[1])
    begin = 0
    for e, end in enumerate(offsets.tolist()):
        p = Problem(x[begin:end], weight.of_expert(e), Epilogue(bias).of_expert(e))
        assert_within_budget(y[begin:end], *p)
        assert torch.equal(y[begin:end], kernels.linear(p))
        begin = end
    assert (y[begin:] == 0).all()


# ---- a rotated row's result and its batch ----------------------------------------------------------------------------

ONE_AND_TWO = [1, pytest.param(2, marks=pytest.mark.slow)]
INVARIANT = [
    pytest.param(dtype, K, marks=[pytest.mark.slow] if K > 576 else [])
    for dtype in (torch.float32, torch.bfloat16)
    for K in (100, 576, 2112, 4864)
]


def invariant_problem(dtype: torch.dtype, K: int, N: int = 37, rows: int = 33) -> Problem:
    x = activation(rows, K, outliers="some", dtype=dtype, seed=5)
    columns = torch.arange(0, K, 29)[:49]
    columns_weight = torch.randn(N, len(columns), generator=generator(6)).to(dtype)
    bias = torch.randn(N, generator=generator(7)).to(dtype)
    return Problem(x, Int8Weight(*packed_weight(N, K, seed=1), None, 64, columns, columns_weight), Epilogue(bias))


@pytest.mark.parametrize("threads", ONE_AND_TWO)
@pytest.mark.parametrize(("dtype", "K"), INVARIANT)
@pytest.mark.parametrize("name", list(reference.ACTIVATIONS))
def test_a_rotated_rows_result_is_bit_equal_for_every_batch(set_threads, threads, dtype, K, name):
    set_threads(threads)
    p = invariant_problem(dtype, K)
    other = torch.randn(33, 37, generator=generator(8)).to(dtype)

    def run(x, other):
        return ops.linear(x, *p.weight, p.bias, name, other, "add")

    y = run(p.x, other)
    for M in range(1, 34):
        assert torch.equal(run(p.x[:M], other[:M]), y[:M])
        assert torch.equal(run(p.x[33 - M :], other[33 - M :]), y[33 - M :])
    padded = torch.cat([p.x[:5], torch.zeros(11, K, dtype=dtype), 1e4 * p.x[5:9]])
    assert torch.equal(run(padded, torch.cat([other[:5], other[:15]]))[:5], y[:5])


@pytest.mark.parametrize("threads", ONE_AND_TWO)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rotated_rows_result_is_bit_equal_for_every_batch_on_all_kernels(kernels, set_threads, threads, dtype):
    set_threads(threads)
    p = invariant_problem(dtype, 2112).with_epilogue(activation="gelu")
    y = kernels.linear(p)
    for M in range(1, 34):
        assert torch.equal(kernels.linear(p.with_x(p.x[:M])), y[:M])


# ---- threads ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("M", [1, 4, 5, 200])
def test_the_number_of_threads_changes_no_bit(kernels, scheme, set_threads, M):
    """Sizes that are split among threads: rows, channels, and both. Of torch's operators it may change roundings."""
    p = problem(M, 512, 700, outliers="some", dtype=torch.float32, seed=M, **scheme)
    results = []
    for threads in (1, 2, 5):
        set_threads(threads)
        results.append(kernels.linear(p))
    for y in results:
        assert_within_budget(y, *p)
        assert kernels.name != "native" or torch.equal(y, results[0])


@pytest.mark.parametrize("threads", [1, 2])
def test_eight_threads_give_bit_equal_results(set_threads, threads):
    set_threads(threads)
    g = generator(11)
    tasks = []
    for dtype in (torch.bfloat16, torch.float32):
        for i, m in enumerate(torch.randint(1, 40, (5,), generator=g).tolist()):
            arguments = list(SCHEME_ARGUMENTS.values())[i]
            p = problem(m, 130, 67, outliers="some", dtype=dtype, seed=m, **arguments)
            tasks.append((p, torch.randn(m, 67, generator=g).to(dtype)))

    def run(p: Problem, other: torch.Tensor) -> list[torch.Tensor]:
        quantized = ops.quantize_rowwise(*p.quantize_args)
        weight = p.weight
        experts = Int8Weight(
            torch.stack([weight.codes] * 2),
            torch.stack([weight.scale, 2 * weight.scale]),
            weight.threshold,
            weight.block,
            weight.columns,
            None if weight.columns_weight is None else torch.stack([weight.columns_weight] * 2),
        )
        x = p.x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(ops.linear(x, *weight, p.bias), x, other)
        return [
            ops.linear(*p.args),
            ops.linear(p.x, *weight, p.bias, "gelu", other, "add"),
            *quantized,
            ops.linear_quantized(p.x, *quantized, *weight, p.bias),
            ops.grouped_linear(p.x, torch.tensor([len(p.x) // 2, len(p.x)]), *experts),
            ops.dequantize(*weight, dtype=p.x.dtype),
            grad,
        ]

    expected = [run(*task) for task in tasks]
    with ThreadPoolExecutor(8) as pool:
        jobs = [
            (results, pool.submit(run, *task)) for _ in range(16) for results, task in zip(expected, tasks, strict=True)
        ]
        for results, job in jobs:
            assert all(torch.equal(a, b) for a, b in zip(results, job.result(), strict=True))
