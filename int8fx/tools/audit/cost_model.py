"""What a product should cost on GPUs that are not here: bytes and operations counted, time modelled.

Every time in this file is modelled, none is measured. Counted: bytes, operations, launches, and the instructions of the
compiled loops. Assumed, and the same for all devices: 92 % of the datasheet's memory bandwidth, 1.5 us per launch (the
gap between two nodes of a graph, filling and draining), 0.8 us from a request to its data, and that what may overlap
does, so that a kernel takes the longest of its memory, its second-level cache and its processors' time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache

import torch

from ...ops.gpu import EXACT_ROWS
from ...triton_kernels import configs
from ...triton_kernels.int8_matmul import GATHER_ROWS
from ...triton_kernels.outliers import ALL_ROWS, BLOCK_O
from .assembly import FLOAT_MATRIX, INT8_MATRIX, Loop, Machine

BANDWIDTH_SHARE = 0.92
LAUNCH = 1.5e-6
LATENCY = 0.8e-6
OUTLIERS = 0.01

Compile = Callable[..., Machine]


@dataclass(frozen=True)
class Limits:
    """What one processor has room for. registers: 32-bit, of all its threads; shared: bytes."""

    registers: int
    shared: int
    shared_per_program: int
    warps: int
    warp_size: int
    reserved: int = 0

    def programs(self, registers: int, shared: int, warps: int) -> int:
        """How many programs run on a processor at a time."""
        per_warp = math.ceil(max(registers, 1) * self.warp_size / 256) * 256
        by_registers = self.registers // (per_warp * warps)
        by_shared = self.shared // (shared + self.reserved) if shared else self.warps
        return min(by_registers, by_shared, self.warps // warps)


_KIB = 1024
LIMITS = {
    "sm_80": Limits(65536, 164 * _KIB, 163 * _KIB, 64, 32, _KIB),
    "sm_89": Limits(65536, 100 * _KIB, 99 * _KIB, 48, 32, _KIB),
    "sm_90": Limits(65536, 228 * _KIB, 227 * _KIB, 64, 32, _KIB),
    "sm_100": Limits(65536, 228 * _KIB, 227 * _KIB, 64, 32, _KIB),
    "gfx90a": Limits(4 * 512 * 64, 64 * _KIB, 64 * _KIB, 32, 64),
    "gfx942": Limits(4 * 512 * 64, 64 * _KIB, 64 * _KIB, 32, 64),
}


@dataclass(frozen=True)
class Gpu:
    """The datasheet's numbers, dense.

    cache_rate: bytes a processor gets from the second-level cache per clock: assumed, 80 % of 48 (64 for CDNA).
    issue: instructions of a warp (wave) that a processor starts per clock: four schedulers; CDNA's take four clocks.
    """

    name: str
    target: str
    processors: int
    clock: float
    bandwidth: float
    int8: float
    float16: float
    cache: float
    cache_rate: float = 38.0
    issue: float = 4.0

    @property
    def int8_per_clock(self) -> float:
        return self.int8 / self.processors / self.clock

    @property
    def float16_per_clock(self) -> float:
        return self.float16 / self.processors / self.clock


GPUS = (
    Gpu("A100", "sm_80", 108, 1.41e9, 2.04e12, 624e12, 312e12, 40e6),
    Gpu("H100", "sm_90", 132, 1.83e9, 3.35e12, 1979e12, 989e12, 50e6),
    Gpu("H200", "sm_90", 132, 1.83e9, 4.8e12, 1979e12, 989e12, 50e6),
    Gpu("MI300X", "gfx942", 304, 2.1e9, 5.3e12, 2615e12, 1307e12, 256e6, cache_rate=51.0, issue=1.0),
)


def floor(gpu: Gpu, M: int, N: int, K: int) -> float:
    """Seconds that no kernel with int8 weights can beat: the bytes that must move, or the operations at peak."""
    return max((N * K + 2 * M * K + 2 * M * N) / gpu.bandwidth, 2 * M * N * K / gpu.int8)


@dataclass(frozen=True)
class Cost:
    """launches, bytes to and from memory, modelled seconds, and what takes them in the product's kernel."""

    launches: int
    bytes: float
    seconds: float
    limit: str

    def __add__(self, other: Cost) -> Cost:
        limit = self.limit if self.seconds >= other.seconds else other.limit
        return Cost(self.launches + other.launches, self.bytes + other.bytes, self.seconds + other.seconds, limit)


