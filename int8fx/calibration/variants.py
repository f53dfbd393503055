"""The weights of a float model under several schemes, as `convert` would quantise them. The model is not changed."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ..conversion.decide import plan
from ..conversion.layers import Layer
from ..conversion.quantizer import Columns, Quantizer
from ..schemes import Scheme
from ..schemes.calibration import Calibration
from ..schemes.weight import Int8Weight


def convertible(model: nn.Module) -> dict[str, Layer]:
    """Layer name -> layer, for each layer that `convert` would convert."""
    return {layer.name: layer for layer in plan(model) if layer.reason is None}


class Variants:
    """Quantises layers under each of ``schemes``.

    Args:
        schemes: the schemes.
        calibration: the statistics from which unquantised columns are chosen; None: from the weights.
        layers: all layers that a conversion would convert.

    Raises:
        ValueError: a scheme needs moments of a layer for which the calibration has none.
    """

    def __init__(self, schemes: Iterable[Scheme], calibration: Calibration | None, layers: Iterable[Layer]) -> None:
        layers = list(layers)
        columns = Columns(calibration, layers)
        self._quantizers = [Quantizer(scheme, calibration, columns) for scheme in schemes]
        for quantizer in self._quantizers:
            quantizer.check(layers)

    def of(self, layer: Layer) -> list[Int8Weight]:
        """The weight of ``layer`` under each scheme, in their order."""
        return [quantizer.reading(layer).weight(quantizer([layer])) for quantizer in self._quantizers]
