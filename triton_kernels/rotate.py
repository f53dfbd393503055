"""The rotation of a row by orthonormal Hadamard blocks, in registers."""

import triton
import triton.language as tl


@triton.jit
def _butterfly(
    x, start, K, STEP: tl.constexpr, BLOCK: tl.constexpr, REGULAR: tl.constexpr, WHOLE_BLOCKS: tl.constexpr
):  # fmt: skip
    """The step at distance ``H = 2 ** STEP``: columns a and b become ``(a + b, a - b)`` in every group of 2 H within K.

    Two steps of a regular matrix, over the bits of a base-4 digit of the column, multiply by ``[[1, 1, 1, -1],
    [1, -1, 1, 1], [1, 1, -1, 1], [-1, 1, 1, 1]]``. Their signs are 1, -1, -1, 1 by the digit: of the partner in the
    first step, of the column itself in the second. The last step is Sylvester's if it has no other bit of a digit.
    """
    SIZE: tl.constexpr = x.numel
    H: tl.constexpr = 1 << STEP
    GROUPS: tl.constexpr = SIZE // (2 * H)
    pairs = tl.reshape(x, (GROUPS, 2, H))
    bits = pairs.to(tl.int32, bitcast=True)
    partner = (tl.sum(bits, 1, keep_dims=True) - bits).to(tl.float32, bitcast=True)
    second = tl.arange(0, 2)[None, :, None]
    group = start // (2 * H) + tl.arange(0, GROUPS)
    negative = second
    if REGULAR and STEP % 2 == 1:
        negative = second ^ (tl.arange(0, H) >> (STEP - 1))[None, None, :]
    y = partner + tl.where(negative > 0, -pairs, pairs)
    if REGULAR and STEP % 2 == 0 and 4 * H <= BLOCK:
        z = pairs + tl.where((second ^ (group & 1)[:, None, None]) > 0, -partner, partner)
        y = z if WHOLE_BLOCKS else tl.where((group // 2 < K // (4 * H))[:, None, None], z, y)
    if not WHOLE_BLOCKS:
        y = tl.where((group < K // (2 * H))[:, None, None], y, pairs)
    return tl.reshape(y, (SIZE,))


@triton.jit
def rotate(x, start, K, BLOCK: tl.constexpr, REGULAR: tl.constexpr, WHOLE_BLOCKS: tl.constexpr):
    """The columns ``start <= k < start + len(x)`` of a row, rotated; equal bit for bit to the reference's ``rotate``.

    Butterflies of columns at distance 1, 2, 4, ..., BLOCK / 2, each rounded once, then a product with ``n ** -0.5``.
    A column reads its partner as the integer ``(a + b) - a`` of their bits, which wraps around. The compiler simplifies
    this: a partner in the same thread costs nothing, one in the same warp a shuffle.

    The columns after the last whole block are rotated in blocks of decreasing powers of two. Each of these begins at a
    multiple of twice its size. So two columns at distance H are a pair exactly if K holds their whole group of
    ``2 * H``: ``k // (2 * H) < K // (2 * H)``.

    Args:
        x: float32; its length is a power of two, at least BLOCK; 0 where k >= K.
        start: a multiple of BLOCK.
        BLOCK: a power of two; 1 for no rotation.
        REGULAR: whether the Hadamard matrices are the regular ones, or else Sylvester's.
        WHOLE_BLOCKS: K is a multiple of BLOCK.
    """
    if BLOCK > 1:
        norm = tl.full(x.shape, BLOCK**-0.5, tl.float32)
        if not WHOLE_BLOCKS:
            k = start + tl.arange(0, x.numel)
            norm = tl.full(x.shape, 1.0, tl.float32)
        for i in tl.static_range(0, 16):
            if 2 << i <= BLOCK:
                x = _butterfly(x, start, K, i, BLOCK, REGULAR, WHOLE_BLOCKS)
                if not WHOLE_BLOCKS:
                    norm = tl.where(k // (2 << i) < K // (2 << i), (2 << i) ** -0.5, norm)
        x *= norm
    return x
