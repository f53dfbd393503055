"""GPTQ: rounds a weight by the second moments of its inputs, so that columns compensate for the errors of others."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .formats import ChooseScales, Grouping, GroupScales, absmax_scales, decode, encode, group_codes, per_column
from .quantize import TINY
from .rotate import rotate
from .weight import PackedTensors

DAMPING = 0.01  # times the mean of the moments' diagonal, as in GPTQ
_COLUMNS = 128  # rounded before their errors reach all later columns
_RIDGE = 1e-6  # relative, of the moments of unquantised columns


def round_weight(
    weight: Tensor,
    grouping: Grouping,
    moments: Tensor,
    block: int = 1,
    columns: Tensor | None = None,
    choose: ChooseScales = absmax_scales,
) -> PackedTensors:
    """Codes and unquantised columns with a small ``sum_n E[((w[n] - v[n]) . x) ** 2]``: w the weight, v its rounding.

    In the coordinates of the matmul, ``z = rotate(x without columns)`` and ``k = x[columns]``, the loss of a row is
    ``d H d`` with ``H = E[(z, k) (z, k)^T]`` and d the row's error there. Unquantised columns are not rounded, so they
    can correct errors. First the objective loses what they will correct (a Schur complement). Then the other columns
    are rounded one by one. Last the unquantised columns are updated::

        S = H_zz - H_zk inv(H_kk) H_kz + damping * I
        v[:, j] = nearest(w[:, j]);   w[:, i] -= (w[:, j] - v[:, j]) * U[j, i] / U[j, j]  for i after j
        columns_weight = W[:, columns] + (R W - v) H_zk inv(H_kk)

    U is the upper Cholesky factor of ``inv(S)``, columns come in the order of falling ``S[j, j]``, and scales and zero
    points are those of the weight before any column is rounded (GPTQ's static groups). Damping is 1 % of the mean of
    H_zz's diagonal. Moments of fewer rows than columns, summed in float32, may not be positive definite with it: then
    it is the smallest of 10, 100 ... times as much with which they are. S, U and the corrections are computed in
    float64, errors in float32.

    Source: GPTQ, Frantar et al. 2022, arXiv 2210.17323, section 3; the order and static groups are those of its
    authors' code (act-order).

    Args:
        weight: ``[N, K]`` or ``[E, N, K]``, finite, any float dtype.
        grouping: the format of the codes and their groups.
        moments: ``[K, K]``, ``E[x x^T]`` up to a factor: as `calibrate` measures it with ``moments=True``.
        block: of the rotation (`rotate`); 1 for none.
        columns: ``[C]`` int64, the unquantised columns.
        choose: how groups get their scales and zero points.

    Returns:
        ``columns_weight`` has weight's dtype. It is corrected, so it is not an exact copy of the weight's columns.

    Raises:
        ValueError: the moments are those of no inputs (not finite, or negative on the diagonal), or a scale's dtype
            cannot hold a scale.
    """
    *lead, K = weight.shape
    rounded, H_zz = weight.reshape(math.prod(lead), K).float(), moments.to(weight.device, torch.float64)
    if not bool(H_zz.isfinite().all()) or bool((H_zz.diagonal() < 0).any()):
        raise ValueError("the moments of its inputs are not finite, or negative on the diagonal; legal: x.T @ x")
    if columns is not None:
        H_kk = H_zz[columns][:, columns]
        H_kk.diagonal().mul_(1 + _RIDGE).add_(_RIDGE * H_kk.diagonal().mean() + TINY)
        H_zz, rounded = H_zz.index_fill(0, columns, 0), rounded.index_fill(1, columns, 0)
        H_kz = rotate(H_zz[:, columns].T, block)
        H_zz = H_zz.index_fill(1, columns, 0)
    H_zz = rotate(rotate(H_zz, block).T.contiguous(), block)
    S, damping = H_zz, DAMPING * float(H_zz.diagonal().mean()) + TINY if K else TINY
    if columns is not None:
        correction = torch.linalg.solve(H_kk, H_kz)  # inv(H_kk) H_kz
        S = H_zz - H_kz.T @ correction
    rounded = rotate(rounded, block)
    scales = choose(rounded, grouping)
    codes = _round_columns(rounded, S, damping, scales, grouping)
    packed = group_codes(codes, scales, grouping)
    columns_weight = None
    if columns is not None:
        values = decode(codes, *_of_columns(scales, K, grouping), grouping)
        errors = rounded.double() - values.double()
        columns_weight = weight[..., columns].double() + (errors @ correction.T).view(*lead, len(columns))
        columns_weight = columns_weight.to(weight.dtype)

    def of_experts(t: Tensor) -> Tensor:
        return t.view(*lead, *t.shape[1:])

    zero_point, scale_range = (None if t is None else of_experts(t) for t in packed[2:])
    return PackedTensors(
        of_experts(packed.codes), of_experts(packed.scale), columns, columns_weight, zero_point, scale_range
    )


def _of_columns(scales: GroupScales, K: int, grouping: Grouping) -> tuple[Tensor, Tensor | None]:
    """Scale and zero of each column: ``[R, K]``, or ``[R, 1]`` if a row is one group."""
    size = grouping.size or max(K, 1)
    scale, zero = (None if t is None else per_column(t, K, size) for t in (scales.scale, scales.zero))
    return scale, zero  # type: ignore[return-value]  # there is a scale


def _round_columns(w: Tensor, S: Tensor, damping: float, scales: GroupScales, grouping: Grouping) -> Tensor:
    """The codes of ``w [R, K]`` by error feedback, as `encode` returns them."""
    R, K = w.shape
    order = S.diagonal().argsort(descending=True, stable=True)
    factor = _factor(S[order][:, order], damping).to(w.dtype)
    scale, zero = (None if t is None else t.T[order] for t in _of_columns(scales, K, grouping))
    assert scale is not None
    remaining = w.T[order].contiguous()  # [K, R]: a column is a row of memory
    codes = encode(remaining[:0], scale[:0], None if zero is None else zero[:0], grouping).new_empty(K, R)
    for i in range(0, K, _COLUMNS):
        part, factor_here = remaining[i : i + _COLUMNS], factor[i : i + _COLUMNS, i : i + _COLUMNS]
        errors = torch.empty_like(part)
        for j, column in enumerate(part):
            of_column = scale[i + j], None if zero is None else zero[i + j]
            codes[i + j] = encode(column, *of_column, grouping)
            errors[j] = (column - decode(codes[i + j], *of_column, grouping)) / factor_here[j, j]
            part[j + 1 :] -= torch.outer(factor_here[j, j + 1 :], errors[j])
        remaining[i + _COLUMNS :] -= factor[i : i + _COLUMNS, i + _COLUMNS :].T @ errors
    return codes.index_select(0, order.argsort()).T.contiguous()


def _factor(S: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of ``inv(S + damping * I)``, with 10, 100 ... times the damping if it takes that."""
    largest = float(S.diagonal().abs().amax()) if S.numel() else 0.0
    while True:
        lower, failed = torch.linalg.cholesky_ex(S + damping * torch.eye(len(S), dtype=S.dtype, device=S.device))
        if not failed:
            factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed:
            return factor
        if damping > len(S) * largest:  # then the diagonal dominates, whatever the rest is
            raise ValueError("the moments of its inputs are no positive semidefinite matrix; legal: x.T @ x")
        damping *= 10
