"""Conversion of an ``nn.Module``: its modules become packed ones, in place."""

from __future__ import annotations

from torch import nn

from ..schemes.weight import PackedTensors
from .forwards import FORWARDS
from .layers import Layer, PackedLayer, grouped, packed_layers, walk
from .memory import drop_file_pages
from .packed import Weights, pack_modules, refuse_unfit, tie_equal_columns
from .quantizer import Quantizer
from .recipes import Kind


def root_of(model: nn.Module) -> nn.Module:
    return model


def layers_of(model: nn.Module) -> list[Layer]:
    return list(walk(model))


def packed_of(model: nn.Module) -> list[PackedLayer]:
    return list(packed_layers(model))


def pack(model: nn.Module, chosen: list[Layer], quantizer: Quantizer) -> None:
    """Packs the weights of ``chosen``."""
    check_what_is_loaded(model)
    leave_fast_paths(model, {id(layer.module) for layer in chosen})
    pack_layers(chosen, quantizer)


def pack_layers(chosen: list[Layer], quantizer: Quantizer) -> None:
    """Packs the weights of ``chosen``, module by module. Each float weight is freed when its module is packed.

    Modules that share a weight are packed together: an interruption converts all of them or none.
    """
    for together in _together(chosen):
        tensors: dict[int, PackedTensors] = {}
        for tied in grouped(together, lambda layer: id(layer.weight)):
            tensors[id(tied[0].weight)] = quantizer(tied)
        ready = []
        for layers in grouped(together, lambda layer: id(layer.module)):
            recipe = layers[0].recipe
            weights: Weights = {
                layer.parameter: (tensors[id(layer.weight)], quantizer.reading(layer)) for layer in layers
            }
            # Attention leaves its fused path even if only some weights are packed. Others then keep their forward.
            replaced = recipe.kind is Kind.ATTENTION or recipe.layouts.keys() == weights.keys()
            ready.append((layers[0].module, weights, FORWARDS.get(recipe.kind) if replaced else None))
        floats = [layer.weight for layer in together]
        pack_modules(ready)
        for weight in floats:
            drop_file_pages(weight)


def _together(chosen: list[Layer]) -> list[list[Layer]]:
    """``chosen`` in groups: layers of one module, and of modules that share a weight, are in one."""
    group_of: dict[int, list[Layer]] = {}  # by the id of a module or a weight
    for layer in chosen:
        by_module, by_weight = (group_of.get(key, []) for key in (id(layer.module), id(layer.weight)))
        merged = [*by_module, *(by_weight if by_weight is not by_module else []), layer]
        for member in merged:
            group_of[id(member.module)] = group_of[id(member.weight)] = merged
    return list({id(group): group for group in group_of.values()}.values())


def check_what_is_loaded(model: nn.Module) -> None:
    """Makes ``model.load_state_dict`` refuse tensors that do not fit, before it loads any, and tie columns again."""
    hooks = model._load_state_dict_pre_hooks.values()
    if all(getattr(wrapped, "hook", None) is not refuse_unfit for wrapped in hooks):
        model.register_load_state_dict_pre_hook(refuse_unfit)
        model.register_load_state_dict_post_hook(tie_equal_columns)


def leave_fast_paths(model: nn.Module, converted: set[int]) -> None:
    """Turns off the fused inference paths of ``nn.TransformerEncoder(Layer)``, which take float weights only."""
    for module in model.modules():
        if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerEncoder)) and any(
            id(m) in converted for m in module.modules()
        ):
            if isinstance(module, nn.TransformerEncoderLayer):
                module.activation_relu_or_gelu = 0
            else:
                module.use_nested_tensor = False
