"""Distances of a model's outputs from a reference's, with confidence intervals."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def kl_divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """``KL(P || Q) = sum_v P[v] * (log P[v] - log Q[v])`` in nats; P is the reference's softmax, Q that of ``logits``.

    Args:
        reference: ``[..., V]`` logits, any float dtype; computed in float32.
        logits: ``[..., V]``, likewise.

    Returns:
        ``[...]`` float32, >= 0 up to rounding.
    """
    log_p, log_q = (F.log_softmax(t.float(), -1) for t in (reference, logits))
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def top1_agreement(reference: Tensor, logits: Tensor) -> Tensor:
    """Whether both ``[..., V]`` logits have their maximum at the same token: ``[...]`` bool."""
    return reference.argmax(-1) == logits.argmax(-1)


def cosine_distance(reference: Tensor, y: Tensor) -> Tensor:
    """``1 - reference . y / (|reference| |y|)`` over the last dimension, in float64: ``[..., H]`` to ``[...]``."""
    return 1 - torch.cosine_similarity(reference.double(), y.double(), dim=-1)


def negative_log_likelihood(logits: Tensor, ids: Tensor) -> Tensor:
    """``-log softmax(logits)[t, ids[t + 1]]`` in nats; perplexity is the exponential of its mean.

    Args:
        logits: ``[T, V]``, any float dtype; computed in float32.
        ids: ``[T]``, the tokens that the model read.

    Returns:
        ``[T - 1]`` float32.
    """
    return F.cross_entropy(logits[:-1].float(), ids[1:], reduction="none")


def retrieval_agreement(reference: Tensor, y: Tensor, k: int = 10) -> tuple[Tensor, Tensor]:
    """Whether each row has the same nearest rows as in the reference, by cosine similarity.

    Args:
        reference: ``[M, H]``, one vector per text.
        y: ``[M, H]``, the vectors of the same texts from another model.
        k: how many neighbours count, at most M - 1.

    Returns:
        ``[M]`` float64 each: 1 where the nearest neighbour is the same, else 0; the share of the k nearest neighbours
        that both have.
    """
    k = min(k, reference.shape[0] - 1)
    expected, neighbours = _nearest(reference, k), _nearest(y, k)
    shared = (expected.unsqueeze(2) == neighbours.unsqueeze(1)).any(2).double().mean(1)
    return (expected[:, 0] == neighbours[:, 0]).double(), shared


def _nearest(vectors: Tensor, k: int) -> Tensor:
    """``[M, H]`` to ``[M, k]``: the other rows of largest cosine similarity, the largest first."""
    unit = F.normalize(vectors.double(), dim=-1)
    return (unit @ unit.T).fill_diagonal_(-torch.inf).topk(k, -1).indices


def bootstrap(
    groups: list[Tensor], statistic: Callable[[Tensor], Tensor], resamples: int = 1000, level: float = 0.95
) -> tuple[float, float, float]:
    """``statistic`` of all values, and the bounds of its percentile bootstrap interval over groups.

    Source: Efron & Tibshirani 1993, An Introduction to the Bootstrap, sections 13.3 and 8.6. Values that depend on one
    another (the tokens of a window) form a group and are drawn together. The same groups give the same interval.

    Args:
        groups: values, one tensor ``[T, ...]`` per group.
        statistic: ``[n, ...]`` to a number.
        resamples: how many times ``len(groups)`` groups are drawn, with replacement.
        level: the confidence level.

    Returns:
        The statistic and the interval's lower and upper bound.
    """
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(groups), (resamples, len(groups)), generator=generator).tolist()
    values = torch.stack([statistic(torch.cat([groups[i] for i in draw])).double() for draw in drawn])
    low, high = values.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    return float(statistic(torch.cat(groups))), low, high
