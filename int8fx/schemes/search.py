"""AWQ's search of scales: groups are clipped where that makes the matmul's error smaller."""

from __future__ import annotations

import torch
from torch import Tensor

from .formats import Grouping, GroupScales, absmax_scales, decode, encode, split_groups, store_scales

_RATIOS = 20  # from 1 down to just above .5


def searched_scales(weight: Tensor, grouping: Grouping, moments: Tensor) -> GroupScales:
    """Scales ``ratio * absmax_scales`` with the smallest ``e H e`` of each group, of the ratios 1, 0.975 ... 0.525.

    e is the error of the group's weights after rounding, and H the moments ``E[x x^T]`` of its input channels, so
    ``e H e`` is the mean square of the error that the group adds to the output. Values beyond the largest code are
    clipped. Zero points are those of `absmax_scales`.

    Source: the clipping of AWQ, Lin et al. 2023, arXiv 2306.00978, and of its authors' code, which takes samples of x
    in place of H, and ten ratios.

    Args:
        weight: ``[R, K]``, float32 or float64, finite.
        moments: ``[K, K]``, ``E[x x^T]`` up to a factor.

    Raises:
        ValueError: the scale's dtype cannot hold a scale.
    """
    first = absmax_scales(weight, grouping)
    groups = split_groups(weight, grouping)
    if not weight.numel():
        return first
    H = _diagonal_blocks(moments.to(weight), groups.shape[-1])
    zero = None if first.zero is None else first.zero.unsqueeze(-1)
    best, smallest = first.scale, None
    for i in range(_RATIOS):
        scale = store_scales(first.scale * (1 - i / 2 / _RATIOS), grouping).scale
        codes = encode(groups, scale.unsqueeze(-1), zero, grouping)
        errors = groups - decode(codes, scale.unsqueeze(-1), zero, grouping)
        loss = (torch.einsum("rgi,gij->rgj", errors, H) * errors).sum(-1)
        best = scale if smallest is None else scale.where(loss < smallest, best)
        smallest = loss if smallest is None else loss.minimum(smallest)
    return store_scales(best, grouping)._replace(zero=first.zero)


def _diagonal_blocks(moments: Tensor, size: int) -> Tensor:
    """``[G, size, size]``: the moments of each group's input channels; zeros fill the last group."""
    K = len(moments)
    count = -(-K // size)
    padded = torch.nn.functional.pad(moments, (0, count * size - K, 0, count * size - K))
    return padded.view(count, size, count, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()
