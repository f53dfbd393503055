"""Statistics of layers' inputs, from which a conversion chooses unquantised columns and rounds weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Calibration:
    """Statistics of each layer's inputs, measured by `calibrate`; ``torch.save`` can store them.

    absmax: layer name -> ``[K]`` float32: the largest absolute value of each input column.
    rows: layer name -> how many rows were seen.
    moments: layer name -> ``[K, K]`` float32, ``x.T @ x`` of all rows; only of `calibrate(moments=True)`. With a folder
        they are read from there when they are asked for.
    """

    absmax: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    moments: Mapping[str, Tensor] = field(default_factory=dict)


class Statistics:
    """The statistics of rows as they come; ``calibration`` holds those so far.

    Args:
        moments: whether to sum up ``x.T @ x`` too.
    """

    def __init__(self, moments: bool = False) -> None:
        self.calibration, self._moments = Calibration(), moments
        self._last: tuple[Tensor, int | None, Tensor, Tensor | None] | None = None

    def add(self, name: str, x: Tensor) -> None:
        """Adds the rows ``x [M, K]`` to the statistics of layer ``name``."""
        if not x.shape[0]:
            return
        absmax, products = self._of(x)
        all_absmax, rows, moments = self.calibration.absmax, self.calibration.rows, self.calibration.moments
        all_absmax[name] = torch.maximum(all_absmax[name], absmax) if name in all_absmax else absmax
        rows[name] = rows.get(name, 0) + x.shape[0]
        if products is not None:
            assert isinstance(moments, dict)
            moments[name] = moments[name].add_(products) if name in moments else products.clone()

    def _of(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Absmax and products of x: those of the last x if it is the same object, as for the linears of q, k and v."""
        version = None if x.is_inference() else x._version
        if self._last is not None and version is not None and self._last[0] is x and self._last[1] == version:
            return self._last[2:]
        wide = x.float()
        products = (wide.T @ wide).cpu() if self._moments else None
        self._last = x, version, wide.abs().amax(0).cpu(), products
        return self._last[2:]
