"""Rotation by an orthonormal block-Hadamard matrix."""

from __future__ import annotations

import torch
from torch import Tensor


def rotation_blocks(K: int, block: int) -> list[tuple[int, int]]:
    """``(first column, size)`` of the diagonal blocks of `rotate`'s matrix: sizes are powers of two that add up to K.

    As many of size ``block`` as K holds, then smaller ones for the remaining columns, the largest first.
    """
    blocks = [(i, block) for i in range(0, K - block + 1, block)]
    begin, size = K - K % block, block // 2
    while size:
        if K & size:
            blocks.append((begin, size))
            begin += size
        size //= 2
    return blocks


def rotate(x: Tensor, block: int) -> Tensor:
    """``y[..., i + j] = sum_k(x[..., i + k] * H[k, j]) / sqrt(n)`` in each block ``(i, n)`` of `rotation_blocks`.

    H is Sylvester's Hadamard matrix, ``H[k, j] = (-1) ** popcount(k & j)``. ``H / sqrt(n)`` is orthonormal and
    inverse to itself, so ``rotate(x) @ rotate(w).T == x @ w.T`` and ``rotate(rotate(x)) == x`` in exact arithmetic.

    Floats are summed in one order on every device and for every M: butterflies ``(a + b, a - b)`` of columns at
    distance 1, 2, 4, ..., n / 2, each rounded once, then a multiplication by ``n ** -0.5``. To first order::

        abs(error[m, k]) <= (log2(n) + 2) * u / sqrt(n) * sum_block(abs(x[m, j]))

    with u half the machine epsilon of x's dtype and the sum over the block that k is in.

    Args:
        x: ``[..., K]``, float32 or float64.
        block: a power of two; 1 leaves x as it is.

    Returns:
        ``[..., K]`` of x's dtype.
    """
    K = x.shape[-1]
    if block == 1 or not x.numel():
        return x
    tail = K - K % block  # where the smaller blocks begin
    parts = [_hadamard(x[..., :tail], block)] if tail else []
    parts += [_hadamard(x[..., i : i + n], n) for i, n in rotation_blocks(K, block) if i >= tail]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _hadamard(x: Tensor, n: int) -> Tensor:
    y, h = x.reshape(-1, n), 1
    while h < n:  # three distances at a time: torch then reads and writes the tensor half as often
        radix = min(8, n // h)
        columns = list(y.view(-1, n // (h * radix), radix, h).unbind(2))
        for i in (1, 2, 4)[: radix.bit_length() - 1]:
            for j in range(radix):
                if not j & i:
                    a, b = columns[j], columns[j | i]
                    columns[j], columns[j | i] = a + b, a - b
        y, h = torch.stack(columns, 2), h * radix
    return y.reshape(x.shape) * n**-0.5
