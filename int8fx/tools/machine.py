"""Describes the machine, the versions and the installed packages, for measurements."""

from __future__ import annotations

import os
import platform
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch

from .. import __version__
from ..ops import native

PACKAGES = ("int8fx", "torch", "transformers", "bitsandbytes", "torchao", "onnxruntime", "auto-round-lib", "zentorch")
CACHE_BYTES = 32 << 20  # assumed for a last-level cache that the system does not describe


def machine() -> str:
    """The CPU, its number of threads and the versions on one line; then what affects times."""
    line = (
        f"{_cpu_name()} ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, transformers {version('transformers')}, int8fx {__version__}"
    )
    capabilities = torch.cpu.get_capabilities()
    if not any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")):
        line += "\nThis CPU has no bfloat16 instructions: torch's bfloat16 is slow on it."
    kernels = f"C++ for {native.instruction_set().name}" if native.load() else "torch's operators, which are slow"
    return f"{line}\nint8 matmuls: {kernels}."


def describe(threads: int) -> dict[str, str]:
    """The CPU as the bench's CSV has it: date, machine, isa, threads, python and versions by name."""
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "machine": f"{_cpu_name()}, {os.cpu_count()} CPUs",
        "isa": native.instruction_set().name,
        "threads": str(threads),
        "python": platform.python_version(),
        "versions": "; ".join(f"{name} {_version(name)}" for name in PACKAGES),
    }


def describe_gpu(device: str) -> dict[str, str]:
    """The GPU ``device`` as the bench's CSV has it: `describe` with the GPU's name and target, and triton's version."""
    from ..triton_kernels.tiles import target_of

    cpu = describe(torch.get_num_threads())
    runtime = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    return cpu | {
        "machine": torch.cuda.get_device_name(device),
        "isa": target_of(torch.device(device)),
        "versions": f"{cpu['versions']}; triton {version('triton')}; {runtime}",
    }


def missing(*packages: str) -> str:
    """``"not installed: ..."`` with those of ``packages`` that are not; an empty text if all are."""
    absent = [name for name in packages if find_spec(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else ""


def last_level_cache() -> int:
    """Bytes of the last-level cache according to the system; `CACHE_BYTES` if it does not say."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        if text[-1:] in "KM" and text[:-1].isdigit():
            sizes.append(int(text[:-1]) << (10 if text.endswith("K") else 20))
    return max(sizes, default=CACHE_BYTES)


def total_memory() -> int:
    """Bytes of the machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cpu_name() -> str:
    return torch.cpu.get_capabilities().get("cpu_name") or platform.processor()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "-"
