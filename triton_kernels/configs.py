"""The tiles the kernels run with: one table, by how many rows there are."""

from __future__ import annotations

from dataclasses import dataclass
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


def workspace(config: Config, N: int, tiles: int, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """Room for the parts of a split K loop, and a counter per tile that starts at 0; nothing without a split."""
    if config.SPLIT_K == 1:
        return None, None
    tiles *= triton.cdiv(N, config.BLOCK_N)
    partial = torch.empty(tiles, config.SPLIT_K, config.BLOCK_M, config.BLOCK_N, dtype=torch.float32, device=device)
    return partial, torch.zeros(tiles, dtype=torch.int32, device=device)


@cache
def processors(device: torch.device) -> int:
    """How many multiprocessors the device has; 1 for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _split(config: Config, N: int, K: int, tiles: int, device: torch.device) -> Config:
    """As many programs as fill the device twice, while each has at least four K blocks to run."""
    programs, split = tiles * triton.cdiv(N, config.BLOCK_N), 1
    while programs * split < 2 * processors(device) and 8 * split * config.BLOCK_K <= K and split < 16:
        split *= 2
    return Config(**{**config.__dict__, "SPLIT_K": split})


def fused_linear(M: int, N: int, K: int, E: int, device: torch.device) -> Config:
    return _split(Config(triton.next_power_of_2(max(M, 16)), 64, 128, 4, 4), N, K, E, device)


def weight_only(M: int, N: int, K: int, E: int, device: torch.device) -> Config:
    return _split(Config(16 if M <= 16 else 32, 64, 128, 4, 4), N, K, E, device)


def int8_matmul(M: int, N: int, K: int, device: torch.device) -> Config:
    return Config(128, 128, 128, 8, 3)
