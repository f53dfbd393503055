"""The rotation of a row by orthonormal Hadamard blocks, in registers."""

import triton
import triton.language as tl


@triton.jit
def _butterfly(x, start, K, H: tl.constexpr, WHOLE_BLOCKS: tl.constexpr):
    """Replaces columns a and b at distance H by ``(a + b, a - b)``, in every group of ``2 * H`` within K."""
    SIZE: tl.constexpr = x.numel
    GROUPS: tl.constexpr = SIZE // (2 * H)
    pairs = tl.reshape(x, (GROUPS, 2, H))
    bits = pairs.to(tl.int32, bitcast=True)
    partner = (tl.sum(bits, 1, keep_dims=True) - bits).to(tl.float32, bitcast=True)
    second = tl.arange(0, 2)[None, :, None] > 0
    y = partner + tl.where(second, -pairs, pairs)
    if not WHOLE_BLOCKS:
        group = start // (2 * H) + tl.arange(0, GROUPS)
        y = tl.where((group < K // (2 * H))[:, None, None], y, pairs)
    return tl.reshape(y, (SIZE,))


@triton.jit
def rotate(x, start, K, BLOCK: tl.constexpr, WHOLE_BLOCKS: tl.constexpr):
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
        WHOLE_BLOCKS: K is a multiple of BLOCK.
    """
    if BLOCK > 1:
        norm = tl.full(x.shape, BLOCK**-0.5, tl.float32)
        if not WHOLE_BLOCKS:
            k = start + tl.arange(0, x.numel)
            norm = tl.full(x.shape, 1.0, tl.float32)
        for i in tl.static_range(0, 16):
            if 2 << i <= BLOCK:
                x = _butterfly(x, start, K, 1 << i, WHOLE_BLOCKS)
                if not WHOLE_BLOCKS:
                    norm = tl.where(k // (2 << i) < K // (2 << i), (2 << i) ** -0.5, norm)
        x *= norm
    return x
