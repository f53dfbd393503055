"""GPTQ: rounds a weight by the second moments of its inputs, so that columns compensate for the errors of others."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .quantize import INT8_MAX, TINY, quantize_weight
from .rotate import rotate
from .weight import PackedTensors

DAMPING = 0.01  # times the mean of the moments' diagonal, as in GPTQ
_COLUMNS = 128  # rounded before their errors reach all later columns


def round_weight(weight: Tensor, moments: Tensor, block: int = 1, columns: Tensor | None = None) -> PackedTensors:
    """Codes and unquantised columns with a small ``sum_n E[((w[n] - v[n]) . x) ** 2]``: w the weight, v its rounding.

    In the coordinates of the matmul, ``z = rotate(x without columns)`` and ``k = x[columns]``, the loss of a row is
    ``d H d`` with ``H = E[(z, k) (z, k)^T]`` and d the row's error there. Unquantised columns are not rounded, so they
    can correct errors. First the objective loses what they will correct (a Schur complement). Then the other columns
    are rounded one by one. Last the unquantised columns are updated::

        S = H_zz - H_zk inv(H_kk) H_kz + damping * I
        v[:, j] = round(w[:, j] / scale) * scale;   w[:, i] -= (w[:, j] - v[:, j]) * U[j, i] / U[j, j]  for i after j
        columns_weight = W[:, columns] + (R W - v) H_zk inv(H_kk)

    U is the upper Cholesky factor of ``inv(S)``, columns come in the order of falling ``S[j, j]``, damping is 1 % of
    the mean of H_zz's diagonal, and the scales are those of `quantize_weight`. S, U and the corrections are computed in
    float64, errors in float32.

    Source: GPTQ, Frantar et al. 2022, arXiv 2210.17323, section 3; the order is that of its authors' code (act-order).

    Args:
        weight: ``[N, K]`` or ``[E, N, K]``, finite, any float dtype.
        moments: ``[K, K]``, ``E[x x^T]`` up to a factor: as `calibrate` measures it with ``moments=True``.
        block: of the rotation (`rotate`); 1 for none.
        columns: ``[C]`` int64, the unquantised columns.

    Returns:
        ``columns_weight`` has weight's dtype. It is corrected, so it is not an exact copy of the weight's columns.
    """
    _, scale = quantize_weight(weight, block, columns)
    *lead, K = weight.shape
    rounded, H_zz = weight.reshape(math.prod(lead), K).float(), moments.to(weight.device, torch.float64)
    if columns is not None:
        H_kk = H_zz[columns][:, columns]
        H_kk.diagonal().add_(1e-6 * H_kk.diagonal().mean() + TINY)
        H_zz, rounded = H_zz.index_fill(0, columns, 0), rounded.index_fill(1, columns, 0)
        H_kz = rotate(H_zz[:, columns].T, block)
        H_zz = H_zz.index_fill(1, columns, 0)
    H_zz = rotate(rotate(H_zz, block).T.contiguous(), block)
    S, damping = H_zz, DAMPING * H_zz.diagonal().mean() + TINY
    if columns is not None:
        correction = torch.linalg.solve(H_kk, H_kz)  # inv(H_kk) H_kz
        S = H_zz - H_kz.T @ correction
    S.diagonal().add_(damping)
    rounded = rotate(rounded, block)
    codes = _round_columns(rounded, S, scale.flatten())
    if columns is None:
        return PackedTensors(codes.view(*lead, K), scale)
    errors = rounded.double() - codes.double() * scale.double().view(-1, 1)
    columns_weight = weight[..., columns].double() + (errors @ correction.T).view(*lead, len(columns))
    return PackedTensors(codes.view(*lead, K), scale, columns, columns_weight.to(weight.dtype))


def _round_columns(w: Tensor, moments: Tensor, scale: Tensor) -> Tensor:
    """The codes of ``w [N, K]`` by error feedback; ``moments [K, K]`` are positive definite."""
    order = moments.diagonal().argsort(descending=True, stable=True)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments[order][:, order]))
    factor = torch.linalg.cholesky(inverse, upper=True).to(w.dtype)
    remaining = w.T[order].contiguous()  # [K, N]: a column is a row of memory
    codes = torch.empty(remaining.shape, dtype=torch.int8, device=w.device)
    for i in range(0, len(remaining), _COLUMNS):
        part, factor_here = remaining[i : i + _COLUMNS], factor[i : i + _COLUMNS, i : i + _COLUMNS]
        errors = torch.empty_like(part)
        for j, column in enumerate(part):
            rounded = (column / scale).round().clamp(-INT8_MAX, INT8_MAX)
            codes[i + j] = rounded.to(torch.int8)
            errors[j] = (column - rounded * scale) / factor_here[j, j]
            part[j + 1 :] -= torch.outer(factor_here[j, j + 1 :], errors[j])
        remaining[i + _COLUMNS :] -= factor[i : i + _COLUMNS, i + _COLUMNS :].T @ errors
    return codes.index_select(0, order.argsort()).T.contiguous()
