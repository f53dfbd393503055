"""The schemes in plain torch: the specification that kernels, fakes and passes are checked against."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .quantize import compute_dtype, dequantize, outlier_mask, quantize_rowwise
from .rotate import rotate
from .weight import NO_EPILOGUE, Epilogue, Int8Weight

ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "none": lambda y: y,
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
}
BINARIES: dict[str, Callable[..., Tensor]] = {"none": lambda y, other: y, "add": torch.add, "mul": torch.mul}


def linear(x: Tensor, weight: Int8Weight, epilogue: Epilogue = NO_EPILOGUE) -> Tensor:
    """``y = binary(activation(x_int8 @ codes.T * scales + x_outlier @ (codes * scale).T + bias), other)``.

    The paper's decomposition (arXiv 2208.07339, equation 8): columns of the flattened ``[M, K]`` input with any
    ``abs(x) >= threshold`` are multiplied in floating point. The other columns are multiplied in int8, with one scale
    per row of x (its absmax over these columns) and one per output channel. The residual uses the weight's int8 codes
    times its scale, since no other copy of the weight exists.

    bitsandbytes differs: its row absmax leaves out outlier *elements*, so the small elements of an outlier column still
    stretch the row's scale, which makes it a little coarser.

    Rotated int8 is the same with ``R = rotate`` (`rotate.rotate`; the identity for ``block=1``) around the codes, and
    with ``columns`` that are taken out of x and of the weight before it::

        y = quantize(R(x_int8)) @ codes.T * scales + x_outlier @ (codes * scale)[:, outliers].T
            + x[:, columns] @ columns_weight.T

    ``codes`` are those of ``R(W without columns)``. ``x_int8`` is x with zeros in ``columns`` and in the outlier
    columns. R is orthonormal, so ``R(x) @ R(W).T == x @ W.T``. A rotation takes no threshold: the columns
    of rotated codes are not the columns of x.

    Sums are float32 (float64 for float64 x) and the result is rounded once. Against ``y = x @ w.T + bias`` in
    exact arithmetic, with ``w = codes * scale`` and no rotation, before the activation::

        abs(error[m, n]) <= Q + S + R
        Q = (1 + 2**-16) * x_scale[m] / 2 * sum_in(abs(w[n, k]))
        S = (outliers + 5) * u * (sum_in(abs(x_codes[m, k] * x_scale[m] * w[n, k])) + sum_out(abs(x[m, k] * w[n, k]))
                                  + abs(bias[n])) + (outliers + 1) * h
        R = U * (abs(y[m, n]) + Q + S) + H

    ``sum_out`` runs over the outlier columns and ``columns``, ``sum_in`` over the others, and ``outliers`` counts the
    former. Q is the rounding of x to codes (see `quantize_rowwise`). S is that of the sums, to first order (the exact
    factor is ``n * u / (1 - n * u)``): the int8 sum is exact and rounded by its conversion, two scales and two
    additions; a residual of that many terms, in any order, by one rounding per weight, product or addition, and the
    same two additions. ``u`` is half the machine epsilon of the sums and ``h`` half their smallest subnormal; U and H
    are the same of x's dtype, where that is narrower, else R is 0. It holds where no sum overflows its dtype.
    For bfloat16 x, S is larger by D, since the bfloat16 dot products of CPUs take subnormal numbers for 0::

        D = 2**-126 * (sum_k(abs(w[n, k]) + weight_scale[n]) + sum_columns(abs(x[m, k]) + abs(w[n, k]) + 1))

    Where x is not quantised, a kernel may multiply rows of 16-bit x as fixed-point numbers of 31 bits, exactly. Then S
    is larger by F::

        F = 2**-30 * max_k(abs(x[m, k])) * sum_k(abs(w[n, k]))

    A weight of another format, or with groups, has ``w = (level - zero_point) * scale`` (`quantize.dequantize`) in
    place of ``codes * scale``. Its sums run in floating point, so ``outliers`` is K in S. Where x is quantised, a
    kernel may round the levels of a table of floats to multiples of 1/127. Then S is larger by L::

        L = 1 / 254 * sum_in(abs(x_codes[m, k] * x_scale[m] * scale[n, k]))

    With a rotation, ``y = x @ w.T + bias`` has ``w = R(codes * scale)`` with ``columns_weight`` in its columns. In Q
    and in ``sum_in`` of S, w is ``v = codes * scale`` as it is rotated, and ``sum_in`` is over all k. A term T is added
    for the rounding errors of R(x)::

        T = sum_in(t(x_int8)[m, k] * abs(v[n, k]))
        t(z)[m, k] = (log2(size) + 3) * u / sqrt(size) * sum_block(abs(z[m, j])) + (sqrt(size) + 1) * h

    ``sum_block`` runs over the block that column k is in, of that size.

    Args:
        x: ``[..., K]``; float16, bfloat16, float32 or float64. ``[E, M, K]`` for the weights of E experts: then
            ``y[e]`` is `linear` of ``x[e]`` and the weight of expert e. Outlier columns are chosen for each expert.
        weight: codes ``[N, K]`` or ``[E, N, K]``.
        epilogue: bias, activation and binary.

    Returns:
        ``[..., N]`` of x's dtype.
    """
    if weight.codes.dim() == 3:
        y = x.new_empty(*x.shape[:-1], weight.codes.shape[1])
        for e in range(weight.codes.shape[0]):
            y[e] = linear(x[e], weight.of_expert(e), epilogue.of_expert(e))
        return y
    ct = compute_dtype(x.dtype)
    x2d = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).to(ct)
    quantised = x2d if weight.columns is None else x2d.index_fill(1, weight.columns, 0)
    mask = outlier_mask(quantised, weight.threshold, weight.columns)
    codes, x_scale = quantize_rowwise(rotate(quantised.masked_fill(mask, 0), weight.block))
    stored = weight._replace(block=1, columns=None, columns_weight=None)
    if weight.is_plain:
        y = (codes.double() @ weight.codes.double().T).to(ct)  # exact: every partial sum is below 2**53
        y = y * x_scale[:, None] * weight.scale.to(ct)
    else:
        y = (codes.double() @ dequantize(stored, torch.float64).T).to(ct) * x_scale[:, None]
    y = y + x2d[:, mask] @ dequantize(stored, ct)[:, mask].T
    if weight.columns is not None and weight.columns_weight is not None:
        y = y + x2d[:, weight.columns] @ weight.columns_weight.to(ct).T
    if epilogue.bias is not None:
        y = y + epilogue.bias.to(ct)
    y = ACTIVATIONS[epilogue.activation](y).reshape(*x.shape[:-1], weight.codes.shape[0])
    if epilogue.other is not None:
        y = BINARIES[epilogue.binary](y, epilogue.other.to(ct))
    return y.to(x.dtype)


def grouped_linear(x: Tensor, offsets: Tensor, weight: Int8Weight, bias: Tensor | None = None) -> Tensor:
    """`linear` of groups of rows, each with the weight of its expert. Outlier columns are chosen for each group.

    Args:
        x: ``[S, K]``, sorted by expert.
        offsets: ``[E]`` integers, the end of each expert's rows. Rows after the last group give 0.
        weight: codes ``[E, N, K]``.
        bias: ``[E, N]``.

    Returns:
        ``[S, N]`` of x's dtype.
    """
    y = x.new_zeros(x.shape[0], weight.codes.shape[1])
    begin = 0
    for e, end in enumerate(offsets.tolist()):
        if end > begin:
            y[begin:end] = linear(x[begin:end], weight.of_expert(e), Epilogue(bias).of_expert(e))
        begin = max(begin, end)
    return y
