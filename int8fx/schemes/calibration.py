"""Statistics of layers' inputs, from which a conversion chooses unquantised columns and rounds weights."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Calibration:
    """Statistics of each layer's inputs, measured by `calibrate`; ``torch.save`` can store them.

    absmax: layer name -> ``[K]`` float32: the largest absolute value of each input column.
    rows: layer name -> how many rows were seen.
    moments: layer name -> ``[K, K]`` float32, ``x.T @ x`` of all rows; only of `calibrate(moments=True)`.
    """

    absmax: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    moments: dict[str, Tensor] = field(default_factory=dict)

    def see(self, name: str, x: Tensor, moments: bool = False) -> None:
        """Adds the rows ``x [M, K]`` to the statistics of layer ``name``."""
        if x.shape[0]:
            absmax = x.abs().amax(0).float().cpu()
            self.absmax[name] = torch.maximum(self.absmax[name], absmax) if name in self.absmax else absmax
            self.rows[name] = self.rows.get(name, 0) + x.shape[0]
            if moments:
                products = (x.float().T @ x.float()).cpu()
                self.moments[name] = self.moments[name].add_(products) if name in self.moments else products
