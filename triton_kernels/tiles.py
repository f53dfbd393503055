"""The tile that a kernel runs with: a table by device and number of rows, and the fastest candidate by a timing.

Each kernel with a choice has a function ``for_<kernel>`` that returns its candidates, and `fastest` picks one of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from hashlib import sha256

import torch
import triton
from triton.runtime.cache import get_cache_manager


@dataclass(frozen=True)
class Tile:
    """A tile of ``BLOCK_M x BLOCK_N`` outputs, summed in steps of ``BLOCK_K``, by ``SPLIT_K`` programs together."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    SPLIT_K: int = 1

    def options(self) -> dict[str, int]:
        """The keywords of a launch, without SPLIT_K."""
        sizes = {"BLOCK_M": self.BLOCK_M, "BLOCK_N": self.BLOCK_N, "BLOCK_K": self.BLOCK_K}
        return {**sizes, "num_warps": self.num_warps, "num_stages": self.num_stages}


# ---- the tables ------------------------------------------------------------------------------------------------------

MANY_ROWS = 64
"""Tiles with this many rows or more are for many rows."""

MAX_SPLITS = 8

# BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages. `python -m int8fx.tools.audit` compiles every tile.
# Tiles that spilled or needed more shared memory than their target has were removed.
_AMPERE = ((128, 256, 128, 8, 3), (128, 128, 128, 8, 3), (64, 128, 128, 4, 3), (64, 64, 128, 4, 4))
_AMD = ((256, 128, 64, 8, 2), (128, 128, 64, 4, 2), (64, 64, 128, 4, 2))
INT8_MATMUL = {
    "sm_80": _AMPERE,
    "sm_89": _AMPERE,
    "sm_90": (  # chosen on an H100
        (128, 128, 128, 4, 3),
        (128, 128, 128, 8, 3),
        (64, 128, 128, 4, 4),
        (64, 64, 128, 4, 6),
        (16, 64, 256, 8, 6),
    ),
    "sm_100": _AMPERE,
    "gfx90a": _AMD,
    "gfx942": _AMD,
}
INT8_MATMUL_FLOAT32 = ((64, 32, 64, 4, 2),)  # no matrix instruction multiplies float32: a larger tile spills

# CDNA has two stages, which keep too few loads in flight for narrow tiles.
FUSED_LINEAR = {"cuda": (16, 64, 256, 4, 4), "hip": (16, 128, 128, 4, 2)}
FUSED_LINEAR_FLOAT32 = (16, 32, 32, 4, 2)

# The key is the largest number of rows that the tile is for.
WEIGHT_ONLY = {
    "cuda": {16: (16, 32, 256, 4, 4), 32: (32, 64, 128, 4, 4), 64: (64, 64, 128, 4, 4), 128: (128, 64, 64, 8, 3)},
    "hip": {16: (16, 128, 128, 4, 2), 32: (32, 128, 128, 4, 2), 64: (64, 128, 128, 8, 2), 128: (128, 64, 64, 8, 2)},
}
WEIGHT_ONLY_FLOAT32 = {16: (16, 32, 32, 4, 2), 32: (32, 32, 32, 4, 2), 64: (64, 32, 32, 8, 2)}

# Kernels that only move bytes have one tile. A dimension that a kernel does not have is 1.
OUTLIER_MASK = Tile(128, 1, 64, 4, 2)
EXTRACT_OUTLIERS = Tile(32, 1, 128, 4, 2)
GATHER_WEIGHT = Tile(1, 64, 1, 4, 2)
GATHER_COLUMNS = Tile(64, 1, 1, 4, 2)

MIN_STEP = 32
"""The smallest BLOCK_K: 16 bytes of codes of 4 bits."""

BLOCK_O = 16
"""How many 16-bit columns one dot multiplies. Panels of such columns are padded with zeros to a multiple."""

MAX_ROW_PART = 16384
"""How many columns of a row `quantize_rowwise` holds at a time."""


# ---- the device ------------------------------------------------------------------------------------------------------


@cache
def target_of(device: torch.device) -> str:
    """The key of the tables for a device: its architecture, or the nearest one that needs no more shared memory."""
    if device.type != "cuda":
        return "sm_80"  # the interpreter
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        name = properties.gcnArchName.split(":")[0]
        return name if name in INT8_MATMUL else "gfx90a"
    major, minor = properties.major, properties.minor
    exact = f"sm_{major}{minor}"
    if exact in INT8_MATMUL:
        return exact
    return "sm_100" if major == 10 else "sm_89"  # the others have 99 KiB of shared memory, like sm_89


