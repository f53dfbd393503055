"""Columns that every call keeps in floating point, and their exact weights: a fixed list, known to convert."""

import triton
import triton.language as tl


@triton.jit
def is_kept(columns_ptr, C, start, BLOCK_K: tl.constexpr):
    """Which of the columns ``start <= k < start + BLOCK_K`` are among ``columns[:C]``: ``[BLOCK_K]`` bool.

    ``columns`` are distinct integers in any order; start and BLOCK_K are multiples of 32. Each word of 32 columns is
    compared with the whole list, 64 at a time.
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
def add_kept(acc, x_ptr, at, columns_ptr, weight_ptr, channels, C, stride_xk, BLOCK_O: tl.constexpr):
    """``acc[m, n] + sum_c(x[m, columns[c]] * weight[n, c])``, BLOCK_O columns a dot, in the order of the list.

    Products of two 16-bit values are exact in float32, where they are summed; values of different dtypes are
    multiplied in float32, without tensor cores.

    Args:
        acc: ``[BLOCK_M, BLOCK_N]`` float32.
        at: ``[BLOCK_M]`` int64, where the rows of x begin.
        columns_ptr: ``[C]``. weight_ptr: ``[channels, C]``, contiguous.
        channels: ``[BLOCK_N]`` int64, rows of the weight that exist.
    """
    for first in range(0, C, BLOCK_O):
        c = first + tl.arange(0, BLOCK_O)
        column = tl.load(columns_ptr + c, mask=c < C, other=0).to(tl.int64)
        x = tl.load(x_ptr + at[:, None] + (column * stride_xk)[None, :], mask=(c < C)[None, :], other=0)
        w = tl.load(weight_ptr + channels[None, :] * C + c[:, None], mask=(c < C)[:, None], other=0)
        if x.dtype == w.dtype:
            acc = tl.dot(x, w, acc, input_precision="ieee")
        else:
            acc = tl.dot(x.to(tl.float32), w.to(tl.float32), acc, input_precision="ieee")
    return acc
