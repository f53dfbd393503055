"""Every Triton kernel in the interpreter, against `int8fx.schemes.reference` and float64.

The tiles are small, so that small tensors have several of them and a partial one at each end.
"""

import math

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from int8fx.triton_kernels import outliers as outliers_kernels
from int8fx.triton_kernels.configs import Config
from int8fx.triton_kernels.fused_linear import fused_linear
from int8fx.triton_kernels.int8_matmul import int8_matmul
from int8fx.triton_kernels.outliers import extract_outliers, gather_weight, outlier_mask
from int8fx.triton_kernels.quantize_rowwise import quantize_rowwise
from int8fx.triton_kernels.weight_only import weight_only
from support import interpreter  # noqa: F401
from support.helpers import (
    INF,
    activation,
    assert_within,
    assert_within_bound,
    assert_within_budget,
    bound,
    generator,
    oracle,
    packed_weight,
    problem,
    seeds,
    thresholds,
    unit_roundoff,
    with_layout,
)

from int8fx.schemes import quantize, reference
from int8fx.schemes.quantize import INT8_MAX, TINY

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Fewer than elsewhere, and shown as found: the interpreter is slow, to shrink an example takes it minutes.
EXAMPLES = settings(max_examples=settings().max_examples * 5 // 8, phases=(Phase.explicit, Phase.generate))
CONSTANTS = {"int8_max": INT8_MAX, "tiny": TINY}
TILE = Config(16, 32, 32, 4, 2)

dtypes = st.sampled_from(DTYPES)
rows = st.sampled_from((0, 1, 15, 16, 17, 33))
sizes = st.sampled_from((0, 1, 16, 31, 32, 33, 63, 64, 65, 97))
splits = st.sampled_from((1, 2, 4))
outliers = st.sampled_from(("none", "column", "columns", "row", "token", "some", "last"))
values = st.sampled_from(("normal", "normal", "zero_rows", "nan", "inf", "denormal", "huge"))
layouts = st.sampled_from(("contiguous", "transposed", "sliced", "expanded", "broadcast"))
epilogues = st.tuples(st.sampled_from(tuple(reference.ACTIVATIONS)), st.sampled_from(tuple(reference.BINARIES)))


@st.composite
def activations(draw, M=rows, K=sizes):
    M, K, where, dtype = draw(M), draw(K), draw(outliers), draw(dtypes)
    kind = "none" if where == "last" else where
    x = activation(M, K, outliers=kind, values=draw(values), dtype=dtype, seed=draw(seeds))
    if where == "last" and x.numel():
        x[-1, -1] = 50  # in the last partial block
    return with_layout(x, draw(layouts))


@st.composite
def products(draw, M=rows):
    """x, weight, scale, bias, threshold, activation, other, binary: with weights and others of any strides."""
    x = draw(activations(M=M))
    N, seed = draw(sizes), draw(seeds)
    weight, scale = packed_weight(N, x.shape[1], zero_row=draw(st.booleans()), spread=8.0, seed=seed)
    bias_dtype = draw(st.sampled_from((None, x.dtype, torch.float32)))
    bias = None if bias_dtype is None else torch.randn(N, generator=generator(seed)).to(bias_dtype)
    activation_name, binary = draw(epilogues)
    other = torch.randn(x.shape[0], N, generator=generator(seed + 1)).to(x.dtype) if binary != "none" else None
    if draw(st.booleans()):
        weight = weight.t().contiguous().t()
        other = None if other is None else other.t().contiguous().t()
    return x, weight, scale, bias, draw(thresholds), activation_name, other, binary


def quantized(x, threshold):
    mask = outlier_mask(x[None], threshold)
    return *quantize_rowwise(x[None], mask, **CONSTANTS), extract_outliers(x[None], mask)


def one(*tensors):
    """With a leading dimension of one weight."""
    return tuple(None if t is None else t[None] for t in tensors)


# ---- quantisation and outliers ---------------------------------------------------------------------------------------


@EXAMPLES
@given(activations(), thresholds)
def test_codes_scales_and_mask_are_those_of_the_reference(x, threshold):
    mask = outlier_mask(x[None], threshold)
    expected_mask = quantize.outlier_mask(x, threshold)
    assert torch.equal(mask[0], expected_mask)
    codes, scale = quantize_rowwise(x[None], mask, **CONSTANTS)
    expected, expected_scale = quantize.quantize_rowwise(x, expected_mask)
    torch.testing.assert_close(scale, expected_scale, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(codes[scale.isfinite()], expected[scale.isfinite()])
    if not expected_mask.any():
        again = quantize_rowwise(x[None], None, **CONSTANTS)
        assert torch.equal(again[0][scale.isfinite()], codes[scale.isfinite()])


@EXAMPLES
@given(activations(K=st.sampled_from((1, 31, 32, 33, 255, 256, 257, 300))), st.sampled_from((0.0, 2.5, 6.0)))
def test_outliers_come_out_in_order_with_zeros_behind_them(x, threshold):
    mask = outlier_mask(x[None], threshold)
    panel, columns, count = extract_outliers(x[None], mask)
    if not x.numel():
        return
    expected = mask[0].nonzero().squeeze(-1)
    n = len(expected)
    assert count.tolist() == [n]
    assert torch.equal(columns[0, :n].long(), expected)
    torch.testing.assert_close(panel[:, :n], x[:, expected], rtol=0, atol=0, equal_nan=True)
    padded = math.ceil(n / outliers_kernels.BLOCK_O) * outliers_kernels.BLOCK_O
    assert (panel[:, n:padded] == 0).all()
    assert (columns[0, n:padded] == 0).all()


@pytest.mark.parametrize("value", [math.nan, INF, -INF])
@pytest.mark.parametrize("threshold", [6.0, INF])
@pytest.mark.parametrize("kernel", ["int8_matmul", "fused_linear"])
def test_nan_and_inf_stay_in_their_row(kernel, threshold, value):
    """In a column that is no outlier by threshold inf, in one that is by 6; 0 * weight hides neither."""
    x, weight, scale, bias, _ = problem(5, 65, 33, dtype=torch.float16)
    weight[0] = 0
    clean = x.clone()
    clean[2, 64] = 7.0 if value != value or threshold == INF else math.copysign(7.0, value)
    x[2, 64] = value
    if math.isnan(value) and threshold == 6.0:
        clean[2, 64] = 0.0

    def product(x):
        if kernel == "fused_linear":
            return fused_linear(x[None], *one(weight, scale, bias), threshold, **CONSTANTS, config=TILE)
        codes, x_scale, outlying = quantized(x, threshold)
        assert not x_scale.isinf().any()  # inf is NaN there, so that 0 * scale cannot hide it
        return int8_matmul(codes, x_scale, *one(weight, scale), outlying, *one(bias), x.dtype, config=TILE)

    y, expected = product(x), product(clean)
    others = torch.arange(5) != 2
    assert torch.equal(y[others], expected[others])
    assert not y[2].isfinite().any()


def test_a_row_longer_than_a_block_is_quantised_as_one():
    x = activation(3, 20001, outliers="some", seed=1)
    mask = outlier_mask(x[None], 6.0)
    codes, scale = quantize_rowwise(x[None], mask, **CONSTANTS)
    expected, expected_scale = quantize.quantize_rowwise(x, mask[0])
    assert torch.equal(codes, expected)
    assert torch.equal(scale, expected_scale)


# ---- the product of quantised activations ----------------------------------------------------------------------------


@EXAMPLES
@given(products())
def test_int8_matmul_is_as_exact_as_the_reference(p):
    x, weight, scale, bias, threshold, activation_name, other, binary = p
    codes, x_scale, outlying = quantized(x, threshold)
    packed = one(weight, scale)
    y = int8_matmul(codes, x_scale, *packed, outlying, *one(bias), x.dtype, activation_name, other, binary, config=TILE)
    assert_within_budget(y, *p)


@pytest.mark.parametrize("K", [64, 1100])
@pytest.mark.parametrize("where", ["some", "columns", "none"])
def test_many_rows_gather_the_weight_of_their_outliers_once(K, where, monkeypatch):
    """With K = 64 there are more outliers than were gathered: the product fetches the rest."""
    monkeypatch.setattr("int8fx.triton_kernels.int8_matmul.GATHER_ROWS", 1)
    x, weight, scale, bias, threshold = problem(33, K, 40, outliers=where, dtype=torch.bfloat16)
    codes, x_scale, outlying = quantized(x, threshold)
    gathered = gather_weight(weight[None], *outlying[1:])
    columns = outlying[1][0, : min(int(outlying[2]), gathered.shape[2])].long()
    assert torch.equal(gathered[0, :, : len(columns)], weight[:, columns])
    y = int8_matmul(codes, x_scale, *one(weight, scale), outlying, *one(bias), x.dtype, config=TILE)
    assert_within_budget(y, x, weight, scale, bias, threshold)


@EXAMPLES
@given(
    st.lists(st.integers(0, 20), min_size=1, max_size=4),
    st.integers(0, 3),
    sizes,
    dtypes,
    st.sampled_from(("int8_matmul", "fused_linear", "weight_only")),
    seeds,
)
def test_rows_of_groups_meet_their_own_weight_and_outliers(counts, behind, N, dtype, kernel, seed):
    S, E, K = sum(counts) + behind, len(counts), 65
    offsets = torch.tensor(counts).cumsum(0)
    x = activation(S, K, outliers="some", dtype=dtype, seed=seed)
    weight, scale = (torch.stack(t) for t in zip(*(packed_weight(N, K, seed=e) for e in range(E)), strict=True))
    bias = torch.randn(E, N, generator=generator(seed))
    config = Config(128 if kernel == "fused_linear" else 16, 32, 32, 4, 2, SPLIT_K=2)
    if kernel == "fused_linear":
        y = fused_linear(x[None], weight, scale, bias, 6.0, **CONSTANTS, offsets=offsets, config=config)
    elif kernel == "weight_only":
        y = weight_only(x[None], weight, scale, bias, offsets=offsets, config=config)
    else:
        mask = outlier_mask(x[None], 6.0, offsets, E)
        codes, x_scale = quantize_rowwise(x[None], mask, **CONSTANTS, offsets=offsets)
        outlying = extract_outliers(x[None], mask, offsets)
        y = int8_matmul(codes, x_scale, weight, scale, outlying, bias, dtype, offsets=offsets, config=config)
    begin = 0
    for e, end in enumerate(offsets.tolist()):
        if end > begin and N:
            part = (y[begin:end], x[begin:end], weight[e], scale[e], bias[e])
            if kernel == "fused_linear":
                assert_within_fused(*part, 6.0, splits=2)
            else:
                assert_within_budget(*part, 0.0 if kernel == "weight_only" else 6.0, slices=8)
        begin = end
    assert (y[begin:] == 0).all()


@EXAMPLES
@given(st.integers(1, 3), st.sampled_from((1, 16, 19)), sizes, dtypes, st.booleans(), layouts, seeds)
def test_a_batch_of_weights_is_a_product_each(E, M, N, dtype, fused, layout, seed):
    K = 65
    x = activation(E * M, K, outliers="some", dtype=dtype, seed=seed).reshape(E, M, K)
    x = with_layout(x, layout)
    weight, scale = (torch.stack(t) for t in zip(*(packed_weight(N, K, seed=e) for e in range(E)), strict=True))
    if fused:
        y = fused_linear(x, weight, scale, None, 6.0, **CONSTANTS, config=Config(32, 32, 32, 4, 2))
    else:
        mask = outlier_mask(x, 6.0)
        codes, x_scale = quantize_rowwise(x, mask, **CONSTANTS)
        y = int8_matmul(codes, x_scale, weight, scale, extract_outliers(x, mask), None, dtype, config=TILE)
    for e in range(E):
        if N:
            part = (y.view(E, M, N)[e], x[e], weight[e], scale[e], None, 6.0)
            (assert_within_fused if fused else assert_within_budget)(*part)


# ---- one launch ------------------------------------------------------------------------------------------------------


def assert_within_fused(y, x, weight, scale, bias, threshold, *, splits=1, block=32):
    """The bound in `fused_linear`'s docstring.

    The sums run over the kernel's own codes, whose values differ from the scheme's by at most twice what either may
    differ from x, so their magnitude by at most ``2 * Q``.
    """
    slices = math.ceil(x.shape[1] / block) + splits
    exact, terms = oracle(x, weight, scale, bias), bound(x, weight, scale, bias, threshold, slices)
    n = (x.shape[1] + slices + 4) * unit_roundoff(torch.float32)
    terms = type(terms)(terms.codes * (1 + 2 * n), terms.sums, terms.magnitude)
    assert_within(y, exact, terms.total(exact, x.dtype), terms.magnitude)


@EXAMPLES
@given(products(), splits)
def test_fused_linear_is_within_the_bound_of_the_scheme(p, split):
    x, weight, scale, bias, threshold, *_ = p
    config = Config(64, 32, 32, 4, 2, SPLIT_K=split)
    y = fused_linear(x[None], *one(weight, scale, bias), threshold, **CONSTANTS, config=config)
    assert_within_fused(y, x, weight, scale, bias, threshold, splits=split)


@EXAMPLES
@given(products(), splits)
def test_fused_linear_ends_like_the_other_kernels(p, split):
    """Its epilogue, on threshold 0: then nothing is quantised and the reference's budget holds element by element."""
    x, weight, scale, bias, _, activation_name, other, binary = p
    config = Config(64, 32, 32, 4, 2, SPLIT_K=split)
    y = fused_linear(
        x[None], *one(weight, scale, bias), 0.0, activation_name, other, binary, **CONSTANTS, config=config
    )
    assert_within_budget(y, x, weight, scale, bias, 0.0, activation_name, other, binary, slices=8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where", ["none", "some", "token"])
def test_scales_per_block_are_more_exact_than_the_scheme(dtype, where):
    """Not element by element, where luck decides, but in the sum of squares: per-block steps are never coarser."""
    x, weight, scale, bias, threshold = problem(16, 512, 64, outliers=where, dtype=dtype)
    exact = oracle(x, weight, scale, bias)
    config = Config(16, 64, 64, 4, 2)
    y = fused_linear(x[None], *one(weight, scale, bias), threshold, **CONSTANTS, config=config)
    expected = reference.linear(x, weight, scale, bias, threshold)
    assert (y - exact).square().sum() < (expected - exact).square().sum()


def test_fused_linear_refuses_rows_that_one_tile_cannot_hold():
    x, weight, scale, bias, _ = problem(17, 32, 8)
    with pytest.raises(ValueError, match="x has 17 rows; legal: at most 16"):
        fused_linear(x[None], *one(weight, scale, bias), 6.0, **CONSTANTS, config=TILE)


@EXAMPLES
@given(products(), splits)
def test_weight_only_rounds_its_sums_and_nothing_else(p, split):
    x, weight, scale, bias, _, activation_name, other, binary = p
    config = Config(16, 32, 32, 4, 2, SPLIT_K=split)
    y = weight_only(x[None], *one(weight, scale, bias), activation_name, other, binary, config=config)
    assert_within_budget(y, x, weight, scale, bias, 0.0, activation_name, other, binary, slices=8)
    if activation_name == "none" and other is None:
        assert_within_bound(y, x, weight, scale, bias, 0.0)


# ---- what a batch shares ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [1, 4])
def test_weight_only_results_of_a_row_do_not_depend_on_the_batch(split):
    x, weight, scale, bias, _ = problem(33, 97, 33, dtype=torch.bfloat16)
    config = Config(16, 32, 32, 4, 2, SPLIT_K=split)
    y = weight_only(x[None], *one(weight, scale, bias), config=config)
    alone = [weight_only(row[None, None], *one(weight, scale, bias), config=config) for row in x]
    assert torch.equal(y, torch.cat(alone))


@pytest.mark.parametrize("kernel", ["int8_matmul", "fused_linear"])
def test_without_outliers_a_row_does_not_depend_on_the_batch(kernel):
    x, weight, scale, bias, _ = problem(33, 97, 33, outliers="columns", dtype=torch.float16)

    def product(x):
        if kernel == "fused_linear":
            config = Config(64, 32, 32, 4, 2)
            return fused_linear(x[None], *one(weight, scale, bias), INF, **CONSTANTS, config=config)
        codes, x_scale = quantize_rowwise(x[None], None, **CONSTANTS)
        return int8_matmul(codes, x_scale, *one(weight, scale), None, *one(bias), x.dtype, config=TILE)

    assert torch.equal(product(x), torch.cat([product(row[None]) for row in x]))


def test_splits_are_added_in_order_and_leave_their_counters_at_zero(monkeypatch):
    from int8fx.triton_kernels import configs

    x, weight, scale, bias, _ = problem(5, 300, 40)
    made = []
    workspace = configs.workspace
    monkeypatch.setattr(configs, "workspace", lambda *args: made.append(workspace(*args)) or made[-1])
    config = Config(16, 32, 32, 4, 2, SPLIT_K=4)
    first, second = (weight_only(x[None], *one(weight, scale, bias), config=config) for _ in range(2))
    assert torch.equal(first, second)
    assert all((counter == 0).all() for _, counter in made)
