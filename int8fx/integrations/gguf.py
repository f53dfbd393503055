"""GGUF files, of llama.cpp: their weights as int8fx stores them, without rounding again.

| type | block of 32 weights | int8fx |
|---|---|---|
| Q4_0 | float16 d; 16 bytes, whose lower halves are the first 16 codes: ``w = (code - 8) * d`` | ``int4_fullrange`` |
| Q8_0 | float16 d; 32 int8 codes: ``w = code * d`` | ``int8`` |

Tensors of other types, and those that int8fx does not pack, such as embeddings, become floats. The names of tensors,
and the order of their rows, are those of transformers' own reader (``modeling_gguf_pytorch_utils``).

Source: ggml's ``ggml-common.h`` and the package ``gguf``, which reads the file.
"""

from __future__ import annotations

import mmap
import struct
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..conversion.layers import walk
from .groups import merged, pack_groups

_BLOCK = 32
_FLOATS = ("F32", "F16", "BF16", "F64")
_SHOWN = 4  # names in a message


def from_gguf(
    file: str | Path, model: Any, *, dtype: torch.dtype = torch.float32, compute: str = "fp32"
) -> dict[str, Tensor]:
    """The state dict of a GGUF file as int8fx has it, for a model of transformers.

    A UserWarning names the quantised tensors that become floats.

    Args:
        model: the float model of the file's configuration. It may be on meta, and is not changed.
        dtype: of the tensors that are not packed. float32 holds their values exactly.
        compute: as in `int8fx.weight_only`.

    Raises:
        ImportError: the package ``gguf`` is not installed.
        ValueError: the file is damaged or has nothing to pack, transformers cannot read its architecture, or int8fx
            cannot hold a value. The message names the file or the tensor.
    """

    def warn(text: str) -> None:
        warnings.warn(f"int8fx: {file}: {text}", stacklevel=4)

    return merged(read_gguf(open_gguf(Path(file)), model, dtype=dtype, compute=compute, note=warn))


class _Place(NamedTuple):
    """A weight that int8fx packs: ``[N, K]`` of its codes, and how its module has it, as in `packed.Reading`."""

    shape: tuple[int, ...]
    layout: str


def read_gguf(
    reader: Any, model: Any, *, dtype: torch.dtype, compute: str, note: Callable[[str], None]
) -> Iterator[dict[str, Tensor]]:
    """The result of `from_gguf` in parts, each a tensor of the file. ``note`` is told at the end what became floats.

    Args:
        reader: what `open_gguf` returns.
    """
    from gguf import dequantize
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    processor = TENSOR_PROCESSORS.get(_architecture(reader), TensorProcessor)(config=model.config.to_dict())
    try:
        names = get_gguf_hf_weights_map(model, processor)
    except NotImplementedError as error:
        raise ValueError(f"int8fx: a GGUF file of the architecture {_architecture(reader)!r}: {error}") from error
    places, tied = _places(model), _tied_names(model)
    if not any(tensor.tensor_type.name in _UNPACK and names.get(tensor.name) in places for tensor in reader.tensors):
        kinds = Counter(tensor.tensor_type.name for tensor in reader.tensors)
        found = ", ".join(f"{count} of {kind}" for kind, count in kinds.most_common())
        raise ValueError(
            f"int8fx: no weight to pack among the tensors of the GGUF file: {found or 'none'}; legal: Q4_0, Q8_0. "
            "Others can be quantised anew: from_pretrained(folder, gguf_file=...) of transformers, then int8fx.convert"
        )
    experts: dict[str, Any] = {"tensors": {}}  # of a layer, as transformers stacks them
    dequantised: dict[str, list[str]] = {}
    for tensor in reader.tensors:
        name, kind = names.get(tensor.name), tensor.tensor_type.name
        place = places.get(name)
        order = None if place is None or kind not in _UNPACK else _row_order(processor, tensor, place.layout)
        if place is not None and order is not None:
            codes, scale, bits = _UNPACK[kind](torch.from_numpy(tensor.data.copy()))
            if codes.shape != place.shape:
                raise ValueError(
                    f"int8fx: {tensor.name!r} has shape {tuple(codes.shape)}; legal: {place.shape}, that of {name!r}"
                )
            packed = pack_groups(name, codes[order], scale[order], None, bits=bits, size=_BLOCK, compute=compute)
            yield {other + k.removeprefix(name): t for other in tied[name] for k, t in packed.items()}
            continue
        try:
            values = dequantize(tensor.data, tensor.tensor_type)
            result = processor.process(
                weights=values, name=tensor.name, tensor_key_mapping=names, parsed_parameters=experts
            )
        except (NotImplementedError, KeyError, ValueError) as error:
            raise ValueError(f"int8fx: {tensor.name!r} of type {kind}: {type(error).__name__}: {error}") from error
        if (name := names.get(result.name)) is not None:
            value = torch.from_numpy(result.weights.copy()).to(dtype)
            yield dict.fromkeys(tied.get(name, [name]), value)
        if kind not in _FLOATS and (name is not None or result.name is None):
            dequantised.setdefault(kind, []).append(tensor.name)
    for name, value in experts["tensors"].items():
        yield {name: value.to(dtype)}
    for kind, those in dequantised.items():
        shown = ", ".join(those[:_SHOWN]) + (", ..." if len(those) > _SHOWN else "")
        note(f"{len(those)} tensors of type {kind} become {dtype}: {shown}")