def _copy(gpu: Gpu, dram: float, cached: float = 0.0) -> Cost:
    """A kernel that only moves bytes."""
    seconds = dram / (gpu.bandwidth * BANDWIDTH_SHARE)
    seconds += cached / (gpu.cache_rate * gpu.processors * gpu.clock)
    return Cost(1, dram, LAUNCH + seconds, "memory")


def _instructions(machine: Machine, pattern) -> tuple[int, Loop | None]:
    loop = machine.loop(pattern)
    return (0, None) if loop is None else (loop.instructions, loop)


def few_rows(gpu: Gpu, compiled: Compile, M: int, N: int, K: int, outliers: float) -> Cost:
    """`fused_linear` for one row, `weight_only` for more: one launch, and a fill of the counters where K is split."""
    sizes = (N, K, 1, torch.bfloat16, gpu.target, gpu.processors)
    config = (configs.fused_linear(*sizes) if M == 1 else configs.weight_only(M, *sizes))[0]
    single = replace(config, SPLIT_K=1)
    tile = 2 * config.BLOCK_M * config.BLOCK_N * config.BLOCK_K
    machine = compiled(gpu.target, "weight_only", single)
    instructions, _ = _instructions(machine, FLOAT_MATRIX)
    matrix = tile / gpu.float16_per_clock
    if M == 1:
        widen = instructions
        machine = compiled(gpu.target, "fused_linear", single, True, M)
        plain, _ = _instructions(compiled(gpu.target, "fused_linear", single, False, M), INT8_MATRIX)
        full, loop = _instructions(machine, INT8_MATRIX)
        assert loop is not None
        if not loop.count(FLOAT_MATRIX):  # the residual was moved out of the loop's range
            full += widen
        skipped = max(plain, full - widen)
        share = 1 - (1 - outliers) ** config.BLOCK_K  # of the blocks hold an outlier
        instructions = skipped + share * (full - skipped)
        matrix = tile / gpu.int8_per_clock + share * matrix

    issue = instructions * config.num_warps / gpu.issue
    tiles = math.ceil(N / config.BLOCK_N)
    programs = tiles * config.SPLIT_K
    steps = math.ceil(math.ceil(K / config.BLOCK_K) / config.SPLIT_K)
    busy = math.ceil(programs / gpu.processors) * steps * max(matrix, issue) / gpu.clock

    dram = N * K + 2 * M * K + 2 * M * N
    cached = programs * steps * config.BLOCK_K * (config.BLOCK_N + 2 * M)
    if config.SPLIT_K > 1:
        cached += 2 * programs * M * config.BLOCK_N * 4
    limits = LIMITS[gpu.target]
    resident = min(
        limits.programs(machine.registers, machine.shared, config.num_warps), math.ceil(programs / gpu.processors)
    )
    in_flight = resident * min(programs, gpu.processors) * (config.num_stages - 1) * config.BLOCK_N * config.BLOCK_K
    memory = dram / min(gpu.bandwidth * BANDWIDTH_SHARE, in_flight / LATENCY)
    times = {
        "memory": memory,
        "cache": cached / (gpu.cache_rate * gpu.processors * gpu.clock),
        "matrix" if matrix > issue else "issue": busy,
    }
    limit = max(times, key=lambda name: times[name])
    launches = 2 if config.SPLIT_K > 1 else 1
    return Cost(launches, dram, launches * LAUNCH + times[limit], limit)


