import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.helpers import (
    INF,
    activation,
    assert_within_bound,
    assert_within_budget,
    generator,
    oracle,
    packed_weight,
    problem,
    problems,
    unit_roundoff,
)

from int8fx import ops
from int8fx.ops import fallback as cpu
from int8fx.schemes import quantize, reference
from int8fx.schemes.quantize import MAX_K

F32 = unit_roundoff(torch.float32)
EDGES = (1039, 1040, 1041, 2080, 2081, 4096, MAX_K)


@pytest.fixture(params=[False, True], ids=["float_gemm", "int_mm"])
def fast(request, monkeypatch):
    """Both ways of torch's operators to multiply codes: `_int_mm` is exact on every CPU, and fast with VNNI."""
    monkeypatch.setattr(cpu, "has_fast_int_mm", lambda: request.param)
    return request.param


def codes(*shape: int, seed: int) -> torch.Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator(seed))


# ---- int8_matmul ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [False, True], ids=["float_gemm", "int_mm"])
@given(st.integers(0, 20), st.integers(0, 300), st.integers(0, 40), st.integers(0, 2**31))
def test_product_of_codes_is_exact(way, M, K, N, seed):
    a, b = codes(M, K, seed=seed), codes(N, K, seed=seed + 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "has_fast_int_mm", lambda: way)
        for dtype in (torch.float32, torch.float64):
            y = cpu.int8_matmul(a, b, dtype)
            assert y.dtype == dtype
            assert torch.equal(y, (a.long() @ b.long().t()).to(dtype))


@pytest.mark.parametrize("K", EDGES)
@pytest.mark.parametrize("sign", [1, -1, 0])
def test_extreme_codes_do_not_overflow_or_saturate(fast, K, sign):
    """All 127, all -127 times 127, or alternating: the largest sums that K allows."""
    a = torch.full((2, K), 127, dtype=torch.int8)
    b = torch.full((1, K), 127 * (sign or 1), dtype=torch.int8)
    if sign == 0:
        b[:, ::2] = -127
    exact = a.long() @ b.long().t()
    y = cpu.int8_matmul(a, b)
    # each slice's sum is exact, adding it to the others rounds once; _int_mm rounds once altogether
    roundings = 1 if fast else math.ceil(K / 1040) - 1
    assert ((y.double() - exact).abs() <= roundings * F32 * K * 127**2).all()
    assert torch.equal(cpu.int8_matmul(a, b, torch.float64), exact.double())


@pytest.mark.parametrize("K", [1040, 1041, 2081])
def test_a_slice_of_the_float_product_is_exact(monkeypatch, K):
    monkeypatch.setattr(cpu, "has_fast_int_mm", lambda: False)
    a = torch.full((1, K), 127, dtype=torch.int8)
    a[:, 1039] = 1  # an odd sum: not a multiple of what float32 rounds to
    exact = a.long() @ a.long().t()
    y = cpu.int8_matmul(a, a)
    assert abs(y.item() - exact.item()) <= (math.ceil(K / 1040) - 1) * F32 * exact.item()


def test_many_output_channels_are_widened_in_blocks(monkeypatch):
    monkeypatch.setattr(cpu, "has_fast_int_mm", lambda: False)
    monkeypatch.setattr(cpu, "_BLOCK", 1000)
    a, b = codes(5, 1100, seed=1), codes(33, 1100, seed=2)
    assert torch.equal(cpu.int8_matmul(a, b, torch.float64), (a.long() @ b.long().t()).double())
    x, packed = activation(5, 1100, outliers="columns", seed=3), packed_weight(33, 1100, seed=4)
    assert_within_budget(cpu.linear(x, *packed, None, 6.0), x, *packed, None, 6.0)


def test_fast_int_mm_is_refused_where_it_saturates(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_vnni": True})
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: (a.int() @ b.int()).clamp(max=2**15 - 1))
    assert not cpu.has_fast_int_mm.__wrapped__()
    monkeypatch.undo()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_vnni": True})
    assert cpu.has_fast_int_mm.__wrapped__() == (
        torch._int_mm(*[torch.full((64, 64), 127, dtype=torch.int8)] * 2).eq(64 * 127**2).all().item()
    )
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert not cpu.has_fast_int_mm.__wrapped__()


