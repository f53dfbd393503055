"""What the tests of AWQ's and TEQ's scales share: weights that read the same channels, and ways to choose scales."""

from __future__ import annotations

from functools import partial

import torch
from support.helpers import correlated, generator
from torch import Tensor

from int8fx.schemes.awq import Bounds, ScaledWeight
from int8fx.schemes.formats import absmax_scales
from int8fx.schemes.hqq import hqq_scales
from int8fx.schemes.search import searched_scales

CHOICES = {
    "absmax": lambda moments: absmax_scales,
    "hqq": lambda moments: hqq_scales,
    "search": lambda moments: partial(searched_scales, moments=moments),
}


def unbounded(C: int) -> Bounds:
    return Bounds(torch.full((C,), 1e-30), torch.full((C,), 1e30))


def problem(N: int, K: int, seed: int, count: int = 1, rows: int = 200) -> tuple[list[ScaledWeight], Tensor, Tensor]:
    """Weights that read the same x, the size of its channels, and x."""
    x = correlated(rows, max(1, K), seed)[:, :K]
    weights = [
        ScaledWeight(torch.randn(N, K, generator=generator(seed + i)), x.T @ x, torch.arange(K)) for i in range(count)
    ]
    return weights, x.square().mean(0).sqrt(), x
