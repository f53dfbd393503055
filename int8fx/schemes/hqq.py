"""HQQ: scales and zero points under which most weights have a small error, without data."""

from __future__ import annotations

from torch import Tensor

from .formats import Grouping, GroupScales, absmax_scales, code_range, encode, split_groups, steps_of, store_scales

NORM = 0.7  # p
_STEPS, _BETA, _GROWTH = 20, 10.0, 1.01


def hqq_scales(weight: Tensor, grouping: Grouping) -> GroupScales:
    """Scales and zero points with a small ``sum_k abs(w[k] - v[k]) ** 0.7`` in each group; v is w after rounding.

    A norm below 1 counts few large errors less than many small ones. It is minimised by half-quadratic splitting, from
    `absmax_scales` on, in at most 20 steps. With ``q = level - zero_point`` and ``r = w - scale * q``::

        e = sign(r) * max(0, abs(r) - abs(r) ** (p - 1) / beta)
        zero_point = round(mean(level - (w - e) / scale))    if asymmetric
        scale = sum(q * (w - e)) / sum(q * q)

    Here w and r are in units of the first scale, and beta is 10, and 1.01 times as large after each step. Of all steps
    a group keeps the one with the smallest norm, so it is never worse by it than `absmax_scales`.

    Source: Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models". Their zero points are
    floats, and they fit these alone. Zero points are integers here, so that scales are fitted too, and symmetric and
    float formats have a solution as well.

    Args:
        weight: ``[R, K]``, float32 or float64, finite.

    Raises:
        ValueError: the scale's dtype cannot hold a scale.
    """
    best = absmax_scales(weight, grouping)
    groups = split_groups(weight, grouping)
    if not groups.numel():
        return best
    unit, beta, found = best.scale.abs().unsqueeze(-1), _BETA, best
    unit = unit.where(unit != 0, 1)
    smallest = None
    for step in range(_STEPS + 1):
        scale, zero = found.scale.unsqueeze(-1), None if found.zero is None else found.zero.unsqueeze(-1)
        codes = encode(groups, scale, zero, grouping)
        q = steps_of(codes, zero, grouping, groups.dtype)
        r = (groups - scale * q) / unit
        norm = r.abs().pow(NORM).sum(-1)
        better = norm < smallest if smallest is not None else norm.isfinite()
        smallest = norm if smallest is None else norm.minimum(smallest)
        best = _where(better, found, best)
        if step == _STEPS or (step and not better.any()):
            break
        e = r.sign() * (r.abs() - r.abs().pow(NORM - 1) / beta).clamp_min(0) * unit
        if zero is not None:
            low, high = code_range(grouping)
            zero = (codes - (groups - e) / scale.where(scale != 0, 1)).mean(-1, keepdim=True).round().clamp(low, high)
            q = steps_of(encode(groups, scale, zero, grouping), zero, grouping, groups.dtype)
        squares = (q * q).sum(-1)
        fitted = ((q * (groups - e)).sum(-1) / squares.where(squares != 0, 1)).where(squares != 0, found.scale)
        found = store_scales(fitted, grouping)._replace(zero=None if zero is None else zero.squeeze(-1))
        beta *= _GROWTH
    if grouping.double_quant:  # the range of a row's scales is that of those it keeps
        best = store_scales(best.scale, grouping)._replace(zero=best.zero)
    return best


def _where(condition: Tensor, a: GroupScales, b: GroupScales) -> GroupScales:
    """``a`` for the groups ``[R, G]`` of ``condition``, else ``b``. The range of scales is that of ``b``."""
    zero = None if a.zero is None or b.zero is None else a.zero.where(condition, b.zero)
    return GroupScales(a.stored.where(condition, b.stored), a.scale.where(condition, b.scale), zero, b.scale_range)