# ---- linear ---------------------------------------------------------------------------------------------------------


@given(problems(batched=None))
def test_linear_is_within_the_references_error(kernels, p):
    assert_within_budget(kernels.linear(*p), *p)


@given(problems(batched=None))
def test_linear_is_within_the_derived_bound(kernels, p):
    assert_within_bound(kernels.linear(*p), *p)


@given(problems())
def test_quantising_first_and_multiplying_later_is_linear(kernels, p):
    quantized = kernels.quantize_rowwise(p.x, p.threshold)
    y = kernels.linear_quantized(p.x, *quantized, p.codes, p.scale, p.bias)
    torch.testing.assert_close(y, kernels.linear(*p), rtol=0, atol=0, equal_nan=True)


@given(problems(values=("normal", "zero_rows", "denormal", "huge")))
def test_quantize_rowwise_is_the_references(kernels, p):
    found_codes, scale, mask = kernels.quantize_rowwise(p.x, p.threshold)
    x2d = p.x.reshape(math.prod(p.x.shape[:-1]), p.x.shape[-1])
    expected_mask = quantize.outlier_mask(x2d, p.threshold)
    expected_codes, expected_scale = quantize.quantize_rowwise(x2d, expected_mask)
    assert torch.equal(mask, expected_mask)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(found_codes, expected_codes)


@given(
    problems(batched=None, values=("normal", "zero_rows")),
    st.sampled_from(list(reference.ACTIVATIONS)),
    st.sampled_from(list(reference.BINARIES)),
    st.integers(0, 2**31),
)
def test_epilogue_is_within_the_references_error(kernels, p, name, binary, seed):
    other = None
    if binary != "none":
        other = torch.randn(*p.x.shape[:-1], p.codes.shape[-2], generator=generator(seed)).to(p.x.dtype)
    before = None if other is None else other.clone()
    y = kernels.linear(*p, name, other, binary)
    assert_within_budget(y, *p, name, other, binary)
    if other is not None:
        assert torch.equal(other, before)
    if p.codes.dim() == 2:
        quantized = kernels.quantize_rowwise(p.x, p.threshold)
        again = kernels.linear_quantized(p.x, *quantized, p.codes, p.scale, p.bias, name, other, binary)
        assert torch.equal(again, y)


@given(problems(values=("nan", "inf"), layouts=("contiguous", "transposed", "sliced")))
def test_nan_and_inf_stay_in_their_rows(kernels, p):
    clean = p.x.isfinite().all(-1)
    y = kernels.linear(*p)
    assert not y[~clean].isfinite().any()
    if p.threshold == INF:  # then not even through the choice of outlier columns
        healthy = torch.where(p.x.isfinite(), p.x, 0)
        assert torch.equal(y[clean], kernels.linear(healthy, *list(p)[1:])[clean])


@given(problems(values=("normal", "zero_rows")))
def test_inputs_are_left_as_they_were(kernels, p):
    before = [t.clone() for t in p if isinstance(t, torch.Tensor)]
    kernels.linear(*p)
    kernels.quantize_rowwise(p.x, p.threshold)
    assert all(torch.equal(a, b) for a, b in zip(before, (t for t in p if isinstance(t, torch.Tensor)), strict=True))


