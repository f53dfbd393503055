"""Which rows belong to which weight: one weight, a batch of weights, or rows sorted by the weight they need.

``offsets [E]`` (on the device) holds the end of each group's rows.
"""

import triton
import triton.language as tl


@triton.jit
def group_rows(offsets_ptr, e, exists, M):
    """``(first, end)``: group ``e`` has the rows ``first <= m < end``. ``e`` is a number or a tensor of numbers.

    ``exists`` is true for numbers below E; other groups have no rows.
    """
    end = tl.minimum(tl.load(offsets_ptr + e, mask=exists, other=0).to(tl.int32), M)
    first = tl.load(offsets_ptr + e - 1, mask=(e > 0) & exists, other=0).to(tl.int32)
    return first, end


@triton.jit
def group_of_row(offsets_ptr, m, E, BLOCK_E: tl.constexpr):
    """The group that row ``m`` belongs to; E for a row after the last group. ``BLOCK_E >= E`` is a power of two."""
    i = tl.arange(0, BLOCK_E)
    ends = tl.load(offsets_ptr + i, mask=i < E, other=0)
    return tl.sum(((ends <= m) & (i < E)).to(tl.int32), 0)


@triton.jit
def tile_rows(tile, e, offsets_ptr, M, E, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):
    """``(e, first, end)``: tile ``tile`` holds the rows ``first <= m < min(first + BLOCK_M, end)`` of weight ``e``.

    Without offsets every weight has M rows and ``e`` comes from the grid. With offsets the tiles of all groups are
    numbered one after the other. The grid has ``cdiv(M, BLOCK_M) + E`` tiles, which is enough for any group sizes.
    Tiles after the last group get ``e = E``. ``BLOCK_E >= E`` is a power of two.
    """
    if offsets_ptr is None:
        first, end = tile * BLOCK_M, M
    else:
        i = tl.arange(0, BLOCK_E)
        begins, ends = group_rows(offsets_ptr, i, i < E, M)
        tiles = tl.where(i < E, (tl.maximum(ends - begins, 0) + BLOCK_M - 1) // BLOCK_M, 0)
        e = tl.minimum(tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0), E)
        tiles_before = tl.sum(tl.where(i < e, tiles, 0), 0)
        first = tl.sum(tl.where(i == e, begins, 0), 0) + (tile - tiles_before) * BLOCK_M
        end = tl.sum(tl.where(i == e, ends, 0), 0)
    return e, first, end


def row_tiles(M: int, E: int, BLOCK_M: int, grouped: bool) -> int:
    """How many row tiles a grid needs: per weight, or for all groups together whatever their sizes."""
    return triton.cdiv(M, BLOCK_M) + (E if grouped else 0)
