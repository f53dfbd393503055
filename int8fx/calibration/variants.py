"""The weights of a float model under several schemes: what `convert` would make of them. The model stays as it is."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ..conversion.convert import Pack
from ..conversion.layers import Layer, plan
from ..schemes import Scheme
from ..schemes.calibration import Calibration
from ..schemes.weight import Int8Weight


def convertible(model: nn.Module) -> dict[str, Layer]:
    """Layer name -> layer, for each layer that `convert` would convert."""
    return {layer.name: layer for layer in plan(model) if layer.reason is None}


class Variants:
    """Quantises a layer under each of ``schemes``.

    Args:
        schemes: the schemes.
        calibration: what unquantised columns are chosen by; None: they are chosen by the weights.
        layers: all layers that a conversion would convert.

    Raises:
        ValueError: a scheme needs moments, and the calibration has none of a layer.
    """

    def __init__(self, schemes: Iterable[Scheme], calibration: Calibration | None, layers: Iterable[Layer]) -> None:
        self.schemes, layers = list(schemes), list(layers)
        self._quantizers = [Pack(scheme, calibration, layers) for scheme in self.schemes]

    def of(self, layer: Layer) -> list[Int8Weight]:
        """The weight of ``layer`` under each scheme, in their order."""
        weights = []
        for scheme, quantizer in zip(self.schemes, self._quantizers, strict=True):
            codes, scale, *columns = quantizer([layer])
            weights.append(Int8Weight(codes, scale, scheme.threshold, scheme.block, *columns))
        return weights
