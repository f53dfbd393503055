"""Metrics against their formulas, and what holds for every interval."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.helpers import generator, seeds

from int8fx.tools import metrics

# ---- distances ------------------------------------------------------------------------------------------------------


def test_kl_divergence_is_the_formula():
    g = torch.Generator().manual_seed(0)
    a, b = (3 * torch.randn(5, 7, 100, generator=g, dtype=torch.float64) for _ in range(2))
    p, q = a.softmax(-1), b.softmax(-1)
    torch.testing.assert_close(metrics.kl_divergence(a, b).double(), (p * (p / q).log()).sum(-1), rtol=1e-5, atol=1e-6)
    assert metrics.kl_divergence(a, a).abs().max() < 1e-6
    assert metrics.kl_divergence(a, a + 5).abs().max() < 1e-5


def test_top1_agreement():
    a = torch.tensor([[1.0, 2, 3], [3, 2, 1]])
    assert metrics.top1_agreement(a, torch.tensor([[0.0, 0, 9], [0, 9, 0]])).tolist() == [True, False]


def test_cosine_distance():
    a = torch.tensor([[1.0, 0], [1, 0], [1, 0]])
    b = torch.tensor([[2.0, 0], [0, 3], [-1, 0]])
    assert metrics.cosine_distance(a, b).tolist() == pytest.approx([0, 1, 2])


@given(st.integers(2, 9), st.integers(2, 30), seeds)
def test_negative_log_likelihood_is_that_of_the_next_token(T, V, seed):
    logits = torch.randn(T, V, generator=generator(seed))
    ids = torch.randint(V, (T,), generator=generator(seed))
    p = logits.double().softmax(-1)
    expected = [-math.log(p[t, ids[t + 1]]) for t in range(T - 1)]
    assert metrics.negative_log_likelihood(logits, ids).tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)


@given(st.integers(2, 12), st.integers(1, 12), seeds)
def test_a_model_agrees_with_itself_on_neighbours(M, k, seed):
    vectors = torch.randn(M, 8, generator=generator(seed))
    nearest, shared = metrics.retrieval_agreement(vectors, 3 * vectors, k)
    assert nearest.tolist() == [1.0] * M
    assert shared.tolist() == [1.0] * M


def test_neighbours_that_changed_are_counted():
    before = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
    after = before[[0, 2, 1, 3]]
    nearest, shared = metrics.retrieval_agreement(before, after, 1)
    assert nearest.tolist() == shared.tolist() == [0.0] * 4
    assert metrics.retrieval_agreement(before, after, 3)[1].tolist() == [1.0] * 4


# ---- intervals ------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=12), st.integers(1, 5))
def test_intervals_of_means_lie_between_the_groups_and_hold_the_mean(values, size):
    groups = [torch.full((size,), v, dtype=torch.float64) for v in values]
    mean, low, high = metrics.bootstrap(groups, torch.mean)
    slack = 1e-9 * (1 + max(map(abs, values)))
    assert mean == pytest.approx(sum(values) / len(values), abs=slack)
    assert min(values) - slack <= low <= high <= max(values) + slack
    assert metrics.bootstrap(groups, torch.mean) == (mean, low, high)


def test_intervals_of_equal_groups_have_no_width():
    assert metrics.bootstrap([torch.tensor([1.0, 3.0])] * 5, torch.mean) == (2.0, 2.0, 2.0)


def test_intervals_cover_the_true_mean_as_often_as_they_say():
    g, hits, runs = generator(0), 0, 200
    for _ in range(runs):
        groups = list(torch.randn(24, 1, generator=g))
        _, low, high = metrics.bootstrap(groups, torch.mean, resamples=300)
        hits += low <= 0 <= high
    expected, spread = 0.92, math.sqrt(0.95 * 0.05 / runs)  # of 24 groups, percentile intervals are a little short
    assert abs(hits / runs - expected) < 4 * spread


def test_groups_are_drawn_whole():
    """Values that hang together do not narrow the interval, as many as there are."""
    one = [torch.tensor([float(i)]) for i in range(8)]
    many = [t.expand(100) for t in one]
    assert metrics.bootstrap(one, torch.mean)[1:] == pytest.approx(metrics.bootstrap(many, torch.mean)[1:])
