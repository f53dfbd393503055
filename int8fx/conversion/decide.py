"""Decides which weights of a model `convert` converts, and why not the others."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from .defaults import leave_by_default
from .layers import Layer, grouped, packed_layers, refuse_converted, walk
from .packed import clash
from .recipes import NO_PRODUCT, Kind, Recipe
from .selection import Choice


def plan(model: nn.Module) -> list[Layer]:
    """What ``convert(model)`` would do with each weight: `Layer.reason` is None for those that it would convert.

    Raises:
        ValueError: a layer is converted already.
    """
    refuse_converted(packed_layers(model), Choice())
    return decide(model, walk(model), Choice())


def decide(model: nn.Module, layers: Iterable[Layer], choice: Choice) -> list[Layer]:
    """The ``layers`` of ``model``, with `Layer.reason` set for each that ``choice`` excludes or that is unsuitable."""
    layers = list(layers)
    for layer in layers:
        names = (layer.name, *layer.aliases)
        selected = choice.selects(names, layer.module)
        if choice.skips(names, layer.module):
            layer.reason = "skipped"
        elif layer.layout is None:
            layer.reason = layer.recipe.refused.get(layer.parameter, NO_PRODUCT)
        elif (taken := clash(layer.module, layer.parameter)) is not None:
            layer.reason = f"its module already has a {taken!r}"
        elif not choice.by_default:
            layer.reason = None if selected else "not selected"
    if choice.by_default:
        leave_by_default(model, layers)
    _agree_on_ties(layers)
    return layers


def _agree_on_ties(layers: list[Layer]) -> None:
    """Converts layers that share a Parameter together or not at all: an embedding with its selected head."""
    for tied in grouped(layers, lambda layer: id(layer.weight)):
        if len(tied) == 1 or all(layer.reason is not None for layer in tied):
            continue
        for layer in tied:
            if layer.recipe.kind is Kind.EMBEDDING and layer.reason is not None and layer.reason != "skipped":
                layer.recipe = Recipe({layer.parameter: layer.layout or "NK"}, Kind.EMBEDDING)
                layer.reason = None
        left = next((layer for layer in tied if layer.reason is not None), None)
        for layer in tied:
            other = next((o for o in tied if o.layout != layer.layout), None)
            if left is not None:
                layer.reason = layer.reason or f"tied to {left.name}, which is not converted"
            elif other is not None:
                layer.reason = f"its weight is shared with {other.name}, which uses it transposed"
