"""Unquantised columns: a list fixed at conversion. x and the weight have these columns in floating point."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import BLOCK_O, GATHER_COLUMNS


@triton.jit
def is_listed(columns_ptr, C, start, BLOCK_K: tl.constexpr):
    """Which of the columns ``start <= k < start + BLOCK_K`` are in ``columns[:C]``: ``[BLOCK_K]`` bool.

    ``columns`` are distinct integers in any order; start and BLOCK_K are multiples of 32. Each word of 32 columns is
    compared with the list, 64 entries at a time.
    """
    word = start // 32 + tl.arange(0, BLOCK_K // 32)
    bits = tl.zeros((BLOCK_K // 32,), tl.int32)
    for first in range(0, C, 64):
        c = first + tl.arange(0, 64)
        column = tl.load(columns_ptr + c, mask=c < C, other=-1).to(tl.int32)
        bit = tl.full((64,), 1, tl.int32) << (column & 31)
        bits |= tl.sum(tl.where((column >> 5)[:, None] == word[None, :], bit[:, None], 0), 0)
    spread = (bits[:, None] >> tl.arange(0, 32)[None, :]) & 1
    return tl.reshape(spread, (BLOCK_K,)) != 0


@triton.jit
def add_columns(acc, x_ptr, at, columns_ptr, weight_ptr, channels, C, stride_xk, BLOCK_O: tl.constexpr):
    """``acc[m, n] + sum_c(x[m, columns[c]] * weight[n, c])``, BLOCK_O columns per dot, in the order of the list.

    Products of two 16-bit values are exact in float32, where they are summed. Values of different dtypes are
    multiplied in float32, without tensor cores.

    Args:
        acc: ``[BLOCK_M, BLOCK_N]`` float32.
        at: ``[BLOCK_M]`` int64, where each row of x begins.
        columns_ptr: ``[C]``; None where x holds these columns only (`gather_columns`).
        weight_ptr: ``[channels, C]``, contiguous.
        channels: ``[BLOCK_N]`` int64, existing rows of the weight.
    """
    for first in range(0, C, BLOCK_O):
        c = first + tl.arange(0, BLOCK_O)
        column = c.to(tl.int64)
        if columns_ptr is not None:
            column = tl.load(columns_ptr + c, mask=c < C, other=0).to(tl.int64)
        x = tl.load(x_ptr + at[:, None] + (column * stride_xk)[None, :], mask=(c < C)[None, :], other=0)
        w = tl.load(weight_ptr + channels[None, :] * C + c[:, None], mask=(c < C)[:, None], other=0)
        if x.dtype == w.dtype:
            acc = tl.dot(x, w, acc, input_precision="ieee")
        else:
            acc = tl.dot(x.to(tl.float32), w.to(tl.float32), acc, input_precision="ieee")
    return acc


@triton.jit
def _gather_columns_kernel(
    source_ptr, columns_ptr, panel_ptr, M, C, pitch, stride_e, stride_m, stride_k,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    e = tl.program_id(2).to(tl.int64)
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    column = c.to(tl.int64)
    if columns_ptr is not None:
        column = tl.load(columns_ptr + c, mask=c < C, other=0).to(tl.int64)
    rows = (m < M)[:, None]
    at = e * stride_e + m[:, None] * stride_m + column[None, :] * stride_k
    values = tl.load(source_ptr + at, mask=rows & (c < C)[None, :], other=0)
    tl.store(panel_ptr + (e * M + m)[:, None] * pitch + c[None, :], values, mask=rows)


def gather_columns(source: Tensor, columns: Tensor | None) -> Tensor:
    """``panel[e, m, c] = source[e, m, columns[c]]``, then zeros up to a multiple of `BLOCK_O` columns. Exact.

    It pays for many rows. Without it, each tile of the matmul would fetch 32 bytes for every single value.

    Args:
        source: ``[E, M, K]``, any dtype and strides.
        columns: ``[C]`` integers below K, contiguous; None for all columns in order.

    Returns:
        ``[E, M, P]``, contiguous.
    """
    E, M, K = source.shape
    C = K if columns is None else len(columns)
    blocks = triton.cdiv(C, BLOCK_O)
    panel = torch.empty(E, M, blocks * BLOCK_O, dtype=source.dtype, device=source.device)
    if panel.numel():
        BLOCK_M = GATHER_COLUMNS.BLOCK_M
        _gather_columns_kernel[(triton.cdiv(M, BLOCK_M), blocks, E)](
            source, columns, panel, M, C, blocks * BLOCK_O, *source.stride(),
            BLOCK_M=BLOCK_M, BLOCK_O=BLOCK_O, num_warps=GATHER_COLUMNS.num_warps,
        )  # fmt: skip
    return panel
