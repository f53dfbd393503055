"""Rotation by an orthonormal block-Hadamard matrix."""

from __future__ import annotations

import torch
from torch import Tensor


def rotation_blocks(K: int, block: int) -> list[tuple[int, int]]:
    """``(first column, size)`` of the diagonal blocks of `rotate`'s matrix: sizes are powers of two that add up to K.

    As many of size ``abs(block)`` as K holds, then smaller ones for the remaining columns, the largest first.
    """
    block = abs(block)
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

    H is a symmetric Hadamard matrix: its elements are 1 and -1, and ``H @ H = n * I``. So ``H / sqrt(n)`` is
    orthonormal and inverse to itself; ``rotate(x) @ rotate(w).T == x @ w.T`` and ``rotate(rotate(x)) == x`` in exact
    arithmetic. There are two kinds::

        Sylvester's:  S[k, j] = (-1) ** popcount(k & j)
        regular:      H[k, j] = d[k] * S[k, j] * d[j],   d[k] = (-1) ** (how many base-4 digits of k are 3)

    Where n is a power of four, all rows of the regular matrix have the sum sqrt(n): it is the Kronecker power of
    ``J - 2 P = [[1, 1, 1, -1], [1, -1, 1, 1], [1, 1, -1, 1], [-1, 1, 1, 1]]``, J all ones and P a permutation. A block
    of equal values c then stays c. Sylvester's first row has the sum n, and the others 0: it makes a single coefficient
    ``sqrt(n) * c`` of them, an outlier where inputs have a mean, as after GELU. Where n is twice a power of four, no
    matrix is regular; H has the sums ``sqrt(2 * n)`` in its first n / 2 rows and 0 in the others.

    Source of the regular matrices: ConvRot, arXiv 2512.03673. Its J - 2 P has the middle rows exchanged.

    Floats are summed in one order on every device and for every M: a multiplication by d, butterflies
    ``(a + b, a - b)`` of columns at distance 1, 2, 4, ..., n / 2, each rounded once, then a multiplication by
    ``d * n ** -0.5``. To first order::

        abs(error[m, k]) <= (log2(n) + 2) * u / sqrt(n) * sum_block(abs(x[m, j]))

    with u half the machine epsilon of x's dtype and the sum over the block that k is in.

    Args:
        x: ``[..., K]``, float32 or float64.
        block: the size of the blocks, a power of two, if they are Sylvester's; minus their size if they are regular; 1
            leaves x as it is.

    Returns:
        ``[..., K]`` of x's dtype.
    """
    K = x.shape[-1]
    if block == 1 or not x.numel():
        return x
    size, is_regular = abs(block), block < 0
    tail = K - K % size  # where the smaller blocks begin
    parts = [_hadamard(x[..., :tail], size, is_regular)] if tail else []
    parts += [_hadamard(x[..., i : i + n], n, is_regular) for i, n in rotation_blocks(K, block) if i >= tail]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _hadamard(x: Tensor, n: int, is_regular: bool) -> Tensor:
    y, h = x.reshape(-1, n), 1
    signs = x.new_ones(1)
    if is_regular:
        while 4 * len(signs) <= n:
            signs = torch.cat([signs, signs, signs, -signs])
        signs = signs.repeat(n // len(signs))
        y = y * signs
    while h < n:  # three distances at a time: torch then reads and writes the tensor half as often
        radix = min(8, n // h)
        columns = list(y.view(-1, n // (h * radix), radix, h).unbind(2))
        for i in (1, 2, 4)[: radix.bit_length() - 1]:
            for j in range(radix):
                if not j & i:
                    a, b = columns[j], columns[j | i]
                    columns[j], columns[j | i] = a + b, a - b
        y, h = torch.stack(columns, 2), h * radix
    return (y.view(-1, n) * (signs * n**-0.5)).view(x.shape)
