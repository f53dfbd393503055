"""Finds, or builds, and loads the C++ kernels in ``csrc/`` for this machine's instruction set.

There is one library for each instruction set. It calls torch by its stable ABI, so it serves the torch that it is
compiled with and later ones. A wheel carries all of them, in `CARRIED`. In a checkout the first `int8fx.convert` of a
model on the CPU compiles one (a minute, one file), or ``int8fx build`` does so ahead of time. It is then stored in
the first of `folders` that can be written, under a name with a hash of the sources, the flags and torch's version.
Loading it registers its kernels for CPU tensors, before `fallback`.

One more library, `AUTOGRAD`, is for one version of torch. It makes eager calls faster, with a gradient and without.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import stat
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from ..schemes.formats import FORMATS, Format
from .rows import WEIGHT_ONLY_ROWS_CPU
from .schemas import NAMESPACE, SCHEMAS

T = TypeVar("T")
SOURCES = Path(__file__).parent / "csrc"
_COMMON = ("-std=c++20", "-O3", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math")

CARRIED = Path(__file__).parent / "compiled"
"""The libraries of a wheel, ``<name>.so``; absent in a checkout."""


@dataclass(frozen=True)
class Library:
    """A library that is compiled from ``csrc/<source>`` and the headers."""

    name: str
    flags: tuple[str, ...] = ()
    source: str = "ops.cpp"


def _kernels(name: str, capability: str, *flags: str) -> Library:
    """capability: the set of torch's vector classes that the kernels are compiled with."""
    return Library(name, (*flags, f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}"))


DEFAULT = _kernels("default", "DEFAULT")
AVX2 = _kernels("avx2", "AVX2", "-mavx2", "-mfma", "-mf16c")
AVX512_VNNI = _kernels(
    "avx512_vnni",
    "AVX512",
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mfma", "-mf16c"),
)
AVX512_BF16 = Library("avx512_bf16", (*AVX512_VNNI.flags, "-mavx512bf16", "-mavx512vbmi"))
AMX = Library("amx", (*AVX512_BF16.flags, "-mamx-tile", "-mamx-int8", "-mamx-bf16"))
INSTRUCTION_SETS = (
    (DEFAULT, AVX2, AVX512_VNNI, AVX512_BF16, AMX) if platform.machine() in ("x86_64", "AMD64") else (DEFAULT,)
)
"""Those that this kind of machine may have. A wheel carries the kernels of each."""

AUTOGRAD = Library(f"autograd_torch_{torch.__version__.partition('+')[0]}", source="autograd.cpp")


def instruction_set() -> Library:
    """The kernels for the best instruction set of this CPU that ``ATEN_CPU_CAPABILITY`` allows torch to use."""
    capability, features = torch.backends.cpu.get_cpu_capability(), torch.cpu.get_capabilities()
    if capability == "AVX512" and features.get("avx512_vnni", False):
        if not all(features.get(name, False) for name in ("avx512_bf16", "avx512_vbmi")):
            return AVX512_VNNI
        has_amx = all(features.get(name, False) for name in ("amx_int8", "amx_bf16"))
        return AMX if has_amx and _tiles_permitted() else AVX512_BF16
    return AVX2 if capability in ("AVX2", "AVX512") else DEFAULT


def _tiles_permitted() -> bool:
    """Whether Linux lets this process use AMX's tiles. A process must request them first; oneDNN does so too."""
    if sys.platform != "linux":
        return False
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0


def _options(library: Library) -> list[str]:
    """The compiler's options but for paths."""
    schemas = ", ".join(f'"{schema}"' for schema in SCHEMAS)
    levels = ", ".join(f'{{"{name}", {{{_floats(spec)}}}}}' for name, spec in FORMATS.items() if spec.bits == 4)
    definitions = [
        f"-DINT8FX_WEIGHT_ONLY_ROWS={WEIGHT_ONLY_ROWS_CPU}",
        f"-DINT8FX_SCHEMAS={schemas}",
        f"-DINT8FX_LEVELS={levels}",
    ]
    return [*_COMMON, *library.flags, *definitions]


def _floats(spec: Format) -> str:
    """The levels of the codes of 4 bits in C++, less the zero point of symmetric integers."""
    levels = spec.levels or [code - spec.zero_point for code in range(16)]
    return ", ".join(f"{float(level)!r}f" for level in levels)


def command(library: Library, output: Path) -> list[str]:
    """The compiler's command line. The environment variable ``CXX`` names the compiler, ``c++`` by default."""
    root = Path(torch.__file__).parent
    includes = [str(root / "include"), str(root / "include/torch/csrc/api/include")]
    paths = [argument for include in includes for argument in ("-isystem", include)]
    libraries = [f"-L{root / 'lib'}", "-Wl,--as-needed", "-ltorch_cpu", "-lc10"]
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    return [*compiler, *_options(library), *paths, str(SOURCES / library.source), *libraries, "-o", str(output)]


# ---- where a library is stored ---------------------------------------------------------------------------------------


def folders() -> list[Path]:
    """Where a library may be, the first choice first.

    The folder that ``TORCH_EXTENSIONS_DIR`` names, if it is set. Otherwise torch's folder for C++ extensions in the
    user's cache, and for users whose home cannot be written `private_folder`.
    """
    from torch._appdirs import user_cache_dir

    chosen = os.environ.get("TORCH_EXTENSIONS_DIR")
    if chosen:
        return [Path(chosen)]
    home, private = Path(user_cache_dir(appname="torch_extensions")), private_folder()
    return [home] if private is None else [home, private]


def private_folder() -> Path | None:
    """A folder of this user in the system's folder for temporary files; None if there is no such folder."""
    try:
        return Path(tempfile.gettempdir()).resolve() / f"int8fx-{os.geteuid()}"
    except (OSError, AttributeError):  # no folder for temporary files; no users (Windows)
        return None


def _make_private(folder: Path) -> None:
    """Creates ``folder`` for this user alone, or makes sure that it is such a folder.

    To load a library is to run it, with the user's rights, and everybody can write to /tmp. So somebody else may have
    put a library there in advance, in a folder of the name that we look for, or may exchange the folder between its
    check and the load. Nothing is loaded from ``folder`` unless it is a folder, not a link, that belongs to the user
    and that nobody else may enter, in a folder where nobody else but root can rename it.

    Raises:
        PermissionError: it is not so.
    """
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found, parent, user = folder.lstat(), folder.parent.stat(), os.geteuid()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != user or found.st_mode & 0o077:
        raise PermissionError(
            f"it has mode {stat.filemode(found.st_mode)} and belongs to user {found.st_uid}; legal: a folder of user "
            f"{user} with mode 0700"
        )
    if parent.st_uid not in (user, 0) or (parent.st_mode & 0o022 and not parent.st_mode & stat.S_ISVTX):
        raise PermissionError(
            f"{folder.parent} has mode {stat.filemode(parent.st_mode)} and belongs to user {parent.st_uid}; legal: a "
            f"folder of user {user} or of root in which others cannot rename files"
        )


def _make(folder: Path) -> None:
    """Creates ``folder`` unless it exists, and makes sure that it can hold a library.

    Raises:
        OSError: it cannot be created, a library in it would not be safe, or the system loads no library from it.
    """
    if folder == private_folder():
        _make_private(folder)
    else:
        folder.mkdir(parents=True, exist_ok=True)
    no_exec = getattr(os, "ST_NOEXEC", 0)  # Linux
    if no_exec and os.statvfs(folder).f_flag & no_exec:
        raise PermissionError("it is mounted with the option noexec")


def in_first_folder(use: Callable[[Path], T]) -> T:
    """``use(folder)`` for the first of `folders` for which it does not raise OSError.

    Raises:
        RuntimeError: there is none. The message names the folders, the reasons and the way out.
    """
    failures = []
    for folder in folders():
        try:
            _make(folder)
            return use(folder)
        except OSError as error:
            failures.append(f"{folder}: {error.__cause__ or error}")
    raise RuntimeError(
        f"no folder for the compiled kernels ({'; '.join(failures)}); set the environment variable "
        "TORCH_EXTENSIONS_DIR to a folder that can be written"
    )


def path_of(library: Library, folder: Path | None = None) -> Path:
    """The path of ``library``, once it is compiled, in ``folder``, by default the first of `folders`."""
    text = [torch.__version__, platform.machine(), *_options(library)]
    sources = [path for path in SOURCES.iterdir() if path.suffix == ".h" or path.name == library.source]
    text += [path.name + path.read_text() for path in sorted(sources)]
    key = hashlib.sha256("\0".join(text).encode()).hexdigest()[:16]
    return (folder or folders()[0]) / f"int8fx_{library.name}_{key}" / "int8fx_cpu.so"


# ---- building --------------------------------------------------------------------------------------------------------


def build(library: Library) -> Path:
    """The path of ``library``: as the wheel carries it, or compiled.

    Compiles it unless it exists, with a line on stderr. Processes wait for each other.

    Raises:
        RuntimeError: there is no compiler, it failed, or no folder can be used.
        ImportError: the system has no file locks of this kind (Windows).
    """
    carried = _carried(library)
    return carried if carried.exists() else in_first_folder(lambda folder: _build(folder, library))


def _carried(library: Library) -> Path:
    return CARRIED / f"{library.name}.so"


def _build(folder: Path, library: Library, broken: int | None = None) -> Path:
    """`build` in ``folder``. A library that was written at the time ``broken`` is compiled again."""
    import fcntl  # not on Windows

    path = path_of(library, folder)
    if broken is None and _is_complete(path):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the system releases it if the process dies
        if _is_complete(path) and path.stat().st_mtime_ns != broken:  # by another process
            return path
        what = "what links them to torch" if library == AUTOGRAD else f"the CPU kernels for {library.name}"
        print(f"int8fx: compiling {what}, once: about a minute", file=sys.stderr)
        compile_to(path, lambda output: command(library, output))
        _digest_file(path).write_text(_digest(path))
    return path


def _digest_file(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _is_complete(path: Path) -> bool:
    """Whether the file is what the compiler wrote. Loading a truncated library can end the process (SIGBUS)."""
    try:
        return _digest_file(path).read_text() == _digest(path)
    except FileNotFoundError:
        return False


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


# ---- loading ---------------------------------------------------------------------------------------------------------

_loading = threading.Lock()
_loaded: bool | None = None


def load() -> bool:
    """Whether the C++ kernels run for CPU tensors. Loads them at the first call, compiled if need be; or warns.

    Those that the process has loaded itself by ``torch.ops.load_library`` are taken.
    """
    global _loaded
    if _loaded is None:
        with _loading:
            if _loaded is None:
                _loaded = _has_kernels_for("CPU") or _load(instruction_set())
                if _loaded and not _has_kernels_for("AutogradCPU"):
                    _load(AUTOGRAD)
    return _loaded


def _has_kernels_for(key: str) -> bool:
    """Whether a library has registered kernels for a dispatch key."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::linear", key)


def _load(library: Library) -> bool:
    try:
        if not _load_carried(library):
            in_first_folder(lambda folder: _load_from(folder, library))
    except (ImportError, RuntimeError, OSError) as error:
        without = (
            "calls take 10 us longer under torch.no_grad()"
            if library == AUTOGRAD
            else "matmuls run on torch's operators, several times slower than the C++ kernels"
        )
        warnings.warn(f"int8fx: CPU {without}: {error}", stacklevel=2)
        return False
    return True


def _load_carried(library: Library) -> bool:
    """Whether the wheel carries ``library`` and this system loads it."""
    path = _carried(library)
    if not path.exists():
        return False
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        warnings.warn(f"int8fx: this system does not load {path}: {error.__cause__ or error}", stacklevel=3)
        return False
    return True


def _load_from(folder: Path, library: Library) -> None:
    """Loads the library in ``folder``. One that does not load, as of a system with newer libraries, is rebuilt once."""
    path = _build(folder, library)
    written = path.stat().st_mtime_ns
    try:
        torch.ops.load_library(str(path))
    except OSError:
        torch.ops.load_library(str(_build(folder, library, broken=written)))
