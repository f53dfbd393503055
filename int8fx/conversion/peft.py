"""What PEFT must not do with packed layers, and what `convert` must not do with layers that PEFT holds.

PEFT has no hook for either. So packed modules look at who is calling when their Parameters are listed or when they are
copied. The names of PEFT's modules, classes and functions are read; it is not imported.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from .callers import caller


def is_trained_whole(module: nn.Module) -> bool:
    """Whether ``module`` is PEFT's, and holds another module and copies of it that are trained and saved."""
    return _is_a(module, "peft.utils.other", "ModulesToSaveWrapper")


def adapted_parameters(model: nn.Module) -> set[int]:
    """The ids of the modules of ``model`` of which PEFT adapts a Parameter (``target_parameters``).

    PEFT replaces the Parameter by its sum with the adapter in each forward, so it must stay a Parameter.
    """
    wrappers = (module for module in model.modules() if _is_a(module, "peft.tuners.lora.layer", "ParamWrapper"))
    return {id(wrapper.get_base_layer()) for wrapper in wrappers}  # type: ignore[operator]


def refuse_targets(names: Iterable[str], label: Any) -> None:
    """Raises TypeError if PEFT is looking for Parameters to adapt, and ``target_parameters`` names one of ``names``.

    Args:
        names: the names that a packed module has for one weight, and for its codes.
        label: the name of the weight in messages.
    """
    frame = caller("peft.tuners.tuners_utils", "_inject_parameters")
    if frame is None:
        return
    path, targets = frame.f_locals.get("unwrapped_module_name"), frame.f_locals.get("target_names", ())
    for key in (f"{path}.{name}" for name in names):
        for target in targets:
            if key == target or key.endswith(f".{target}"):
                raise TypeError(
                    f"int8fx: PEFT's target_parameters names {target!r}, and the weight {label} is int8: it is no "
                    "Parameter that an adapter can be added to. Legal: leave it in 16 bits, by int8fx.convert(model, "
                    "skip=[...]) or by adding the adapters before int8fx.convert; for linear layers also target_modules"
                )


def refuse_trained_copy(label: Any) -> None:
    """Raises TypeError if PEFT is copying the packed layer ``label`` to train the copy (``modules_to_save``)."""
    frame = caller("peft.utils.other", "update")
    if frame is not None and is_trained_whole(frame.f_locals.get("self")):  # type: ignore[arg-type]
        raise TypeError(
            f"int8fx: PEFT's modules_to_save trains a copy of the layer {label}, and int8 is not trained; legal: "
            f"int8fx.convert(model, skip=[{label}]), or an adapter for it (target_modules)"
        )


def _is_a(module: object, file: str, name: str) -> bool:
    return any((c.__module__, c.__name__) == (file, name) for c in type(module).__mro__)
