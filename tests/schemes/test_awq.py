"""`awq_scales` against brute force, and what its scales make small."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.equalization import CHOICES, problem, unbounded
from support.helpers import correlated, generator, groupings, in_groups, seeds, stored_rows
from torch import Tensor

from int8fx.schemes.awq import Bounds, ScaledWeight, awq_scales, loss
from int8fx.schemes.formats import Grouping


@given(groupings(), st.sampled_from(sorted(CHOICES)), st.integers(0, 4), st.integers(0, 80), seeds)
def test_the_loss_is_never_above_that_of_the_weights_as_they_are(grouping, choice, N, K, seed):
    weights, size, _ = problem(N, K, seed, 2)
    s = awq_scales(weights, size, grouping, CHOICES[choice], unbounded(K))
    assert s.shape == (K,)
    assert s.isfinite().all()
    assert (s > 0).all()
    assert loss(weights, s, grouping, CHOICES[choice]) <= loss(weights, torch.ones(K), grouping, CHOICES[choice])


@given(groupings(), st.integers(1, 4), st.integers(1, 80), seeds)
def test_the_loss_is_the_error_of_the_outputs(grouping, N, K, seed):
    """Measured on x, with the codes that a conversion stores."""
    weights, _, x = problem(N, K, seed)
    s = torch.exp(torch.randn(K, generator=generator(seed)))
    rounded = stored_rows(in_groups(weights[0].weight * s, grouping)) / s.double()
    errors = x.double() @ (rounded - weights[0].weight.double()).T
    found = loss(weights, s, grouping, CHOICES["absmax"])
    assert abs(found - errors.square().sum()) <= 1e-3 * errors.square().sum() + 1e-5 * x.square().sum()


def brute_force(x: Tensor, weight: Tensor, size: int) -> list[tuple[float, Tensor]]:
    """Loss and s of each alpha, for int4_clip in groups of ``size``: in float64, group by group, on x itself."""
    a = (x.double() ** 2).mean(0).sqrt()
    results = []
    for i in range(20):
        s = a ** (i / 20)
        s = s / (s.max() * s.min()).sqrt()
        rounded = torch.empty_like(weight, dtype=torch.float64)
        for k in range(0, weight.shape[1], size):
            part = (weight * s)[:, k : k + size]
            delta = part.abs().amax(1, keepdim=True) / 7
            rounded[:, k : k + size] = torch.clamp(torch.round(part / delta), -8, 7) * delta
        results.append((float(((x.double() @ (rounded / s - weight).T) ** 2).sum()), s))
    return results


@given(st.integers(1, 6), st.integers(2, 70), st.sampled_from([8, 32]), seeds)
def test_it_is_the_best_alpha_of_brute_force(N, K, size, seed):
    weights, channels, x = problem(N, K, seed)
    s = awq_scales(weights, channels, Grouping("int4_clip", size), CHOICES["absmax"], unbounded(K))
    results = brute_force(x, weights[0].weight.double(), size)
    smallest = min(found for found, _ in results)
    mine = min(results, key=lambda result: float((result[1].log() - s.log()).abs().amax()))
    assert (mine[1].log() - s.log()).abs().amax() < 1e-3
    assert mine[0] <= 1.01 * smallest  # float32 may round ties another way


def test_outlier_channels_gain():
    weights, size, _ = problem(64, 128, 0)
    grouping = Grouping("int4_clip", 32)
    s = awq_scales(weights, size, grouping, CHOICES["absmax"], unbounded(128))
    assert s[64] == s.max()  # the large one
    losses = [loss(weights, t, grouping, CHOICES["absmax"]) for t in (s, torch.ones(128))]
    assert losses[0] < 0.5 * losses[1]


def test_dead_and_fixed_channels_keep_one():
    weights, size, _ = problem(8, 40, 0)
    size[3] = 0
    low, high = unbounded(40)
    low[7] = high[7] = 1
    s = awq_scales(weights, size, Grouping("int4_clip", 8), CHOICES["absmax"], Bounds(low, high))
    assert s[3] == s[7] == 1
    assert (s != 1).any()
    zeros = torch.zeros(40)
    assert (awq_scales(weights, zeros, Grouping(), CHOICES["absmax"], unbounded(40)) == 1).all()


def test_scales_stay_within_their_bounds():
    weights, size, _ = problem(8, 40, 0)
    bounds = Bounds(torch.full((40,), 0.8), torch.full((40,), 1.25))
    s = awq_scales(weights, size, Grouping("int4_clip", 8), CHOICES["absmax"], bounds)
    assert (s >= bounds.low).all()
    assert (s <= bounds.high).all()
    assert (s != 1).any()


@pytest.mark.parametrize("rows", [1, 5])
def test_few_rows_and_channels_far_apart_are_no_trouble(rows):
    weights, _, x = problem(8, 40, 0, rows=rows)
    factors = torch.logspace(-3, 3, 40)
    x = x * factors
    weights = [weights[0]._replace(moments=x.T @ x)]
    s = awq_scales(weights, x.square().mean(0).sqrt(), Grouping("int4_clip", 8), CHOICES["absmax"], unbounded(40))
    assert s.isfinite().all()
    losses = [loss(weights, t, Grouping("int4_clip", 8), CHOICES["absmax"]) for t in (s, torch.ones(40))]
    assert losses[0] < losses[1]


def test_channels_that_several_inputs_read_have_one_scale():
    x = correlated(200, 8, 0)
    channels = torch.arange(8).repeat_interleave(2)
    both = x[:, channels]
    one = ScaledWeight(torch.randn(6, 16, generator=generator(0)), both.T @ both, channels)
    s = awq_scales([one], x.square().mean(0).sqrt(), Grouping("int4_clip", 8), CHOICES["absmax"], unbounded(8))
    assert s.shape == (8,)
    assert loss([one], s, Grouping("int4_clip", 8), CHOICES["absmax"]) < loss(
        [one], torch.ones(8), Grouping("int4_clip", 8), CHOICES["absmax"]
    )


def test_a_scale_that_its_dtype_does_not_hold_is_refused_at_one_and_left_out_elsewhere():
    grouping = Grouping("int4_clip", 4, scale_dtype=torch.float16)
    huge = ScaledWeight(torch.full((2, 8), 1e8), torch.eye(8), torch.arange(8))
    with pytest.raises(ValueError, match="legal: another scale_dtype"):
        awq_scales([huge], torch.ones(8), grouping, CHOICES["absmax"], unbounded(8))
    near = ScaledWeight(torch.full((2, 8), 4e5), torch.eye(8), torch.arange(8))
    s = awq_scales([near], torch.logspace(-8, 8, 8), grouping, CHOICES["absmax"], unbounded(8))
    assert loss([near], s, grouping, CHOICES["absmax"]) <= loss([near], torch.ones(8), grouping, CHOICES["absmax"])
