"""`hqq_scales` and `searched_scales`: what each makes small, against the scales of the largest values."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.helpers import correlated, generator, groupings, in_groups, seeds, stored_rows
from torch import Tensor

from int8fx.schemes.formats import ChooseScales, Grouping, absmax_scales
from int8fx.schemes.hqq import NORM, hqq_scales
from int8fx.schemes.search import searched_scales


def heavy_tailed(N: int, K: int, seed: int) -> Tensor:
    g = generator(seed)
    return torch.randn(N, K, generator=g) * torch.exp(torch.randn(N, K, generator=g))


def values(weight: Tensor, grouping: Grouping, choose: ChooseScales = absmax_scales) -> Tensor:
    return stored_rows(in_groups(weight, grouping, choose=choose))


def sums(t: Tensor, size: int | None) -> Tensor:
    """Of the groups of each row."""
    return torch.stack([part.sum(-1) for part in t.split(size or max(1, t.shape[-1]), -1)], -1)


@given(groupings(), st.integers(0, 4), st.integers(1, 150), seeds)
def test_hqq_never_has_a_larger_norm(grouping, N, K, seed):
    weight = heavy_tailed(N, K, seed)
    grouping = grouping._replace(double_quant=False)  # which rounds the scales that were chosen
    norms = [
        sums((weight.double() - values(weight, grouping, choose)).abs().pow(NORM), grouping.size)
        for choose in (hqq_scales, absmax_scales)
    ]
    assert (norms[0] <= norms[1] * (1 + 1e-4) + 1e-6).all()


@given(groupings(), st.integers(0, 4), st.integers(1, 150), seeds)
def test_the_search_never_has_a_larger_error(grouping, N, K, seed):
    x, weight = correlated(200, K, seed), heavy_tailed(N, K, seed)
    grouping = grouping._replace(double_quant=False)
    choose = partial(searched_scales, moments=x.T @ x)
    size, losses = grouping.size or K, []
    for which in (choose, absmax_scales):
        error = weight.double() - values(weight, grouping, which)
        parts = [a @ b.T for a, b in zip(error.split(size, -1), x.double().split(size, -1), strict=True)]
        losses.append(torch.stack([part.square().sum(-1) for part in parts], -1))
    assert (losses[0] <= losses[1] * (1 + 1e-4) + 1e-6).all()


@given(groupings(), st.integers(0, 4), st.integers(1, 150), seeds)
@pytest.mark.parametrize("choose", [hqq_scales, "search"])
def test_codes_are_the_nearest_in_their_scales(choose, grouping, N, K, seed):
    """And what is stored has the form of any weight: shapes, dtypes and legal codes."""
    weight = heavy_tailed(N, K, seed)
    if choose == "search":
        choose = partial(searched_scales, moments=torch.eye(K))
    packed, alone = in_groups(weight, grouping, choose=choose), in_groups(weight, grouping)
    for tensor, other in zip(packed, alone, strict=True):
        if isinstance(other, Tensor):
            assert (tensor.shape, tensor.dtype) == (other.shape, other.dtype)
    assert stored_rows(packed).isfinite().all()
    if grouping.format == "int8" and not grouping.asymmetric:
        assert packed.codes.numel() == 0 or packed.codes.min() >= -127


@pytest.mark.parametrize(("format", "gain"), [("int4_clip", 0.97), ("int4_fullrange", 0.99), ("fp4_e2m1", 0.995)])
def test_hqq_is_better_on_most_weights(format, gain):
    weight, grouping = heavy_tailed(64, 512, 0), Grouping(format, 128)
    norms = [
        (weight - values(weight, grouping, choose)).abs().pow(NORM).sum() for choose in (hqq_scales, absmax_scales)
    ]
    assert norms[0] < gain * norms[1]


def test_hqq_is_as_good_as_another_solver_of_it():
    """torchao's, with its integer zero points, in its own objective and ours."""
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    weight = torch.randn(64, 512, generator=generator(1))
    codes, scale, zero, _ = primitives._choose_qparams_and_quantize_affine_hqq(
        weight, 4, 128, compute_dtype=torch.float32, device="cpu", raw_output=True
    )
    theirs = ((codes.float().view(-1, 128) - zero.view(-1, 1)) * scale.view(-1, 1)).view_as(weight)
    mine = values(weight, Grouping("int4_clip", 128, asymmetric=True), hqq_scales)
    norms = [(weight - v).abs().pow(NORM).sum() for v in (mine, theirs)]
    assert norms[0] < 1.02 * norms[1]


def test_the_search_clips_where_the_inputs_are_small():
    """The largest weight of a group has an input that is nearly 0: the other weights get smaller steps."""
    weight = torch.randn(8, 32, generator=generator(0))
    weight[:, 5] = 6
    moments = torch.ones(32).index_fill(0, torch.tensor([5]), 1e-6).diag()
    packed = in_groups(weight, Grouping("int4_clip", 32), choose=partial(searched_scales, moments=moments))
    assert (packed.scale < 0.6 * in_groups(weight, Grouping("int4_clip", 32)).scale).all()
    unweighted = in_groups(weight, Grouping("int4_clip", 32), choose=partial(searched_scales, moments=torch.eye(32)))
    assert (unweighted.scale > packed.scale).all()


def test_a_scale_that_its_dtype_does_not_hold_is_refused():
    for choose in (hqq_scales, partial(searched_scales, moments=torch.eye(8))):
        with pytest.raises(ValueError, match="legal: another scale_dtype"):
            in_groups(torch.full((2, 8), 1e8), Grouping("int4_clip", 4, scale_dtype=torch.float16), choose=choose)
