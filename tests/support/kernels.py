"""The kernels for CPU tensors, called in one way: the C++ kernels through the ops, or `fallback`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from support.helpers import Problem
from torch import Tensor

from int8fx import ops
from int8fx.ops import fallback
from int8fx.schemes.weight import Int8Weight

KERNELS = ("native", "float_gemm", "int_mm")
"""The C++ kernels; `fallback` that multiplies codes by the float GEMM; `fallback` that does it by ``aten::_int_mm``."""


@dataclass(frozen=True)
class Kernels:
    """``name``: of KERNELS. Of `fallback`, only inside `torch_kernels` is it known which way it multiplies codes."""

    name: str

    def linear(self, p: Problem) -> Tensor:
        return ops.linear(*p.args) if self.name == "native" else fallback.linear(*p)

    def quantize_rowwise(self, p: Problem) -> tuple[Tensor, Tensor, Tensor]:
        kernels = ops if self.name == "native" else fallback
        return kernels.quantize_rowwise(*p.quantize_args)

    def linear_quantized(self, p: Problem, quantized: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        if self.name == "native":
            return ops.linear_quantized(p.x, *quantized, *p.weight, *p.epilogue)
        return fallback.linear_quantized(p.x, *quantized, p.weight, p.epilogue)

    def grouped_linear(self, x: Tensor, offsets: Tensor, weight: Int8Weight, bias: Tensor | None = None) -> Tensor:
        if self.name == "native":
            return ops.grouped_linear(x, offsets, *weight, bias)
        return fallback.grouped_linear(x, offsets, weight, bias)


@contextmanager
def torch_kernels(name: str) -> Iterator[None]:
    """`fallback` with one way to multiply codes, whatever this CPU has.

    ``_int_mm`` is exact on every CPU, and fast with VNNI. torch 2.13 with VNNI returns uninitialised memory for K = 1:
    a call with K < 2 fails here on every CPU.
    """
    int_mm = torch._int_mm

    def checked_int_mm(codes: Tensor, weight: Tensor) -> Tensor:
        assert codes.shape[1] > 1, f"torch._int_mm with K = {codes.shape[1]}"
        return int_mm(codes, weight)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fallback, "has_fast_int_mm", lambda: name == "int_mm")
        patch.setattr(torch, "_int_mm", checked_int_mm)
        yield
