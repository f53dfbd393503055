"""LLM.int8() in one launch for few rows: outliers, quantisation, int8 matmul, 16-bit residual, scales, bias, store."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .codes import widen
from .epilogue import finish, scale_channels
from .groups import group_rows
from .quantize_rowwise import row_scale
from .split_k import arrive, collect, k_range, workspace
from .tiles import Tile, fastest


@triton.jit
def _repeat(rows, BLOCK_M: tl.constexpr):
    """``rows [R, n]`` repeated to ``[BLOCK_M, n]``; R divides BLOCK_M."""
    R: tl.constexpr = rows.shape[0]
    n: tl.constexpr = rows.shape[1]
    if R == 1:
        rows = tl.broadcast_to(rows, (BLOCK_M, n))
    elif R < BLOCK_M:
        rows = tl.reshape(tl.broadcast_to(rows[None, :, :], (BLOCK_M // R, R, n)), (BLOCK_M, n))
    return rows


@triton.jit
def _fused_linear_kernel(
    x_ptr, weight_ptr, weight_scale_ptr, bias_ptr, other_ptr, offsets_ptr, y_ptr, partial_ptr, counter_ptr,
    M, N, K, stride_xe, stride_xm, stride_xk, stride_we, stride_wn, stride_wk, stride_om, stride_on, rows_per_weight,
    threshold, INT8_MAX: tl.constexpr, TINY: tl.constexpr, OUTLIERS: tl.constexpr,
    ACTIVATION: tl.constexpr, BINARY: tl.constexpr, EVEN_K: tl.constexpr, SPLIT_K: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile_n, split, e = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, end = 0, M
    if offsets_ptr is not None:
        first, end = group_rows(offsets_ptr, e, True, M)
        if first >= end:
            return
    m = first + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    begin, stop = k_range(split, K, BLOCK_K, SPLIT_K)
    x_ptr += e.to(tl.int64) * stride_xe
    r = first + tl.arange(0, ROWS)
    x_ptrs = x_ptr + r.to(tl.int64)[:, None] * stride_xm + (begin + k).to(tl.int64)[None, :] * stride_xk
    channels = tl.minimum(n, N - 1).to(tl.int64)
    weight_ptr += e.to(tl.int64) * stride_we
    weight_ptrs = weight_ptr + channels[None, :] * stride_wn + (begin + k).to(tl.int64)[:, None] * stride_wk

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(begin, stop, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs, mask=(r < end)[:, None], other=0)
            w = tl.load(weight_ptrs)
        else:
            x = tl.load(x_ptrs, mask=(r < end)[:, None] & (k[None, :] < K - start), other=0)
            w = tl.load(weight_ptrs, mask=k[:, None] < K - start, other=0)
        inliers = x.to(tl.float32)
        if OUTLIERS:
            # Columns beyond K hold 0. With threshold 0 they are outliers too and add 0.
            outlier = tl.max((tl.abs(inliers) >= threshold).to(tl.int32), 0)
            inliers = tl.where(outlier[None, :] > 0, 0.0, inliers)
        scale = row_scale(tl.max(tl.abs(inliers).to(tl.int32, bitcast=True), 1), INT8_MAX, TINY)
        steps = tl.broadcast_to(tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)[:, None], inliers.shape)
        codes = tl.fma(inliers, steps, tl.full(inliers.shape, 12582912.0, tl.float32))  # rounds, see to_codes
        sums = tl.dot(_repeat(codes.to(tl.int32, bitcast=True).to(tl.int8), BLOCK_M), w, out_dtype=tl.int32)
        acc += sums.to(tl.float32) * _repeat(scale[:, None], BLOCK_M)
        if OUTLIERS:
            if tl.max(outlier, 0) > 0:
                outliers = tl.where(outlier[None, :] > 0, x, tl.zeros_like(x))
                acc = tl.dot(_repeat(outliers, BLOCK_M), widen(w, x.dtype), acc, input_precision="ieee")
        x_ptrs += BLOCK_K * stride_xk
        weight_ptrs += BLOCK_K * stride_wk

    rows = e.to(tl.int64) * rows_per_weight + m
    if SPLIT_K > 1:
        tile = e * tl.num_programs(0) + tile_n
        if not arrive(acc, m < end, partial_ptr, counter_ptr, tile, split, BLOCK_M, BLOCK_N, SPLIT_K):
            return
        acc = collect(partial_ptr, m < end, tile, BLOCK_M, BLOCK_N, SPLIT_K)
    acc = scale_channels(acc, weight_scale_ptr, n, N, e)
    finish(acc, bias_ptr, other_ptr, y_ptr, rows, m < end, n, N, e, stride_om, stride_on, ACTIVATION, BINARY)


def fused_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    threshold: float | None,
    activation: str = "none",
    other: Tensor | None = None,
    binary: str = "none",
    *,
    int8_max: int,
    tiny: float,
    offsets: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """``y = binary(activation((x_int8 @ weight.T * scales + x_outlier @ weight.T) * weight_scale + bias), other)``.

    This is LLM.int8() for so few rows that one tile holds them all. A program then sees every row of its block of K
    columns, so it finds exactly the scheme's outlier columns. It does not see complete rows, so each block of a row
    has a scale: ``scale[m, b] = max(abs(x[m, k])) / int8_max`` over the columns k of block b that are not outliers.

    **Error.** It is within the bound of `reference.linear`. The scheme's scale is the maximum of these scales, so
    ``scale[m, b] <= x_scale[m]``. A code is ``round(x * r)`` in one fused operation, where r is ``1 / scale`` rounded.
    Then ``abs(x * r - x / scale) <= 127 * 2**-24 < 2**-17``, which the scheme's division may also be off by, and
    ``abs(x - code * scale) <= scale[m, b] / 2 * (1 + 2**-16)``. Summed over the blocks::

        sum_b(scale[m, b] * sum_in_b(abs(w))) / 2 * (1 + 2**-16) <= x_scale[m] / 2 * (1 + 2**-16) * sum_in(abs(w)) = Q

    where Q is the term of `reference.linear`'s bound. S grows by one rounding per block and per split
    (``outliers + blocks + splits + 4`` roundings). R is the same. Rows whose large values lie in few blocks become more
    exact than the scheme. A row with NaN or inf in a column that is not an outlier gets NaN, as in the reference.

    The residual runs only in blocks that hold an outlier. It multiplies x's 16 bits by the codes as 16 bits, exactly.
    If x has fewer rows than a matrix instruction, they are quantised once and repeated until they fill the tile.

    Args:
        x: ``[E, M, K]`` float16, bfloat16 or float32, any strides; ``[1, S, K]`` with offsets. M (or S) is at most the
            tile's BLOCK_M.
        weight: ``[E, N, K]`` int8, any strides.
        weight_scale: ``[E, N]`` float32, contiguous.
        bias: ``[E, N]``, any float dtype, contiguous, or None.
        threshold: >= 0; None for no outliers.
        activation, other, binary: as in `int8fx::linear`; other is ``[E * M, N]``, any strides.
        int8_max, tiny: the largest code and the smallest scale.
        offsets: ``[E]``, the end of each group's rows. The weight of a group without rows is not read. Rows after the
            last group get 0.
        tile: None for the fastest of the table.

    Returns:
        ``[E * M, N]`` (``[S, N]`` with offsets) of x's dtype.

    Raises:
        ValueError: x has more rows than the tile.
    """
    E, N, K = weight.shape
    M, grouped = x.shape[1], offsets is not None
    rows = x.shape[0] * M
    y = (x.new_zeros if grouped else x.new_empty)((rows, N))
    if 0 in (E, rows, N):
        return y
    if tile is None:
        candidates = tiles.for_fused_linear(N, K, E, x.dtype, tiles.target_of(x.device), tiles.processors_of(x.device))
        shape = (triton.next_power_of_2(M), N, K, E, x.dtype, threshold is not None, tiles.name_of(x.device))
        tile = fastest(
            "fused_linear", shape, candidates,
            lambda tile: fused_linear(
                x, weight, weight_scale, bias, threshold, activation, other, binary,
                int8_max=int8_max, tiny=tiny, offsets=offsets, tile=tile,
            ),
        )  # fmt: skip
    if M > tile.BLOCK_M:
        raise ValueError(f"fused_linear: x has {M} rows; legal: at most {tile.BLOCK_M}, or outliers would be missed")
    partial, counter = workspace(tile, N, E, x.device)
    stride_om, stride_on = (0, 0) if other is None else other.stride()
    _fused_linear_kernel[(triton.cdiv(N, tile.BLOCK_N), tile.SPLIT_K, E)](
        x_ptr=x, weight_ptr=weight, weight_scale_ptr=weight_scale, bias_ptr=bias, other_ptr=other, offsets_ptr=offsets,
        y_ptr=y, partial_ptr=partial, counter_ptr=counter,
        M=M, N=N, K=K, rows_per_weight=0 if grouped else M,
        stride_xe=0 if grouped else x.stride(0), stride_xm=x.stride(1), stride_xk=x.stride(2),
        stride_we=weight.stride(0), stride_wn=weight.stride(1), stride_wk=weight.stride(2),
        stride_om=stride_om, stride_on=stride_on,
        threshold=0.0 if threshold is None else threshold, OUTLIERS=threshold is not None,
        INT8_MAX=int8_max, TINY=tiny, ACTIVATION=activation, BINARY=binary,
        EVEN_K=K % tile.BLOCK_K == 0, SPLIT_K=tile.SPLIT_K, ROWS=min(triton.next_power_of_2(M), tile.BLOCK_M),
        **tile.options(),
    )  # fmt: skip
    return y