@cache
def processors_of(device: torch.device) -> int:
    """How many multiprocessors the device has; 1 for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@cache
def name_of(device: torch.device) -> str:
    """The device's name, which is part of the key of a stored timing."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _backend(target: str) -> str:
    return "hip" if target.startswith("gfx") else "cuda"


# ---- candidates ------------------------------------------------------------------------------------------------------


def int8_matmul_tiles(dtype: torch.dtype, target: str, epilogue: bool) -> list[Tile]:
    """All tiles of `int8_matmul` for a target, the largest first.

    Args:
        dtype: the dtype in which 16-bit columns are multiplied.
        epilogue: an activation, a second tensor or unquantised columns follow. A thread with more than 64 sums has too
            few registers for these, so its tile is not a candidate.
    """
    tiles = [Tile(*row) for row in (INT8_MATMUL_FLOAT32 if dtype == torch.float32 else INT8_MATMUL[target])]
    warp_size = 64 if _backend(target) == "hip" else 32

    def sums(tile: Tile) -> int:
        return tile.BLOCK_M * tile.BLOCK_N

    def max_sums(tile: Tile) -> int:
        return 64 * min(256, tile.num_warps * warp_size)

    return [tile for tile in tiles if not epilogue or sums(tile) <= max_sums(tile)]


