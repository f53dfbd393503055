"""Decides which weights of a model `convert` converts, and why not the others."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import nn

from .defaults import leave_by_default
from .layers import HEAD, TASK_HEAD, TRAINABLE, TRAINED_WHOLE, Layer, grouped, packed_layers, refuse_converted, walk
from .packed import clash
from .recipes import NO_PRODUCT, TABLE, Kind, Recipe
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


EXPECTED_TO_STAY = (TABLE, HEAD, TASK_HEAD, TRAINABLE, TRAINED_WHOLE, "skipped")


def mostly_left(layers: list[Layer], taken: Collection[str]) -> str | None:
    """A warning that more than half of the bytes of a model stay as they are, None if that is not so.

    Counted are weights that a user would expect to become int8: not embeddings, heads, and what is trained or skipped.
    Layers are those of `decide`, by default; ``taken`` names those whose int8 weights are taken over from another
    package.
    """
    weights = {id(layer.weight): layer for layer in layers if layer.reason not in EXPECTED_TO_STAY}
    left = [layer for layer in weights.values() if layer.reason is not None and layer.name not in taken]
    size, size_left = (sum(layer.weight.nbytes for layer in group) for group in (weights.values(), left))
    if 2 * size_left <= size:
        return None
    largest = max(left, key=lambda layer: layer.weight.nbytes)
    return (
        f"{100 * size_left / size:.0f} % of the weight bytes beside embeddings and heads stay as they are. The largest "
        f"is {largest.name} {list(largest.weight.shape)}: {largest.reason}. int8fx.summary(model) lists all"
    )


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
