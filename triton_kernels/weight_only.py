"""int8 weights, activations in floating point: for few rows, which are bound by reading the weight."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .epilogue import finish, scale_channels
from .groups import row_tiles, tile_rows
from .split_k import arrive, collect, k_range, workspace
from .tiles import Tile, fastest
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
    # Rows beyond the last are read as the last and never stored: the loop needs no mask for them.
    existing = tl.minimum(m, end - 1).to(tl.int64)
    x_ptrs = x_ptr + existing[:, None] * stride_xm + (begin + k).to(tl.int64)[None, :] * stride_xk
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
    tile: Tile | None = None,
) -> Tensor:
    """``y = binary(activation(x @ weight.T * weight_scale + bias), other)``: only the weight is quantised.

    This is `reference.linear` with threshold 0. Codes are widened to x's 16 bits exactly, so all products are exact and
    only the float32 sums round: ``abs(error) <= (K + splits + 3) * 2**-24 * sum_k(abs(x * w)) + rounding of y``. Row m
    of y depends on row m of x only.

    Args:
        x: ``[E, M, K]`` float16, bfloat16 or float32, any strides; ``[1, S, K]`` with offsets.
        weight: ``[E, N, K]`` int8, any strides.
        weight_scale: ``[E, N]`` float32, contiguous.
        bias: ``[E, N]``, any float dtype, contiguous, or None.
        activation, other, binary: as in `int8fx::linear`; other is ``[E * M, N]``, any strides.
        offsets: ``[E]``, the end of each group's rows. The weight of a group without rows is not read. Rows after the
            last group get 0.
        tile: None for the fastest of the table.

    Returns:
        ``[E * M, N]`` (``[S, N]`` with offsets) of x's dtype.
    """
    E, N, K = weight.shape
    M, grouped = x.shape[1], offsets is not None
    y = (x.new_zeros if grouped else x.new_empty)((x.shape[0] * M, N))
    if 0 in (E, *y.shape):
        return y
    if tile is None:
        target, processors = tiles.target_of(x.device), tiles.processors_of(x.device)
        candidates = tiles.for_weight_only(M, N, K, E, x.dtype, target, processors)
        shape = (triton.next_power_of_2(M), N, K, E, x.dtype, grouped, tiles.name_of(x.device))
        tile = fastest(
            "weight_only", shape, candidates,
            lambda tile: weight_only(
                x, weight, weight_scale, bias, activation, other, binary, offsets=offsets, tile=tile
            ),
        )  # fmt: skip
    tiles_m, weights = row_tiles(M, E, tile.BLOCK_M, grouped), 1 if grouped else E
    partial, counter = workspace(tile, N, tiles_m * weights, x.device)
    stride_om, stride_on = (0, 0) if other is None else other.stride()
    _weight_only_kernel[(triton.cdiv(N, tile.BLOCK_N) * tiles_m, tile.SPLIT_K, weights)](
        x_ptr=x, weight_ptr=weight, weight_scale_ptr=weight_scale, bias_ptr=bias, other_ptr=other, offsets_ptr=offsets,
        y_ptr=y, partial_ptr=partial, counter_ptr=counter,
        M=M, N=N, K=K, E=E, rows_per_weight=0 if grouped else M,
        stride_xe=0 if grouped else x.stride(0), stride_xm=x.stride(1), stride_xk=x.stride(2),
        stride_we=weight.stride(0), stride_wn=weight.stride(1), stride_wk=weight.stride(2),
        stride_om=stride_om, stride_on=stride_on,
        ACTIVATION=activation, BINARY=binary, EVEN_K=K % tile.BLOCK_K == 0, SPLIT_K=tile.SPLIT_K,
        BLOCK_E=triton.next_power_of_2(E), **tile.options(),
    )  # fmt: skip
    return y
