"""The weights of a model: lists them, and refuses those that cannot be packed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from ..schemes import Scheme
from ..schemes.quantize import INT8_MAX, MAX_K
from .packed import PackedModule, Reading, is_codes, join
from .peft import adapted_parameters
from .recipes import Recipe, matrices, recipe_for, uninitialized
from .selection import Choice

HEAD = "the output embeddings: left in 16 bits unless selected"
TASK_HEAD = "the head for a task: left in 16 bits unless selected"
ROUTER = "the router of experts: left in 16 bits unless selected"
TRAINABLE = "trainable: other weights are frozen, so it is being trained; left unless selected"
ADAPTED = "PEFT adapts a Parameter of its module (target_parameters), which stays in 16 bits"
TRAINED_WHOLE = "trainable: PEFT trains a copy of its module (modules_to_save); left unless selected"


@dataclass
class Layer:
    """One float weight of a model.

    full_name: of the Parameter, with the path of its module.
    module: holds the Parameter.
    recipe: how to convert the module.
    reason: why the weight is not converted; None if it is to be converted.
    aliases: other names of the layer, if its module has several paths.
    """

    full_name: str
    module: nn.Module
    recipe: Recipe
    reason: str | None = None
    aliases: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return layer_name(self.full_name)

    @property
    def parameter(self) -> str:
        """The name of the Parameter in its module."""
        return self.full_name.rpartition(".")[2]

    @property
    def layout(self) -> str | None:
        """``NK`` or ``KN`` as in `packed.Reading`, None if the weight cannot be converted."""
        return self.recipe.layouts.get(self.parameter)

    @property
    def weight(self) -> Tensor:
        weight = self.module._parameters[self.parameter]
        assert weight is not None
        return weight

    def oriented(self) -> Tensor:
        """The weight as ``[..., N, K]``, a view."""
        w = self.weight.detach()
        w = w.flatten(w.dim() - self.recipe.kernel_dims - 1) if self.recipe.kernel_dims else w
        return w.transpose(-1, -2) if self.layout == "KN" else w


class PackedLayer(NamedTuple):
    """One packed weight of a model: the module that holds its buffers, their name there, and how they are read.

    reading: None if the graph does not record it, for example because it was loaded from a file.
    """

    name: str
    module: nn.Module
    parameter: str
    reading: Reading | None


def layer_name(full_name: str) -> str:
    """The name of a layer: the path of its module, or that of its Parameter if that is not called ``weight``."""
    path, _, parameter = full_name.rpartition(".")
    return path if parameter == "weight" and path else full_name


# ---- listing weights ------------------------------------------------------------------------------------------------


def walk(model: nn.Module, prefix: str = "") -> Iterator[Layer]:
    """Every Parameter of two or more dimensions of ``model``, with the recipe for it."""
    paths: dict[int, list[str]] = {}
    for path, module in model.named_modules(prefix=prefix, remove_duplicate=False):
        paths.setdefault(id(module), []).append(path)
    adapted = adapted_parameters(model)
    for path, module in model.named_modules(prefix=prefix):
        parameters = [name for name in matrices(module) if not is_codes(name, module._parameters[name])]
        package = quantised_by(module)
        if isinstance(module, PackedModule):
            recipe = Recipe(refused=dict.fromkeys(parameters, "its module is converted in part"))
        elif id(module) in adapted:
            recipe = Recipe(refused=dict.fromkeys(parameters, ADAPTED))
        elif package:
            recipe = Recipe(refused=dict.fromkeys(parameters, f"already quantised by {package}"))
        else:
            recipe = recipe_for(module)
        for parameter in parameters:
            aliases = tuple(layer_name(join(other, parameter)) for other in paths[id(module)] if other != path)
            yield Layer(join(path, parameter), module, recipe, aliases=aliases)


def packed_layers(model: nn.Module) -> Iterator[PackedLayer]:
    """The packed weights of the modules of ``model``."""
    for path, module in model.named_modules():
        if isinstance(module, PackedModule):
            for parameter, reading in module.packed_weights.items():
                yield PackedLayer(layer_name(join(path, parameter)), module, parameter, reading)


def quantised_by(module: nn.Module) -> str | None:
    """The other package that quantised the weight of ``module``, if int8fx recognises it."""
    package, weight = _package(module), module._parameters.get("weight")
    if package == "bitsandbytes" or weight is None:
        return package if package == "bitsandbytes" else None
    return "torchao" if "torchao" in (package, _package(weight)) else None


def _package(value: object) -> str:
    return type(value).__module__.partition(".")[0]


def grouped(layers: Iterable[Layer], key: Callable[[Layer], int]) -> list[list[Layer]]:
    groups: dict[int, list[Layer]] = {}
    for layer in layers:
        groups.setdefault(key(layer), []).append(layer)
    return list(groups.values())


# ---- what is refused ------------------------------------------------------------------------------------------------


def check_modules(model: nn.Module) -> None:
    """Raises ValueError, naming the layer, if ``model`` has Parameters without a shape."""
    for path, module in model.named_modules():
        name, weight = path or type(model).__name__, module._parameters.get("weight")
        if uninitialized(weight):
            raise ValueError(f"int8fx.convert: layer {name!r} has no weight yet; run the model once before converting")


def refuse_converted(packed: Iterable[PackedLayer], choice: Choice) -> None:
    """Raises ValueError if ``choice`` selects a layer that is converted already."""
    for name, module, _, _ in packed:
        skipped = choice.skips([name], module)
        if (choice.selects([name], module) or choice.by_default) and not skipped:
            raise ValueError(f"int8fx.convert: layer {name!r} is already converted by int8fx; legal: float weights")


def choose(layers: list[Layer], scheme_of: Callable[[Layer], Scheme]) -> list[Layer]:
    """The layers to convert. Raises ValueError, naming the layer, unless all of them can be packed."""
    chosen = [layer for layer in layers if layer.reason is None]
    for layer in chosen:
        check_weight(layer, scheme_of(layer))
    return chosen


def check_weight(layer: Layer, scheme: Scheme) -> None:
    """Raises ValueError, naming the layer, unless its weight can be packed."""
    name, weight, K = layer.name, layer.weight, layer.oriented().shape[-1]

    def refuse(problem: str, legal: str) -> None:
        raise ValueError(f"int8fx.convert: layer {name!r} {problem}; legal: {legal}")

    if weight.layout != torch.strided:
        refuse(f"has a {str(weight.layout).removeprefix('torch.')} weight", "dense weights")
    if not weight.is_floating_point() or weight.dtype.itemsize < 2:
        refuse(f"has {weight.dtype} weights", "float16, bfloat16, float32 or float64")
    if type(weight) not in (nn.Parameter, Tensor) and not isinstance(weight, FakeTensor):
        refuse(f"has a weight of type {type(weight).__name__}", "plain tensors")
    if K > MAX_K:
        refuse(f"has K = {K} input channels", f"K <= {MAX_K}, or int32 sums could overflow")
    if weight.numel() and not weight.is_meta and not isinstance(weight, FakeTensor):
        low, high = weight.detach().aminmax()
        if not (low.isfinite() and high.isfinite()):
            refuse("has NaN or inf in its weight", "finite weights")
        absmax, largest = float(max(-low, high)), torch.finfo(torch.float32).max
        if absmax / INT8_MAX > largest:
            refuse("has a weight whose scale overflows float32", "weights that float32 can hold")
        if scheme.rotation != 1 and absmax * abs(scheme.rotation) > largest:  # `rotate` sums a block before it scales
            refuse(
                f"has a weight whose rotation overflows float32: {absmax:.3g}",
                f"up to {largest / abs(scheme.rotation):.3g}",
            )
