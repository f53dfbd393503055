"""Weights of 8 and 4 bits, activations in floating point: for few rows, which are bound by reading the weight."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .codes import PLAIN, Coding, add_product, codebook, load_scale, load_zero, table_of, unpack
from .epilogue import finish
from .groups import row_tiles, tile_rows
from .split_k import arrive, collect, k_range, workspace
from .tiles import Decoding, Tile, fastest


@triton.jit
def _step(
    at, K, GROUP: tl.constexpr, STEPS: tl.constexpr, EVEN_K: tl.constexpr, BITS: tl.constexpr, BLOCK_K: tl.constexpr
):
    """``(group, start, first, last)`` of the step at ``at``, which has the columns from ``start`` on.

    Those with ``first <= k < last`` are of the group; the others count as 0. Where BLOCK_K does not divide groups, each
    has STEPS steps. The first column is even if a byte has two codes.
    """
    group, start, first, last = 0, at, 0, K
    if GROUP > 0:
        if EVEN_K:
            group = at // GROUP
        else:
            group = at // BLOCK_K // STEPS
            first = group * GROUP
            last = tl.minimum(first + GROUP, K)
            start = first + at // BLOCK_K % STEPS * BLOCK_K
            if BITS == 4:
                start -= first % 2
    return group, start, first, last


@triton.jit
def _weight_only_kernel(
    x_ptr, weight_ptr, weight_scale_ptr, zero_point_ptr, scale_range_ptr, bias_ptr, other_ptr, offsets_ptr, y_ptr,
    partial_ptr, counter_ptr,
    M, N, K, E, G, depth, stride_xe, stride_xm, stride_xk, stride_we, stride_wn, stride_wk, stride_om, stride_on,
    rows_per_weight, BITS: tl.constexpr, ZERO: tl.constexpr, LEVELS: tl.constexpr, UNIT: tl.constexpr,
    PARTS: tl.constexpr, GROUP: tl.constexpr, STEPS: tl.constexpr,
    ACTIVATION: tl.constexpr, BINARY: tl.constexpr, EVEN_K: tl.constexpr, SPLIT_K: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(N, BLOCK_N)
    tile, split = tl.program_id(0), tl.program_id(1)
    e, first_row, end = tile_rows(tile // tiles_n, tl.program_id(2), offsets_ptr, M, E, BLOCK_M, BLOCK_E)
    if e >= E:
        return
    m = first_row + tl.arange(0, BLOCK_M)
    n = tile % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    CODES: tl.constexpr = 8 // BITS  # in a byte
    b = tl.arange(0, BLOCK_K // CODES)
    begin, stop = k_range(split, depth, BLOCK_K, SPLIT_K)
    x_ptr += e.to(tl.int64) * stride_xe
    # Rows beyond the last are read as the last and never stored: the loop needs no mask for them.
    existing = tl.minimum(m, end - 1).to(tl.int64)
    x_ptrs = x_ptr + existing[:, None] * stride_xm + k.to(tl.int64)[None, :] * stride_xk
    weight_ptr += e.to(tl.int64) * stride_we
    channels = tl.minimum(n, N - 1).to(tl.int64)
    weight_ptrs = weight_ptr + channels[None, :] * stride_wn + b.to(tl.int64)[:, None] * stride_wk

    channels += e.to(tl.int64) * N
    table = None if LEVELS is None else table_of(LEVELS)

    if GROUP == 0:
        x_ptrs += tl.cast(begin, tl.int64) * stride_xk
        weight_ptrs += tl.cast(begin // CODES, tl.int64) * stride_wk

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for at in range(begin, stop, BLOCK_K):
        group, start, first, last = _step(at, K, GROUP, STEPS, EVEN_K, BITS, BLOCK_K)
        x_tile, weight_tile = x_ptrs, weight_ptrs
        if GROUP > 0:
            x_tile += tl.cast(start, tl.int64) * stride_xk
            weight_tile += tl.cast(start // CODES, tl.int64) * stride_wk
        if EVEN_K:
            x, codes = tl.load(x_tile), tl.load(weight_tile)
        else:
            exists = (start + k >= first) & (start + k < last)
            x = tl.load(x_tile, mask=exists[None, :], other=0)
            codes = tl.load(weight_tile, mask=(start // CODES + b)[:, None] < tl.cdiv(K, CODES), other=0)
        if BITS == 4:
            codes = unpack(codes)
        if GROUP == 0:
            x_ptrs += BLOCK_K * stride_xk
            weight_ptrs += BLOCK_K // CODES * stride_wk
            acc = add_product(acc, x, codes, load_zero(zero_point_ptr, channels, ZERO), table, PARTS)
        else:
            zero = load_zero(zero_point_ptr, channels * G + group, ZERO)
            scale = load_scale(weight_scale_ptr, scale_range_ptr, channels, G, group)
            acc += add_product(tl.zeros_like(acc), x, codes, zero, table, PARTS) * scale[None, :]

    if SPLIT_K > 1:
        tile += tl.program_id(2) * tl.num_programs(0)
        if not arrive(acc, m < end, partial_ptr, counter_ptr, tile, split, BLOCK_M, BLOCK_N, SPLIT_K):
            return
        acc = collect(partial_ptr, m < end, tile, BLOCK_M, BLOCK_N, SPLIT_K)
    if UNIT != 1:
        acc *= 1.0 / UNIT
    if GROUP == 0:
        acc *= load_scale(weight_scale_ptr, scale_range_ptr, channels, 1, 0)[None, :]
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
    coding: Coding = PLAIN,
    offsets: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """``y = binary(activation(x @ w.T + bias), other)``, w as `Coding` says: only the weight is quantised.

    This is `reference.linear` with threshold 0. Codes less their zero points are widened to x's 16 bits exactly, as are
    levels of E2M1 floats times their unit, so all products are exact and only the float32 sums round::

        abs(error) <= (K + splits + 3) * 2**-24 * sum_k(abs(x * w)) + rounding of y

    Quantised scales add 1 to the factor. Codebooks add 3: levels are rounded to float32, and divided by the unit at the
    end. Levels of many bits (nf4) are cut into 3 parts for bfloat16 and 2 for float16, whose sum is the float32 level
    (to 2**-24 of it for float16). inf times such a level is NaN, since a part may be 0.

    A group is summed by itself, step by step, and each sum is multiplied by the group's scale and added. Any group size
    is legal; in one that BLOCK_K does not divide, the last step is partly idle. Row m of y depends on row m of x only.

    Args:
        x: ``[E, M, K]`` float16, bfloat16 or float32, any strides; ``[1, S, K]`` with offsets.
        weight: ``[E, N, K]`` int8, or ``[E, N, ceil(K / 2)]`` uint8, two codes of 4 bits to a byte; any strides.
        weight_scale: ``[E, N]`` or, in groups, ``[E, N, G]``; a float dtype, or uint8 with a range; contiguous.
        bias: ``[E, N]``, any float dtype, contiguous, or None.
        activation, other, binary: as in `int8fx::linear`; other is ``[E * M, N]``, any strides.
        coding: what the codes stand for.
        offsets: ``[E]``, the end of each group's rows. The weight of a group without rows is not read. Rows after the
            last group get 0.
        tile: None for the fastest of the table.

    Returns:
        ``[E * M, N]`` (``[S, N]`` with offsets) of x's dtype.
    """
    (E, N, _), (M, K), grouped = weight.shape, x.shape[1:], offsets is not None
    y = (x.new_zeros if grouped else x.new_empty)((x.shape[0] * M, N))
    if 0 in (E, *y.shape):
        return y
    size = 0 if coding.group_size is None or coding.group_size >= K else coding.group_size
    bits = 8 if weight.dtype == torch.int8 else 4
    book = None if coding.levels is None else codebook(coding.levels, x.dtype)
    if tile is None:
        target, processors = tiles.target_of(x.device), tiles.processors_of(x.device)
        decoding = Decoding(size, book.parts if book else 1, coding.scale_range is not None)
        candidates = tiles.for_weight_only(M, N, K, E, x.dtype, target, processors, decoding)
        kind = bits, decoding, book is not None, coding.zero_point is not None
        shape = (triton.next_power_of_2(M), N, K, E, x.dtype, grouped, *kind, tiles.name_of(x.device))
        tile = fastest(
            "weight_only", shape, candidates,
            lambda tile: weight_only(
                x, weight, weight_scale, bias, activation, other, binary, coding=coding, offsets=offsets, tile=tile
            ),
        )  # fmt: skip
    BLOCK_K = tile.BLOCK_K
    even = K % BLOCK_K == 0 and size % BLOCK_K == 0  # size 0 is a multiple of all
    steps = triton.cdiv(size + (size % 2 if bits == 4 else 0), BLOCK_K)
    depth = K if even or size == 0 else triton.cdiv(K, size) * steps * BLOCK_K
    tiles_m, weights = row_tiles(M, E, tile.BLOCK_M, grouped), 1 if grouped else E
    partial, counter = workspace(tile, N, tiles_m * weights, x.device)
    stride_om, stride_on = (0, 0) if other is None else other.stride()
    _weight_only_kernel[(triton.cdiv(N, tile.BLOCK_N) * tiles_m, tile.SPLIT_K, weights)](
        x_ptr=x, weight_ptr=weight, weight_scale_ptr=weight_scale, zero_point_ptr=coding.zero_point,
        scale_range_ptr=coding.scale_range, bias_ptr=bias, other_ptr=other, offsets_ptr=offsets,
        y_ptr=y, partial_ptr=partial, counter_ptr=counter,
        M=M, N=N, K=K, E=E, G=triton.cdiv(K, size) if size else 1, depth=depth, rows_per_weight=0 if grouped else M,
        stride_xe=0 if grouped else x.stride(0), stride_xm=x.stride(1), stride_xk=x.stride(2),
        stride_we=weight.stride(0), stride_wn=weight.stride(1), stride_wk=weight.stride(2),
        stride_om=stride_om, stride_on=stride_on,
        BITS=bits, ZERO=coding.zero, LEVELS=book and book.levels, UNIT=book.unit if book else 1,
        PARTS=book.parts if book else 1, GROUP=size, STEPS=steps,
        ACTIVATION=activation, BINARY=binary, EVEN_K=even, SPLIT_K=tile.SPLIT_K,
        BLOCK_E=triton.next_power_of_2(E), **tile.options(),
    )  # fmt: skip
    return y
