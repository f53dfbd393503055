"""How far a model's outputs are from a reference's, and how sure of it one can be."""

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
        ids: ``[T]``, what was read.

    Returns:
        ``[T - 1]`` float32.
    """
    return F.cross_entropy(logits[:-1].float(), ids[1:], reduction="none")


def retrieval_agreement(reference: Tensor, y: Tensor, k: int = 10) -> tuple[Tensor, Tensor]:
    """Whether each row finds the same other rows as in the reference, by cosine similarity.

    Args:
        reference: ``[M, H]``, one vector per text.
        y: ``[M, H]``, those of another model.
        k: how many neighbours count, at most M - 1.

    Returns:
        ``[M]`` float64 each: 1 where the nearest neighbour is the same, else 0; the share of the k nearest that are.
    """
    k = min(k, reference.shape[0] - 1)
    found = []
    for vectors in (reference, y):
        unit = F.normalize(vectors.double(), dim=-1)
        similarity = (unit @ unit.T).fill_diagonal_(-torch.inf)
        found.append(similarity.topk(k, -1).indices)
    theirs, ours = found
    shared = (theirs.unsqueeze(2) == ours.unsqueeze(1)).any(2).double().mean(1)
    return (theirs[:, 0] == ours[:, 0]).double(), shared


def word_errors(reference: list[str], words: list[str]) -> int:
    """The least number of words to insert, delete or replace that makes ``reference`` of ``words``.

    Over the number of words in ``reference`` this is the word error rate (Levenshtein 1966, Soviet Physics Doklady 10).
    """
    row = list(range(len(words) + 1))
    for i, expected in enumerate(reference, 1):
        last, row[0] = row[0], i
        for j, word in enumerate(words, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (word != expected))
    return row[-1]


def bootstrap(
    groups: list[Tensor], statistic: Callable[[Tensor], Tensor], resamples: int = 1000, level: float = 0.95
) -> tuple[float, float, float]:
    """``statistic`` of all values, and the bounds of its percentile bootstrap interval over whole groups.

    Source: Efron & Tibshirani 1993, An Introduction to the Bootstrap, sections 13.3 and 8.6: what hangs together (the
    tokens of a window) is drawn together. The same groups give the same interval.

    Args:
        groups: values, one tensor ``[T, ...]`` per group.
        statistic: ``[n, ...]`` to a number.
        resamples: how many times groups are drawn, with replacement, as many as there are.
        level: of confidence.
    """
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(groups), (resamples, len(groups)), generator=generator).tolist()
    values = torch.stack([statistic(torch.cat([groups[i] for i in draw])).double() for draw in drawn])
    low, high = values.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    return float(statistic(torch.cat(groups))), low, high
