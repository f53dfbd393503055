"""How torch's operators multiply int8, and which of two ways a CPU takes. `test_kernels` tests the ops."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.helpers import Problem, activation, assert_within_budget, generator, packed_weight, seeds, unit_roundoff
from support.kernels import torch_kernels

from int8fx.ops import fallback
from int8fx.schemes.quantize import MAX_K
from int8fx.schemes.weight import Int8Weight

F32 = unit_roundoff(torch.float32)
WAYS = ("float_gemm", "int_mm")


@pytest.fixture(params=WAYS)
def way(request):
    """Both ways of torch's operators to multiply codes, on every CPU."""
    with torch_kernels(request.param):
        yield request.param


def codes(*shape: int, seed: int) -> torch.Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator(seed))


# ---- int8_matmul -----------------------------------------------------------------------------------------------------


def assert_exact(a: torch.Tensor, b: torch.Tensor) -> None:
    for dtype in (torch.float32, torch.float64):
        y = fallback.int8_matmul(a, b, dtype)
        assert y.dtype == dtype
        assert torch.equal(y, (a.long() @ b.long().t()).to(dtype))


@pytest.mark.parametrize("way", WAYS)
@given(st.integers(0, 20), st.integers(0, 300), st.integers(0, 40), seeds)
def test_the_matmul_of_codes_is_exact(way, M, K, N, seed):
    with torch_kernels(way):
        assert_exact(codes(M, K, seed=seed), codes(N, K, seed=seed + 1))


@pytest.mark.parametrize("M", [0, 1, 5, 33])
@pytest.mark.parametrize("K", [0, 1, 2, 3])
@pytest.mark.parametrize("N", [0, 1, 7])
def test_the_shortest_dimensions_are_exact(way, M, K, N):
    assert_exact(codes(M, K, seed=1), codes(N, K, seed=2))


def test_int_mm_never_gets_one_column():
    """torch 2.13 with VNNI returns uninitialised memory then. (This fails on CPUs without VNNI too.)"""
    with torch_kernels("int_mm"):
        with pytest.raises(AssertionError, match="_int_mm with K = 1"):
            torch._int_mm(codes(5, 1, seed=1), codes(3, 1, seed=2).t())
        assert_exact(codes(5, 1, seed=1), codes(3, 1, seed=2))


@pytest.mark.parametrize("K", [1039, 1040, 1041, 2080, 2081, 4096, MAX_K])
@pytest.mark.parametrize("sign", [1, -1, 0])
def test_extreme_codes_do_not_overflow_or_saturate(way, K, sign):
    """All 127, all -127 times 127, or alternating: the largest sums that K allows."""
    a = torch.full((2, K), 127, dtype=torch.int8)
    b = torch.full((1, K), 127 * (sign or 1), dtype=torch.int8)
    if sign == 0:
        b[:, ::2] = -127
    exact = a.long() @ b.long().t()
    y = fallback.int8_matmul(a, b)
    # each slice's sum is exact, adding it to the others rounds once; _int_mm rounds once altogether
    roundings = 1 if way == "int_mm" else math.ceil(K / 1040) - 1
    assert ((y.double() - exact).abs() <= roundings * F32 * K * 127**2).all()
    assert torch.equal(fallback.int8_matmul(a, b, torch.float64), exact.double())


@pytest.mark.parametrize("K", [1040, 1041, 2081])
def test_a_slice_of_the_float_matmul_is_exact(K):
    a = torch.full((1, K), 127, dtype=torch.int8)
    a[:, 1039] = 1  # an odd sum: not a multiple of what float32 rounds to
    exact = a.long() @ a.long().t()
    with torch_kernels("float_gemm"):
        y = fallback.int8_matmul(a, a)
    assert abs(y.item() - exact.item()) <= (math.ceil(K / 1040) - 1) * F32 * exact.item()


@pytest.mark.parametrize("M", [3, 5])
def test_many_output_channels_are_widened_in_blocks(monkeypatch, M):
    monkeypatch.setattr(fallback, "_BLOCK", 1000)
    a, b = codes(M, 1100, seed=1), codes(33, 1100, seed=2)
    with torch_kernels("float_gemm"):
        assert torch.equal(fallback.int8_matmul(a, b, torch.float64), (a.long() @ b.long().t()).double())
        for threshold in (6.0, None):
            weight = Int8Weight(*packed_weight(33, 1100, seed=4), threshold)
            p = Problem(activation(M, 1100, outliers="columns", seed=3), weight)
            assert_within_budget(fallback.linear(*p), *p)


# ---- outliers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("threshold", "quantises"), [(0.0, False), (1e-9, True), (None, True)])
def test_where_every_column_is_an_outlier_x_is_not_quantised(monkeypatch, threshold, quantises):
    calls, real = [], fallback.quantize_rowwise
    monkeypatch.setattr(fallback, "quantize_rowwise", lambda *args: calls.append(args) or real(*args))
    p = Problem(activation(9, 40, seed=1), Int8Weight(*packed_weight(7, 40, seed=2), threshold))
    y = fallback.linear(*p)
    assert len(calls) == quantises
    assert_within_budget(y, *p)
    assert torch.equal(fallback.linear_quantized(p.x, *real(*p.quantize_args), p.weight, p.epilogue), y)


@pytest.mark.parametrize("other", [0.0, math.nan])
def test_a_value_that_is_the_threshold_in_float32_is_an_outlier(other):
    threshold = 0.7  # more than its nearest float32
    x = torch.full((5, 3), 0.1)
    x[1, 1], x[2, 2] = threshold, other
    assert x[1, 1].item() < threshold
    assert fallback.quantize_rowwise(x, threshold)[2].tolist() == [False, True, False]


# ---- has_fast_int_mm -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vnni", "saturates", "expected"), [(True, False, True), (True, True, False), (False, False, False)]
)
def test_int_mm_is_fast_with_vnni_unless_it_saturates(monkeypatch, vnni, saturates, expected):
    def int_mm(a, b):
        y = a.int() @ b.int()
        return y.clamp(max=2**15 - 1) if saturates else y

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_vnni": vnni})
    monkeypatch.setattr(torch, "_int_mm", int_mm)
    assert fallback.has_fast_int_mm.__wrapped__() is expected


def test_without_a_word_of_vnni_int_mm_is_not_fast(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert not fallback.has_fast_int_mm.__wrapped__()


def test_this_cpus_answer_is_that_of_its_own_int_mm():
    full = torch.full((64, 64), 127, dtype=torch.int8)
    exact = bool(torch._int_mm(full, full).eq(64 * 127**2).all())
    vnni = torch.cpu.get_capabilities().get("avx512_vnni", False)
    assert fallback.has_fast_int_mm.__wrapped__() is (vnni and exact)


@pytest.mark.parametrize("fast", [False, True])
def test_the_answer_chooses_the_way(monkeypatch, fast):
    """Whatever this CPU has, both answers are asked for."""
    calls = []
    monkeypatch.setattr(fallback, "has_fast_int_mm", lambda: fast)
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: calls.append(a.shape) or a.int() @ b.int())
    assert_exact(codes(5, 40, seed=1), codes(3, 40, seed=2))
    assert len(calls) == 2 * fast
