"""TEQ: scales of input channels that are trained."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .awq import Bounds, ChooseByMoments, ScaledWeight, scaled_rows
from .formats import ChooseScales, Grouping, encode, exact_scales, split_groups, steps_of

STEPS = 200
_RATE = 0.01  # of log(s), falling to 0
_DECAYS = (0.9, 0.999)  # of Adam's averages
_EPSILON = 1e-8


def teq_scales(
    weights: Sequence[ScaledWeight],
    start: Tensor,
    grouping: Grouping,
    choose: ChooseByMoments,
    bounds: Bounds,
    steps: int = STEPS,
) -> Tensor:
    """The s of smallest `awq.loss` that Adam finds from ``start`` on, in 200 steps on ``log(s)``.

    Rounding is differentiated by a straight-through estimator that sees the scale of each group too, in which
    ``q = level - zero_point`` is constant::

        Q(u) = u + delta(u) * constant(q - u / delta(u))

    delta moves with the group's largest value, as absmax scales do, whichever way it was chosen. Of all steps the s of
    the smallest loss is kept, so it is never above that of ``start``.

    Source: TEQ, Cheng et al. 2023, arXiv 2310.10944, section 3. The paper trains all s of a model together, by the
    model's loss and from ones. Here a fold is trained alone, by the error in its linears' outputs.

    Args:
        weights, grouping, choose, bounds: as `awq.awq_scales` takes them.
        start: ``[C]``, within the bounds, such as AWQ's scales.
        steps: how many.

    Returns:
        ``[C]`` of start's dtype.

    Raises:
        ValueError: the scale's dtype cannot hold a scale at the start.
    """
    best, smallest = start, math.inf
    logs, low, high = start.log(), bounds.low.log(), bounds.high.log()
    mean, square, unit = torch.zeros_like(logs), torch.zeros_like(logs), 0.0
    for step in range(steps + 1):
        s = start if step == 0 else logs.exp().clamp(bounds.low, bounds.high)
        try:
            found, gradient = _gradient(weights, s, grouping, choose)
        except ValueError:  # the steps before this one have led out of the range of a scale's dtype
            if step == 0:
                raise
            break
        if found < smallest:
            best, smallest = s, found
        unit = unit or found
        if not unit or not math.isfinite(found):
            break
        if step == steps:
            break
        gradient = gradient * s / unit  # of log(s), for a loss of 1 at the start
        mean = mean.lerp(gradient, 1 - _DECAYS[0])
        square = square.lerp(gradient.square(), 1 - _DECAYS[1])
        ahead = mean / (1 - _DECAYS[0] ** (step + 1))
        spread = (square / (1 - _DECAYS[1] ** (step + 1))).sqrt() + _EPSILON
        logs = (logs - _RATE * (1 - step / steps) * ahead / spread).clamp(low, high)
    return best


def _gradient(
    weights: Sequence[ScaledWeight], s: Tensor, grouping: Grouping, choose: ChooseByMoments
) -> tuple[float, Tensor]:
    """`awq.loss` and its gradient ``[C]`` by s."""
    total = 0.0
    with torch.enable_grad():
        s = s.detach().requires_grad_()
        gradient = torch.zeros_like(s)
        for one in weights:
            for scaled, of_inputs, scales_of in scaled_rows(one, s, choose):
                errors = _errors(scaled, grouping, scales_of) / of_inputs
                part = ((errors @ one.moments) * errors).sum()
                total += float(part.detach())
                gradient += torch.autograd.grad(part, s)[0]
    return total, gradient


def _errors(u: Tensor, grouping: Grouping, choose: ChooseScales) -> Tensor:
    """``Q(u) - u``, differentiable."""
    groups = split_groups(u, grouping)
    exact = exact_scales(groups, grouping).unsqueeze(-1)
    with torch.no_grad():
        chosen = choose(u, grouping)
        scale, zero = chosen.scale.unsqueeze(-1), None if chosen.zero is None else chosen.zero.unsqueeze(-1)
        q = steps_of(encode(groups, scale, zero, grouping), zero, grouping, u.dtype)
        errors = q - groups / scale.where(scale != 0, 1)
        per_exact = torch.where(exact != 0, scale / exact.where(exact != 0, 1), 0)
        rest = scale - per_exact * exact  # what does not move with u: all of a scale of zeros
    delta = per_exact * exact + rest
    return torch.where(scale != 0, delta * errors, -groups).flatten(1)[:, : u.shape[1]]