def _places(model: Any) -> dict[str, _Place]:
    """Name -> place, for the weights of two dimensions that int8fx packs, under each of their names."""
    places = {
        id(layer.weight): _Place(tuple(layer.oriented().shape), layer.layout)
        for layer in walk(model)
        if layer.layout is not None and layer.oriented().dim() == 2
    }
    return {name: places[id(p)] for name, p in model.named_parameters(remove_duplicate=False) if id(p) in places}


def _tied_names(model: Any) -> dict[str, list[str]]:
    """Name of a Parameter -> all its names."""
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    return {name: tied for tied in names.values() for name in tied}


def _row_order(processor: Any, tensor: Any, layout: str) -> Tensor | slice | None:
    """The rows of the file's tensor in the order of the model's weight; None if transformers does more than reorder.

    Asks its processor, by giving it the numbers of rows, and of columns, in place of weights.
    """
    import numpy as np

    shape = tuple(int(size) for size in reversed(tensor.shape))
    if len(shape) != 2:
        return None
    numbers = [np.broadcast_to(np.arange(size, dtype=np.int32)[index], shape) for size, index in (
        (shape[0], np.s_[:, None]), (shape[1], np.s_[None, :])
    )]  # fmt: skip
    results = []
    for given in numbers:
        try:
            result = processor.process(weights=given, name=tensor.name, tensor_key_mapping={}, parsed_parameters=None)
        except (ValueError, TypeError, AttributeError):
            return None
        if result.name != tensor.name:
            return None
        results.append(result.weights)
    if all(a is b for a, b in zip(results, numbers, strict=True)):
        return slice(None) if layout == "NK" else None
    rows, columns = (result.T if layout == "KN" else result for result in results)
    if rows.shape != shape or not (rows == rows[:, :1]).all() or not (columns == numbers[1]).all():
        return None
    order = torch.from_numpy(rows[:, 0].astype(np.int64))
    return order if torch.equal(order.sort().values, torch.arange(shape[0])) else None


