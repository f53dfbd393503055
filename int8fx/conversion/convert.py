"""``convert``: quantises the weights of a model, in place."""

from __future__ import annotations

import logging
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch._subclasses import FakeTensor
from torch.export import ExportedProgram
from torch.fx import GraphModule

from ..ops import native
from ..passes.inductor import install
from ..schemes import Scheme, llm_int8
from ..schemes.calibration import Calibration
from ..terminal import show_progress
from . import exported, graph_module, modules
from .decide import decide, mostly_left
from .foreign import ForeignLayer, check_scheme, foreign_layers, pack_foreign
from .layers import Layer, PackedLayer, check_modules, choose, grouped, refuse_converted
from .memory import trim_heap
from .packed import tensors_of
from .quantizer import Columns, Quantizer
from .selection import Choice, Selection

LEFT = "int8fx_left"  # attribute of a converted model: layer name -> why it was not converted
LARGE = 1 << 30  # bytes of weights from which on a conversion shows its progress

log = logging.getLogger("int8fx")


class SchemePerLayer(Protocol):
    """A scheme for each layer, as `int8fx.plan` chooses them."""

    @property
    def schemes(self) -> Mapping[str, Scheme]:
        """Layer name -> scheme. Layers without an entry are not converted."""

    @property
    def calibration(self) -> Calibration | None: ...


class ModelKind(Protocol):
    """What `convert` and `summary` call for one kind of model. Three modules of this package implement it."""

    def root_of(self, model: Any) -> nn.Module:
        """The module that holds `LEFT`."""

    def layers_of(self, model: Any) -> list[Layer]:
        """The float weights of the model."""

    def packed_of(self, model: Any) -> list[PackedLayer]:
        """The packed weights of the model."""

    def pack(self, model: Any, chosen: list[Layer], quantizer: Quantizer) -> None:
        """Packs the weights of ``chosen``, in place."""


def kind_of(model: Any, function: str) -> ModelKind:
    """The kind of ``model``.

    Raises:
        TypeError: it is of no kind that int8fx takes; the message names ``function``.
    """
    if isinstance(model, (GraphModule, ExportedProgram)):
        return exported if isinstance(model, ExportedProgram) else graph_module
    if isinstance(model, nn.Module):
        return modules
    raise TypeError(
        f"int8fx.{function}: found {type(model).__name__}; legal: nn.Module, torch.fx.GraphModule, "
        "torch.export.ExportedProgram"
    )


def convert(
    model: Any,
    scheme: Scheme | SchemePerLayer | None = None,
    *,
    select: Selection | None = None,
    skip: Selection = (),
    calibration: Calibration | None = None,
    progress: bool | None = None,
) -> Any:
    """Quantises the weights of ``model`` to int8, in place, and returns ``model``.

    The weights of linear layers, attention, fused experts and of bare Parameters used in matmuls become int8 codes and
    a float32 scale per output channel. Where a module still multiplies by dequantised weights, ``torch.compile(model)``
    rewrites these matmuls: the passes are appended to Inductor's list (`int8fx.uninstall` removes them).

    Packed weights are frozen. Other Parameters require grad as before: an optimizer over ``model.parameters()`` trains
    them alone, without a warning. To fine-tune, add adapters.

    One line at level INFO of the logger ``int8fx`` counts what was converted, and what was not and why. A UserWarning
    says so if, without ``select``, more than half of the bytes stay as they are. Embeddings, heads, what is trained and
    what ``skip`` names are not counted.

    Args:
        model: an ``nn.Module``, a ``torch.fx.GraphModule`` or a ``torch.export.ExportedProgram``.
        scheme: `llm_int8()` by default; `rotated()`, or a scheme for each layer as `plan` returns it.
        select: the layers to convert: names or patterns as in ``model.layers.*.q_proj`` or ``lm_head``, or a function
            (name, module) -> bool. By default all but output embeddings, heads for a task, routers, 1x1 convolutions,
            what a transformers model keeps in float32, and weights that require grad while others are frozen; these can
            be selected. Not with a plan, which names its layers.
        skip: the layers not to convert, in the same form.
        calibration: what `calibrate` returned for this model. Schemes choose their unquantised columns according to it.
            For a layer without data, they are the columns of largest weight, the same for all such weights of one
            module. By default the plan's.
        progress: whether to show a bar on stderr; by default if that is a terminal and the weights have over 1 GB.

    Raises:
        TypeError: ``model`` or an argument is of the wrong kind.
        ValueError: a layer cannot be converted (already quantised, on meta, integer, complex or non-finite weights, K >
            133,144), a pattern matches nothing, a plan names a layer that the model does not have, or the scheme needs
            moments that the calibration does not have. The message names it; the model is not changed. Only where a
            weight turns out not to be quantisable (a float16 scale overflows, moments are no ``x.T @ x``) layers before
            it are converted already.

    If it is interrupted, or memory runs out, each layer is either converted or not, and the model still works. A second
    ``convert(model, select=...)`` converts the others.
    """
    prepared = prepare(model, scheme, select=select, skip=skip, calibration=calibration, progress=progress)
    kind_of(model, "convert").pack(model, prepared.chosen, prepared.quantizer)
    pack_foreign(prepared.foreign, scheme if isinstance(scheme, Scheme) else None)
    finish(model, prepared)
    trim_heap()
    return model


