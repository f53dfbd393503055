import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from int8fx.triton_kernels.outliers import extract_outliers, gather_weight, outlier_mask
from int8fx.triton_kernels.tiles import BLOCK_O
from support.helpers import problem, thresholds
from support.triton import EXAMPLES, activations

from int8fx.schemes import quantize


@EXAMPLES
@given(activations(), thresholds)
def test_the_mask_is_the_references(x, threshold):
    assert torch.equal(outlier_mask(x[None], threshold)[0], quantize.outlier_mask(x, threshold))


@pytest.mark.parametrize("M", [256, 257, 300])
def test_outliers_of_many_rows_are_found_by_several_programs(M):
    x = torch.zeros(M, 70)
    x[0, 3], x[127, 64], x[128, 65], x[M - 1, 69] = 6.0, -7.0, 6.0, 8.0
    assert outlier_mask(x[None], 6.0)[0].nonzero().squeeze(-1).tolist() == [3, 64, 65, 69]


@EXAMPLES
@given(activations(K=st.sampled_from((1, 31, 32, 33, 255, 256, 257, 300))), st.sampled_from((0.0, 2.5, 6.0)))
def test_outliers_come_out_in_order_with_zeros_after_them(x, threshold):
    mask = outlier_mask(x[None], threshold)
    panel, columns, count = extract_outliers(x[None], mask)
    if not x.numel():
        return
    expected = mask[0].nonzero().squeeze(-1)
    n = len(expected)
    assert count.tolist() == [n]
    assert torch.equal(columns[0, :n].long(), expected)
    torch.testing.assert_close(panel[:, :n], x[:, expected], rtol=0, atol=0, equal_nan=True)
    padded = math.ceil(n / BLOCK_O) * BLOCK_O
    assert (panel[:, n:padded] == 0).all()
    assert (columns[0, n:padded] == 0).all()


@pytest.mark.parametrize("K", [64, 1100])
@pytest.mark.parametrize("outliers", ["some", "columns", "none"])
def test_the_weight_of_the_first_outliers_is_gathered(K, outliers):
    """With K = 64 and outliers in all columns there are more of them than fit."""
    x, weight, _ = problem(33, K, 40, outliers=outliers, dtype=torch.bfloat16)
    _, columns, count = extract_outliers(x[None], outlier_mask(x[None], 6.0))
    gathered = gather_weight(weight.codes[None], columns, count)
    first = columns[0, : min(int(count), gathered.shape[2])].long()
    assert len(first) == 0 if outliers == "none" else len(first) > 0
    assert torch.equal(gathered[0, :, : len(first)], weight.codes[:, first])
