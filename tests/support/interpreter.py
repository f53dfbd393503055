"""Triton's interpreter, corrected to compute what the hardware computes. Every test that runs a kernel imports it.

The interpreter of triton 3.7.1 has four errors. It multiplies the bits of bfloat16 values in `tl.dot` and converts
integers to bfloat16 as if they were bits. It cuts float32 to bfloat16, where hardware rounds to nearest even. It rounds
twice in `tl.fma`. Its float dots are a BLAS's, whose sums depend on where in the tile a row is; the sums of a matrix
instruction do not. Four functions are replaced, in this process only.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from support import hardware
from triton import knobs
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from int8fx import ops
from int8fx.ops import gpu, native
from int8fx.ops.rows import Form
from int8fx.ops.rows import form as rows_form

assert knobs.runtime.interpret or hardware.DEVICE, "set TRITON_INTERPRET=1 before triton is imported, as conftest does"


def _widen(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _round_to_bfloat16(x: np.ndarray) -> np.ndarray:
    return torch.from_numpy(np.array(x, np.float32)).bfloat16().view(torch.int16).numpy().view(np.uint16)


ONE_INSTRUCTION = 16
"""The length of the longest dot product that one matrix instruction computes."""

_cast = InterpreterBuilder.cast_impl
_dot = InterpreterBuilder.create_dot


def _cast_with_bfloat16(self, source, to):
    data, target = source.data, to.scalar
    if source.dtype.scalar == tl.bfloat16 and target != tl.bfloat16:
        source = TensorHandle(_widen(data), tl.float32)
    if target == tl.bfloat16 and source.dtype.scalar != tl.bfloat16:
        return TensorHandle(_round_to_bfloat16(source.data), target)
    return _cast(self, source, to) if source.dtype.scalar != target else source


def _dot_with_bfloat16(self, a, b, d, *options):
    a, b = (TensorHandle(_widen(t.data), tl.float32) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b))
    if d.dtype.scalar != tl.float32 or a.data.shape[-1] > ONE_INSTRUCTION:
        return _dot(self, a, b, d, *options)
    acc = d.data.copy()
    for k in range(a.data.shape[-1]):
        acc += a.data[:, k, None].astype(np.float32) * b.data[None, k].astype(np.float32)
    return TensorHandle(acc, tl.float32)


def _fma(self, x, y, z):
    exact = x.data.astype(np.float64) * y.data + z.data
    return TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)


def _convert(self, source, to, rounding):
    return _cast_with_bfloat16(self, source, to)


if not hardware.DEVICE:
    InterpreterBuilder.cast_impl = _cast_with_bfloat16
    InterpreterBuilder.create_fp_to_fp = _convert
    InterpreterBuilder.create_dot = _dot_with_bfloat16
    InterpreterBuilder.create_fma = _fma


@contextmanager
def cpu_tensors_on(kernels: ModuleType) -> Iterator[None]:
    """The ops of CPU tensors run on `fallback` or `gpu`; with `gpu`, on Triton's interpreter."""
    native.load()  # the kernels that are registered last serve
    library = torch.library.Library("int8fx", "IMPL")

    def form(rows: int, device_type: str, *weight: Any, **fields: Any) -> Form:
        return rows_form(rows, "cuda" if kernels is gpu else device_type, *weight, **fields)

    try:
        for name in ("linear", "linear_quantized", "quantize_rowwise", "grouped_linear"):
            library.impl(name, ops.kernel_on(kernels, name), "CPU", allow_override=True)
        with mock.patch.object(ops, "form", form):
            yield
    finally:
        library._destroy()


def cpu_tensors_on_triton() -> AbstractContextManager[None]:
    """The ops of CPU tensors run on Triton's interpreter."""
    return cpu_tensors_on(gpu)