@dataclass
class Prepared:
    """A conversion that has been decided on and checked, before any weight is packed.

    root: the module that holds `LEFT`.
    chosen: the layers to pack.
    quantizer: quantises their weights.
    reasons: layer name -> why it is not converted.
    foreign: layers that another package has quantised, to be taken over.
    warning: what to tell the user when it is done, or None.
    """

    root: nn.Module
    chosen: list[Layer]
    quantizer: Quantizer
    reasons: dict[str, str]
    foreign: list[ForeignLayer]
    warning: str | None


def prepare(
    model: Any,
    scheme: Scheme | SchemePerLayer | None = None,
    *,
    select: Selection | None = None,
    skip: Selection = (),
    calibration: Calibration | None = None,
    progress: bool | None = None,
) -> Prepared:
    """What ``convert`` of these arguments will do. Raises what it raises. The model is not changed."""
    schemes = _schemes(llm_int8() if scheme is None else scheme)
    if isinstance(schemes, Mapping):
        if select is not None:
            raise TypeError("int8fx.convert: select with a plan, which names its layers; legal: skip")
        select = _is_in(schemes)
        calibration = scheme.calibration if calibration is None else calibration  # type: ignore[union-attr]  # a plan
    if calibration is not None and not isinstance(calibration, Calibration):
        raise TypeError(f"int8fx.convert: calibration is {calibration!r}; legal: what int8fx.calibrate returns")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("int8fx.convert: the model is a ScriptModule; legal: the eager model that it was scripted from")
    kind, choice = kind_of(model, "convert"), Choice(select, skip)
    root = kind.root_of(model)
    check_modules(root)
    foreign = foreign_layers(root, choice)
    check_scheme(foreign, scheme if isinstance(scheme, Scheme) else None)
    layers, packed = decide(root, kind.layers_of(model), choice), kind.packed_of(model)
    refuse_converted(packed, choice)
    names = [name for layer in layers for name in (layer.name, *layer.aliases)] + [layer.name for layer in packed]
    choice.check_all_used(names)
    if isinstance(schemes, Mapping):
        schemes = _assign(schemes, layers, names)
    chosen = choose(layers, lambda layer: schemes[layer.name] if isinstance(schemes, Mapping) else schemes)
    quantizer = Quantizer(schemes, calibration, Columns(calibration, chosen), _progress(chosen, progress))
    quantizer.check(chosen)
    taken = {layer.name for layer in foreign}
    reasons = {layer.name: layer.reason for layer in layers if layer.reason is not None and layer.name not in taken}
    warning = mostly_left(layers, taken) if choice.by_default else None
    if not chosen and not foreign:
        warning = "no layer was converted; int8fx.summary(model) says why"
    return Prepared(root, chosen, quantizer, reasons, foreign, warning)


