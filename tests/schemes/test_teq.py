"""`teq_scales`: never worse than its start, and by gradients that are those of its formula."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.equalization import CHOICES, problem, unbounded
from support.helpers import generator, groupings, seeds

from int8fx.schemes.awq import Bounds, ScaledWeight, awq_scales, loss
from int8fx.schemes.formats import Grouping
from int8fx.schemes.teq import _errors, _gradient, teq_scales

CLIP = Grouping("int4_clip", 32)


@given(groupings(), st.sampled_from(sorted(CHOICES)), st.integers(0, 3), st.integers(0, 60), seeds)
def test_the_loss_is_never_above_that_of_the_start(grouping, choice, N, K, seed):
    weights, _, _ = problem(N, K, seed, 2)
    start = torch.exp(torch.randn(K, generator=generator(seed)))
    s = teq_scales(weights, start, grouping, CHOICES[choice], unbounded(K), steps=5)
    assert s.isfinite().all()
    assert (s > 0).all()
    found, first = (loss(weights, t, grouping, CHOICES[choice]) for t in (s, start))
    assert found <= first * (1 + 1e-4) + 1e-6


@given(groupings(), st.integers(1, 3), st.integers(1, 60), seeds)
def test_the_loss_that_is_differentiated_is_the_loss(grouping, N, K, seed):
    weights, _, _ = problem(N, K, seed)
    s = torch.exp(torch.randn(K, generator=generator(seed)))
    found, gradient = _gradient(weights, s, grouping, CHOICES["absmax"])
    expected = loss(weights, s, grouping, CHOICES["absmax"])
    assert abs(found - expected) <= 1e-3 * expected + 1e-5 * float(weights[0].moments.trace())
    assert gradient.isfinite().all()


def test_training_gains_beyond_awq():
    weights, size, _ = problem(48, 64, 0)
    awq = awq_scales(weights, size, CLIP, CHOICES["absmax"], unbounded(64))
    losses = [
        loss(weights, t, CLIP, CHOICES["absmax"])
        for t in (teq_scales(weights, awq, CLIP, CHOICES["absmax"], unbounded(64)), awq)
    ]
    assert losses[0] < 0.95 * losses[1]


def test_gradients_see_the_scale_of_the_group():
    """With constant steps q, ``Q(u) - u = delta(u) * constant``: only the largest value of a group moves it."""
    u = torch.tensor([[1.0, 0.3, -7.2, 0.4]], dtype=torch.float64, requires_grad=True)
    errors = _errors(u, Grouping("int4_clip", 4), CHOICES["absmax"](None))
    (gradient,) = torch.autograd.grad(errors[0, 1], u)
    delta = 7.2 / 7
    q, w = round(0.3 / delta), 0.3
    assert torch.allclose(errors[0, 1], torch.tensor(q * delta - w, dtype=torch.float64), atol=1e-7)
    assert torch.allclose(gradient, torch.tensor([[0, 0, -(q - w / delta) / 7, 0]], dtype=torch.float64), atol=1e-7)


def test_fixed_channels_and_bounds_hold():
    weights, _, _ = problem(8, 40, 0)
    low, high = torch.full((40,), 0.5), torch.full((40,), 2.0)
    low[7] = high[7] = 1
    s = teq_scales(weights, torch.ones(40), CLIP, CHOICES["absmax"], Bounds(low, high))
    assert s[7] == 1
    assert (s >= low).all()
    assert (s <= high).all()
    assert (s != 1).any()


def test_weights_that_round_exactly_stay():
    one = ScaledWeight(torch.zeros(3, 8), torch.eye(8), torch.arange(8))
    assert (teq_scales([one], torch.ones(8), CLIP, CHOICES["absmax"], unbounded(8)) == 1).all()


def test_a_scale_that_its_dtype_does_not_hold_at_the_start_is_refused():
    huge = ScaledWeight(torch.full((2, 8), 1e8), torch.eye(8), torch.arange(8))
    grouping = Grouping("int4_clip", 4, scale_dtype=torch.float16)
    with pytest.raises(ValueError, match="legal: another scale_dtype"):
        teq_scales([huge], torch.ones(8), grouping, CHOICES["absmax"], unbounded(8))
