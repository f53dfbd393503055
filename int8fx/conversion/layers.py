"""The weights of a model: which there are, what becomes of each under `convert`, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..schemes.quantize import INT8_MAX, MAX_K
from .packed import PackedModule, clash
from .recipes import Recipe, embedding_forward, matrices, recipe_for, uninitialized
from .selection import Names, Selection

HEAD = "the output embeddings: left in 16 bits unless selected"


@dataclass
class Layer:
    """One weight of a model: where it is and what becomes of it; ``aliases`` are its other names in shared modules."""

    name: str
    module: nn.Module
    parameter: str
    layout: str | None
    recipe: Recipe
    reason: str | None = None
    aliases: tuple[str, ...] = ()

    @property
    def weight(self) -> Tensor:
        return self.module._parameters[self.parameter]  # type: ignore[return-value]

    def oriented(self) -> Tensor:
        """The weight as ``[..., N, K]``, a view."""
        w = self.weight.detach()
        w = w.flatten(w.dim() - self.recipe.kernel_dims - 1) if self.recipe.kernel_dims else w
        return w.transpose(-1, -2) if self.layout == "KN" else w


def plan(
    model: nn.Module,
    select: Selection | None = None,
    skip: Selection = (),
    candidates: Iterable[Layer] | None = None,
    packed: Iterable[tuple[str, nn.Module, str]] | None = None,
) -> list[Layer]:
    """What `convert` would do with each weight of ``model``: `Layer.reason` is None for those it would convert.

    ``candidates`` and ``packed`` are what `walk` and `packed_layers` find, if they are not what a model consists of.

    Raises:
        ValueError: a layer to convert is converted already, or a pattern matches nothing.
    """
    chosen = None if select is None else Names(select, "select")
    skipped = Names(skip, "skip")
    layers = list(walk(model) if candidates is None else candidates)
    heads = _output_embeddings(model, layers)
    for layer in layers:
        selected = chosen is not None and _hit(chosen, layer.module, layer.name, *layer.aliases)
        if _hit(skipped, layer.module, layer.name, *layer.aliases):
            layer.reason = "skipped"
        elif layer.layout is None:
            layer.reason = layer.recipe.refused.get(layer.parameter, "not the weight of a product")
        elif (taken := clash(layer.module, layer.parameter)) is not None:
            layer.reason = f"its module has a {taken!r} of its own"
        elif chosen is not None:
            layer.reason = None if selected else "not selected"
        elif id(layer.module) in heads:
            layer.reason = HEAD
        elif layer.recipe.on_request:
            layer.reason = layer.recipe.on_request
    names = [name for layer in layers for name in (layer.name, *layer.aliases)]
    for full, module, _ in packed_layers(model) if packed is None else packed:
        names.append(full)
        left = skipped(full, module)
        if (chosen is None or chosen(full, module)) and not left:
            raise ValueError(f"int8fx.convert: layer {full!r} is already converted by int8fx; legal: float weights")
    for selection in (chosen, skipped):
        if selection is not None:
            selection.check_all_used(names)
    _leave_routers(layers, chosen)
    _agree_on_ties(layers)
    return layers


def _hit(selection: Names, module: nn.Module, *names: str) -> bool:
    hits = [selection(name, module) for name in names]  # all of them: every pattern that matches counts as used
    return any(hits)


def packed_layers(model: nn.Module) -> Iterator[tuple[str, PackedModule, str]]:
    """The packed weights of ``model``: layer name, module, name in the module."""
    for name, module in model.named_modules():
        if isinstance(module, PackedModule):
            for parameter in module.packed_weights:
                yield layer_name(name, parameter), module, parameter


def layer_name(module: str, parameter: str) -> str:
    """The name of a layer: that of its module, or of the Parameter if that is not called ``weight``."""
    return module if parameter == "weight" and module else f"{module}.{parameter}" if module else parameter


def walk(model: nn.Module, prefix: str = "") -> Iterator[Layer]:
    """Every Parameter of two or more dimensions of ``model``, with the recipe for it."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(prefix=prefix, remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    for name, module in model.named_modules(prefix=prefix):
        own = matrices(module)
        package = _quantised_by(module)
        if isinstance(module, PackedModule):
            recipe = Recipe(refused=dict.fromkeys(own, "its module is converted in part"))
        elif package:
            recipe = Recipe(refused=dict.fromkeys(own, f"already quantised by {package}"))
        else:
            recipe = recipe_for(module)
        for parameter in own:
            aliases = tuple(layer_name(n, parameter) for n in names[id(module)] if n != name)
            layout = recipe.layouts.get(parameter)
            yield Layer(layer_name(name, parameter), module, parameter, layout, recipe, aliases=aliases)


def _quantised_by(module: nn.Module) -> str | None:
    """The package that quantised ``module``'s own weight, if it is known."""
    package, weight = _package(module), module._parameters.get("weight")
    if package == "bitsandbytes" or weight is None:
        return package if package == "bitsandbytes" else None
    return "torchao" if "torchao" in (package, _package(weight)) else None


