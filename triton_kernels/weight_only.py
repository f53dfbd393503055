"""int8 weights, activations as they are: for few rows, where reading the weight is all the time there is."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .epilogue import finish, scale_channels
from .groups import row_tiles, tile_rows
from .split_k import arrive, collect, k_range
from .tuning import fastest
from .widen import widen


@triton.jit
def _weight_only_kernel(
    x_ptr, weight_ptr, weight_scale_ptr, bias_ptr, other_ptr, offsets_ptr, y_ptr, partial_ptr, counter_ptr,
    M, N, K, E, stride_xe, stride_xm, stride_xk, stride_we, stride_wn, stride_wk, stride_om, stride_on, rows_per_weight,
    ACTIVATION: tl.constexpr, BINARY: tl.constexpr, EVEN_K: tl.constexpr, SPLIT_K: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(N, BLOCK_N)
    tile, split = tl.program_id(0), tl.program_id(1)
    e, first, end = tile_rows(tile // tiles_n, tl.program_id(2), offsets_ptr, M, E, BLOCK_M, BLOCK_E)
    if e >= E:
        return
    m = first + tl.arange(0, BLOCK_M)
    n = tile % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    begin, stop = k_range(split, K, BLOCK_K, SPLIT_K)
    x_ptr += e.to(tl.int64) * stride_xe
    inside = tl.minimum(m, end - 1).to(tl.int64)  # rows beyond the last are read as the last and never stored
    x_ptrs = x_ptr + inside[:, None] * stride_xm + (begin + k).to(tl.int64)[None, :] * stride_xk
    weight_ptr += e.to(tl.int64) * stride_we
    channels = tl.minimum(n, N - 1).to(tl.int64)
    weight_ptrs = weight_ptr + channels[None, :] * stride_wn + (begin + k).to(tl.int64)[:, None] * stride_wk

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(begin, stop, BLOCK_K):
        if EVEN_K:
            x, w = tl.load(x_ptrs), tl.load(weight_ptrs)
        else:
            x = tl.load(x_ptrs, mask=k[None, :] < K - start, other=0)
            w = tl.load(weight_ptrs, mask=k[:, None] < K - start, other=0)
        acc = tl.dot(x, widen(w, x.dtype), acc, input_precision="ieee")
        x_ptrs += BLOCK_K * stride_xk
        weight_ptrs += BLOCK_K * stride_wk

    if SPLIT_K > 1:
        tile += tl.program_id(2) * tl.num_programs(0)
        if not arrive(acc, m < end, partial_ptr, counter_ptr, tile, split, BLOCK_M, BLOCK_N, SPLIT_K):
            return
        acc = collect(partial_ptr, m < end, tile, BLOCK_M, BLOCK_N, SPLIT_K)
    acc = scale_channels(acc, weight_scale_ptr, n, N, e)
    rows = e.to(tl.int64) * rows_per_weight + m
    finish(acc, bias_ptr, other_ptr, y_ptr, rows, m < end, n, N, e, stride_om, stride_on, ACTIVATION, BINARY)


def weight_only(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str = "none",
    other: Tensor | None = None,
    binary: str = "none",
    *,
    offsets: Tensor | None = None,
    config: configs.Config | None = None,
) -> Tensor:
    """``y = binary(activation(x @ weight.T * weight_scale + bias), other)``: only the weight is quantised.

    x keeps its 16 bits, the codes are widened to them, both exactly, so products are exact and the float32 sums are all
    that rounds: ``abs(error) <= (K + splits + 3) * 2**-24 * sum_k(abs(x * w)) + rounding of y``, which is
    `reference.linear` with threshold 0. Row m of y depends on row m of x alone.

    Args:
        x: ``[E, M, K]`` float16, bfloat16 or float32, any strides; ``[1, S, K]`` with offsets.
        weight: ``[E, N, K]`` int8, any strides.
        weight_scale: ``[E, N]`` float32, contiguous.
        bias: ``[E, N]``, any float dtype, contiguous, or None.
        activation, other, binary: as in `int8fx::linear`; other is ``[E * M, N]``, any strides.
        offsets: ``[E]``, the end of each group's rows; groups without rows cost no read of their weight; rows behind
            the last group get 0.
        config: a tile; None for the table's.

    Returns:
        ``[E * M, N]`` (``[S, N]`` with offsets) of x's dtype.
    """
    E, N, K = weight.shape
    M, grouped = x.shape[1], offsets is not None
    y = (x.new_zeros if grouped else x.new_empty)((x.shape[0] * M, N))
    if 0 in (E, *y.shape):
        return y
    if config is None:
        candidates = configs.weight_only(
            M, N, K, E, x.dtype, configs.target_of(x.device), configs.processors_of(x.device)
        )
        config = fastest(
            "weight_only", (triton.next_power_of_2(M), N, K, E, x.dtype, grouped, configs.name_of(x.device)),
            candidates, lambda c: weight_only(
                x, weight, weight_scale, bias, activation, other, binary, offsets=offsets, config=c
            ),
        )  # fmt: skip
    tiles_m, weights = row_tiles(M, E, config.BLOCK_M, grouped), 1 if grouped else E
    partial, counter = configs.workspace(config, N, tiles_m * weights, x.device)
    _weight_only_kernel[(triton.cdiv(N, config.BLOCK_N) * tiles_m, config.SPLIT_K, weights)](
        x, weight, weight_scale, bias, other, offsets, y, partial, counter,
        M, N, K, E, 0 if grouped else x.stride(0), *x.stride()[1:], *weight.stride(),
        *((0, 0) if other is None else other.stride()), 0 if grouped else M,
        activation, binary, K % config.BLOCK_K == 0, config.SPLIT_K, triton.next_power_of_2(E),
        **config.kernel_options(),
    )  # fmt: skip
    return y
