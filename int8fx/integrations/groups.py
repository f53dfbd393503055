"""Integer codes of other libraries as packed weights of int8fx, with the same values."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..conversion.format import FORMAT, format_tensor
from ..schemes import weight_only
from ..schemes.formats import SCALE_DTYPES, pack, per_column
from ..schemes.weight import PackedTensors


def merged(parts: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """One state dict of its parts."""
    return {name: tensor for part in parts for name, tensor in part.items()}


def pack_groups(
    name: str, codes: Tensor, scale: Tensor, zero_point: Tensor | None, *, bits: int, size: int, compute: str
) -> dict[str, Tensor]:
    """The tensors of the packed weight ``w[n, k] = (codes[n, k] - zero_point[n, k // size]) * scale[n, k // size]``.

    Values are the same bit for bit, but for the sign of a zero. 4 bits with zero point 8 everywhere become
    ``int4_fullrange``, whose scales may be negative, others ``int4_clip``. 8 bits become ``int8``, less 128. A group
    with a negative scale is stored with the opposite scale and the opposite codes where the format has no such scales.
    A group with the scale 0, which int8fx does not have, gets the codes of 0 and another scale.

    Args:
        name: of the weight.
        codes: ``[N, K]`` uint8, below ``2**bits``.
        scale: ``[N, G]``, float32, bfloat16 or float16.
        zero_point: ``[N, G]`` integers from 0 to ``2**bits - 1``, or None for ``2**(bits - 1)`` everywhere.
        bits: 4 or 8.
        size: of the groups; a row is one group if it is K or more.
        compute: as in `weight_only`.

    Raises:
        ValueError: a scale is NaN or inf or of another dtype, or a zero point is out of range. The message names the
            weight.
    """
    scale_dtype = next((text for text, dtype in SCALE_DTYPES.items() if dtype == scale.dtype), None)
    if scale_dtype is None:
        raise ValueError(f"int8fx: {name!r} has scales of {scale.dtype}; legal: {', '.join(SCALE_DTYPES)}")
    if not bool(scale.isfinite().all()):
        raise ValueError(f"int8fx: {name!r} has a scale that is NaN or inf; legal: finite scales")
    K, largest, middle = codes.shape[-1], 2**bits - 1, 2 ** (bits - 1)
    if zero_point is not None:
        wrong = (zero_point < 0) | (zero_point > largest)
        if bool(wrong.any()):
            raise ValueError(
                f"int8fx: {name!r} has a zero point of {int(zero_point[wrong][0])}; legal: 0 to {largest}, those of "
                f"{bits} bits"
            )
    zero = torch.full(scale.shape, middle, dtype=torch.uint8) if zero_point is None else zero_point.to(torch.uint8)
    if bits == 8 or bool((zero != middle).any()):
        negative = scale < 0
        if bool(negative.any()):
            codes = torch.where(per_column(negative, K, size), largest - codes, codes)
            zero, scale = torch.where(negative, largest - zero, zero), scale.abs()
    empty = scale == 0
    if bool(empty.any()):
        codes = torch.where(per_column(empty, K, size), per_column(zero, K, size), codes)
        scale = scale.masked_fill(empty, torch.finfo(scale.dtype).tiny)
    asymmetric = bool((zero != middle).any()) or (bits == 8 and bool((codes == 0).any()))  # symmetric int8: from -127
    if bits == 8:
        dtype, codes, zero = "int8", _less_128(codes), _less_128(zero)
    else:
        dtype, codes = "int4_clip" if asymmetric else "int4_fullrange", pack(codes)
    one = size >= K
    scheme = weight_only(dtype, -1 if one else size, asymmetric, scale_dtype, compute=compute)
    scale, zero = (t.squeeze(1).contiguous() if one else t.contiguous() for t in (scale, zero))
    tensors = PackedTensors(codes.contiguous(), scale, zero_point=zero if asymmetric else None)
    return {**tensors.named(name), name + FORMAT: format_tensor(scheme)}


def _less_128(codes: Tensor) -> Tensor:
    """uint8 as int8, less 128."""
    return (codes ^ 128).view(torch.int8)
