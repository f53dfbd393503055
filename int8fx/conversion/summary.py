"""``summary``: what a conversion did, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from ..terminal import table
from .convert import LEFT
from .layers import Layer, packed_layers, plan
from .packed import SUFFIXES


@dataclass(frozen=True)
class Row:
    """One weight: ``converted`` or the ``reason`` why not, its shape as stored and its bytes before and after."""

    name: str
    kind: str
    shape: tuple[int, ...]
    converted: bool
    reason: str
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class Summary:
    """The rows of `summary`; prints as a table."""

    rows: tuple[Row, ...]

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

    def _cells(self) -> Iterator[tuple[str, ...]]:
        for row in self.rows:
            shape = "x".join(map(str, row.shape))
            outcome = "int8" if row.converted else row.reason
            yield row.name, row.kind, shape, outcome, f"{row.bytes_before:,}", f"{row.bytes_after:,}"

    def _total(self) -> str:
        return (
            f"{len(self.converted)} of {len(self.rows)} weights converted, "
            f"{self.bytes_before:,} -> {self.bytes_after:,} bytes"
        )

    _HEAD = ("layer", "module", "shape", "int8, or why not", "bytes before", "after")

    def __str__(self) -> str:
        return "\n".join([table([self._HEAD, *self._cells()]), self._total()])

    def __rich__(self) -> Any:
        from rich.table import Table

        rich = Table(caption=self._total())
        for i, title in enumerate(self._HEAD):
            rich.add_column(title, justify="right" if i > 3 else "left")
        for cells in self._cells():
            rich.add_row(*cells)
        return rich


def summary(model: Any) -> Summary:
    """What `convert` did to each weight of ``model``, or would do if it is not converted.

    Args:
        model: what `convert` takes; also a model that is quantised already, or on meta.

    Returns:
        A `Summary`: ``print`` gives text, ``rich.print`` a table; ``rows`` has the numbers (bytes, shapes as stored).

    Raises:
        TypeError: ``model`` is none of these.
    """
    if isinstance(model, (GraphModule, ExportedProgram)):
        from .graph_module import DTYPES, graph_layers, packed_in_graph

        root = model.graph_module if isinstance(model, ExportedProgram) else model
        in_graph = packed_in_graph(model)
        layers = plan(root, candidates=graph_layers(model), packed=())
    elif isinstance(model, nn.Module):
        root, in_graph, layers = model, [], plan(model, packed=())
    else:
        raise TypeError(
            f"int8fx.summary: found {type(model).__name__}; legal: nn.Module, torch.fx.GraphModule, "
            "torch.export.ExportedProgram"
        )
    seen: set[int] = set()
    rows = []
    for name, module, parameter in packed_layers(root):
        kind, dtype = type(module).__mro__[2].__name__, module.packed_weights[parameter].dtype
        rows.append(_converted(name, kind, module, parameter, dtype, seen))
    for name, owner, parameter in in_graph:
        dtype = root.meta.get(DTYPES, {}).get(name, torch.float32)
        rows.append(_converted(name, "graph", owner, parameter, dtype, seen))
    reasons = getattr(root, LEFT, {})
    is_converted = bool(rows)
    for layer in layers:
        rows.append(_left(layer, reasons.get(layer.name) or layer.reason, is_converted, seen))
    return Summary(tuple(rows))


def _converted(name: str, kind: str, module: nn.Module, parameter: str, dtype: torch.dtype, seen: set[int]) -> Row:
    codes: Tensor = module._buffers[parameter]  # type: ignore[assignment]
    after = sum(t.nbytes for s in SUFFIXES if (t := module._buffers.get(parameter + s)) is not None)
    shape = tuple(codes.shape)
    if id(codes) in seen:
        return Row(name, kind, shape, True, "", 0, 0)
    seen.add(id(codes))
    return Row(name, kind, shape, True, "", codes.numel() * dtype.itemsize, after)


def _left(layer: Layer, reason: str | None, is_converted: bool, seen: set[int]) -> Row:
    kind, weight = type(layer.module).__name__, layer.weight
    size = weight.numel() * weight.element_size() if id(weight) not in seen else 0
    seen.add(id(weight))
    if reason is not None or is_converted:
        return Row(layer.name, kind, tuple(weight.shape), False, reason or "not converted", size, size)
    oriented = layer.oriented().shape
    after = (oriented.numel() + oriented[:-1].numel() * torch.float32.itemsize) if size else 0
    return Row(layer.name, kind, tuple(oriented), False, "float (not converted yet)", size, after)
