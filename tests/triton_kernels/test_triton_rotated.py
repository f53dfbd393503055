"""Rotated int8 and kept columns on the Triton kernels, in the interpreter: codes, products, dispatch, whole models."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from int8fx.triton_kernels import quantize_rowwise as quantize_kernel
from int8fx.triton_kernels.configs import Config
from int8fx.triton_kernels.int8_matmul import int8_matmul
from int8fx.triton_kernels.quantize_rowwise import quantize_rowwise
from support import interpreter
from support.graphs import compiled
from support.helpers import (
    INF,
    NO_THRESHOLD,
    Problem,
    Rotation,
    activation,
    assert_within_bound,
    assert_within_budget,
    generator,
    packed_weight,
    rotated_problems,
    seeds,
)
from test_rotated_models import SCHEMES, batch, model_of
from test_triton_kernels import CONSTANTS, DTYPES, EXAMPLES, activations, one

import int8fx
from int8fx.calibration.calibrate import calibrate
from int8fx.ops import gpu
from int8fx.passes import count_ops, fold, lower, share
from int8fx.schemes import quantize, reference

TILE = Config(16, 32, 32, 4, 2)
FEWER = settings(max_examples=settings().max_examples // 2, phases=(Phase.explicit, Phase.generate))
dtypes = st.sampled_from(DTYPES)
static = {"dtype": dtypes, "tops": (0,), "thresholds": (NO_THRESHOLD, INF)}


# ---- codes -----------------------------------------------------------------------------------------------------------


def assert_codes(x, block, columns, mask=None):
    found = quantize_rowwise(x[None], None if mask is None else mask[None], **CONSTANTS, block=block, columns=columns)
    rest = x.float() if columns is None else x.float().index_fill(1, columns, 0)
    rest = rest if mask is None else rest.masked_fill(mask, 0)
    codes, scale = quantize.quantize_rowwise(quantize.rotate(rest, block))
    torch.testing.assert_close(found[1], scale, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found[0][scale.isfinite()], codes[scale.isfinite()])


@EXAMPLES
@given(
    activations(K=st.sampled_from((0, 1, 31, 32, 33, 64, 97, 128, 300))),
    st.sampled_from((1, 2, 16, 64, 256)),
    st.integers(0, 70),
    st.booleans(),
    seeds,
)
def test_codes_and_scales_are_the_references_bit_for_bit(x, block, count, masked, seed):
    K = x.shape[1]
    columns = torch.randperm(K, generator=generator(seed))[:count] if count else None
    mask = torch.rand(K, generator=generator(seed + 1)) < 0.1 if masked else None
    assert_codes(x, block, columns, mask)


@pytest.mark.parametrize(
    ("K", "block"), [(4096, 4096), (5000, 64), (5000, 4096), (8193, 8192), (20000, 64), (16385, 8192)]
)
def test_long_rows_and_long_blocks(K, block):
    """Rows of one part, of several, and with a rest behind the last whole block."""
    assert_codes(activation(2, K, outliers="some", dtype=torch.bfloat16, seed=3), block, torch.arange(5, K, 101))


def test_blocks_that_no_program_holds_are_refused():
    K = 2 * quantize_kernel.MAX_BLOCK
    with pytest.raises(ValueError, match=f"block {K} of K = {K}; legal: at most 8192 on a GPU"):
        quantize_rowwise(torch.zeros(1, 1, K), None, **CONSTANTS, block=K)


# ---- products --------------------------------------------------------------------------------------------------------


@EXAMPLES
@given(rotated_problems(batched=None, **static))
def test_linear_is_as_exact_as_the_reference(p):
    y = gpu.linear(*p.all)
    if p.rotation.block == 1 and p.rotation.columns is None:
        assert_within_bound(y, *p)  # scales per block of K: more exact, but not element by element
    else:
        assert_within_budget(y, *p, rotation=p.rotation)


@FEWER
@given(rotated_problems(dtype=dtypes, tops=(0,), thresholds=(6.0, 2.5, 0.0)))
def test_kept_columns_beside_the_outliers_of_the_call(p):
    """``llm_int8(keep=...)``: a kept column is no outlier, whatever it holds."""
    assume(p.rotation.columns is not None)
    p = replace(p, rotation=replace(p.rotation, block=1))
    assert_within_budget(gpu.linear(*p.all), *p, rotation=p.rotation)


@FEWER
@given(
    rotated_problems(values=("normal", "zero_rows"), **static),
    st.sampled_from(list(reference.ACTIVATIONS)),
    st.sampled_from(list(reference.BINARIES)),
    seeds,
)
def test_epilogues(p, name, binary, seed):
    assume(p.rotation.block > 1 or p.rotation.columns is not None)
    other = None
    if binary != "none":
        other = torch.randn(*p.x.shape[:-1], p.codes.shape[-2], generator=generator(seed)).to(p.x.dtype)
    y = gpu.linear(*p, name, other, binary, *p.rotation)
    assert_within_budget(y, *p, name, other, binary, rotation=p.rotation)


@FEWER
@given(rotated_problems(**static))
def test_quantising_first_and_multiplying_later_is_linear(p):
    assume(p.rotation.block > 1 or p.rotation.columns is not None)
    quantized = gpu.quantize_rowwise(*p.quantize)
    assert not quantized[2].any()
    y = gpu.linear_quantized(p.x, *quantized, p.codes, p.scale, p.bias, "none", None, "none", *list(p.rotation)[:3])
    torch.testing.assert_close(y, gpu.linear(*p.all), rtol=0, atol=0, equal_nan=True)


@FEWER
@given(rotated_problems(values=("nan", "inf"), layouts=("contiguous",), **static))
def test_nan_and_inf_stay_in_their_rows(p):
    clean = p.x.isfinite().all(-1)
    y = gpu.linear(*p.all)
    assert not y[~clean].isfinite().any()
    healthy = gpu.linear(torch.where(p.x.isfinite(), p.x, 0), *p.all[1:])
    assert torch.equal(y[clean], healthy[clean])


@FEWER
@given(st.lists(st.integers(0, 20), min_size=1, max_size=4), st.integers(0, 3), dtypes, st.booleans(), seeds)
def test_rows_of_groups_meet_their_own_kept_weights(sizes, behind, dtype, rotated, seed):
    E, K, N = len(sizes), 100, 11
    x = activation(sum(sizes) + behind, K, outliers="some", dtype=dtype, seed=seed)
    packed = [packed_weight(N, K, seed=seed + e) for e in range(E)]
    weight, scale = (torch.stack(parts) for parts in zip(*packed, strict=True))
    rotation = Rotation(32 if rotated else 1, torch.tensor([50, 3]), torch.randn(E, N, 2, generator=generator(seed)))
    bias = torch.randn(E, N, generator=generator(seed + 1))
    offsets = torch.tensor(sizes).cumsum(0)
    y = gpu.grouped_linear(x, weight, scale, bias, offsets, NO_THRESHOLD, *rotation)
    begin = 0
    for e, end in enumerate(offsets.tolist()):
        p = Problem(x[begin:end], weight[e], scale[e], bias[e], NO_THRESHOLD, rotation.of_expert(e))
        assert torch.equal(y[begin:end], gpu.linear(*p.all))
        begin = end
    assert (y[begin:] == 0).all()


# ---- batch invariance ------------------------------------------------------------------------------------------------


def invariant_problem(dtype, rows):
    K, N = 100, 19
    x = activation(rows, K, outliers="some", dtype=dtype, seed=5)
    columns = torch.arange(0, K, 29)
    kept = torch.randn(N, len(columns), generator=generator(6)).to(dtype)
    return Problem(x, *packed_weight(N, K, seed=1), None, NO_THRESHOLD, Rotation(64, columns, kept))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rows_result_is_bit_equal_for_every_batch(dtype):
    """Beyond 1 and 32 rows other schemes change kernels; this one does not."""
    p = invariant_problem(dtype, 130)
    whole = gpu.linear(*p.all)
    for M in (1, 16, 17, 64, 65, 129):
        assert torch.equal(gpu.linear(p.x[:M], *p.all[1:]), whole[:M])
    assert torch.equal(gpu.linear(p.x[97:], *p.all[1:]), whole[97:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_split_of_k_changes_a_bit(dtype):
    p = invariant_problem(dtype, 19)
    codes, x_scale = quantize_rowwise(p.x[None], None, **CONSTANTS, block=64, columns=p.rotation.columns)
    kept = p.x[None], p.rotation.columns, p.rotation.columns_weight[None]
    tiles = [Config(16, 32, 32, 4, 2, SPLIT_K=split) for split in (1, 2, 4, 8)] + [Config(16, 32, 64, 4, 2, SPLIT_K=2)]
    results = [
        int8_matmul(codes, x_scale, *one(p.codes, p.scale), None, None, dtype, kept=kept, config=tile) for tile in tiles
    ]
    assert all(torch.equal(results[0], y) for y in results)
    assert_within_budget(results[0], *p, rotation=p.rotation)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kept_dtype", [None, torch.float32])
@pytest.mark.parametrize("experts", [0, 3])
def test_many_rows_gather_kept_columns_and_mark_them_once(dtype, kept_dtype, experts, monkeypatch):
    """The same bits as where they stand: 20 columns, which is no multiple of what a dot takes."""
    K, N, C = 100, 19, 20
    x = activation(33, K, outliers="some", dtype=dtype, seed=5)
    lead = (experts,) if experts else ()
    packed = [packed_weight(N, K, seed=seed) for seed in range(max(experts, 1))]
    weight, scale = (torch.stack(parts).view(*lead, *parts[0].shape) for parts in zip(*packed, strict=True))
    columns = torch.randperm(K, generator=generator(1))[:C]
    kept = torch.randn(*lead, N, C, generator=generator(2)).to(kept_dtype or dtype)

    def product():
        if experts:
            offsets = torch.tensor([5, 5, 30])
            return gpu.grouped_linear(x, weight, scale, None, offsets, NO_THRESHOLD, 64, columns, kept)
        return gpu.linear(x, weight, scale, None, NO_THRESHOLD, "none", None, "none", 64, columns, kept)

    def outliers_too():
        return gpu.quantize_rowwise(x, 6.0, 1, columns)

    expected, expected_codes = product(), outliers_too()
    monkeypatch.setattr("int8fx.triton_kernels.int8_matmul.GATHER_KEPT_ROWS", 1)
    monkeypatch.setattr("int8fx.triton_kernels.quantize_rowwise.MARKED_ROWS", 1)
    assert torch.equal(product(), expected)
    assert all(torch.equal(a, b) for a, b in zip(outliers_too(), expected_codes, strict=True))


# ---- dispatch and models ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("block", "threshold", "top"), [(64, NO_THRESHOLD, 1), (1, 6.0, 1), (64, 6.0, 0)])
def test_columns_chosen_by_the_call_are_refused(block, threshold, top):
    x, weight, scale = torch.randn(3, 64), *packed_weight(5, 64)
    legal = "legal: llm_int8, and rotated with columns='static' or None"
    with pytest.raises(NotImplementedError, match=legal):
        gpu.linear(x, weight, scale, None, threshold, "none", None, "none", block, None, None, top)
    with pytest.raises(NotImplementedError, match=legal):
        gpu.quantize_rowwise(x, threshold, block, None, top)
    with pytest.raises(NotImplementedError, match=legal):
        gpu.grouped_linear(x, weight[None], scale[None], None, torch.tensor([3]), threshold, block, None, None, top)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("static", torch.float32), *((name, torch.bfloat16) for name in SCHEMES if name != "dynamic")],
)
def test_models_are_lowered_shared_folded_and_as_right_as_on_the_cpu(name, dtype):
    model, x = model_of(dtype), batch(3, 5, dtype=dtype)
    exact = copy.deepcopy(model).float()(x.float())
    int8fx.convert(model, SCHEMES[name], calibration=calibrate(model, [x]))
    run, backend = compiled(model, lower, share, fold)
    with torch.no_grad():
        with interpreter.cpu_tensors_on_triton():
            y = run(x)
        on_cpu = run(x)
    (graph,) = backend.after
    found = count_ops(graph)
    assert (found["linear"] + found["linear_quantized"], found.get("dequantize")) == (7, None)
    assert (y - exact).norm() <= 1.05 * (on_cpu - exact).norm()
