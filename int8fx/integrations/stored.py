"""Which weights of a checkpoint are packed, and how: for loaders that convert a model before they load it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from ..conversion import convert as conversion
from ..conversion.format import FORMAT, read_scheme
from ..conversion.layers import layer_name
from ..schemes import Scheme
from ..schemes.calibration import Calibration


@dataclass(frozen=True)
class _Schemes:
    """The scheme of each layer, as ``convert`` takes a plan."""

    schemes: Mapping[str, Scheme]
    calibration: Calibration | None = None


def read_schemes(tensors: Mapping[str, Tensor]) -> dict[str, Scheme]:
    """Name of a weight -> its scheme, for each packed weight among ``tensors``.

    Raises:
        ValueError: a format cannot be read. The message names it.
    """
    schemes = {}
    for key in tensors:
        if key.endswith(FORMAT):
            try:
                schemes[key.removesuffix(FORMAT)] = read_scheme(tensors[key])
            except ValueError as error:
                raise ValueError(f"int8fx: {key!r} of the checkpoint: {error}") from error
    return schemes


def convert_as_stored(model: nn.Module, schemes: Mapping[str, Scheme]) -> None:
    """Converts the weights of ``model`` that ``schemes`` names.

    Raises:
        ValueError: the model does not have one, or it cannot be packed. The message names it.
    """
    conversion.convert(model, _Schemes({layer_name(name): scheme for name, scheme in schemes.items()}))
    reasons = getattr(model, conversion.LEFT, {})
    if lost := sorted(name for name in schemes if layer_name(name) in reasons):
        reason = reasons[layer_name(lost[0])]
        raise ValueError(f"int8fx: {lost[0]!r} is packed in the checkpoint, and cannot be here: {reason}")
