"""Builds and loads the C++ kernels in ``csrc/`` for this machine's instruction set.

There is one library for each instruction set. It is compiled on first use (half a minute, one file) or ahead of time by
``int8fx build``. It is stored in torch's folder for C++ extensions (``TORCH_EXTENSIONS_DIR``), under a name with a hash
of the sources, the flags and torch's version. Loading it registers its kernels for CPU tensors, before `fallback`.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from .rows import WEIGHT_ONLY_ROWS_CPU

SOURCES = Path(__file__).parent / "csrc"
_COMMON = ("-std=c++20", "-O3", "-fPIC", "-shared", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")


@dataclass(frozen=True)
class InstructionSet:
    """A set of instructions that `csrc/` has tiles for.

    capability: the set of torch's vector classes that the library is compiled with.
    """

    name: str
    capability: str
    flags: tuple[str, ...]


DEFAULT = InstructionSet("default", "DEFAULT", ())
AVX2 = InstructionSet("avx2", "AVX2", ("-mavx2", "-mfma", "-mf16c"))
AVX512_VNNI = InstructionSet(
    "avx512_vnni",
    "AVX512",
    ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mfma", "-mf16c"),
)
AMX = InstructionSet("amx", "AVX512", (*AVX512_VNNI.flags, "-mamx-tile", "-mamx-int8"))


def instruction_set() -> InstructionSet:
    """The best instruction set of this CPU that ``ATEN_CPU_CAPABILITY`` allows torch to use."""
    capability, features = torch.backends.cpu.get_cpu_capability(), torch.cpu.get_capabilities()
    if capability == "AVX512" and features.get("avx512_vnni", False):
        return AMX if features.get("amx_int8", False) and _tiles_permitted() else AVX512_VNNI
    return AVX2 if capability in ("AVX2", "AVX512") else DEFAULT


def _tiles_permitted() -> bool:
    """Whether Linux lets this process use AMX's tiles. A process must request them first; oneDNN does so too."""
    if sys.platform != "linux":
        return False
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0


def command(isa: InstructionSet, output: Path) -> list[str]:
    """The compiler's command line. The environment variable ``CXX`` names the compiler, ``c++`` by default."""
    root = Path(torch.__file__).parent
    flags = [*_COMMON, *isa.flags, f"-DCPU_CAPABILITY={isa.capability}", f"-DCPU_CAPABILITY_{isa.capability}"]
    flags.append(f"-DINT8FX_WEIGHT_ONLY_ROWS={WEIGHT_ONLY_ROWS_CPU}")
    for include in (root / "include", root / "include/torch/csrc/api/include"):
        flags += ["-isystem", str(include)]
    libraries = [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"]
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    return [*compiler, *flags, str(SOURCES / "ops.cpp"), *libraries, "-o", str(output)]


def library(isa: InstructionSet) -> Path:
    """The path of the library for ``isa``."""
    from torch._appdirs import user_cache_dir

    root = os.environ.get("TORCH_EXTENSIONS_DIR") or user_cache_dir(appname="torch_extensions")
    text = [torch.__version__, *command(isa, Path("library"))[1:]]
    text += [path.name + path.read_text() for path in sorted(SOURCES.iterdir()) if path.suffix in (".cpp", ".h")]
    key = hashlib.sha256("\0".join(text).encode()).hexdigest()[:16]
    return Path(root) / f"int8fx_{isa.name}_{key}" / "int8fx_cpu.so"


def build(isa: InstructionSet) -> Path:
    """Compiles the library for ``isa`` unless it exists, with a line on stderr. Processes wait for each other.

    Raises:
        RuntimeError: there is no compiler, or it failed.
        OSError: the folder cannot be written.
        ImportError: the system has no file locks of this kind (Windows).
    """
    import fcntl  # not on Windows

    path = library(isa)
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the system releases it if the process dies
        if path.exists():
            return path
        print(f"int8fx: compiling the CPU kernels for {isa.name}, once: about half a minute", file=sys.stderr)
        compile_to(path, lambda output: command(isa, output))
    return path


def compile_to(path: Path, command_for: Callable[[Path], list[str]]) -> None:
    """Runs ``command_for(output)`` in a temporary folder, and moves the output to ``path`` when it is complete.

    Raises:
        RuntimeError: there is no compiler, or it failed.
        OSError: the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as directory:
        output = Path(directory) / path.name
        try:
            done = subprocess.run(command_for(output), capture_output=True, text=True)
        except FileNotFoundError as error:
            raise RuntimeError(f"no C++ compiler: {error.filename} not found") from error
        if done.returncode != 0:
            raise RuntimeError(f"the C++ compiler failed: {shlex.join(done.args)}\n{done.stderr[-2000:]}")
        os.replace(output, path)


_loading = threading.Lock()
_loaded: bool | None = None


def load() -> bool:
    """Whether the C++ kernels run for CPU tensors. Builds and loads them at the first call; warns if that fails."""
    global _loaded
    if _loaded is None:
        with _loading:
            if _loaded is None:
                _loaded = _load()
    return _loaded


def _load() -> bool:
    try:
        torch.ops.load_library(str(build(instruction_set())))
    except (ImportError, RuntimeError, OSError) as error:
        warnings.warn(
            f"int8fx: CPU matmuls run on torch's operators, several times slower than the C++ kernels: {error}",
            stacklevel=2,
        )
        return False
    return True
