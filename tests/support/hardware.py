"""The Triton kernels on a GPU, for tests of CPU tensors: ``INT8FX_TEST_DEVICE=cuda pytest tests/triton_kernels``.

Each tensor is copied to the GPU with its strides, and each result is copied back. Only the kernels run on the GPU.
"""

import functools
import importlib
import os
from typing import Any

import torch
from torch._subclasses import FakeTensor
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = os.environ.get("INT8FX_TEST_DEVICE", "")

KERNELS = {
    "fused_linear": ("fused_linear",),
    "int8_matmul": ("int8_matmul",),
    "outliers": ("outlier_mask", "extract_outliers", "gather_weight"),
    "quantize_rowwise": ("quantize_rowwise",),
    "weight_only": ("weight_only",),
}


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    bytes_ = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).to(DEVICE)
    empty = torch.empty(0, dtype=tensor.dtype, device=DEVICE)
    return empty.set_(bytes_.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())


def _on_device(kernel):
    @functools.wraps(kernel)
    def run(*args: Any, **kwargs: Any):
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if any(isinstance(t, FakeTensor) or t.device.type != "cpu" for t in tensors):
            return kernel(*args, **kwargs)
        args, kwargs = tree_map_only(torch.Tensor, _copy, (args, kwargs))
        return tree_map_only(torch.Tensor, torch.Tensor.cpu, kernel(*args, **kwargs))

    return run


def install() -> None:
    """Replaces the launchers, in this process and without a way back."""
    for module_name, names in KERNELS.items():
        module = importlib.import_module(f"int8fx.triton_kernels.{module_name}")
        for name in names:
            setattr(module, name, _on_device(getattr(module, name)))
