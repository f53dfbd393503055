"""GPTQ and AWQ checkpoints: their 4-bit and 8-bit linear layers as int8fx stores them, without rounding again.

Both store a layer ``X`` with K input and N output channels in G groups as ``X.qweight``, ``X.qzeros`` and ``X.scales
[G, N]``. Codes and zero points are in int32, the first in the lowest bits.

| | qweight | qzeros | zero point |
|---|---|---|---|
| GPTQ | ``[K * bits / 32, N]``, along K | ``[G, N * bits / 32]``, along N | one more than is stored |
| GPTQ, gptq_v2 | the same | the same | as stored |
| AWQ, gemm | ``[K, N / 8]``, along N, in the order 0, 2, 4, 6, 1, 3, 5, 7 | ``[G, N / 8]``, the same | as stored |

GPTQ has ``X.g_idx [K]`` too, the group of each input channel.

Sources: AutoGPTQ, ``qlinear_cuda_old.py``; GPTQModel, ``convert_gptq_v1_to_v2_format``; AutoAWQ, ``WQLinear_GEMM``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .groups import merged, pack_groups

_WORD = 32  # bits
_IN_ORDER = range(8)
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_QWEIGHT, _OTHERS = "qweight", ("qzeros", "scales", "g_idx")


class _Layer(NamedTuple):
    """The tensors of a quantised layer called ``name``."""

    name: str
    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor | None

    def refuse(self, found: str, legal: str) -> ValueError:
        return ValueError(f"int8fx: layer {self.name!r}: {found}; legal: {legal}")


def from_gptq(state_dict: Mapping[str, Tensor], *, v2: bool = False, compute: str = "fp32") -> dict[str, Tensor]:
    """A state dict of GPTQ layers as int8fx has it; other tensors stay as they are.

    Args:
        v2: whether zero points are as they are stored (``checkpoint_format`` ``gptq_v2``), and not one more.
        compute: as in `int8fx.weight_only`.

    Raises:
        ValueError: a layer lacks a part, or has one of another dtype or shape, other bits than 4 or 8, groups that are
            not of consecutive input channels, or a value that int8fx cannot hold. The message names the layer.
    """
    return merged(read_gptq(state_dict, v2=v2, compute=compute))


def from_awq(state_dict: Mapping[str, Tensor], *, compute: str = "fp32") -> dict[str, Tensor]:
    """A state dict of AWQ layers in the layout ``gemm`` as int8fx has it; other tensors stay as they are.

    Args:
        compute: as in `int8fx.weight_only`.

    Raises:
        ValueError: a layer lacks a part, or has one of another dtype or shape, or a value that int8fx cannot hold. The
            message names the layer.
    """
    return merged(read_awq(state_dict, compute=compute))


def read_gptq(state_dict: Mapping[str, Tensor], *, v2: bool, compute: str) -> Iterator[dict[str, Tensor]]:
    """The result of `from_gptq` in parts, each a layer or another tensor."""
    return _read(state_dict, partial(_gptq, v2=v2, compute=compute))


def read_awq(state_dict: Mapping[str, Tensor], *, compute: str) -> Iterator[dict[str, Tensor]]:
    """The result of `from_awq` in parts, each a layer or another tensor."""
    return _read(state_dict, partial(_awq, compute=compute))


def _read(
    state_dict: Mapping[str, Tensor], pack: Callable[[str, _Layer], dict[str, Tensor]]
) -> Iterator[dict[str, Tensor]]:
    prefixes = {prefix for key in state_dict for prefix, part in [_split(key)] if part == _QWEIGHT}
    for key in state_dict:
        prefix, part = _split(key)
        name = prefix.removesuffix(".")
        if part == _QWEIGHT:
            parts = {other: state_dict[prefix + other] for other in _OTHERS if prefix + other in state_dict}
            if missing := {"qzeros", "scales"} - parts.keys():
                raise ValueError(f"int8fx: layer {name!r} lacks {sorted(missing)[0]}; legal: qweight, qzeros, scales")
            if prefix + "weight" in state_dict:
                raise ValueError(f"int8fx: layer {name!r} has qweight and weight; legal: one of them")
            layer = _Layer(name, state_dict[key], parts["qzeros"], parts["scales"], parts.get("g_idx"))
            yield pack(prefix + "weight", layer)
        elif part not in _OTHERS or prefix not in prefixes:
            if part == "qzeros":
                raise ValueError(f"int8fx: layer {name!r} has qzeros and lacks qweight; legal: qweight, qzeros, scales")
            yield {key: state_dict[key]}


def _split(key: str) -> tuple[str, str]:
    """``a.b.qweight`` as ``a.b.`` and ``qweight``."""
    part = key.rpartition(".")[2]
    return key.removesuffix(part), part


def _check(layer: _Layer) -> None:
    """Raises ValueError unless the tensors are matrices of the dtypes and of the G and N that they all have."""
    for part, tensor in (("qweight", layer.qweight), ("qzeros", layer.qzeros)):
        if tensor.dtype != torch.int32 or tensor.dim() != 2:
            raise layer.refuse(f"{part} has {_described(tensor)}", "a matrix of int32")
    if not layer.scales.is_floating_point() or layer.scales.dim() != 2 or not layer.scales.numel():
        raise layer.refuse(f"scales has {_described(layer.scales)}", "floats [G, N]")
    if layer.qzeros.shape[0] != layer.scales.shape[0]:
        raise layer.refuse(
            f"qzeros has {_described(layer.qzeros)}, scales {_described(layer.scales)}", "as many rows, one per group"
        )


def _described(tensor: Tensor) -> str:
    return f"shape {tuple(tensor.shape)}, dtype {tensor.dtype}"


def _gptq(name: str, layer: _Layer, *, v2: bool, compute: str) -> dict[str, Tensor]:
    _check(layer)
    (rows, N), columns = layer.qweight.shape, layer.qzeros.shape[1]
    if layer.scales.shape[1] != N:
        raise layer.refuse(f"scales has {_described(layer.scales)}, qweight {_described(layer.qweight)}", "[G, N]")
    bits = next((bits for bits in (4, 8) if columns * _WORD == N * bits), None)
    if bits is None:
        raise layer.refuse(
            f"{columns} columns of qzeros for N = {N} output channels", "N * bits / 32 of them, and 4 or 8 bits"
        )
    K = rows * _WORD // bits
    size = _group_size(layer, K)
    zero_point = _unpack(layer.qzeros, bits).to(torch.int16)
    if not v2:
        zero_point += 1
        if bool((zero_point == 2**bits).any()):
            raise layer.refuse(
                f"a zero point is stored as {2**bits - 1}, which libraries read as {2**bits} or as 0",
                f"0 to {2**bits - 2}, or gptq_v2",
            )
    codes, scale = _unpack(layer.qweight.T, bits), layer.scales.T
    return pack_groups(name, codes, scale, zero_point.T, bits=bits, size=size, compute=compute)


def _group_size(layer: _Layer, K: int) -> int:
    """How many consecutive input channels have one scale; the last group may have fewer."""
    groups, index = layer.scales.shape[0], layer.g_idx
    if index is None:
        size = K // groups
        if K % groups or (groups > 1 and size & (size - 1)):  # the last group may be shorter: other sizes are possible
            raise layer.refuse(
                f"{groups} groups of K = {K} input channels, and no g_idx that says their size",
                "groups of equal size, a power of two",
            )
        return size
    if index.dtype not in (torch.int32, torch.int64) or index.shape != (K,):
        raise layer.refuse(f"g_idx has {_described(index)}", f"int32 [{K}]")
    if K and (int(index.min()) < 0 or int(index.max()) >= groups):
        raise layer.refuse(f"g_idx has {int(index.min())} to {int(index.max())}", f"0 to {groups - 1}, its groups")
    size = int((index == 0).sum())
    if not size or groups != -(-K // size) or not torch.equal(index.long(), torch.arange(K) // size):
        raise layer.refuse(
            "g_idx is not k // group_size: its groups are not of consecutive input channels (desc_act, act-order)",
            "a model quantised with desc_act=False or with static groups",
        )
    return size


def _awq(name: str, layer: _Layer, *, compute: str) -> dict[str, Tensor]:
    _check(layer)
    (K, columns), (groups, N) = layer.qweight.shape, layer.scales.shape
    if columns * 8 != N or layer.qzeros.shape[1] != columns:
        raise layer.refuse(
            f"qweight has {_described(layer.qweight)}, qzeros {_described(layer.qzeros)}, scales "
            f"{_described(layer.scales)}",
            "[K, N / 8], [G, N / 8], [G, N], as AutoAWQ's gemm has them",
        )
    if not K or K % groups:
        raise layer.refuse(f"{groups} groups of K = {K} input channels", "groups of equal size")
    codes, zero_point = (_unpack(packed, 4, _AWQ_ORDER).T for packed in (layer.qweight, layer.qzeros))
    return pack_groups(name, codes, layer.scales.T, zero_point, bits=4, size=K // groups, compute=compute)


def _unpack(packed: Tensor, bits: int, order: tuple[int, ...] | range = _IN_ORDER) -> Tensor:
    """Words ``[R, C]`` as codes ``[R, C * 32 / bits]`` uint8: ``order[j]`` is the place of the j-th lowest code."""
    count = _WORD // bits
    codes = torch.empty(packed.shape[0], packed.shape[1] * count, dtype=torch.uint8)
    for j, place in zip(range(count), order, strict=False):
        codes[:, place::count] = packed >> bits * j & 2**bits - 1
    return codes
