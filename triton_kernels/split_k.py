"""Several programs share the K loop of one tile. The last one to finish adds their partial sums and stores."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import Tile


@triton.jit
def k_range(split, K, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr):
    """``[begin, end)``: the part of the K loop, a number of blocks, that program ``split`` of ``SPLIT_K`` runs."""
    step = ((K + BLOCK_K - 1) // BLOCK_K + SPLIT_K - 1) // SPLIT_K * BLOCK_K
    return tl.minimum(split * step, K), tl.minimum((split + 1) * step, K)


@triton.jit
def arrive(
    acc, row_mask, partial_ptr, counter_ptr, tile, split,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    """Stores the rows of ``acc`` that exist in ``partial[tile, split]``; true for the program that does so last.

    ``counter[tile]`` starts at 0 and ends at 0. `collect` adds the parts in the order of ``split``, whichever program
    is last, so the sum does not depend on timing.
    """
    tile_ptr = partial_ptr + (tile.to(tl.int64) * SPLIT_K + split) * (BLOCK_M * BLOCK_N)
    at = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    tl.store(tile_ptr + at, acc, mask=row_mask[:, None])
    tl.debug_barrier()  # every thread's part is written before one thread announces it
    last = tl.atomic_add(counter_ptr + tile, 1, sem="acq_rel") == SPLIT_K - 1
    if last:
        tl.store(counter_ptr + tile, 0)
    return last


@triton.jit
def collect(partial_ptr, row_mask, tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT_K: tl.constexpr):
    """``sum_split(partial[tile, split])``, in partial's dtype, always in the same order."""
    tile_ptr = partial_ptr + tile.to(tl.int64) * (SPLIT_K * BLOCK_M * BLOCK_N)
    at = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    mask = row_mask[:, None]
    acc = tl.load(tile_ptr + at, mask=mask, other=0, cache_modifier=".cg")
    for split in range(1, SPLIT_K):
        acc += tl.load(tile_ptr + split * (BLOCK_M * BLOCK_N) + at, mask=mask, other=0, cache_modifier=".cg")
    return acc


def workspace(
    tile: Tile, N: int, row_tiles: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Tensor | None, Tensor | None]:
    """What `arrive` needs: ``partial [tiles, SPLIT_K, BLOCK_M, BLOCK_N]`` and ``counter [tiles]``, which is all 0.

    ``tiles = row_tiles * cdiv(N, BLOCK_N)``. Both are None if K is not split.
    """
    if tile.SPLIT_K == 1:
        return None, None
    tiles = row_tiles * triton.cdiv(N, tile.BLOCK_N)
    partial = torch.empty(tiles, tile.SPLIT_K, tile.BLOCK_M, tile.BLOCK_N, dtype=dtype, device=device)
    return partial, torch.zeros(tiles, dtype=torch.int32, device=device)
