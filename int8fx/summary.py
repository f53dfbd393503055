"""``summary``: what a conversion did, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .convert import _LEFT, _layer_name, plan
from .packing import SCALE, PackedModule


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
        table = [self._HEAD, *self._cells()]
        widths = [max(len(line[i]) for line in table) for i in range(len(self._HEAD))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in table]
        return "\n".join([*(line.rstrip() for line in lines), self._total()])

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table(caption=self._total())
        for i, title in enumerate(self._HEAD):
            table.add_column(title, justify="right" if i > 3 else "left")
        for cells in self._cells():
            table.add_row(*cells)
        return table


def summary(model: nn.Module) -> Summary:
    """What `convert` did to each weight of ``model``, or would do if it is not converted.

    Returns:
        A `Summary`: ``print`` gives text, ``rich.print`` a table; ``rows`` has the numbers (bytes, shapes as stored).

    Raises:
        TypeError: ``model`` is no ``nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"int8fx.summary: found {type(model).__name__}; legal: an nn.Module")
    return Summary(tuple(_rows(model)))


def _rows(model: nn.Module) -> Iterator[Row]:
    converted = [(name, m) for name, m in model.named_modules() if isinstance(m, PackedModule)]
    seen: set[int] = set()
    for name, module in converted:
        for parameter, packed in module.packed_weights.items():
            codes, scale = module._buffers[parameter], module._buffers[parameter + SCALE]
            assert codes is not None and scale is not None
            first = id(codes) not in seen
            seen.add(id(codes))
            before = codes.numel() * packed.dtype.itemsize if first else 0
            after = codes.nbytes + scale.nbytes if first else 0
            kind = type(module).__mro__[2].__name__
            yield Row(_layer_name(name, parameter), kind, tuple(codes.shape), True, "", before, after)
    reasons = getattr(model, _LEFT, {})
    layers = plan(model, skip=lambda name, module: isinstance(module, PackedModule))
    for layer in layers:
        size = layer.weight.nbytes if id(layer.weight) not in seen else 0
        seen.add(id(layer.weight))
        reason = reasons.get(layer.name) or layer.reason
        if converted and reason is None:
            reason = "not converted"
        if not converted and reason is None:
            codes, scale = layer.weight.numel(), layer.oriented().shape[:-1].numel() * torch.float32.itemsize
            yield Row(
                layer.name, type(layer.module).__name__, tuple(layer.oriented().shape), False, "float (not converted yet)",
                size, size if not size else codes + scale,
            )  # fmt: skip
        else:
            yield Row(layer.name, type(layer.module).__name__, tuple(layer.weight.shape), False, reason or "", size, size)
