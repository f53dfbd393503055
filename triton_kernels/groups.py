"""Which rows belong to which weight: one weight, a batch of weights, or rows sorted by the weight they need."""

import triton
import triton.language as tl


@triton.jit
def tile_rows(tile, e, offsets_ptr, M, E, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):
    """``(e, first, end)``: tile ``tile`` holds the rows ``first <= m < min(first + BLOCK_M, end)`` of weight ``e``.

    Without offsets every weight has M rows and ``e`` comes from the grid. With ``offsets [E]`` (the end of each
    weight's rows, on the device) the tiles of all groups are counted up: the grid has ``cdiv(M, BLOCK_M) + E`` of
    them, which is always enough, and those that are too many get ``e = E``. ``BLOCK_E >= E`` is a power of two.
    """
    if offsets_ptr is None:
        first, end = tile * BLOCK_M, M
    else:
        i = tl.arange(0, BLOCK_E)
        ends = tl.minimum(tl.load(offsets_ptr + i, mask=i < E, other=0).to(tl.int32), M)
        begins = tl.load(offsets_ptr + i - 1, mask=(i > 0) & (i < E), other=0).to(tl.int32)
        tiles = tl.where(i < E, (tl.maximum(ends - begins, 0) + BLOCK_M - 1) // BLOCK_M, 0)
        e = tl.minimum(tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0), E)
        before = tl.sum(tl.where(i < e, tiles, 0), 0)
        first = tl.sum(tl.where(i == e, begins, 0), 0) + (tile - before) * BLOCK_M
        end = tl.sum(tl.where(i == e, ends, 0), 0)
    return e, first, end


def row_tiles(M: int, E: int, BLOCK_M: int, grouped: bool) -> int:
    """How many row tiles a grid needs: per weight, or for all groups together whatever their sizes."""
    return triton.cdiv(M, BLOCK_M) + (E if grouped else 0)
