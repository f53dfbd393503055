"""LLM.int8() in one launch for few rows: outliers, quantisation, int8 product, residual, scales, bias, store."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .epilogue import finish, scale_channels
from .quantize_rowwise import row_scale
from .split_k import arrive, collect, k_range
from .tuning import fastest
from .widen import widen


@triton.jit
def _repeat(rows, BLOCK_M: tl.constexpr):
    """``rows [R, n]`` as often as makes BLOCK_M of them: ``[BLOCK_M, n]``."""
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
        end = tl.minimum(tl.load(offsets_ptr + e).to(tl.int32), M)
        first = tl.load(offsets_ptr + e - 1, mask=e > 0, other=0).to(tl.int32)
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
        inside = x.to(tl.float32)
        if OUTLIERS:
            # Columns beyond K hold 0: outliers too if the threshold is 0, which adds 0 to the residual.
            outlier = tl.max((tl.abs(inside) >= threshold).to(tl.int32), 0)
            inside = tl.where(outlier[None, :] > 0, 0.0, inside)
        scale = row_scale(tl.max(tl.abs(inside).to(tl.int32, bitcast=True), 1), INT8_MAX, TINY)
        steps = tl.broadcast_to(tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)[:, None], inside.shape)
        codes = tl.fma(inside, steps, tl.full(inside.shape, 12582912.0, tl.float32))  # see to_codes
        products = tl.dot(_repeat(codes.to(tl.int32, bitcast=True).to(tl.int8), BLOCK_M), w, out_dtype=tl.int32)
        acc += products.to(tl.float32) * _repeat(scale[:, None], BLOCK_M)
        if OUTLIERS:
            if tl.max(outlier, 0) > 0:
                kept = tl.where(outlier[None, :] > 0, x, tl.zeros_like(x))
                acc = tl.dot(_repeat(kept, BLOCK_M), widen(w, x.dtype), acc, input_precision="ieee")
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
    threshold: float,
    activation: str = "none",
    other: Tensor | None = None,
    binary: str = "none",
    *,
    int8_max: int,
    tiny: float,
    offsets: Tensor | None = None,
    config: configs.Config | None = None,
) -> Tensor:
    """``y = binary(activation((x_int8 @ weight.T * scales + x_outlier @ weight.T) * weight_scale + bias), other)``.

    `reference.linear`'s product for so few rows that one tile holds them all. Then a block of columns of x lies
    in one program with all its rows, and which of its columns are outliers is known there and then: exactly the
    scheme's columns. What is not known is the maximum of a whole row, so the scale is that of the row *in this block*:
    ``scale[m, b] = max_in(abs(x[m, k])) / 127`` over the block's columns without its outliers.

    The error is bounded by the scheme's: the scheme's own scale is the maximum of these over b, ``scale[m, b] <=
    x_scale[m]``. A code is ``round(x * r)`` in one fused operation with ``r = 1 / scale`` rounded, so ``abs(x * r - x /
    scale) <= 127 * 2**-24 < 2**-17``, which is what the scheme's division may err by, and ``abs(x - code * scale) <=
    scale[m, b] / 2 * (1 + 2**-16)``. Summed over the blocks::

        sum_b(scale[m, b] * sum_in_b(abs(w))) / 2 * (1 + 2**-16) <= x_scale[m] / 2 * (1 + 2**-16) * sum_in(abs(w)) = Q

    with Q the term of `reference.linear`'s bound. Rows whose large values lie in few blocks gain most. S grows
    by one rounding per block and per split (``outliers + blocks + splits + 4`` roundings); R is the same. A row with
    NaN or inf in a column that is no outlier gets NaN, as there.

    Fewer rows than the matrix instructions ask for are quantised once and repeated until they fill the tile.

    The residual runs only in blocks that hold an outlier; it multiplies x's 16 bits by the codes as 16 bits, exactly.

    Args:
        x: ``[E, M, K]`` float16, bfloat16 or float32, any strides; ``[1, S, K]`` with offsets. M or S at most the
            tile's BLOCK_M.
        weight: ``[E, N, K]`` int8, any strides.
        weight_scale: ``[E, N]`` float32, contiguous.
        bias: ``[E, N]``, any float dtype, contiguous, or None.
        threshold: >= 0, inf for no outliers.
        activation, other, binary: as in `int8fx::linear`; other is ``[E * M, N]``, any strides.
        int8_max, tiny: the largest code and the smallest scale.
        offsets: ``[E]``, the end of each group's rows; groups without rows cost no read of their weight; rows behind
            the last group get 0.
        config: a tile; None for the table's.

    Returns:
        ``[E * M, N]`` (``[S, N]`` with offsets) of x's dtype.
    """
    E, N, K = weight.shape
    M = x.shape[1]
    rows = x.shape[0] * M
    y = (x.new_empty if offsets is None else x.new_zeros)((rows, N))
    if 0 in (E, rows, N):
        return y
    if config is None:
        candidates = configs.fused_linear(
            N, K, E, x.dtype, configs.target_of(x.device), configs.processors_of(x.device)
        )
        shape = (triton.next_power_of_2(M), N, K, E, x.dtype, threshold != float("inf"), configs.name_of(x.device))
        config = fastest(
            "fused_linear", shape, candidates,
            lambda c: fused_linear(
                x, weight, weight_scale, bias, threshold, activation, other, binary,
                int8_max=int8_max, tiny=tiny, offsets=offsets, config=c,
            ),
        )  # fmt: skip
    if M > config.BLOCK_M:
        raise ValueError(f"fused_linear: x has {M} rows; legal: at most {config.BLOCK_M}, or outliers would be missed")
    split, (partial, counter) = config.SPLIT_K, configs.workspace(config, N, E, x.device)
    _fused_linear_kernel[(triton.cdiv(N, config.BLOCK_N), split, E)](
        x, weight, weight_scale, bias, other, offsets, y, partial, counter,
        M, N, K, 0 if offsets is not None else x.stride(0), x.stride(1), x.stride(2), *weight.stride(),
        *((0, 0) if other is None else other.stride()), 0 if offsets is not None else M,
        threshold, int8_max, tiny, threshold != float("inf"), activation, binary, K % config.BLOCK_K == 0, split,
        min(triton.next_power_of_2(M), config.BLOCK_M), **config.kernel_options(),
    )  # fmt: skip
    return y