def for_int8_matmul(
    M: int, N: int, K: int, E: int, dtype: torch.dtype, epilogue: bool, target: str, processors: int
) -> tuple[Tile, ...]:
    """Candidates for `int8_matmul`, the best guess first.

    The guess is the largest tile that gives every processor a program. If none does, it is the smallest tile, with K
    split (`split`). ``dtype`` and ``epilogue``: see `int8_matmul_tiles`.
    """
    tiles = int8_matmul_tiles(dtype, target, epilogue)
    # Every row of tiles reads the entire weight, so a tile of few rows is used only if it holds all rows.
    max_rows = max(MANY_ROWS, triton.next_power_of_2(M))
    few_rows = [tile for tile in tiles if M <= tile.BLOCK_M < MANY_ROWS]
    tiles = few_rows or [tile for tile in tiles if MANY_ROWS <= tile.BLOCK_M <= max_rows]

    def programs(tile: Tile) -> int:
        return triton.cdiv(M, tile.BLOCK_M) * triton.cdiv(N, tile.BLOCK_N) * E

    unsplit = next((tile for tile in tiles if programs(tile) >= processors), tiles[-1])
    guess = split(unsplit, programs(unsplit), K, processors)
    others = [tile for tile in tiles if tile != unsplit and programs(tile) >= processors // 2]
    return guess, *([unsplit] if guess != unsplit else []), *others[-2:]


def for_fused_linear(N: int, K: int, E: int, dtype: torch.dtype, target: str, processors: int) -> tuple[Tile, ...]:
    """Candidates for `fused_linear`: one tile with K `split`, and the same with twice as many splits."""
    row = FUSED_LINEAR_FLOAT32 if dtype == torch.float32 else FUSED_LINEAR[_backend(target)]
    return _two_splits(Tile(*row), 1, N, K, E, processors)


@dataclass(frozen=True)
class Decoding:
    """What `weight_only` does in a step of K beside the products: its registers limit BLOCK_K.

    group_size: 0 for one group in a row.
    parts: see `codes.Codebook`.
    has_range: whether scales are codes themselves.
    """

    group_size: int = 0
    parts: int = 1
    has_range: bool = False

    def fit(self, tile: Tile, K: int) -> Tile:
        """``tile`` of a table for a row of K columns. No target spills (`python -m int8fx.tools.audit`).

        BLOCK_K divides groups and K, or else wastes little of the last step of a group.
        """
        size = self.group_size
        step = (size | K) & -(size | K)  # the largest power of two that divides both
        uneven = size > 0 and step < MIN_STEP
        if uneven:
            step = max(MIN_STEP, triton.next_power_of_2(size + 1))
        BLOCK_K = min(tile.BLOCK_K, 64 if uneven or self.parts > 1 else tile.BLOCK_K, step if size else tile.BLOCK_K)
        if self.has_range and BLOCK_K < tile.BLOCK_K:
            BLOCK_K = MIN_STEP
        narrow = BLOCK_K == MIN_STEP < tile.BLOCK_K and tile.BLOCK_N < 64 and not self.has_range
        wide = tile.BLOCK_M >= MANY_ROWS and size > 0
        return replace(
            tile,
            BLOCK_K=BLOCK_K,
            BLOCK_N=64 if narrow else tile.BLOCK_N,
            num_warps=max(8, tile.num_warps) if wide else tile.num_warps,
        )


PLAIN = Decoding()


def for_weight_only(
    M: int, N: int, K: int, E: int, dtype: torch.dtype, target: str, processors: int, decoding: Decoding = PLAIN
) -> tuple[Tile, ...]:
    """Candidates for `weight_only`: one tile with K `split`, and the same with twice as many splits.

    For more than 64 rows they are a tile of 128 rows and one of 64. With 128, a range of scales takes too many
    registers.
    """
    table = WEIGHT_ONLY_FLOAT32 if dtype == torch.float32 else WEIGHT_ONLY[_backend(target)]
    heights = [rows for rows in table if rows <= MANY_ROWS] if decoding.has_range else list(table)
    least = next((rows for rows in heights if rows >= M), heights[-1])
    tallest, *others = (
        _two_splits(decoding.fit(Tile(*table[rows]), K), triton.cdiv(M, rows), N, K, E, processors)
        for rows in (least, *(rows for rows in heights if MANY_ROWS <= rows < least))
    )
    return (tallest[0], *(tiles[0] for tiles in others)) if others else tallest


def for_quantize_rowwise(K: int, block: int) -> Tile:
    """The tile of `quantize_rowwise`: a row, or up to `MAX_ROW_PART` columns of it, in whole blocks of the rotation."""
    BLOCK_K = min(triton.next_power_of_2(max(K, 32)), max(MAX_ROW_PART, block))
    return Tile(1, 1, BLOCK_K, 8 if BLOCK_K <= 8192 else 16, 2)


def split(tile: Tile, programs: int, K: int, processors: int) -> Tile:
    """``tile`` with K split until three quarters of the processors have a program, of at least four K blocks each."""
    while 4 * programs * tile.SPLIT_K < 3 * processors and _may_split(tile, K):
        tile = replace(tile, SPLIT_K=2 * tile.SPLIT_K)
    return tile


def _may_split(tile: Tile, K: int) -> bool:
    return tile.SPLIT_K < MAX_SPLITS and 8 * tile.SPLIT_K * tile.BLOCK_K <= K


def _two_splits(tile: Tile, tiles_m: int, N: int, K: int, E: int, processors: int) -> tuple[Tile, ...]:
    tile = split(tile, tiles_m * triton.cdiv(N, tile.BLOCK_N) * E, K, processors)
    return (tile, replace(tile, SPLIT_K=2 * tile.SPLIT_K)) if _may_split(tile, K) else (tile,)


# ---- the fastest candidate -------------------------------------------------------------------------------------------

CLEARLY_FASTER = 0.95
"""A candidate replaces the guess if it takes at most this part of the guess's time. Smaller differences are noise."""

_fastest: dict[str, int] = {}


def fastest(kernel: str, shape: tuple, candidates: tuple[Tile, ...], run: Callable[[Tile], object]) -> Tile:
    """The candidate whose ``run`` takes the least time; the first if none is clearly faster.

    The first call with a key measures. The result is stored in this process and in Triton's cache directory. While a
    CUDA graph is captured nothing can be measured: the first candidate is returned and nothing is stored. The
    interpreter is never measured.

    Args:
        kernel, shape: the key: the kernel's name, the sizes that decide (M rounded up to a power of two) and the
            device's name.
        candidates: the same for the same key.
        run: launches the kernel with a tile. It must have no effect other than its output.
    """
    if len(candidates) == 1 or not torch.cuda.is_available():
        return candidates[0]
    key = sha256(repr((kernel, shape, candidates, triton.__version__)).encode()).hexdigest()
    if key not in _fastest:
        cache = get_cache_manager(key)
        stored = cache.get_file("fastest.json")
        if stored is not None:
            with open(stored) as file:
                _fastest[key] = json.load(file)
        elif torch.cuda.is_current_stream_capturing():
            return candidates[0]
        else:
            times = [_time(partial(run, tile)) for tile in candidates]
            best = times.index(min(times))
            _fastest[key] = best if times[best] < CLEARLY_FASTER * times[0] else 0
            cache.put(json.dumps(_fastest[key]), "fastest.json", binary=False)
    return candidates[_fastest[key]]


def _time(run: Callable[[], object]) -> float:
    return triton.testing.do_bench(run, warmup=5, rep=20, return_mode="median")