def many_rows(gpu: Gpu, compiled: Compile, M: int, N: int, K: int, outliers: float) -> Cost:
    """`outlier_mask`, `quantize_rowwise`, `extract_outliers`, `gather_weight`, `int8_matmul`."""
    config = configs.int8_matmul(M, N, K, 1, torch.bfloat16, False, gpu.target, gpu.processors)[0]
    split = config.SPLIT_K
    machine = compiled(gpu.target, "int8_matmul", replace(config, SPLIT_K=1))
    int8, _ = _instructions(machine, INT8_MATRIX)
    float16, _ = _instructions(machine, FLOAT_MATRIX)
    x = 2 * M * K
    again = x if x > gpu.cache / 2 else 0  # what of x is read from memory a second time
    columns = math.ceil(outliers * K)
    twice = x if K > configs.MOST_COLUMNS else 0  # a row of several parts is read again, from the cache
    extract = configs.EXTRACT_OUTLIERS
    masks = math.ceil(M / extract.BLOCK_M) * math.ceil(K / extract.BLOCK_K) * K / 2  # each program reads what is before
    cost = _copy(gpu, x) + _copy(gpu, again + M * K, x - again + twice) + _copy(gpu, 0, M * columns * 34 + masks)
    if M > ALL_ROWS:
        cost += Cost(1, K, LAUNCH, "memory")  # the mask, filled with zeros
    gathers = columns and M >= GATHER_ROWS
    if gathers:
        cost += _copy(gpu, min(N * columns * 64, N * K) + N * columns)
    elif M >= GATHER_ROWS:
        cost += Cost(1, 0, LAUNCH, "memory")
    if split > 1:
        cost += Cost(1, 0, LAUNCH, "memory")  # the counters, filled with zeros

    tile, clock = 2 * config.BLOCK_M * config.BLOCK_N, gpu.clock
    tiles = math.ceil(M / config.BLOCK_M) * math.ceil(N / config.BLOCK_N)
    steps, residual = math.ceil(math.ceil(K / config.BLOCK_K) / split), math.ceil(columns / BLOCK_O)
    matrix = steps * tile * config.BLOCK_K / gpu.int8_per_clock + residual * tile * BLOCK_O / gpu.float16_per_clock
    issue = (steps * int8 + residual * float16) * config.num_warps / gpu.issue
    per_column = config.BLOCK_N * (1 if gathers else 32) + 2 * config.BLOCK_M  # a lone code costs 32 bytes
    fetched = (config.BLOCK_M + config.BLOCK_N) * K / split + residual * BLOCK_O * per_column
    fetched += 8 * config.BLOCK_M * config.BLOCK_N if split > 1 else 0  # a part is stored and read
    waves = math.ceil(tiles * split / gpu.processors)
    dram = M * K + N * K + 2 * M * N
    times = {
        "memory": dram / (gpu.bandwidth * BANDWIDTH_SHARE),
        "cache": waves * fetched / gpu.cache_rate / clock,
        "matrix" if matrix > issue else "issue": waves * max(matrix, issue) / clock,
    }
    limit = max(times, key=lambda name: times[name])
    return cost + Cost(1, dram, LAUNCH + times[limit], limit)


def bitsandbytes(M: int, N: int, K: int, outliers: float) -> tuple[int, float]:
    """Launches and bytes of bitsandbytes 0.50's CUDA path with threshold > 0, counted from its source, fp16 x.

    abs, >=, any over all, its copy to the host, any over rows, nonzero (2), row quantisation, zeroing of the outlier
    columns, two gathers, dequantisation of the gathered weight (2), cuBLASLt's int8 product to int32, its
    dequantisation, addmm. The synchronisations with the host (2) cost time that no byte shows.
    """
    columns = math.ceil(outliers * K)
    x = M * K * (4 + 3 + 1 + 1 + 3)
    sides = M * columns * (1 + 4) + N * columns * (2 + 1 + 4 + 4 + 2)
    product = M * K + N * K + 4 * M * N
    return 16, x + sides + product + 6 * M * N + 4 * M * N + 2 * columns * (M + N)


SHAPES = tuple((M, N) for N in (4096, 8192) for M in (1, 16, 128, 2048))


def modelled(gpu: Gpu, compiled: Compile, M: int, N: int, K: int, outliers: float) -> Cost:
    return (few_rows if M <= EXACT_ROWS else many_rows)(gpu, compiled, M, N, K, outliers)


def rows(compiled: Compile) -> Iterator[str]:
    """The lines of the table."""
    compiled = cache(compiled)
    for gpu in GPUS:
        for M, N in SHAPES:
            plain, some = (modelled(gpu, compiled, M, N, N, share) for share in (0.0, OUTLIERS))
            least = floor(gpu, M, N, N)
            launches, moved = bitsandbytes(M, N, N, OUTLIERS)
            yield (
                f"{gpu.name:8}{M:6}{N:7}{least * 1e6:9.1f}{plain.seconds * 1e6:10.1f}{plain.seconds / least:7.2f}"
                f"{some.seconds * 1e6:10.1f}{some.seconds / plain.seconds - 1:+8.0%}  {some.limit:8}"
                f"{some.launches:3}{some.bytes / 1e6:9.1f}{launches:6}{moved / 1e6:9.1f}"
            )


def report(compiled: Compile) -> str:
    """The table: floor, modelled times and counts, for every GPU and shape."""
    header = (
        f"{'modelled':8}{'M':>6}{'N=K':>7}{'floor us':>9}{'model us':>10}{'ratio':>7}{'1% out us':>10}{'more':>8}  "
        f"{'limit':8}{'n':>3}{'MB':>9}{'bnb n':>6}{'bnb MB':>9}"
    )
    return "\n".join([header, *rows(compiled)])
