"""Triton's interpreter, made to compute what the hardware computes; imported by every test that runs a kernel.

The interpreter of triton 3.7.1 stores bfloat16 as its bits and then multiplies those in `tl.dot`, converts integers to
them as if they were integers, cuts float32 to bfloat16 where hardware rounds to nearest even, and rounds twice in
`tl.fma`. Its float products are a BLAS's, whose sums depend on where in its tile a row stands; those of one matrix
instruction do not. The four functions below are replaced in this process only.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import triton.language as tl
from support import hardware
from triton import knobs
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from int8fx import ops
from int8fx.ops import gpu, native

assert knobs.runtime.interpret or hardware.DEVICE, "set TRITON_INTERPRET=1 before triton is imported, as conftest does"


def _widen(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _round_to_bfloat16(x: np.ndarray) -> np.ndarray:
    return torch.from_numpy(np.array(x, np.float32)).bfloat16().view(torch.int16).numpy().view(np.uint16)


ONE_INSTRUCTION = 16
"""Up to how many products of a row and a column a matrix instruction adds up."""

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
def cpu_tensors_on_triton() -> Iterator[None]:
    """The interpreter's kernels behind the ops of CPU tensors."""
    native.load()  # what was registered last serves
    library = torch.library.Library("int8fx", "IMPL")
    try:
        for name in ("linear", "linear_quantized", "quantize_rowwise", "grouped_linear"):
            library.impl(name, ops.kernel_on(gpu, name), "CPU", allow_override=True)
        yield
    finally:
        library._destroy()
