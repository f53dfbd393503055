"""The schemes in plain torch: the specification that kernels, fakes and passes are checked against."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .quantize import compute_dtype, dequantize, outlier_mask, quantize_rowwise, rotate

ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "none": lambda y: y,
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
}
BINARIES: dict[str, Callable[..., Tensor]] = {"none": lambda y, other: y, "add": torch.add, "mul": torch.mul}


def linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    threshold: float = 6.0,
    activation: str = "none",
    other: Tensor | None = None,
    binary: str = "none",
    block: int = 1,
    columns: Tensor | None = None,
    columns_weight: Tensor | None = None,
    top: int = 0,
) -> Tensor:
    """``y = binary(activation(x_int8 @ weight_int8.T * scales + x_outlier @ (weight_int8 * scale).T + bias), other)``.

    The paper's decomposition (arXiv 2208.07339, equation 8): columns of the flattened ``[M, K]`` input with
    any ``abs(x) >= threshold`` are multiplied in floating point, the rest in int8 with one scale per row
    of x (absmax over the columns that are left) and one per output channel. The residual uses the
    weight's int8 codes times its scale, since no other copy of the weight exists.

    bitsandbytes differs: its row absmax leaves out outlier *elements*, so the small elements of an outlier
    column still stretch the row's scale, which makes it a little coarser.

    Rotated int8 is the same with ``R = rotate`` (`quantize.rotate`; the identity for ``block=1``) around the codes, and
    ``columns`` that are taken out of x and of the weight before it::

        y = quantize(R(x_rest)) @ weight.T * scales + x_outlier @ R(weight * weight_scale)[:, outliers].T
            + x[:, columns] @ columns_weight.T

    ``weight`` holds the codes of ``R(W without columns)``; ``x_rest`` is x with zeros in ``columns`` and in the
    outlier columns, which the threshold or ``top`` find among the others. R is orthonormal, so its product with R(x)
    is that of W with x.

    Sums are float32 (float64 for float64 x) and the result is rounded once. Against ``y = x @ w.T + bias`` in
    exact arithmetic, with ``w = weight * weight_scale`` and no rotation, before an epilogue::

        abs(error[m, n]) <= Q + S + R
        Q = (1 + 2**-16) * x_scale[m] / 2 * sum_in(abs(w[n, k]))
        S = (outliers + 5) * u * (sum_in(abs(codes[m, k] * x_scale[m] * w[n, k])) + sum_out(abs(x[m, k] * w[n, k]))
                                  + abs(bias[n])) + (outliers + 1) * h
        R = U * (abs(y[m, n]) + Q + S) + H

    ``sum_out`` runs over the outlier columns and ``sum_in`` over the others. Q is the rounding of x to codes (see
    `quantize_rowwise`). S is that of the sums, to first order (the exact factor is ``n * u / (1 - n * u)``): the
    int8 sum is exact and rounded by its conversion, two scales and two additions; a residual of that many
    products, in any order, by one rounding per weight, product or addition, and the same two additions. ``u``
    is half the machine epsilon of the sums and ``h`` half their smallest subnormal; U and H the same of x's
    dtype, where that is narrower, else R is 0. It holds where no sum overflows its dtype.

    With a rotation, ``y = x @ w.T + bias`` has ``w = R(weight * weight_scale)`` with ``columns_weight`` in its columns.
    In Q and in ``sum_in`` of S, w is ``v = weight * weight_scale`` as it is rotated, and ``sum_in`` is over all k;
    ``outliers`` and ``sum_out`` count ``columns`` too. A term T is added for the rounding errors of R, of x and, where
    x's outliers need it, of the weight::

        T = sum_in(t(x_rest)[m, k] * abs(v[n, k])) + sum_outliers(abs(x[m, k]) * (t(v)[n, k] + 2 * u * abs(w[n, k])))
        t(z)[m, k] = (log2(size) + 3) * u / sqrt(size) * sum_block(abs(z[m, j])) + (sqrt(size) + 1) * h

    ``sum_block`` runs over the block that column k is in, of that size.

    Args:
        x: ``[..., K]``; float16, bfloat16, float32 or float64. ``[E, M, K]`` for a batched weight.
        weight: ``[N, K]`` int8, or ``[E, N, K]``: then ``y[e]`` is the product of ``x[e]`` and ``weight[e]``,
            each with its own outlier columns.
        weight_scale: ``[N]`` or ``[E, N]`` float32.
        bias: ``[N]`` or ``[E, N]``, any float dtype.
        threshold: >= 0; inf for plain int8, 0 for a product that is exact up to the weights.
        activation: none, relu, silu, gelu or gelu_tanh.
        other: of y's shape, for ``binary``.
        binary: none, add or mul.
        block: of the rotation, a power of two; 1 for none.
        columns: ``[C]`` int64, distinct: the columns that are kept, whatever x is.
        columns_weight: ``[N, C]`` or ``[E, N, C]``, any float dtype: their weights, exact.
        top: this many columns with the largest absmax over x are outliers beside those of the threshold.

    Returns:
        ``[..., N]`` of x's dtype.
    """
    if weight.dim() == 3:
        y = x.new_empty(*x.shape[:-1], weight.shape[1])
        for e in range(weight.shape[0]):
            bias_e, other_e = (None if t is None else t[e] for t in (bias, other))
            columns_e = None if columns_weight is None else columns_weight[e]
            rotation = (block, columns, columns_e, top)
            y[e] = linear(x[e], weight[e], weight_scale[e], bias_e, threshold, activation, other_e, binary, *rotation)
        return y
    ct = compute_dtype(x.dtype)
    x2d = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).to(ct)
    rest = x2d if columns is None else x2d.index_fill(1, columns, 0)
    mask = outlier_mask(rest, threshold, columns, top)
    codes, x_scale = quantize_rowwise(rotate(rest.masked_fill(mask, 0), block))
    y = (codes.double() @ weight.double().T).to(ct)  # exact: every partial sum is below 2**53
    y = y * x_scale[:, None] * weight_scale.to(ct)
    y = y + x2d[:, mask] @ dequantize(weight, weight_scale, ct, block)[:, mask].T
    if columns is not None and columns_weight is not None:
        y = y + x2d[:, columns] @ columns_weight.to(ct).T
    if bias is not None:
        y = y + bias.to(ct)
    y = ACTIVATIONS[activation](y).reshape(*x.shape[:-1], weight.shape[0])
    if other is not None:
        y = BINARIES[binary](y, other.to(ct))
    return y.to(x.dtype)
