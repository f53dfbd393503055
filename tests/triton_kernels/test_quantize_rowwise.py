import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from int8fx.triton_kernels.quantize_rowwise import MAX_BLOCK, quantize_rowwise
from support.helpers import activation, generator, seeds, thresholds
from support.triton import CONSTANTS, EXAMPLES, activations

from int8fx.schemes import quantize
from int8fx.schemes.rotate import rotate


def assert_equal_to_reference(x, block, columns, mask):
    codes, scale = quantize_rowwise(
        x[None], None if mask is None else mask[None], **CONSTANTS, block=block, columns=columns
    )
    quantised = x.float() if columns is None else x.float().index_fill(1, columns, 0)
    quantised = quantised if mask is None else quantised.masked_fill(mask, 0)
    expected, expected_scale = quantize.quantize_rowwise(rotate(quantised, block))
    torch.testing.assert_close(scale, expected_scale, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(codes[scale.isfinite()], expected[scale.isfinite()])
    assert not scale.isinf().any()  # inf is NaN there, so that 0 * scale cannot hide it


@EXAMPLES
@given(
    activations(K=st.sampled_from((0, 1, 16, 31, 32, 33, 64, 97, 128, 300))),
    st.sampled_from((1, 1, 2, 16, 64, 256, -2, -4, -32, -64, -256)),
    st.integers(0, 70),
    st.one_of(thresholds, st.just("random")),
    seeds,
)
def test_codes_and_scales_are_the_references_bit_for_bit(x, block, count, masked, seed):
    """With and without rotation, unquantised columns and masked columns."""
    K = x.shape[1]
    columns = torch.randperm(K, generator=generator(seed))[:count] if count else None
    if masked == "random":
        mask = torch.rand(K, generator=generator(seed + 1)) < 0.1
    else:
        mask = None if masked is None else quantize.outlier_mask(x, masked)
    assert_equal_to_reference(x, block, columns, mask)


@pytest.mark.parametrize(
    ("K", "block"),
    [
        (20001, 1),
        (4096, 4096),
        (5000, 64),
        (5000, 4096),
        (8193, 8192),
        (20000, 64),
        (16385, 8192),
        (5000, -256),
        (20000, -256),
        (8193, -8192),
    ],
)
def test_long_rows_and_long_blocks(K, block):
    """Rows of one part and of several parts, with columns after the last whole block."""
    x = activation(2, K, outliers="some", dtype=torch.bfloat16, seed=3)
    mask = quantize.outlier_mask(x, 6.0) if block == 1 else None
    assert_equal_to_reference(x, block, torch.arange(5, K, 101), mask)


@pytest.mark.parametrize("masked", [False, True])
def test_columns_of_many_rows_are_marked_once(masked, monkeypatch):
    monkeypatch.setattr("int8fx.triton_kernels.quantize_rowwise.MARKED_ROWS", 1)
    x = activation(33, 100, outliers="some", seed=3)
    mask = quantize.outlier_mask(x, 6.0) if masked else None
    given_mask = None if mask is None else mask.clone()
    assert_equal_to_reference(x, 1 if masked else 64, torch.tensor([99, 3, 40]), mask)
    assert mask is None or torch.equal(mask, given_mask)  # the caller's mask is not written to


def test_blocks_that_no_program_holds_are_refused():
    K = 2 * MAX_BLOCK
    for block in (K, -K):
        with pytest.raises(ValueError, match=f"block {K} of K = {K}; legal: at most 8192 on a GPU"):
            quantize_rowwise(torch.zeros(1, 1, K), None, **CONSTANTS, block=block)
