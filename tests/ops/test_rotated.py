"""Rotated int8: the rotation, the specification and the CPU kernels against the bound that is derived for them."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.helpers import (
    DTYPES,
    INF,
    Problem,
    Rotation,
    activation,
    assert_within_bound,
    assert_within_budget,
    bound,
    generator,
    oracle,
    packed_weight,
    problems,
    rotated_problems,
    rotation_error,
    seeds,
)

from int8fx import ops
from int8fx.schemes import reference
from int8fx.schemes.quantize import NO_THRESHOLD, dequantize, outlier_mask, quantize_weight, rotate, rotation_blocks

blocks = st.sampled_from((1, 2, 4, 8, 16, 32, 64, 128))


def sylvester(n: int) -> torch.Tensor:
    return torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(n)] for i in range(n)], dtype=torch.float64)


# ---- the rotation ---------------------------------------------------------------------------------------------------


@given(st.integers(0, 400), blocks)
def test_blocks_are_powers_of_two_that_cover_every_column_once(K, block):
    blocks = rotation_blocks(K, block)
    assert [i for i, _ in blocks] == [sum(n for _, n in blocks[:j]) for j in range(len(blocks))]
    assert sum(n for _, n in blocks) == K
    assert all(n & (n - 1) == 0 and n <= block for _, n in blocks)
    assert [n for _, n in blocks[: K // block]] == [block] * (K // block)


@given(st.integers(1, 200), blocks)
def test_the_matrix_is_sylvesters_block_by_block(K, block):
    expected = torch.block_diag(*(sylvester(n) / math.sqrt(n) for _, n in rotation_blocks(K, block)))
    found = rotate(torch.eye(K, dtype=torch.float64), block)
    torch.testing.assert_close(found, expected, rtol=2**-51, atol=0)


@given(st.integers(1, 200), st.integers(0, 9), blocks, seeds)
def test_products_of_rotated_rows_are_exact_in_float64(K, M, block, seed):
    x, w = (torch.randn(M, K, generator=generator(seed + i), dtype=torch.float64) for i in range(2))
    rx, rw = rotate(x, block), rotate(w, block)
    error = (rx @ rw.T - x @ w.T).abs()
    tx, tw = (rotation_error(t, block, torch.float64) for t in (x, w))
    sums = (K + 1) * 2**-53 * (rx.abs() @ rw.abs().T + x.abs() @ w.abs().T)
    assert (error <= tx @ rw.abs().T + rx.abs() @ tw.T + tx @ tw.T + sums).all()
    assert ((rotate(rx, block) - x).abs() <= rotation_error(rx, block, torch.float64) + rotate_bound(tx, block)).all()


def rotate_bound(t: torch.Tensor, block: int) -> torch.Tensor:
    """How large the rotation of a tensor can be, whose elements are at most ``t`` in size."""
    bound = torch.zeros_like(t)
    for i, n in rotation_blocks(t.shape[-1], block):
        bound[..., i : i + n] = t[..., i : i + n].sum(-1, keepdim=True) / math.sqrt(n) * (1 + 2**-40)
    return bound


@given(problems(values=("normal", "zero_rows", "denormal", "huge")), blocks)
def test_float32_rotations_are_within_the_derived_bound(p, block):
    x = p.x.float()
    error = (rotate(x, block).double() - rotate(x.double(), block)).abs()
    own = rotation_error(x, block, torch.float64)
    assert (error <= rotation_error(x, block, torch.float32) + own).all()


@given(st.integers(1, 300), blocks, seeds)
def test_a_rotation_does_not_depend_on_the_other_rows(K, block, seed):
    x = torch.randn(33, K, generator=generator(seed))
    whole = rotate(x, block)
    for rows in (1, 2, 7, 32):
        assert torch.equal(rotate(x[:rows], block), whole[:rows])


def test_block_1_is_no_rotation():
    x = torch.randn(3, 5)
    assert rotate(x, 1) is x


def test_an_outlier_spreads_over_its_block():
    x = torch.zeros(1, 128)
    x[0, 70] = 64.0
    y = rotate(x, 64)
    assert (y[0, :64] == 0).all()
    assert (y[0, 64:].abs() == 8).all()


# ---- outlier columns by rank ----------------------------------------------------------------------------------------


@given(problems(), st.integers(0, 5), st.integers(0, 5), seeds)
def test_top_columns_are_the_largest_and_never_those_kept_elsewhere(p, top, count, seed):
    K = p.x.shape[-1]
    x = p.x.reshape(math.prod(p.x.shape[:-1]), K)
    columns = torch.randperm(K, generator=generator(seed))[: min(K, count)]
    mask = outlier_mask(x, p.threshold, columns, top)
    assert mask.shape == (K,)
    assert not mask[columns].any()
    by_size = outlier_mask(x, p.threshold)
    by_size[columns] = False
    assert (mask >= by_size).all()
    free = K - len(columns)
    assert mask.sum() >= (min(top, free) if len(x) else 0)
    if len(x) and K and not x.isnan().any() and p.threshold == INF:
        rest = x.abs().amax(0).index_fill(0, columns, -1.0)
        assert mask.sum() == min(top, free)
        if mask.any() and not mask.all():
            assert rest[mask].min() >= rest[~mask].max()


# ---- the specification and the CPU kernels --------------------------------------------------------------------------


@given(rotated_problems(batched=None))
def test_the_reference_is_within_the_derived_bound(p):
    assert_within_bound(reference.linear(*p.all), *p, p.rotation)


@given(rotated_problems(batched=None))
def test_linear_is_within_the_references_error(kernels, p):
    assert_within_budget(kernels.linear(*p.all), *p, rotation=p.rotation)


@given(rotated_problems())
def test_quantising_first_and_multiplying_later_is_linear(kernels, p):
    quantized = kernels.quantize_rowwise(*p.quantize)
    kept = (p.rotation.block, p.rotation.columns, p.rotation.columns_weight)
    y = kernels.linear_quantized(p.x, *quantized, p.codes, p.scale, p.bias, "none", None, "none", *kept)
    torch.testing.assert_close(y, kernels.linear(*p.all), rtol=0, atol=0, equal_nan=True)


@given(rotated_problems(values=("normal", "zero_rows", "denormal", "huge")))
def test_quantize_rowwise_is_the_references(kernels, p):
    codes, scale, mask = kernels.quantize_rowwise(*p.quantize)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        real = reference.quantize_rowwise
        patch.setattr(reference, "quantize_rowwise", lambda *args: seen.append(real(*args)) or seen[-1])
        reference.linear(*p.all)
    ((expected, expected_scale),) = seen
    assert torch.equal(scale, expected_scale)
    assert torch.equal(codes, expected)
    if p.rotation.columns is not None:
        assert not mask[p.rotation.columns].any()


@given(
    rotated_problems(batched=None, values=("normal", "zero_rows")),
    st.sampled_from(list(reference.ACTIVATIONS)),
    st.sampled_from(list(reference.BINARIES)),
    seeds,
)
def test_epilogue_is_within_the_references_error(kernels, p, name, binary, seed):
    other = None
    if binary != "none":
        other = torch.randn(*p.x.shape[:-1], p.codes.shape[-2], generator=generator(seed)).to(p.x.dtype)
    y = kernels.linear(*p, name, other, binary, *p.rotation)
    assert_within_budget(y, *p, name, other, binary, rotation=p.rotation)


@given(rotated_problems(values=("nan", "inf"), layouts=("contiguous",), tops=(0,), thresholds=(NO_THRESHOLD, INF)))
def test_nan_and_inf_stay_in_their_rows(kernels, p):
    clean = p.x.isfinite().all(-1)
    y = kernels.linear(*p.all)
    assert not y[~clean].isfinite().any()
    healthy = kernels.linear(torch.where(p.x.isfinite(), p.x, 0), *p.all[1:])
    assert torch.equal(y[clean], healthy[clean])


@given(rotated_problems(batched=None))
def test_dequantize_reads_the_weight_that_the_oracle_has(p):
    _, columns, columns_weight, _ = p.rotation
    found = ops.dequantize(p.codes, p.scale, torch.float64, p.threshold, *p.rotation)
    assert torch.equal(found, dequantize(p.codes, p.scale, torch.float64, *list(p.rotation)[:3]))
    if columns is not None:
        assert torch.equal(found[..., columns], columns_weight.double())


@given(st.integers(1, 150), st.integers(1, 20), blocks, st.integers(0, 5), seeds)
def test_a_rotated_weight_is_read_back_to_half_a_step(K, N, block, count, seed):
    """The rotation keeps lengths: a row's error has the length of its codes' rounding error, spread over its block."""
    weight = torch.randn(N, K, generator=generator(seed), dtype=torch.float64)
    columns = torch.randperm(K, generator=generator(seed))[: min(K, count)]
    codes, scale = quantize_weight(weight, block, columns)
    read = dequantize(codes, scale, torch.float64, block, columns, weight[:, columns])
    step = scale.double() / 2 * (1 + 2**-16)
    assert torch.equal(read[:, columns], weight[:, columns])
    error = read - weight
    for i, n in rotation_blocks(K, block):
        assert (error[:, i : i + n].norm(dim=-1) <= step * math.sqrt(n)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kept", [False, True])
def test_long_inner_dimension(kernels, dtype, kept):
    x = activation(5, 2081, outliers="some", dtype=dtype, seed=9)
    codes, scale = packed_weight(7, 2081, seed=8)
    columns = torch.tensor([0, 5, 2080]) if kept else None
    columns_weight = torch.randn(7, 3, generator=generator(1)) if kept else None
    rotation = Rotation(64, columns, columns_weight)
    p = Problem(x, codes, scale, None, NO_THRESHOLD, rotation)
    assert_within_budget(kernels.linear(*p.all), *p, rotation=rotation)
    assert_within_bound(kernels.linear(*p.all), *p, rotation)


def test_a_planted_outlier_costs_rotated_int8_little_and_a_kept_column_nothing():
    x = activation(64, 256, outliers="none", seed=3)
    weight = torch.randn(64, 256, generator=generator(4))
    x[:, 17] *= 60
    exact = x.double() @ weight.double().T

    def error(scheme_block: int, keep: bool) -> float:
        columns = torch.tensor([17]) if keep else None
        kept = None if columns is None else weight[:, columns]
        packed = quantize_weight(weight, scheme_block, columns)
        y = ops.linear(x, *packed, None, NO_THRESHOLD, "none", None, "none", scheme_block, columns, kept)
        return float((y.double() - exact).square().mean().sqrt())

    plain, rotated, kept, both = error(1, False), error(64, False), error(1, True), error(64, True)
    assert rotated < plain / 2
    assert kept < rotated
    assert both < 1.1 * kept


@given(rotated_problems(values=("normal",), layouts=("contiguous", "sliced"), batched=None), seeds)
def test_gradients_are_those_of_the_dequantised_linear(p, seed):
    x = p.x.detach().requires_grad_()
    y = ops.linear(x, *p.all[1:])
    grad = torch.randn(y.shape, generator=generator(seed)).to(y.dtype)
    (found,) = torch.autograd.grad(y, x, grad)
    w = ops.dequantize(p.codes, p.scale, grad.dtype, p.threshold, *p.rotation)
    assert torch.equal(found, grad @ w)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=4), st.integers(0, 3), seeds)
def test_grouped_linear_is_linear_per_group(sizes, behind, seed):
    E, K, N = len(sizes), 100, 11
    x = activation(sum(sizes) + behind, K, outliers="some", seed=seed).requires_grad_()
    packed = [packed_weight(N, K, seed=seed + e) for e in range(E)]
    weight, scale = (torch.stack(parts) for parts in zip(*packed, strict=True))
    columns = torch.tensor([3, 50])
    rotation = Rotation(32, columns, torch.randn(E, N, 2, generator=generator(seed)))
    offsets = torch.tensor(sizes).cumsum(0)
    y = ops.grouped_linear(x, weight, scale, None, offsets, NO_THRESHOLD, *rotation)
    grad = torch.randn(y.shape, generator=generator(seed))
    (found,) = torch.autograd.grad(y, x, grad)
    begin = 0
    for e, end in enumerate(offsets.tolist()):
        of_e = rotation.of_expert(e)
        expected = ops.linear(x[begin:end], weight[e], scale[e], None, NO_THRESHOLD, "none", None, "none", *of_e)
        assert torch.equal(y[begin:end], expected)
        w = ops.dequantize(weight[e], scale[e], torch.float32, NO_THRESHOLD, *of_e)
        assert bound(grad[begin:end], *quantize_weight(w.T), None, 0.0).magnitude.shape == (end - begin, K)
        terms = grad[begin:end].double().abs() @ w.double().abs()
        error = (found[begin:end].double() - grad[begin:end].double() @ w.double()).abs()
        assert (error <= (N + E) * 2**-23 * terms).all()
        begin = end
    assert (y[begin:] == 0).all()
    assert (found[begin:] == 0).all()


# ---- batch invariance -----------------------------------------------------------------------------------------------

CASES = [(dtype, K) for dtype in (torch.float32, torch.bfloat16) for K in (100, 576, 2112, 4864)]


def invariant_problem(dtype: torch.dtype, K: int, N: int = 37, rows: int = 33) -> Problem:
    x = activation(rows, K, outliers="some", dtype=dtype, seed=5)
    columns = torch.arange(0, K, 29)[:49]
    kept = torch.randn(N, len(columns), generator=generator(6)).to(dtype)
    bias = torch.randn(N, generator=generator(7)).to(dtype)
    return Problem(x, *packed_weight(N, K, seed=1), bias, NO_THRESHOLD, Rotation(64, columns, kept))


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("dtype", "K"), CASES)
@pytest.mark.parametrize("name", list(reference.ACTIVATIONS))
def test_a_rows_result_is_bit_equal_for_every_batch(threads, dtype, K, name):
    p = invariant_problem(dtype, K)
    other = torch.randn(33, 37, generator=generator(8)).to(dtype)

    def run(x, other):
        return ops.linear(x, *list(p)[1:], name, other, "add", *p.rotation)

    whole = run(p.x, other)
    for M in range(1, 34):
        assert torch.equal(run(p.x[:M], other[:M]), whole[:M])
        assert torch.equal(run(p.x[33 - M :], other[33 - M :]), whole[33 - M :])
    padded = torch.cat([p.x[:5], torch.zeros(11, K, dtype=dtype), 1e4 * p.x[5:9]])
    assert torch.equal(run(padded, torch.cat([other[:5], other[:15]]))[:5], whole[:5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rows_result_is_bit_equal_for_every_batch_on_all_kernels(kernels, threads, dtype):
    p = invariant_problem(dtype, 2112)
    args = (*list(p)[1:], "gelu", None, "none", *p.rotation)
    whole = kernels.linear(p.x, *args)
    for M in range(1, 34):
        assert torch.equal(kernels.linear(p.x[:M], *args), whole[:M])


def test_oracle_has_the_columns():
    p = invariant_problem(torch.float32, 100)
    columns, kept = p.rotation.columns, p.rotation.columns_weight
    only = torch.zeros_like(p.x).index_copy(1, columns, p.x[:, columns])
    exact = p.x[:, columns].double() @ kept.double().T
    torch.testing.assert_close(oracle(only, p.codes, p.scale, None, p.rotation), exact, rtol=2**-40, atol=2**-40)
