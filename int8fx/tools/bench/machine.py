"""What this machine is, and the most it can do: int8 operations and bytes read per second."""

from __future__ import annotations

import ctypes
import os
import platform
import shlex
import time
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch

from ...ops import native
from .timing import Measured, Work

PEAK, READS = "int8 peak", "reads"
SOURCE = Path(__file__).parent / "limits.cpp"
PACKAGES = ("int8fx", "torch", "transformers", "bitsandbytes", "torchao", "onnxruntime", "auto-round-lib")
_SECONDS = 0.005  # of a call that measures the peak: it fills a slice as products do, to meet the same neighbours
_PARTS = 4  # of the buffer, read in turns, likewise


def describe(threads: int) -> dict[str, str]:
    """The machine, as the CSV's columns have it."""
    capabilities = torch.cpu.get_capabilities()
    versions = []
    for name in PACKAGES:
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            versions.append(f"{name} -")
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "machine": f"{capabilities.get('cpu_name') or platform.processor()}, {os.cpu_count()} CPUs",
        "isa": native.instruction_set().name,
        "threads": str(threads),
        "python": platform.python_version(),
        "versions": "; ".join(versions),
    }


def missing(*packages: str) -> str:
    """Why a candidate that needs ``packages`` cannot run: ``"not installed: ..."``, or an empty text if it can."""
    absent = [name for name in packages if find_spec(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else ""


def last_level_cache() -> int:
    """Bytes of the last-level cache, as the system tells; 32 MiB if it does not."""
    sizes = [32 << 20]
    caches = list(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    for path in caches:
        text = path.read_text().strip()
        if text[-1:] in "KM" and text[:-1].isdigit():
            sizes.append(int(text[:-1]) << (10 if text.endswith("K") else 20))
    return max(sizes[1:] or sizes)


@dataclass(frozen=True)
class Limits:
    """The two limits, to measure between the rounds of other work. Made by `limits`; ``reason``: why there are none."""

    threads: int
    turns: int = 0
    buffer: torch.Tensor | None = None
    library: ctypes.CDLL | None = None
    reason: str = ""

    @property
    def instruction(self) -> str:
        """The instruction of the int8 peak."""
        return self.library.int8_instruction().decode() if self.library else ""

    def work(self, threads: int | None = None) -> dict[str, Work]:
        """Calls for `timing.interleave`, under the names `PEAK` and `READS`."""
        library, buffer, threads = self.library, self.buffer, threads or self.threads
        if library is None or buffer is None:
            return {}
        parts = [part.data_ptr() for part in buffer.chunk(_PARTS)]
        words = buffer.numel() // _PARTS // 8
        return {
            PEAK: [lambda: library.int8_multiply(self.turns, threads)],
            READS: [lambda part=part: library.read_words(part, words, threads) for part in parts],  # type: ignore[misc]
        }

    def rates(self, found: dict[str, Measured], threads: int | None = None) -> tuple[Measured, Measured]:
        """Takes `PEAK` and `READS` out of ``found``: operations and bytes per second, one value per round."""
        peak, reads = found.pop(PEAK, Measured()), found.pop(READS, Measured())
        if self.library is None or self.buffer is None:
            return Measured(note=self.reason), Measured(note=self.reason)
        operations = self.library.int8_operations() * self.turns * (threads or self.threads)
        return (
            Measured([operations / s for s in peak.values], peak.note),
            Measured([self.buffer.numel() / _PARTS / s for s in reads.values], reads.note),
        )


def limits(threads: int, buffer: int | None = None) -> Limits:
    """The limits of ``threads`` threads, over a buffer of four last-level caches and at least 256 MiB.

    Without a compiler there are none, and `Limits.reason` says so.
    """
    try:
        library = ctypes.CDLL(str(_build()))
    except (RuntimeError, OSError) as error:
        return Limits(threads, reason=str(error).split("\n")[0])
    library.int8_instruction.restype = ctypes.c_char_p
    library.int8_operations.restype = ctypes.c_int64
    library.int8_multiply.restype = ctypes.c_int64
    library.int8_multiply.argtypes = (ctypes.c_int64, ctypes.c_int)
    library.read_words.restype = ctypes.c_uint64
    library.read_words.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int)
    turns, seconds = 1000, 0.0
    while seconds < _SECONDS:
        turns *= 2
        begin = time.perf_counter()
        library.int8_multiply(turns, 1)
        seconds = time.perf_counter() - begin
    nbytes = max(4 * last_level_cache(), 256 << 20) if buffer is None else buffer
    return Limits(threads, turns, torch.ones(nbytes // 64 * 64, dtype=torch.int8), library)


def _build() -> Path:
    """The library of `SOURCE` for this machine; compiled unless it is there, beside int8fx's own."""
    isa = native.instruction_set()
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    flags = ["-std=c++20", "-O3", "-fPIC", "-shared", "-fopenmp", *isa.flags]
    key = sha256("\0".join([*compiler, *flags, SOURCE.read_text()]).encode()).hexdigest()[:16]
    path = native.library(isa).parent.parent / f"int8fx_limits_{key}" / "limits.so"
    if not path.exists():
        native.compile_to(path, lambda output: [*compiler, *flags, str(SOURCE), "-o", str(output)])
    return path
