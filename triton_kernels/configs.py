"""The tiles the kernels run with: one table by device and number of rows, and how a tile is chosen from it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
import triton
from torch import Tensor


@dataclass(frozen=True)
class Config:
    """A tile ``BLOCK_M x BLOCK_N``, K in steps of ``BLOCK_K``, its K loop shared by ``SPLIT_K`` programs."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    SPLIT_K: int = 1

    def kernel_options(self, **more: int) -> dict[str, int]:
        tile = {"BLOCK_M": self.BLOCK_M, "BLOCK_N": self.BLOCK_N, "BLOCK_K": self.BLOCK_K}
        return {**tile, **more, "num_warps": self.num_warps, "num_stages": self.num_stages}


MANY_ROWS = 64
"""From how many rows on a tile is for many."""

MOST_SPLITS = 8

# BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages. `python -m int8fx.tools.audit.audit` compiles every one of them;
# what spilled or needed more shared memory than its target has was taken out.
_AMPERE = ((128, 256, 128, 8, 3), (128, 128, 128, 8, 3), (64, 128, 128, 4, 3), (64, 64, 128, 4, 4))
_AMD = ((256, 128, 64, 8, 2), (128, 128, 64, 4, 2), (64, 64, 128, 4, 2))
INT8_MATMUL = {
    "sm_80": _AMPERE,
    "sm_89": _AMPERE,
    "sm_90": (  # by an H100
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
FLOAT32 = ((64, 32, 64, 4, 2),)  # its residual runs without matrix instructions: a larger tile spills

# One row costs little to quantise. CDNA, with two stages, has too little in flight for narrow tiles.
FUSED_LINEAR = {"cuda": (16, 64, 256, 4, 4), "hip": (16, 128, 128, 4, 2)}
FUSED_LINEAR_FLOAT32 = (16, 32, 32, 4, 2)

# By how many rows there are at most.
WEIGHT_ONLY = {
    "cuda": {16: (16, 32, 256, 4, 4), 32: (32, 64, 128, 4, 4), 64: (64, 64, 128, 4, 4)},
    "hip": {16: (16, 128, 128, 4, 2), 32: (32, 128, 128, 4, 2), 64: (64, 128, 128, 8, 2)},
}
WEIGHT_ONLY_FLOAT32 = {16: (16, 32, 32, 4, 2), 32: (32, 32, 32, 4, 2), 64: (64, 32, 32, 8, 2)}

# Kernels that only move bytes: their tiles, with the dimensions they do not have as 1.
OUTLIER_MASK = Config(128, 1, 64, 4, 2)
MOST_COLUMNS = 16384  # of a row that `quantize_rowwise` holds at a time
EXTRACT_OUTLIERS = Config(32, 1, 128, 4, 2)
GATHER_WEIGHT = Config(1, 64, 1, 4, 2)
GATHER_COLUMNS = Config(64, 1, 1, 4, 2)


@cache
def target_of(device: torch.device) -> str:
    """The column of the table for a device: its architecture, or the nearest that asks for no more."""
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
    """What a timing is remembered for."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def tiles(dtype: torch.dtype, target: str, epilogue: bool) -> list[Config]:
    """The tiles of `int8_matmul`, largest first.

    A thread with more than 64 sums has no registers left for an activation, another tensor or kept columns.
    """
    configs = [Config(*row) for row in (FLOAT32 if dtype == torch.float32 else INT8_MATMUL[target])]
    warp = 64 if _backend(target) == "hip" else 32
    most = {warps: 64 * min(256, warps * warp) for warps in (4, 8)}
    return [c for c in configs if not epilogue or most[c.num_warps] >= c.BLOCK_M * c.BLOCK_N]


def int8_matmul(
    M: int, N: int, K: int, E: int, dtype: torch.dtype, epilogue: bool, target: str, processors: int
) -> tuple[Config, ...]:
    """Candidates for `int8_matmul`, best guess first: the largest tile that still gives every processor a program.

    Where none does, K is split under the smallest one (`split`). ``dtype``: in which the columns that stay in floating
    point are multiplied.
    """
    configs = tiles(dtype, target, epilogue)
    # A tile of few rows is for them alone: every row of tiles reads the whole weight.
    most = max(MANY_ROWS, triton.next_power_of_2(M))
    few = [c for c in configs if M <= c.BLOCK_M < MANY_ROWS]
    configs = few or [c for c in configs if MANY_ROWS <= c.BLOCK_M <= most]

    def programs(c: Config) -> int:
        return triton.cdiv(M, c.BLOCK_M) * triton.cdiv(N, c.BLOCK_N) * E

    guess = next((c for c in configs if programs(c) >= processors), configs[-1])
    whole, guess = guess, split(guess, programs(guess), K, processors)
    near = [c for c in configs if c != whole and programs(c) >= processors // 2]
    return guess, *([whole] if guess != whole else []), *near[-2:]


def split(config: Config, programs: int, K: int, processors: int) -> Config:
    """``config`` with K split until three quarters of the processors have a program, of four K blocks or more."""
    while 4 * programs * config.SPLIT_K < 3 * processors and _may_split(config, K):
        config = replace(config, SPLIT_K=2 * config.SPLIT_K)
    return config


def _may_split(config: Config, K: int) -> bool:
    return config.SPLIT_K < MOST_SPLITS and 8 * config.SPLIT_K * config.BLOCK_K <= K


def fused_linear(N: int, K: int, E: int, dtype: torch.dtype, target: str, processors: int) -> tuple[Config, ...]:
    """Candidates for `fused_linear`: K is `split`, and split once more."""
    tile = FUSED_LINEAR_FLOAT32 if dtype == torch.float32 else FUSED_LINEAR[_backend(target)]
    return _split_twice(Config(*tile), 1, N, K, E, processors)


def weight_only(M: int, N: int, K: int, E: int, dtype: torch.dtype, target: str, processors: int) -> tuple[Config, ...]:
    """Candidates for `weight_only`: K is `split`, and split once more."""
    table = WEIGHT_ONLY_FLOAT32 if dtype == torch.float32 else WEIGHT_ONLY[_backend(target)]
    config = Config(*table[next((rows for rows in table if rows >= M), max(table))])
    return _split_twice(config, triton.cdiv(M, config.BLOCK_M), N, K, E, processors)


def _backend(target: str) -> str:
    return "hip" if target.startswith("gfx") else "cuda"


def _split_twice(config: Config, tiles_m: int, N: int, K: int, E: int, processors: int) -> tuple[Config, ...]:
    config = split(config, tiles_m * triton.cdiv(N, config.BLOCK_N) * E, K, processors)
    return (config, replace(config, SPLIT_K=2 * config.SPLIT_K)) if _may_split(config, K) else (config,)


def quantize_rowwise(K: int, block: int) -> Config:
    """The tile of `quantize_rowwise`: a whole row, or as much as `MOST_COLUMNS`, of whole blocks of the rotation."""
    BLOCK_K = min(triton.next_power_of_2(max(K, 32)), max(MOST_COLUMNS, block))
    return Config(1, 1, BLOCK_K, 8 if BLOCK_K <= 8192 else 16, 2)


def workspace(
    config: Config, N: int, tiles: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Tensor | None, Tensor | None]:
    """Room for the parts of a split K loop, and a counter per tile that starts at 0; nothing without a split.

    tiles: how many there are for one tile of N.
    """
    if config.SPLIT_K == 1:
        return None, None
    tiles *= triton.cdiv(N, config.BLOCK_N)
    partial = torch.empty(tiles, config.SPLIT_K, config.BLOCK_M, config.BLOCK_N, dtype=dtype, device=device)
    return partial, torch.zeros(tiles, dtype=torch.int32, device=device)
