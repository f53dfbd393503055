"""What follows the sums of a tile: scale, bias, activation, a second tensor, one rounding, the store."""

import triton
import triton.language as tl


@triton.jit
def _sigmoid(v):
    return 1.0 / (1.0 + tl.exp(-v))


@triton.jit
def activate(v, ACTIVATION: tl.constexpr):
    """The activations of `int8fx::linear`, in float32.

    ``gelu_tanh`` is ``0.5 * v * (1 + tanh(z))``, computed as ``v * sigmoid(2 * z)``: equal, and without cancellation.
    """
    if ACTIVATION == "relu":
        v = tl.where(v < 0, 0.0, v)  # keeps NaN, which maximum() would drop
    elif ACTIVATION == "silu":
        v = v * _sigmoid(v)
    elif ACTIVATION == "gelu":
        v = 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        v = v * _sigmoid(1.5957691216057308 * (v + 0.044715 * v * v * v))
    return v


@triton.jit
def scale_channels(acc, weight_scale_ptr, n, N, e):
    """``acc[m, n] * weight_scale[e, n]``."""
    at = weight_scale_ptr + e.to(tl.int64) * N + n
    return acc * tl.load(at, mask=n < N, other=0).to(tl.float32)[None, :]


@triton.jit
def finish(
    acc, bias_ptr, other_ptr, y_ptr, rows, row_mask, n, N, e, stride_om, stride_on,
    ACTIVATION: tl.constexpr, BINARY: tl.constexpr,
):  # fmt: skip
    """``y[rows, n] = binary(activation(acc + bias[e, n]), other[rows, n])``, rounded once.

    ``acc [BLOCK_M, BLOCK_N]`` is float32, ``rows`` int64, ``y [rows, N]`` contiguous; other has any strides.
    """
    n_mask = n < N
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + e.to(tl.int64) * N + n, mask=n_mask, other=0).to(tl.float32)[None, :]
    acc = activate(acc, ACTIVATION)
    mask = row_mask[:, None] & n_mask[None, :]
    if BINARY != "none":
        at = rows[:, None] * stride_om + n.to(tl.int64)[None, :] * stride_on
        other = tl.load(other_ptr + at, mask=mask, other=0).to(tl.float32)
        acc = acc + other if BINARY == "add" else acc * other
    tl.store(y_ptr + rows[:, None] * N + n[None, :], acc.to(y_ptr.dtype.element_ty), mask=mask)
