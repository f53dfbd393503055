"""The machine and the versions of a measurement."""

from __future__ import annotations

import platform

import torch

from .. import __version__
from ..ops import native


def machine() -> str:
    """The CPU, the versions, and properties of this CPU that explain its times."""
    import transformers

    capabilities = torch.cpu.get_capabilities()
    line = (
        f"{capabilities.get('cpu_name') or platform.processor()} ({torch.backends.cpu.get_cpu_capability()}), "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"int8fx {__version__}"
    )
    if not any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")):
        line += "\nThis CPU has no bfloat16 instructions: torch's bfloat16 is slow on it."
    kernels = f"C++ for {native.instruction_set().name}" if native.load() else "torch's operators, which are slow"
    return f"{line}\nint8 matmuls: {kernels}."
