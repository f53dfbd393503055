"""The matmul of quantised activations: an int8 loop, then the 16-bit columns, then one rounding."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .codes import widen
from .columns import add_columns, gather_columns
from .epilogue import finish, scale_channels
from .groups import row_tiles, tile_rows
from .outliers import gather_weight
from .split_k import arrive, collect, k_range, workspace
from .tiles import BLOCK_O, Tile, fastest

GATHER_ROWS = 512
"""With this many rows per weight or more, the outlier columns of the weight are gathered before the matmul."""

GATHER_COLUMNS_ROWS = 128
"""With this many rows per weight or more, unquantised columns of x and of the weight are gathered before the matmul."""


@triton.jit
def _fetch(weight_ptr, column_ptrs, channels, stride_wn, stride_wk):
    """The codes ``[BLOCK_O, BLOCK_N]`` of some columns, read from the weight itself."""
    columns = tl.load(column_ptrs).to(tl.int64)
    return tl.load(weight_ptr + channels[None, :] * stride_wn + columns[:, None] * stride_wk)


@triton.jit
def _int8_matmul_kernel(
    codes_ptr, x_scale_ptr, weight_ptr, weight_scale_ptr, outlier_ptr, outlier_columns_ptr, count_ptr, gathered_ptr,
    x_ptr, columns_ptr, columns_weight_ptr, offsets_ptr, bias_ptr, other_ptr, y_ptr, partial_ptr, counter_ptr,
    M, N, K, E, C, pitch, capacity, stride_xe, stride_xm, stride_xk, stride_we, stride_wn, stride_wk,
    stride_om, stride_on, rows_per_weight,
    ACTIVATION: tl.constexpr, BINARY: tl.constexpr, EVEN_K: tl.constexpr, SPLIT_K: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # Programs that run at the same time share tiles of x and of the weight: GROUP_M row tiles come before the next
    # column of tiles.
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

    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for start in range(begin, stop, BLOCK_K):
        if EVEN_K:
            a, b = tl.load(codes_ptrs), tl.load(weight_ptrs)
        else:
            a = tl.load(codes_ptrs, mask=k[None, :] < K - start, other=0)
            b = tl.load(weight_ptrs, mask=k[:, None] < K - start, other=0)
        sums = tl.dot(a, b, sums, out_dtype=tl.int32)
        codes_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K * stride_wk

    if SPLIT_K > 1:  # integers: the sum is the same for every order and split
        tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        if not arrive(sums, m < end, partial_ptr, counter_ptr, tile, split, BLOCK_M, BLOCK_N, SPLIT_K):
            return
        sums = collect(partial_ptr, m < end, tile, BLOCK_M, BLOCK_N, SPLIT_K)

    acc = sums.to(tl.float32) * tl.load(x_scale_ptr + rows)[:, None]
    if count_ptr is not None:
        o = tl.arange(0, BLOCK_O)
        outlier_columns_ptr += e.to(tl.int64) * pitch
        for start in range(0, tl.load(count_ptr + e), BLOCK_O):
            x = tl.load(outlier_ptr + rows[:, None] * pitch + (start + o)[None, :])
            if gathered_ptr is None:
                w = _fetch(weight_ptr, outlier_columns_ptr + start + o, channels, stride_wn, stride_wk)
            elif start < capacity:
                at = (e.to(tl.int64) * N + channels)[None, :] * capacity + (start + o)[:, None]
                w = tl.load(gathered_ptr + at)
            else:
                w = _fetch(weight_ptr, outlier_columns_ptr + start + o, channels, stride_wn, stride_wk)
            acc = tl.dot(x, widen(w, x.dtype), acc, input_precision="ieee")
    acc = scale_channels(acc, weight_scale_ptr, n, N, e)
    if columns_weight_ptr is not None:
        at = e.to(tl.int64) * stride_xe + tl.minimum(m, end - 1).to(tl.int64) * stride_xm
        at_channels = e.to(tl.int64) * N + channels
        acc = add_columns(acc, x_ptr, at, columns_ptr, columns_weight_ptr, at_channels, C, stride_xk, BLOCK_O)
    rows = e.to(tl.int64) * rows_per_weight + m
    finish(acc, bias_ptr, other_ptr, y_ptr, rows, m < end, n, N, e, stride_om, stride_on, ACTIVATION, BINARY)


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
    unquantised: tuple[Tensor, Tensor, Tensor] | None = None,
    offsets: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """``y = binary(activation((codes @ weight.T * x_scale + residual) * weight_scale + exact + bias), other)``.

    ``residual = panel @ weight[:, outlier_columns].T`` and ``exact = x[:, columns] @ columns_weight.T``.

    **Error.** It is within the bound of `reference.linear`. The int8 sum is exact in int32. The residual multiplies x's
    16-bit values by codes, which float16 and bfloat16 hold exactly, so its products are exact and its float32 sum
    rounds. The channel's scale follows once for both parts. This is the reference's formula with fewer roundings: int32
    to float32, two scales, one per outlier and addition, one at the store. A float32 x is multiplied in float32 without
    tensor cores. So are x and ``columns_weight`` of different dtypes.

    **Batch invariance.** Without outliers a row of y depends on no other row and on no tile, bit for bit. The int8 sum
    is exact for every split of K. The unquantised columns are added in their order, 16 per dot. All tiles of a device
    use one matrix instruction for this, or two whose sums are equal in every bit (`tests/tools/test_audit.py` and
    `tests/ops/test_cuda.py` compare them).

    No launch depends on data: the residual's loop reads its length from ``count``. A tile reads the rows of
    one group only. A program of a group without rows ends at once.

    Args:
        codes: ``[R, K]`` int8, contiguous, and x_scale: ``[R]`` float32, of `quantize_rowwise`; ``R = E * M``.
        weight: ``[E, N, K]`` int8, any strides; 16-byte loads if K is contiguous and a multiple of 16.
        weight_scale: ``[E, N]`` float32, contiguous.
        outliers: panel, columns and count of `extract_outliers`; None for none.
        bias: ``[E, N]``, any float dtype, contiguous, or None.
        dtype: of y.
        activation, other, binary: as in `int8fx::linear`; other is ``[R, N]``, any strides.
        unquantised: x ``[E, M, K]``, any strides (``[1, S, K]`` with offsets); the unquantised columns ``[C]``,
            integers below K, contiguous; columns_weight ``[E, N, C]``, any float dtype, contiguous. The codes are 0 in
            these columns. None for none.
        offsets: ``[E]``, the end of each group's rows. R is then the number of all rows. Rows after the last group get
            0.
        tile: None for the fastest of the table.

    Returns:
        ``[R, N]`` of ``dtype``.
    """
    E, N, K = weight.shape
    R, grouped = codes.shape[0], offsets is not None
    M = R if grouped else R // max(E, 1)
    y = (codes.new_zeros if grouped else codes.new_empty)((R, N), dtype=dtype)
    if 0 in (E, R, N):
        return y
    experts = E if grouped else 1  # how many weights share the M rows
    panel = outlier_columns = count = gathered = None
    if outliers is not None and K:
        panel, outlier_columns, count = outliers
        if GATHER_ROWS * experts <= M:
            gathered = gather_weight(weight, outlier_columns, count)
    x = columns = columns_weight = None
    stride_xe = stride_xm = stride_xk = 0
    if unquantised is not None:
        x, columns, columns_weight = unquantised
        if GATHER_COLUMNS_ROWS * experts <= M:
            x, columns = gather_columns(x, columns), None
            columns_weight = gather_columns(columns_weight.view(E, N, columns_weight.shape[-1]), None)  # padded like x
        stride_xe, stride_xm, stride_xk = x.stride()
    stride_om, stride_on = (0, 0) if other is None else other.stride()

    def launch(tile: Tile) -> None:
        tiles_m, grid_e = row_tiles(M, E, tile.BLOCK_M, grouped), 1 if grouped else E
        partial, counter = workspace(tile, N, tiles_m * grid_e, codes.device, torch.int32)
        _int8_matmul_kernel[(tiles_m * triton.cdiv(N, tile.BLOCK_N), grid_e, tile.SPLIT_K)](
            codes_ptr=codes, x_scale_ptr=x_scale, weight_ptr=weight, weight_scale_ptr=weight_scale,
            outlier_ptr=panel, outlier_columns_ptr=outlier_columns, count_ptr=count, gathered_ptr=gathered,
            x_ptr=x, columns_ptr=columns, columns_weight_ptr=columns_weight, offsets_ptr=offsets,
            bias_ptr=bias, other_ptr=other, y_ptr=y, partial_ptr=partial, counter_ptr=counter,
            M=M, N=N, K=K, E=E, C=0 if columns_weight is None else columns_weight.shape[-1],
            pitch=0 if panel is None else panel.shape[1], capacity=0 if gathered is None else gathered.shape[2],
            rows_per_weight=0 if grouped else M,
            stride_xe=0 if grouped else stride_xe, stride_xm=stride_xm, stride_xk=stride_xk,
            stride_we=weight.stride(0), stride_wn=weight.stride(1), stride_wk=weight.stride(2),
            stride_om=stride_om, stride_on=stride_on,
            ACTIVATION=activation, BINARY=binary, EVEN_K=K % tile.BLOCK_K == 0, SPLIT_K=tile.SPLIT_K,
            BLOCK_O=BLOCK_O, BLOCK_E=triton.next_power_of_2(E), GROUP_M=8, **tile.options(),
        )  # fmt: skip

    if tile is None:
        device, epilogue = codes.device, activation != "none" or other is not None or unquantised is not None
        target, processors = tiles.target_of(device), tiles.processors_of(device)
        residual = dtype
        if unquantised is not None:
            residual = torch.promote_types(dtype, unquantised[2].dtype)  # float32 if they differ
        candidates = tiles.for_int8_matmul(M, N, K, E, residual, epilogue, target, processors)
        shape = (triton.next_power_of_2(M), N, K, E, residual, grouped, unquantised is None, tiles.name_of(device))
        tile = fastest("int8_matmul", shape, candidates, launch)
    launch(tile)
    return y