AFTER_CONVERSION: list[Callable[[Any], None]] = []
"""Called with each converted model. Integrations append to it: imports go one way, so this file cannot call them."""


def finish(model: Any, prepared: Prepared) -> None:
    """Records what a conversion did, once the layers are packed, and makes ready what will run them."""
    setattr(prepared.root, LEFT, prepared.reasons)
    converted = len(prepared.chosen) + len(prepared.foreign)
    log.info("convert: %d weights to int8; left: %s", converted, _counts(prepared.reasons) or "none")
    if prepared.warning is not None:
        warnings.warn(f"int8fx.convert: {prepared.warning}", stacklevel=3)
    install()
    load_kernels(model)
    for call in AFTER_CONVERSION:
        call(model)


def load_kernels(model: Any) -> None:
    """Loads the C++ kernels if ``model`` has packed weights on the CPU.

    So they are built at conversion if they have to be, with a line on stderr, and not in the first forward.
    """
    codes = (tensors_of(layer.module, layer.parameter).codes for layer in kind_of(model, "convert").packed_of(model))
    if any(t.device.type == "cpu" and not isinstance(t, FakeTensor) for t in codes):
        native.load()


def _schemes(scheme: Any) -> Scheme | Mapping[str, Scheme]:
    """``scheme`` itself, or the scheme of each layer if it is a plan.

    Raises:
        TypeError: ``scheme`` is neither.
    """
    if isinstance(scheme, Scheme):
        return scheme
    schemes = getattr(scheme, "schemes", None)
    if not isinstance(schemes, Mapping) or not hasattr(scheme, "calibration"):
        raise TypeError(
            f"int8fx.convert: scheme is {scheme!r}; legal: int8fx.llm_int8(threshold=...), int8fx.rotated(...), "
            "int8fx.plan(...)"
        )
    for name, value in schemes.items():
        if not isinstance(value, Scheme):
            raise TypeError(f"int8fx.convert: the plan has {value!r} for layer {name!r}; legal: a scheme")
    return schemes


def _is_in(schemes: Mapping[str, Scheme]) -> Callable[[str, nn.Module], bool]:
    return lambda name, _: name in schemes


def _assign(schemes: Mapping[str, Scheme], layers: list[Layer], names: list[str]) -> dict[str, Scheme]:
    """The scheme of each layer that a plan converts. Layers that share a weight but not a scheme are not converted.

    Raises:
        ValueError: the plan names a layer that is not among ``names``.
    """
    unknown = sorted(schemes.keys() - set(names))
    if unknown:
        raise ValueError(
            f"int8fx.convert: the plan has a scheme for layer {unknown[0]!r}, which this model does not have; "
            "legal: a plan of this model"
        )
    assigned = {}
    for tied in grouped(layers, lambda layer: id(layer.weight)):
        planned = {name: schemes[name] for layer in tied for name in (layer.name, *layer.aliases) if name in schemes}
        for layer in tied:
            if layer.reason == "not selected":
                layer.reason = "not in the plan"
            elif layer.reason is None and len(set(planned.values())) > 1:
                layer.reason = f"the plan has different schemes for its weight: as {' and as '.join(planned)}"
            elif layer.reason is None:
                assigned[layer.name] = next(iter(planned.values()))
    return assigned


def _progress(chosen: list[Layer], progress: bool | None) -> Callable[[int], None] | None:
    """A function that shows how many of the weights are done; None if nothing is to be shown."""
    sizes = {id(layer.weight): layer.weight.nbytes for layer in chosen}
    if progress is None:
        progress = sys.stderr.isatty() and sum(sizes.values()) >= LARGE
    return (lambda done: show_progress("converting", done, len(sizes))) if progress else None


def _counts(reasons: Mapping[str, str]) -> str:
    """``2 (skipped), 1 (the output embeddings: ...)``: how many layers were not converted, by reason, largest first."""
    return ", ".join(f"{count} ({reason})" for reason, count in Counter(reasons.values()).most_common())
