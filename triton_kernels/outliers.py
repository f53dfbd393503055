"""The outlier columns of x: their numbers, their count and their values, all of which stay on the device."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .groups import row_tiles, tile_rows
from .tiles import BLOCK_O, EXTRACT_OUTLIERS, GATHER_WEIGHT, OUTLIER_MASK

ALL_ROWS = 256
"""Up to this many rows one program reads all rows of a column. Then the mask need not be filled with zeros before."""


@triton.jit
def _mask_kernel(
    x_ptr, mask_ptr, offsets_ptr, M, K, E, stride_xe, stride_xm, stride_xk, threshold,
    ALL_ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    e, first, end = tile_rows(tl.program_id(0), tl.program_id(2), offsets_ptr, M, E, BLOCK_M, BLOCK_E)
    x_ptr += e.to(tl.int64) * stride_xe
    mask_ptr += e.to(tl.int64) * K
    if ALL_ROWS:
        large = tl.zeros((BLOCK_M, BLOCK_K), tl.int32)
        for start in range(0, M, BLOCK_M):
            large |= _is_large(x_ptr, start, M, k, K, stride_xm, stride_xk, threshold, BLOCK_M)
        tl.store(mask_ptr + k, tl.max(large, 0) > 0, mask=k < K)
    else:
        end = tl.where(e < E, end, 0)
        outlier = tl.max(_is_large(x_ptr, first, end, k, K, stride_xm, stride_xk, threshold, BLOCK_M), 0) > 0
        # Programs of other rows may store the same true at the same place: no atomics are needed.
        tl.store(mask_ptr + k, outlier, mask=outlier & (k < K))


@triton.jit
def _is_large(x_ptr, first, end, k, K, stride_xm, stride_xk, threshold, BLOCK_M: tl.constexpr):
    """1 where ``abs(x[m, k]) >= threshold``, for rows ``first <= m < min(first + BLOCK_M, end)``; int32."""
    m = first + tl.arange(0, BLOCK_M)
    at = m.to(tl.int64)[:, None] * stride_xm + k.to(tl.int64)[None, :] * stride_xk
    mask = (m < end)[:, None] & (k < K)[None, :]
    x = tl.load(x_ptr + at, mask=mask, other=0).to(tl.float32)
    return (mask & (tl.abs(x) >= threshold)).to(tl.int32)


def _strides(x: Tensor, offsets: Tensor | None) -> tuple[int, int, int]:
    """x's strides; 0 between weights if the rows of all groups are in one matrix."""
    return 0 if offsets is not None else x.stride(0), x.stride(1), x.stride(2)


def outlier_mask(x: Tensor, threshold: float | None, offsets: Tensor | None = None, experts: int = 1) -> Tensor:
    """``mask[e, k] = any_m(abs(x[m, k]) >= threshold)`` over the rows m of weight e; NaN is not an outlier.

    Source: LLM.int8() (arXiv 2208.07339), section 3.2. Exact.

    Args:
        x: ``[E, M, K]`` float16, bfloat16 or float32, any strides; ``[1, S, K]`` with offsets.
        threshold: >= 0; None marks no column and reads nothing.
        offsets: ``[experts]`` int32 or int64, the end of each group's rows; None without groups.
        experts: the number of groups.

    Returns:
        ``[E, K]`` bool, ``[experts, K]`` with offsets.
    """
    E, M, K = x.shape
    groups = experts if offsets is not None else E
    all_rows = offsets is None and M <= ALL_ROWS
    if threshold is None or 0 in (groups, M, K):
        return torch.zeros(groups, K, dtype=torch.bool, device=x.device)
    mask = (torch.empty if all_rows else torch.zeros)(groups, K, dtype=torch.bool, device=x.device)
    BLOCK_M, BLOCK_K = OUTLIER_MASK.BLOCK_M, OUTLIER_MASK.BLOCK_K
    tiles_m = 1 if all_rows else row_tiles(M, groups, BLOCK_M, offsets is not None)
    _mask_kernel[(tiles_m, triton.cdiv(K, BLOCK_K), E)](
        x, mask, offsets, M, K, groups, *_strides(x, offsets), threshold=threshold,
        ALL_ROWS=all_rows, BLOCK_M=BLOCK_M, BLOCK_K=BLOCK_K, BLOCK_E=triton.next_power_of_2(groups),
        num_warps=OUTLIER_MASK.num_warps,
    )  # fmt: skip
    return mask


