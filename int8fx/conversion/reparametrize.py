"""What ``torch.nn.utils`` must not do with packed weights: prune or reparametrise them.

Its functions replace a float Parameter by others, and by a hook or a property. A packed weight is no float Parameter,
and they notice in the middle of it or say so in terms of their own. They have no hook for this. So packed modules look
at who is reading them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from .callers import above

_FILES = {f"torch.nn.utils.{f}" for f in ("prune", "weight_norm", "spectral_norm", "parametrize", "parametrizations")}


def is_read_by_torch_utils(calls: int) -> bool:
    """Whether the function that is ``calls`` calls above the one that asks prunes or reparametrises tensors."""
    frame = above(calls + 1)
    return frame is not None and frame.f_globals.get("__name__") in _FILES


def parametrized_name(calls: int) -> str | None:
    """The name of the tensor that ``register_parametrization`` is given, if it is ``calls`` calls above."""
    frame = above(calls + 1)
    if frame is None or frame.f_code.co_name != "register_parametrization" or not is_read_by_torch_utils(calls + 1):
        return None
    return frame.f_locals["tensor_name"]


def refused(label: str) -> TypeError:
    """The error for the packed weight ``label``."""
    return TypeError(
        f"int8fx: the weight {label} is packed, and prune, weight_norm, spectral_norm and register_parametrization of "
        "torch.nn.utils replace a float Parameter; legal: first prune.remove or remove_parametrizations, then "
        f"int8fx.convert; or leave the layer out: convert(model, skip=[{label}])"
    )


class Parameters(dict[str, nn.Parameter | None]):
    """``_parameters`` of a packed module: holds no float weight. ``spectral_norm`` would take it from here."""

    labels: Mapping[str, str] = {}  # packed weight -> its name in messages; set last when a pickle is read

    def __init__(self, items: Iterable[Any], labels: Mapping[str, str]) -> None:
        super().__init__(items)
        self.labels = labels

    def __setitem__(self, name: str, value: nn.Parameter | None) -> None:
        if name in self.labels:
            raise TypeError(
                f"int8fx: the weight {self.labels[name]} is packed, and _parameters[{name!r}] takes no Parameter for "
                f"it; legal: a write into it (module.{name}.data = w rounds w to int8)"
            )
        super().__setitem__(name, value)

    def __missing__(self, name: str) -> nn.Parameter:
        raise refused(self.labels[name]) if name in self.labels else KeyError(name)
