"""AWQ: scales of input channels under which a weight's rounding adds little error to its matmul."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .formats import ChooseScales, Grouping, decode, encode, split_groups

ALPHAS = 20
_CHUNK = 1 << 22  # weight elements that are rounded at once


class ScaledWeight(NamedTuple):
    """A weight that is to be rounded, and the channels that its inputs have.

    weight: ``[N, K]``, float32 or float64, finite.
    moments: ``[K, K]``, ``x.T @ x`` of its inputs.
    channels: ``[K]`` int64: which of C channels an input channel reads. Several may read one.
    """

    weight: Tensor
    moments: Tensor
    channels: Tensor


ChooseByMoments = Callable[[Tensor], ChooseScales]
"""Moments ``[K, K]`` of a weight's inputs -> how its groups get their scales."""


class Bounds(NamedTuple):
    """``[C]`` each: the smallest and the largest scale of a channel, 0 < low <= 1 <= high; both 1 if it is fixed."""

    low: Tensor
    high: Tensor


def loss(weights: Sequence[ScaledWeight], s: Tensor, grouping: Grouping, choose: ChooseByMoments) -> float:
    """``sum_i tr(E_i H_i E_i^T)`` with ``E_i = Q(W_i s) / s - W_i``: the error in the outputs of linears i, squared.

    Q rounds to nearest with the scales that ``choose`` gives for the moments ``H_i / (s s^T)`` of the scaled inputs.
    ``s [C]`` multiplies the input channels that ``channels`` say.

    Raises:
        ValueError: the scale's dtype cannot hold a scale.
    """
    total = 0.0
    for one in weights:
        for scaled, of_inputs, scales_of in scaled_rows(one, s, choose):
            errors = (_nearest(scaled, grouping, scales_of) - scaled) / of_inputs
            total += float(((errors @ one.moments) * errors).sum(dtype=torch.float64))
    return total


def scaled_rows(one: ScaledWeight, s: Tensor, choose: ChooseByMoments) -> Iterator[tuple[Tensor, Tensor, ChooseScales]]:
    """Some rows of ``W s`` at a time, s of each of its K input channels, and how groups get their scales."""
    of_inputs = s[one.channels]
    fixed = of_inputs.detach()
    scales_of = choose(one.moments / fixed / fixed[:, None])
    for rows in one.weight.split(max(1, _CHUNK // max(1, one.weight.shape[1]))):
        yield rows * of_inputs, of_inputs, scales_of


def _nearest(weight: Tensor, grouping: Grouping, choose: ChooseScales) -> Tensor:
    scales = choose(weight, grouping)
    zero = None if scales.zero is None else scales.zero.unsqueeze(-1)
    codes = encode(split_groups(weight, grouping), scales.scale.unsqueeze(-1), zero, grouping)
    return decode(codes, scales.scale.unsqueeze(-1), zero, grouping).flatten(1)[:, : weight.shape[1]]


def awq_scales(
    weights: Sequence[ScaledWeight],
    size: Tensor,
    grouping: Grouping,
    choose: ChooseByMoments,
    bounds: Bounds,
) -> Tensor:
    """``s = size ** alpha`` of the alpha in 0, 0.05 ... 0.95 with the smallest `loss`.

    s is divided by ``sqrt(max(s) * min(s))`` over the channels that are neither dead nor fixed, and clamped to
    ``bounds``. Channels of size 0 keep s = 1. An alpha for which the scale's dtype cannot hold a scale is left out.
    With alpha 0 all s are 1, so the loss is never above that of the weights as they are.

    Source: AWQ, Lin et al. 2023, arXiv 2306.00978, section 3.2, and the normalisation of its authors' code. The paper's
    size of a channel is the mean of ``abs(x)``. Here it is the root mean square, which moments contain. The paper
    measures the error on samples of x.

    Args:
        weights: those that are rounded and read the channels.
        size: ``[C]``, how large the channels are: 0 or more.
        grouping: of the codes.
        choose: how groups get their scales.
        bounds: of s.

    Returns:
        ``[C]`` of size's dtype.

    Raises:
        ValueError: the scale's dtype cannot hold a scale of a weight as it is.
    """
    best = torch.ones_like(size)
    smallest = loss(weights, best, grouping, choose)
    used = (size > 0) & (bounds.low < bounds.high)
    if not used.any():
        return best
    logs = torch.where(used, size, 1).log()
    middle = (logs[used].max() + logs[used].min()) / 2
    for i in range(1, ALPHAS):
        s = torch.where(used, (i / ALPHAS * (logs - middle)).exp().clamp(bounds.low, bounds.high), 1)
        try:
            found = loss(weights, s, grouping, choose)
        except ValueError:
            continue
        if math.isfinite(found) and found < smallest:
            best, smallest = s, found
    return best