@triton.jit
def _extract_kernel(
    x_ptr, mask_ptr, offsets_ptr, panel_ptr, columns_ptr, count_ptr, M, K, E, pitch, stride_xe, stride_xm, stride_xk,
    rows_per_weight, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_E: tl.constexpr,
    BEFORE: tl.constexpr,
):  # fmt: skip
    e, first, end = tile_rows(tl.program_id(0), tl.program_id(2), offsets_ptr, M, E, BLOCK_M, BLOCK_E)
    if e >= E:
        return
    m = first + tl.arange(0, BLOCK_M)
    rows = e.to(tl.int64) * rows_per_weight + m
    mask_ptr += e.to(tl.int64) * K
    columns_ptr += e.to(tl.int64) * pitch
    start = tl.program_id(1) * BLOCK_K
    before = tl.zeros((BEFORE,), tl.int32)  # outliers in columns before start
    for part in range(0, start, BEFORE):
        i = part + tl.arange(0, BEFORE)
        before += tl.load(mask_ptr + i, mask=i < start, other=0).to(tl.int32)
    count = tl.sum(before, 0)
    k = start + tl.arange(0, BLOCK_K)
    outlier = tl.load(mask_ptr + k, mask=k < K, other=0).to(tl.int32)
    here = tl.sum(outlier, 0)
    if here > 0:
        o = count + tl.cumsum(outlier, 0) - 1
        tl.store(columns_ptr + o, k, mask=outlier > 0)  # every row tile stores the same
        existing = (outlier > 0)[None, :] & (m < end)[:, None]
        at = m.to(tl.int64)[:, None] * stride_xm + k.to(tl.int64)[None, :] * stride_xk
        x = tl.load(x_ptr + e.to(tl.int64) * stride_xe + at, mask=existing, other=0)
        tl.store(panel_ptr + rows[:, None] * pitch + o[None, :], x, mask=existing)
    if start + BLOCK_K >= K:
        count += here
        tl.store(count_ptr + e, count)
        o = count + tl.arange(0, BLOCK_O)  # the last dot of the residual reads up to a multiple of BLOCK_O
        padding = o < (count + BLOCK_O - 1) // BLOCK_O * BLOCK_O
        tl.store(columns_ptr + o, tl.zeros_like(o), mask=padding)
        tl.store(
            panel_ptr + rows[:, None] * pitch + o[None, :],
            tl.zeros((BLOCK_M, BLOCK_O), panel_ptr.dtype.element_ty),
            mask=padding[None, :] & (m < end)[:, None],
        )


def extract_outliers(x: Tensor, mask: Tensor, offsets: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """``columns[e, :count[e]] = nonzero(mask[e])``, ``panel[m, o] = x[m, columns[e, o]]``. Exact.

    The count stays on the device, so the panel is as wide as x. Only ``count`` of its columns, and zeros up to a
    multiple of `tiles.BLOCK_O`, are ever written or read.

    Args:
        x: ``[E, M, K]`` float16, bfloat16 or float32, any strides; ``[1, S, K]`` with offsets.
        mask: ``[E, K]`` bool, of `outlier_mask`.
        offsets: as in `outlier_mask`.

    Returns:
        ``panel [E * M, P]`` of x's dtype, ``columns [E, P]`` int32, ``count [E]`` int32; P is K rounded up.
    """
    E, M, K = x.shape
    groups = mask.shape[0]
    pitch = triton.cdiv(K, BLOCK_O) * BLOCK_O
    panel = torch.empty(E * M, pitch, dtype=x.dtype, device=x.device)
    columns = torch.empty(groups, pitch, dtype=torch.int32, device=x.device)
    new = torch.empty if offsets is None else torch.zeros  # a group without rows has no program
    count = new(groups, dtype=torch.int32, device=x.device)
    BLOCK_M, BLOCK_K = EXTRACT_OUTLIERS.BLOCK_M, EXTRACT_OUTLIERS.BLOCK_K
    grid = (row_tiles(M, groups, BLOCK_M, offsets is not None), triton.cdiv(K, BLOCK_K), E)
    if 0 not in (groups, M, K):
        _extract_kernel[grid](
            x, mask, offsets, panel, columns, count, M, K, groups, pitch, *_strides(x, offsets),
            rows_per_weight=M if offsets is None else 0,
            BLOCK_M=BLOCK_M, BLOCK_K=BLOCK_K, BLOCK_O=BLOCK_O, BLOCK_E=triton.next_power_of_2(groups),
            BEFORE=min(triton.next_power_of_2(max(K, BLOCK_K)), 8192), num_warps=EXTRACT_OUTLIERS.num_warps,
        )  # fmt: skip
    return panel, columns, count


@triton.jit
def _gather_kernel(
    weight_ptr, columns_ptr, count_ptr, gathered_ptr, N, capacity, pitch, stride_we, stride_wn, stride_wk,
    BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    e = tl.program_id(2)
    start = tl.program_id(1) * BLOCK_O
    if start >= tl.load(count_ptr + e):
        return
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    o = start + tl.arange(0, BLOCK_O)
    columns = tl.load(columns_ptr + e.to(tl.int64) * pitch + o).to(tl.int64)
    at = e.to(tl.int64) * stride_we + n[:, None] * stride_wn + columns[None, :] * stride_wk
    mask = (n < N)[:, None]
    w = tl.load(weight_ptr + at, mask=mask)
    tl.store(gathered_ptr + (e.to(tl.int64) * N + n)[:, None] * capacity + o[None, :], w, mask=mask)


def gather_weight(weight: Tensor, columns: Tensor, count: Tensor) -> Tensor:
    """``gathered[e, n, o] = weight[e, n, columns[e, o]]`` for the first P outliers, ``P = K / 16``.

    It pays for many rows. Without it, each row tile of the matmul would fetch 32 bytes for every single code of an
    outlier column. Here this happens once. The matmul itself fetches outliers after the first P. Exact.

    Args:
        weight: ``[E, N, K]`` int8, any strides.
        columns, count: of `extract_outliers`.

    Returns:
        ``[E, N, P]`` int8.
    """
    E, N, K = weight.shape
    capacity = triton.cdiv(K, 16 * BLOCK_O) * BLOCK_O
    gathered = torch.empty(E, N, capacity, dtype=torch.int8, device=weight.device)
    if 0 not in gathered.shape:
        BLOCK_N = GATHER_WEIGHT.BLOCK_N
        _gather_kernel[(triton.cdiv(N, BLOCK_N), capacity // BLOCK_O, E)](
            weight, columns, count, gathered, N, capacity, columns.shape[1], *weight.stride(),
            BLOCK_N=BLOCK_N, BLOCK_O=BLOCK_O, num_warps=GATHER_WEIGHT.num_warps,
        )  # fmt: skip
    return gathered
