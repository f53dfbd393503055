"""``summary``: what a conversion did, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..schemes.weight import PackedTensors
from ..terminal import table
from .convert import LEFT, kind_of
from .decide import decide
from .layers import Layer, PackedLayer
from .packed import PackedModule, float_class, tensors_of
from .selection import Choice


@dataclass(frozen=True)
class Row:
    """One weight.

    shape: ``[..., N, K]``.
    scheme: the scheme it was quantised with; empty if it was not converted.
    reason: why it was not converted; empty if it was.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    scheme: str
    reason: str
    bytes_before: int
    bytes_after: int

    @property
    def converted(self) -> bool:
        return not self.reason


@dataclass(frozen=True)
class Summary:
    """What `summary` returns; prints as a table.

    parameters: how many the model had before it was converted, including biases and norms.
    int8_parameters: how many of them are codes now, of 8 or 4 bits.
    """

    rows: tuple[Row, ...]
    parameters: int = 0
    int8_parameters: int = 0

    @property
    def converted(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.converted)

    @property
    def left(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if not row.converted)

    @property
    def bytes_before(self) -> int:
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_after(self) -> int:
        return sum(row.bytes_after for row in self.rows)

    def __str__(self) -> str:
        head = ("layer", "module", "shape", "scheme, or why not", "bytes before", "after")
        total = (
            f"{len(self.converted)} of {len(self.rows)} weights converted, "
            f"{self.int8_parameters:,} of {self.parameters:,} parameters; "
            f"weights: {self.bytes_before:,} -> {self.bytes_after:,} bytes"
        )
        return "\n".join([table([head, *self._cells()], left=4), total])

    def _cells(self) -> Iterator[tuple[str, ...]]:
        for row in self.rows:
            shape = "x".join(map(str, row.shape))
            yield row.name, row.kind, shape, row.scheme or row.reason, f"{row.bytes_before:,}", f"{row.bytes_after:,}"


def summary(model: Any) -> Summary:
    """What `convert` did to each weight of ``model``, or would do if it is not converted.

    Args:
        model: what `convert` takes; also a model that is quantised already, or on meta.

    Returns:
        A `Summary`: ``print`` gives a table; ``rows`` has the numbers (bytes, shapes).

    Raises:
        TypeError: ``model`` is none of these.
    """
    kind = kind_of(model, "summary")
    root, packed = kind.root_of(model), kind.packed_of(model)
    layers = decide(root, kind.layers_of(model), Choice())
    reasons = getattr(root, LEFT, {})
    seen: set[int] = set()
    rows = [_converted(layer, seen) for layer in packed]
    rows += [_left(layer, reasons.get(layer.name) or layer.reason, bool(packed), seen) for layer in layers]
    codes = {id(_tensors(layer).codes): _shape(layer).numel() for layer in packed}
    parameters = {id(p): p.numel() for p in model.parameters() if not _shapeless(p)} | codes
    return Summary(tuple(rows), sum(parameters.values()), sum(codes.values()))


def _tensors(layer: PackedLayer) -> PackedTensors:
    return tensors_of(layer.module, layer.parameter)


def _shape(layer: PackedLayer) -> torch.Size:
    """``[..., N, K]``"""
    codes = _tensors(layer).codes
    return codes.shape if layer.reading is None else layer.reading.shape(codes)


def _shapeless(p: Tensor) -> bool:
    return isinstance(p, nn.UninitializedParameter)


def _converted(layer: PackedLayer, seen: set[int]) -> Row:
    tensors, module, reading = _tensors(layer), layer.module, layer.reading
    kind = float_class(module).__name__ if isinstance(module, PackedModule) else "graph"
    dtype, scheme = (torch.float32, "int8") if reading is None else (reading.dtype, str(reading.scheme))
    before = _shape(layer).numel() * dtype.itemsize
    after = sum(t.nbytes for t in tensors if t is not None)
    if id(tensors.codes) in seen:
        before = after = 0
    seen.add(id(tensors.codes))
    return Row(layer.name, kind, tuple(_shape(layer)), scheme, "", before, after)


def _left(layer: Layer, reason: str | None, is_converted: bool, seen: set[int]) -> Row:
    kind, weight = type(layer.module).__name__, layer.weight
    size = weight.numel() * weight.element_size() if id(weight) not in seen else 0
    seen.add(id(weight))
    if reason is not None or is_converted:
        return Row(layer.name, kind, tuple(weight.shape), "", reason or "not converted", size, size)
    oriented = layer.oriented().shape
    after = (oriented.numel() + oriented[:-1].numel() * torch.float32.itemsize) if size else 0
    return Row(layer.name, kind, tuple(oriented), "", "float (not converted yet)", size, after)
