"""Rounding of weights that knows what they are multiplied by: errors of one column are made good by others."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .quantize import INT8_MAX, TINY, quantize_weight, rotate

DAMPING = 0.01  # times the mean of the moments' diagonal, as in GPTQ
_COLUMNS = 128  # rounded before what they leave reaches all later ones


def round_weight(
    weight: Tensor, moments: Tensor, block: int = 1, columns: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes and kept weights with a small ``sum_n E[((w[n] - v[n]) . x) ** 2]``, w the weight, v what stands for it.

    In the coordinates of the product, ``z = rotate(x without columns)`` and ``k = x[columns]``, the loss of a row is
    ``d H d`` with ``H = E[(z, k) (z, k)^T]`` and d the row's error there. What the kept columns, which are not rounded,
    can make good is taken out first (a Schur complement), the rest is rounded column by column, and last they do so::

        S = H_zz - H_zk inv(H_kk) H_kz + damping * I
        v[:, j] = round(w[:, j] / scale) * scale;   w[:, i] -= (w[:, j] - v[:, j]) * U[j, i] / U[j, j]  for i after j
        kept = W[:, columns] + (R W - v) H_zk inv(H_kk)

    U is the upper Cholesky factor of ``inv(S)``, columns come in the order of falling ``S[j, j]``, damping is 1 % of
    the mean of H_zz's diagonal, and the scales are those of `quantize_weight`. S, U and what the kept columns make good
    are computed in float64, errors in float32.

    Source: GPTQ, Frantar et al. 2022, arXiv 2210.17323, section 3; the order is that of its authors' code (act-order).

    Args:
        weight: ``[N, K]`` or ``[E, N, K]``, finite, any float dtype.
        moments: ``[K, K]``, ``E[x x^T]`` up to a factor: what `calibrate` finds with ``moments=True``.
        block: of the rotation; 1 for none.
        columns: ``[C]`` int64, the columns that are kept.

    Returns:
        ``codes [..., N, K]`` int8, ``scale [..., N]`` float32, kept ``[..., N, C]`` of weight's dtype or, without
        columns, None.
    """
    _, scale = quantize_weight(weight, block, columns)
    *lead, K = weight.shape
    rest, w = moments.to(weight.device, torch.float64), weight.reshape(math.prod(lead), K).float()
    if columns is not None:
        kept = rest[columns][:, columns]
        kept.diagonal().add_(1e-6 * kept.diagonal().mean() + TINY)
        rest, w = rest.index_fill(0, columns, 0), w.index_fill(1, columns, 0)
        across = rotate(rest[:, columns].T, block)  # H_kz
        rest = rest.index_fill(1, columns, 0)
    rest = rotate(rotate(rest, block).T.contiguous(), block)
    damping = DAMPING * rest.diagonal().mean() + TINY
    if columns is not None:
        solved = torch.linalg.solve(kept, across)  # inv(H_kk) H_kz
        rest = rest - across.T @ solved
    rest.diagonal().add_(damping)
    w = rotate(w, block)
    codes = _round_columns(w, rest, scale.flatten())
    if columns is None:
        return codes.view(*lead, K), scale, None
    made_good = (w.double() - codes.double() * scale.double().view(-1, 1)) @ solved.T
    kept_weight = weight[..., columns].double() + made_good.view(*lead, len(columns))
    return codes.view(*lead, K), scale, kept_weight.to(weight.dtype)


def _round_columns(w: Tensor, moments: Tensor, scale: Tensor) -> Tensor:
    """The codes of ``w [N, K]`` by error feedback; ``moments [K, K]`` are positive definite."""
    order = moments.diagonal().argsort(descending=True, stable=True)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments[order][:, order]))
    factor = torch.linalg.cholesky(inverse, upper=True).to(w.dtype)
    left = w.T[order].contiguous()  # [K, N]: a column is a row of memory
    codes = torch.empty(left.shape, dtype=torch.int8, device=w.device)
    for i in range(0, len(left), _COLUMNS):
        part, own = left[i : i + _COLUMNS], factor[i : i + _COLUMNS, i : i + _COLUMNS]
        errors = torch.empty_like(part)
        for j, column in enumerate(part):
            rounded = (column / scale).round().clamp(-INT8_MAX, INT8_MAX)
            codes[i + j] = rounded.to(torch.int8)
            errors[j] = (column - rounded * scale) / own[j, j]
            part[j + 1 :] -= torch.outer(own[j, j + 1 :], errors[j])
        left[i + _COLUMNS :] -= factor[i : i + _COLUMNS, i + _COLUMNS :].T @ errors
    return codes.index_select(0, order.argsort()).T.contiguous()
