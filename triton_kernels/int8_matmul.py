"""The product of quantised activations: a lean int8 loop, then what stays in 16 bits, then one rounding."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .epilogue import finish, scale_channels
from .groups import row_tiles, tile_rows
from .kept import add_kept, gather_columns
from .outliers import BLOCK_O, gather_weight
from .split_k import arrive, collect, k_range
from .tuning import fastest
from .widen import widen


@triton.jit
def _fetch(weight_ptr, column_ptrs, channels, stride_wn, stride_wk):
    """The weight's codes ``[BLOCK_O, BLOCK_N]`` in some columns, from where they stand."""
    columns = tl.load(column_ptrs).to(tl.int64)
    return tl.load(weight_ptr + channels[None, :] * stride_wn + columns[:, None] * stride_wk)


@triton.jit
def _int8_matmul_kernel(
    codes_ptr, x_scale_ptr, weight_ptr, weight_scale_ptr, panel_ptr, columns_ptr, count_ptr, gathered_ptr, offsets_ptr,
    x_ptr, kept_ptr, kept_weight_ptr, bias_ptr, other_ptr, y_ptr, partial_ptr, counter_ptr,
    M, N, K, E, C, pitch, capacity, stride_xe, stride_xm, stride_xk, stride_we, stride_wn, stride_wk,
    stride_om, stride_on, rows_per_weight,
    ACTIVATION: tl.constexpr, BINARY: tl.constexpr, EVEN_K: tl.constexpr, SPLIT_K: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # Programs that run at the same time share weight and x tiles: GROUP_M row tiles go down before the next column.
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles_m = tl.num_programs(0) // tiles_n
    band = tl.program_id(0) // (GROUP_M * tiles_n)
    height = tl.minimum(tiles_m - band * GROUP_M, GROUP_M)
    tile_m = band * GROUP_M + tl.program_id(0) % (GROUP_M * tiles_n) % height
    tile_n = tl.program_id(0) % (GROUP_M * tiles_n) // height

    e, first, end = tile_rows(tile_m, tl.program_id(1), offsets_ptr, M, E, BLOCK_M, BLOCK_E)
    if e >= E:
        return
    m = first + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows and channels beyond the last are read as the last and never stored: the loop needs no mask for them.
    rows = e.to(tl.int64) * rows_per_weight + tl.minimum(m, end - 1)
    channels = tl.minimum(n, N - 1).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    split = tl.program_id(2)
    begin, stop = k_range(split, K, BLOCK_K, SPLIT_K)
    codes_ptrs = codes_ptr + rows[:, None] * K + (begin + k)[None, :]
    weight_ptr += e.to(tl.int64) * stride_we
    weight_ptrs = weight_ptr + channels[None, :] * stride_wn + (begin + k).to(tl.int64)[:, None] * stride_wk

    products = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for start in range(begin, stop, BLOCK_K):
        if EVEN_K:
            a, b = tl.load(codes_ptrs), tl.load(weight_ptrs)
        else:
            a = tl.load(codes_ptrs, mask=k[None, :] < K - start, other=0)
            b = tl.load(weight_ptrs, mask=k[:, None] < K - start, other=0)
        products = tl.dot(a, b, products, out_dtype=tl.int32)
        codes_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K * stride_wk

    if SPLIT_K > 1:  # integers: the sum is the same in every order, and for every split
        tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        if not arrive(products, m < end, partial_ptr, counter_ptr, tile, split, BLOCK_M, BLOCK_N, SPLIT_K):
            return
        products = collect(partial_ptr, m < end, tile, BLOCK_M, BLOCK_N, SPLIT_K)

    acc = products.to(tl.float32) * tl.load(x_scale_ptr + rows)[:, None]
    if count_ptr is not None:
        o = tl.arange(0, BLOCK_O)
        columns_ptr += e.to(tl.int64) * pitch
        for start in range(0, tl.load(count_ptr + e), BLOCK_O):
            x = tl.load(panel_ptr + rows[:, None] * pitch + (start + o)[None, :])
            if gathered_ptr is None:
                w = _fetch(weight_ptr, columns_ptr + start + o, channels, stride_wn, stride_wk)
            elif start < capacity:
                at = (e.to(tl.int64) * N + channels)[None, :] * capacity + (start + o)[:, None]
                w = tl.load(gathered_ptr + at)
            else:
                w = _fetch(weight_ptr, columns_ptr + start + o, channels, stride_wn, stride_wk)
            acc = tl.dot(x, widen(w, x.dtype), acc, input_precision="ieee")
    acc = scale_channels(acc, weight_scale_ptr, n, N, e)
    if kept_weight_ptr is not None:
        at = e.to(tl.int64) * stride_xe + tl.minimum(m, end - 1).to(tl.int64) * stride_xm
        at_channels = e.to(tl.int64) * N + channels
        acc = add_kept(acc, x_ptr, at, kept_ptr, kept_weight_ptr, at_channels, C, stride_xk, BLOCK_O)
    rows = e.to(tl.int64) * rows_per_weight + m
    finish(acc, bias_ptr, other_ptr, y_ptr, rows, m < end, n, N, e, stride_om, stride_on, ACTIVATION, BINARY)


GATHER_ROWS = 512
"""From how many rows per weight on the outlier columns of the weight are gathered before the product."""

GATHER_KEPT_ROWS = 128
"""From how many rows per weight on kept columns of x, and their weights, are gathered before the product."""


def int8_matmul(
    codes: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    outliers: tuple[Tensor, Tensor, Tensor] | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    activation: str = "none",
    other: Tensor | None = None,
    binary: str = "none",
    *,
    kept: tuple[Tensor, Tensor, Tensor] | None = None,
    offsets: Tensor | None = None,
    config: configs.Config | None = None,
) -> Tensor:
    """``y = binary(activation((codes @ weight.T * x_scale + residual) * weight_scale + exact + bias), other)``, where
    ``residual = panel @ weight[:, columns].T`` and ``exact = x[:, kept_columns] @ kept_weight.T``.

    The int8 sum is exact in int32. The residual multiplies x's own 16-bit values by the weight's *codes*, which
    float16 and bfloat16 hold exactly, so its products are exact and only its float32 sum rounds; the channel's scale
    comes after, once for both parts. That is `reference.linear`'s formula with fewer roundings, and its error
    bound: int32 to float32, two scales, one rounding per outlier and addition, one at the store. float32 x is
    multiplied in float32, without tensor cores. So are x and ``kept_weight`` where their dtypes differ.

    Without outliers a row of y depends on no other row, bit for bit, and on no tile: the int8 sum is exact however K is
    split, and the kept columns are added in their order, 16 to a dot, by the one matrix instruction that every tile of
    a device uses, or by two whose sums are the same in every bit (the audit's tests and those on a GPU compare them).

    A program of a group without rows ends at once; a tile reads the rows of one group only. Nothing depends on data on
    the host: the residual's loop reads its length from ``count``.

    Args:
        codes: ``[R, K]`` int8, contiguous, and x_scale: ``[R]`` float32, of `quantize_rowwise`; ``R = E * M``.
        weight: ``[E, N, K]`` int8, any strides; 16-byte loads if K is contiguous and a multiple of 16.
        weight_scale: ``[E, N]`` float32, contiguous.
        outliers: panel, columns and count of `extract_outliers`; None for none.
        bias: ``[E, N]``, any float dtype, contiguous, or None.
        dtype: of y.
        activation, other, binary: as in `int8fx::linear`; other is ``[R, N]``, any strides.
        kept: x ``[E, M, K]``, any strides (``[1, S, K]`` with offsets), columns ``[C]`` integers below K and their
            weights ``[E, N, C]``, any float dtype, both contiguous; the codes have 0 in these columns. None for none.
        offsets: ``[E]``, the end of each group's rows; then R is the number of all rows and those behind the last
            group get 0.
        config: a tile; None for the table's.

    Returns:
        ``[R, N]`` of ``dtype``.
    """
    E, N, K = weight.shape
    R = codes.shape[0]
    M = R if offsets is not None else R // max(E, 1)
    y = (codes.new_empty if offsets is None else codes.new_zeros)((R, N), dtype=dtype)
    if 0 in (E, R, N):
        return y
    grouped = offsets is not None
    panel, columns, count = (None, None, None) if outliers is None or K == 0 else outliers
    gathered = None
    if columns is not None and GATHER_ROWS * (E if grouped else 1) <= M:
        gathered = gather_weight(weight, columns, count)
    x, kept_columns, kept_weight = kept or (None, None, None)
    if kept is not None and GATHER_KEPT_ROWS * (E if grouped else 1) <= M:
        x, kept_columns, kept_weight = (
            gather_columns(x, kept_columns),
            None,
            gather_columns(kept_weight.view(E, N, kept_weight.shape[-1]), None),
        )
    strides = (0, 0, 0) if x is None else x.stride()

    def launch(config: configs.Config) -> None:
        tiles, weights = row_tiles(M, E, config.BLOCK_M, grouped), 1 if grouped else E
        partial, counter = configs.workspace(config, N, tiles * weights, codes.device, torch.int32)
        _int8_matmul_kernel[(tiles * triton.cdiv(N, config.BLOCK_N), weights, config.SPLIT_K)](
            codes, x_scale, weight, weight_scale, panel, columns, count, gathered, offsets,
            x, kept_columns, kept_weight, bias, other, y, partial, counter,
            M, N, K, E, 0 if kept_weight is None else kept_weight.shape[-1], 0 if panel is None else panel.shape[1],
            0 if gathered is None else gathered.shape[2], 0 if grouped else strides[0], *strides[1:], *weight.stride(),
            *((0, 0) if other is None else other.stride()), 0 if grouped else M,
            activation, binary, K % config.BLOCK_K == 0, config.SPLIT_K, BLOCK_O, triton.next_power_of_2(E),
            **config.kernel_options(GROUP_M=8),
        )  # fmt: skip

    if config is None:
        device, epilogue = codes.device, activation != "none" or other is not None or kept is not None
        target, processors = configs.target_of(device), configs.processors_of(device)
        residual = dtype if kept is None else torch.promote_types(dtype, kept[2].dtype)  # float32 if they differ
        candidates = configs.int8_matmul(M, N, K, E, residual, epilogue, target, processors)
        shape = (triton.next_power_of_2(M), N, K, E, residual, grouped, kept is None, configs.name_of(device))
        config = fastest("int8_matmul", shape, candidates, launch)
    launch(config)
    return y
