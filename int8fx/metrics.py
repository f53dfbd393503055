"""How far a model's outputs are from a reference's."""

from __future__ import annotations

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
