"""The limits of this CPU: int8 operations and bytes read per second (limits.cpp)."""

from __future__ import annotations

import ctypes
import os
import shlex
import time
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch

from ...ops import native
from ..machine import last_level_cache
from .timing import Measured, Work

PEAK, READS = "int8 peak", "reads"
SOURCE = Path(__file__).parent / "limits.cpp"
_SECONDS = 0.005  # of a call that measures the peak: about as long as a slice of a round (`timing.SLICE`)
_PARTS = 4  # of the buffer; a call reads one of them, so that it is as short


@dataclass(frozen=True)
class Limits:
    """The two limits, as calls to interleave with other work. `load_limits` returns them.

    turns: of the loop that measures the int8 peak, in one call.
    buffer: the int8 tensor that is read; larger than the last-level cache.
    library: limits.cpp, compiled; None if it cannot be.
    reason: why the limits cannot be measured.
    """

    turns: int = 0
    buffer: torch.Tensor | None = None
    library: ctypes.CDLL | None = None
    reason: str = "not measured"

    @property
    def instruction(self) -> str:
        """The instruction that the int8 peak is measured with; empty if there is no library."""
        return self.library.int8_instruction().decode() if self.library else ""

    def work(self, threads: int) -> dict[str, Work]:
        """Calls on ``threads`` threads for `timing.interleave`, under the names `PEAK` and `READS`."""
        library, buffer = self.library, self.buffer
        if library is None or buffer is None:
            return {}
        parts = [part.data_ptr() for part in buffer.chunk(_PARTS)]
        words = buffer.numel() // _PARTS // 8
        return {
            PEAK: [lambda: library.int8_multiply(self.turns, threads)],
            READS: [lambda part=part: library.read_words(part, words, threads) for part in parts],  # type: ignore[misc]
        }

    def rates(self, measured: dict[str, Measured], threads: int) -> tuple[Measured, Measured]:
        """Takes `PEAK` and `READS` out of ``measured``.

        Returns:
            Operations per second and bytes per second, one value per round; without values if nothing was measured.
        """
        peak, reads = measured.pop(PEAK, Measured()), measured.pop(READS, Measured())
        if self.library is None or self.buffer is None:
            return Measured(note=self.reason), Measured(note=self.reason)
        operations = self.library.int8_operations() * self.turns * threads
        return (
            Measured([operations / seconds for seconds in peak.values], peak.note),
            Measured([self.buffer.numel() / _PARTS / seconds for seconds in reads.values], reads.note),
        )


NO_LIMITS = Limits()


def load_limits(buffer_bytes: int | None = None) -> Limits:
    """Compiles limits.cpp and chooses how long a call takes. Without a compiler, `Limits.reason` says so.

    Args:
        buffer_bytes: to read; None: four last-level caches, and at least 256 MiB.
    """
    try:
        library = ctypes.CDLL(str(_build()))
    except (RuntimeError, OSError) as error:
        return Limits(reason=str(error).split("\n")[0])
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
    nbytes = max(4 * last_level_cache(), 256 << 20) if buffer_bytes is None else buffer_bytes
    return Limits(turns, torch.ones(nbytes // 64 * 64, dtype=torch.int8), library, reason="")


def _build() -> Path:
    """The compiled `SOURCE` for this machine, stored with int8fx's compiled kernels; compiled if it is not there."""
    isa = native.instruction_set()
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    flags = ["-std=c++20", "-O3", "-fPIC", "-shared", "-fopenmp", *isa.flags]
    key = sha256("\0".join([*compiler, *flags, SOURCE.read_text()]).encode()).hexdigest()[:16]

    def compiled(folder: Path) -> Path:
        path = folder / f"int8fx_limits_{key}" / "limits.so"
        if not path.exists():
            native.compile_to(path, lambda output: [*compiler, *flags, str(SOURCE), "-o", str(output)])
        return path

    return native.in_first_folder(compiled)