def _q4_0(data: Tensor) -> tuple[Tensor, Tensor, int]:
    """Rows of blocks ``[N, K / 32 * 18]`` uint8 as codes ``[N, K]``, scales ``[N, K / 32]`` and bits."""
    blocks = data.unflatten(-1, (-1, 2 + _BLOCK // 2))
    halves = blocks[..., 2:]
    return torch.cat([halves & 15, halves >> 4], -1).flatten(-2), _scales(blocks), 4


def _q8_0(data: Tensor) -> tuple[Tensor, Tensor, int]:
    """Rows of blocks ``[N, K / 32 * 34]`` uint8 as codes ``[N, K]``, plus 128, scales ``[N, K / 32]`` and bits."""
    blocks = data.unflatten(-1, (-1, 2 + _BLOCK))
    return (blocks[..., 2:] ^ 128).flatten(-2), _scales(blocks), 8


def _scales(blocks: Tensor) -> Tensor:
    return blocks[..., :2].contiguous().view(torch.float16).squeeze(-1)


_UNPACK: dict[str, Callable[[Tensor], tuple[Tensor, Tensor, int]]] = {"Q4_0": _q4_0, "Q8_0": _q8_0}


# ---- the file -------------------------------------------------------------------------------------------------------

_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of the scalars of metadata
_TEXT, _ARRAY = 8, 9  # the other types of metadata
_LEAST_ENTRY, _LEAST_TENSOR = 13, 24  # bytes


def open_gguf(file: Path) -> Any:
    """A ``gguf.GGUFReader`` of ``file``, whose lengths were compared with its size.

    Raises:
        ImportError: the package ``gguf`` is not installed.
        ValueError: it is no GGUF file, it is damaged, or it is one of several parts. The message names it.
    """
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError as error:
        raise ImportError('int8fx reads GGUF files by the package gguf: pip install "int8fx[gguf]"') from error
    try:
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _check_lengths(data)
        reader = GGUFReader(file)
        parts = reader.fields.get("split.count")
        if parts is not None and int(parts.contents()) > 1:
            raise ValueError(f"one of {int(parts.contents())} files of a model; merge them by llama-gguf-split --merge")
        _architecture(reader)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, struct.error) as error:
        raise ValueError(f"int8fx: {file} is no GGUF file that can be read: {error}") from error
    return reader


def _architecture(reader: Any) -> str:
    field = reader.fields.get("general.architecture")
    if field is None or not isinstance(field.contents(), str):
        raise ValueError("it lacks general.architecture")
    return field.contents()


def _check_lengths(data: mmap.mmap) -> None:
    """Raises ValueError or struct.error if metadata have lengths beyond the end of the file.

    ``gguf`` would take very long over them.
    """
    if data[:4] != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    version, tensors, entries = struct.unpack_from("<IQQ", data, 4)
    if version not in (2, 3):
        raise ValueError(f"it has version {version}; legal: 2 or 3, little-endian")
    if tensors * _LEAST_TENSOR + entries * _LEAST_ENTRY > len(data):
        raise ValueError(f"it declares {tensors} tensors and {entries} metadata in {len(data)} bytes")
    at = 24
    for _ in range(entries):
        at = _after_text(data, at)
        (kind,) = struct.unpack_from("<I", data, at)
        at = _after_value(data, at + 4, kind)


def _after_text(data: mmap.mmap, at: int) -> int:
    (length,) = struct.unpack_from("<Q", data, at)
    return _within(data, at + 8 + length)


def _after_value(data: mmap.mmap, at: int, kind: int) -> int:
    """Where the value of a metadata type that begins at ``at`` ends."""
    if kind == _TEXT:
        return _after_text(data, at)
    if kind in _WIDTHS:
        return _within(data, at + _WIDTHS[kind])
    if kind != _ARRAY:
        raise ValueError(f"a metadata type is {kind}; legal: 0 to 12")
    kind, count = struct.unpack_from("<IQ", data, at)
    if kind in _WIDTHS:
        return _within(data, at + 12 + count * _WIDTHS[kind])
    if kind != _TEXT:
        raise ValueError(f"an array has metadata type {kind}; legal: numbers and texts")
    at += 12
    for _ in range(count):
        at = _after_text(data, at)
    return at


def _within(data: mmap.mmap, at: int) -> int:
    if at > len(data):
        raise ValueError(f"metadata end at byte {at} of {len(data)}")
    return at