def _package(value: object) -> str:
    return type(value).__module__.partition(".")[0]


def check_modules(model: nn.Module) -> None:
    """Raises ValueError, naming the layer, if ``model`` is quantised already or has Parameters without a shape."""
    for name, module in model.named_modules():
        name, weight = name or type(model).__name__, module._parameters.get("weight")
        package = _quantised_by(module)
        if package:
            raise ValueError(
                f"int8fx.convert: layer {name!r} is already quantised by {package} ({type(module).__name__}, "
                f"{type(weight).__name__}); legal: float weights"
            )
        if uninitialized(weight):
            raise ValueError(f"int8fx.convert: layer {name!r} has no weight yet; run the model once before converting")


def choose(layers: list[Layer]) -> list[Layer]:
    """The layers to convert, each of them checked: raises ValueError, naming the layer, unless all can be packed."""
    chosen = [layer for layer in layers if layer.reason is None]
    for layer in chosen:
        check_weight(layer.name, layer.weight, layer.oriented().shape[-1])
    return chosen


def check_weight(name: str, weight: Tensor, K: int) -> None:
    """Raises ValueError, naming the layer, unless ``weight`` can be packed."""
    from torch._subclasses import FakeTensor

    def refuse(found: str, legal: str) -> None:
        raise ValueError(f"int8fx.convert: layer {name!r} {found}; legal: {legal}")

    if weight.layout != torch.strided:
        refuse(f"has a {str(weight.layout).removeprefix('torch.')} weight", "dense weights")
    if weight.is_meta:
        refuse("is on the meta device", "a model with its weights loaded")
    if not weight.is_floating_point() or weight.dtype.itemsize < 2:
        refuse(f"has {weight.dtype} weights", "float16, bfloat16, float32 or float64")
    if type(weight) not in (nn.Parameter, Tensor) and not isinstance(weight, FakeTensor):
        refuse(f"has a weight of type {type(weight).__name__}", "plain tensors")
    if K > MAX_K:
        refuse(f"has K = {K} input channels", f"K <= {MAX_K}, or int32 sums could overflow")
    if weight.numel() and not isinstance(weight, FakeTensor):
        low, high = weight.detach().aminmax()
        if not (low.isfinite() and high.isfinite()):
            refuse("has NaN or inf in its weight", "finite weights")
        if max(-low, high) / INT8_MAX > torch.finfo(torch.float32).max:
            refuse("has a weight whose scale overflows float32", "weights that float32 can hold")


def _output_embeddings(model: nn.Module, layers: list[Layer]) -> set[int]:
    tables = {id(layer.weight) for layer in layers if isinstance(layer.module, nn.Embedding)}
    heads = {id(layer.module) for layer in layers if id(layer.weight) in tables}
    heads |= {id(layer.module) for layer in layers if layer.name.rpartition(".")[2] == "lm_head"}
    for module in model.modules():
        get: Any = getattr(module, "get_output_embeddings", None)
        if callable(get):
            with suppress(NotImplementedError, AttributeError):  # backbones have the method and no embeddings
                heads.add(id(get()))
    return heads


def _leave_routers(layers: list[Layer], chosen: Names | None) -> None:
    """A router picks experts by small differences: layers beside experts, an output for each, stay unless selected."""
    if chosen is not None:
        return
    blocks = {}  # "mlp." of "mlp.experts.down_proj" -> the number of experts
    for layer in layers:
        if layer.layout is not None and layer.weight.dim() == 3:
            block = layer.name.rpartition(".")[0].rpartition(".")[0]
            blocks[block + "." if block else ""] = layer.weight.shape[0]
    for layer in layers:
        if layer.reason is None and layer.weight.dim() == 2:
            outputs = layer.oriented().shape[0]
            if any(layer.name.startswith(block) and outputs == experts for block, experts in blocks.items()):
                layer.reason = "the router of experts: left in 16 bits unless selected"


def _agree_on_ties(layers: list[Layer]) -> None:
    """Layers with one Parameter are converted together or not at all; a tied embedding follows its selected head."""
    for group in grouped(layers, lambda layer: id(layer.weight)):
        if len(group) == 1 or all(layer.reason is not None for layer in group):
            continue
        for layer in group:
            table = layer.recipe.forward is embedding_forward
            if table and layer.reason is not None and layer.reason != "skipped":
                layer.layout, layer.reason = layer.layout or "NK", None
                layer.recipe = Recipe({layer.parameter: layer.layout}, embedding_forward)
        blocked = next((layer for layer in group if layer.reason is not None), None)
        for layer in group:
            other = next((o for o in group if o.layout != layer.layout), None)
            if blocked is not None:
                layer.reason = layer.reason or f"tied to {blocked.name}, which stays as it is"
            elif other is not None:
                layer.reason = f"its weight is shared with {other.name}, which reads it the other way round"


def grouped(layers: Iterable[Layer], key: Callable[[Layer], int]) -> list[list[Layer]]:
    groups: dict[int, list[Layer]] = {}
    for layer in layers:
        groups.setdefault(key(layer), []).append(layer)
    return list(groups.values())