@pytest.mark.parametrize("outliers", ["none", "column", "columns", "row", "token", "some"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_long_inner_dimension(kernels, outliers, dtype):
    p = problem(3, 2081, 5, outliers=outliers, dtype=dtype, seed=9)
    assert_within_budget(kernels.linear(*p), *p)
    assert_within_bound(kernels.linear(*p), *p)


def test_the_longest_inner_dimension(kernels):
    x, (codes, scale) = activation(2, MAX_K, seed=1), packed_weight(1, MAX_K, seed=2)
    assert_within_budget(kernels.linear(x, codes, scale, None, 6.0), x, codes, scale, None, 6.0)


@pytest.mark.parametrize(
    ("dtype", "K"),
    [(torch.float16, 65), (torch.bfloat16, 65), (torch.float32, 65), (torch.float64, 65), (torch.float64, 4097)],
)
def test_representable_inputs_give_the_exact_product(kernels, dtype, K):
    """Rows that are multiples of 1/127 of their maximum lose nothing to int8: only the last rounding is left."""
    x = torch.randint(100, 128, (7, K), generator=generator(3)).double()
    x[:, 0] = 127
    weight, scale = codes(9, K, seed=4).abs(), torch.exp2(-torch.arange(9.0))
    y = kernels.linear((x / 64).to(dtype), weight, scale, None, INF)
    assert torch.equal(y, oracle(x / 64, weight, scale).to(dtype))


# ---- grouped_linear -------------------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=5),
    st.integers(0, 3),
    st.integers(1, 60),
    st.integers(0, 40),
    st.sampled_from((torch.float16, torch.bfloat16, torch.float32, torch.float64)),
    st.sampled_from((torch.int32, torch.int64)),
    st.booleans(),
    st.integers(0, 2**30),
)
def test_grouped_linear_is_linear_per_group(kernels, sizes, behind, K, N, dtype, offset_dtype, with_bias, seed):
    E, S = len(sizes), sum(sizes) + behind
    x = activation(S, K, outliers="some", dtype=dtype, seed=seed)
    packed = [packed_weight(N, K, seed=seed + e) for e in range(E)]
    weight, scale = (torch.stack(parts) for parts in zip(*packed, strict=True))
    bias = torch.randn(E, N, generator=generator(seed)).to(dtype) if with_bias else None
    offsets = torch.tensor(sizes).cumsum(0).to(offset_dtype)
    y = kernels.grouped_linear(x, weight, scale, bias, offsets, 6.0)
    assert y.shape == (S, N)
    begin = 0
    for e, end in enumerate(offsets.tolist()):
        bias_e = None if bias is None else bias[e]
        assert_within_budget(y[begin:end], x[begin:end], weight[e], scale[e], bias_e, 6.0)
        begin = end
    assert (y[begin:] == 0).all()


# ---- threads --------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[1, 2])
def intra_op_threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("M", [1, 4, 5, 200])
def test_the_number_of_threads_changes_no_bit(kernels, M):
    """Sizes that are split among threads: rows, channels, and both."""
    p = problem(M, 512, 700, outliers="some", dtype=torch.float32, seed=M)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(ops.linear(*p))
    finally:
        torch.set_num_threads(before)
    assert_within_budget(found[0], *p)
    if kernels == "native":
        assert all(torch.equal(found[0], y) for y in found[1:])
    for y in found[1:]:
        assert_within_budget(y, *p)


def test_eight_threads_give_bit_equal_results(intra_op_threads):
    g = generator(11)
    experts = tuple(
        torch.stack(parts) for parts in zip(*(packed_weight(67, 130, seed=e) for e in range(2)), strict=True)
    )
    problems = [
        problem(int(m), 130, 67, outliers="some", dtype=dtype, seed=int(m))
        for dtype in (torch.bfloat16, torch.float32)
        for m in torch.randint(1, 40, (4,), generator=g)
    ]
    others = [torch.randn(p.x.shape[0], 67, generator=g).to(p.x.dtype) for p in problems]

    def run(p, other):
        quantized = ops.quantize_rowwise(p.x, p.threshold)
        offsets = torch.tensor([len(p.x) // 2, len(p.x)])
        x = p.x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(ops.linear(x, *list(p)[1:]), x, other)
        return [
            ops.linear(*p),
            ops.linear(*p, "gelu", other, "add"),
            *quantized,
            ops.linear_quantized(p.x, *quantized, p.codes, p.scale, p.bias),
            ops.grouped_linear(p.x, *experts, None, offsets, p.threshold),
            ops.dequantize(p.codes, p.scale, p.x.dtype),
            grad,
        ]

    expected = [run(*args) for args in zip(problems, others, strict=True)]
    with ThreadPoolExecutor(8) as pool:
        jobs = [
            (expected[i], pool.submit(run, problems[i], others[i])) for _ in range(16) for i in range(len(problems))
        ]
        for wanted, job in jobs:
            assert all(torch.equal(a, b) for a, b in zip(wanted, job.result(), strict=True))
