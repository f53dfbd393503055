"""What `convert` leaves in 16 bits unless it is selected, although it could convert it.

Heads, routers, what a model's authors keep in float32, and what is being trained. Attributes of models of transformers
are read; it is not imported.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from torch import Tensor, nn

from .layers import HEAD, ROUTER, TASK_HEAD, TRAINABLE, TRAINED_WHOLE, Layer, packed_layers
from .packed import join, tensors_of
from .peft import is_trained_whole
from .recipes import Kind

HEADS = {"lm_head": HEAD, "score": TASK_HEAD, "classifier": TASK_HEAD, "qa_outputs": TASK_HEAD}
"""Names that heads have in models of any kind."""
KEPT_IN_FLOAT32 = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")


def leave_by_default(model: nn.Module, layers: list[Layer]) -> None:
    """Sets the reason of each of ``layers`` that has none, and that is left unless it is selected."""
    wrapped = {id(inner) for module in model.modules() if is_trained_whole(module) for inner in module.modules()}
    for layer in layers:
        if layer.reason is None and id(layer.module) in wrapped:
            layer.reason = TRAINED_WHOLE
    _leave_routers(model, layers)
    heads, kept = _heads(model, layers), _kept_in_float32(model)
    for layer in layers:
        if layer.reason is None:
            head = HEADS.get(layer.name.rpartition(".")[2]) or heads.get(id(layer.module))
            layer.reason = head or kept(layer) or layer.recipe.on_request
    _leave_trainable(layers)


# ---- heads ----------------------------------------------------------------------------------------------------------


def _heads(model: nn.Module, layers: list[Layer]) -> dict[int, str]:
    """The id of each module of an output embedding or of a head -> the reason to leave it."""
    tables = {id(layer.weight) for layer in layers if isinstance(layer.module, nn.Embedding)}
    heads = {id(layer.module): HEAD for layer in layers if id(layer.weight) in tables}
    for module in model.modules():
        embeddings = _output_embeddings(module)
        heads[id(embeddings)] = HEAD
        if embeddings is None:
            for child in _outside_base_model(module):
                heads.update((id(inner), TASK_HEAD) for inner in child.modules() if id(inner) not in heads)
    del heads[id(None)]
    return heads


def _output_embeddings(module: nn.Module) -> object:
    get: Any = getattr(module, "get_output_embeddings", None)
    with suppress(NotImplementedError, AttributeError):  # backbones have the method and no embeddings
        return get() if callable(get) else None
    return None


def _outside_base_model(module: nn.Module) -> Iterator[nn.Module]:
    """The heads of ``module``, if it is a model of transformers that has a base model: all children beside that one.

    A child that is a model or holds a stack of blocks is no head: a decoder, for example, of images or of features.
    """
    base = getattr(type(module), "base_model_prefix", None)
    if base in module._modules:
        for name, child in module.named_children():
            if name != base and not any(_is_model_or_stack(inner) for inner in child.modules()):
                yield child


def _is_model_or_stack(module: nn.Module) -> bool:
    blocks = module if isinstance(module, nn.ModuleList) else ()
    is_stack = any(next(block.children(), None) is not None for block in blocks)
    return is_stack or hasattr(type(module), "base_model_prefix")


# ---- routers --------------------------------------------------------------------------------------------------------


def _leave_routers(model: nn.Module, layers: list[Layer]) -> None:
    """Excludes routers, which choose experts by small differences.

    A router stands in the block that holds the experts. It is whatever is called ``gate`` or ``router`` there, or a
    linear layer directly in the block with as many outputs as there are experts, or one more (for no expert). A layer
    deeper in the block, such as one of a shared expert, is no router, whatever its size.
    """
    experts_in = _blocks_of_experts(model, layers)
    for layer in layers:
        if layer.reason is None and layer.weight.dim() == 2:
            outputs, parts = layer.oriented().shape[0], layer.name.split(".")
            for depth, part in enumerate(parts):
                counts = experts_in.get(".".join(parts[:depth]))
                beside = depth == len(parts) - 1 and counts and not {outputs, outputs - 1}.isdisjoint(counts)
                if beside or (counts is not None and _is_called_router(part)):
                    layer.reason = ROUTER


def _is_called_router(name: str) -> bool:
    return name in ("gate", "gates", "gating", "wg") or "router" in name


def _blocks_of_experts(model: nn.Module, layers: list[Layer]) -> dict[str, set[int]]:
    """The path of each block of experts -> how many there are, as far as shapes and names tell.

    Experts are a weight of three dimensions in the block itself or in a module of it, or a module whose name says so.
    """
    weights = [(layer.full_name, _number_of_experts(layer)) for layer in layers]
    packed = [(join(p.name, p.parameter) if p.parameter == "weight" else p.name, p) for p in packed_layers(model)]
    weights += [(name, _first_of_three(tensors_of(p.module, p.parameter).codes)) for name, p in packed]
    blocks: dict[str, set[int]] = {}
    entries: dict[str, set[str]] = {}  # path of a container of experts -> its numbered entries
    for full_name, count in weights:
        path, _, _ = full_name.rpartition(".")
        if count is not None:
            for block in {path, path.rpartition(".")[0]}:
                blocks.setdefault(block, set()).add(count)
        parts = path.split(".")
        for depth, part in enumerate(parts):
            if "experts" in part and "shared" not in part:
                blocks.setdefault(".".join(parts[:depth]), set())
                entries.setdefault(".".join(parts[: depth + 1]), set()).update(
                    entry for entry in parts[depth + 1 : depth + 2] if entry[-1:].isdigit()
                )
    for path, names in entries.items():
        if names:
            blocks[path.rpartition(".")[0]].add(len(names))
    return blocks


def _number_of_experts(layer: Layer) -> int | None:
    convolution = layer.recipe.kind is Kind.CONVOLUTION
    return None if layer.layout is None or convolution else _first_of_three(layer.weight)


def _first_of_three(weight: Tensor) -> int | None:
    return weight.shape[0] if weight.dim() == 3 and weight.shape[0] > 1 else None


# ---- what others decided --------------------------------------------------------------------------------------------


def _kept_in_float32(model: nn.Module) -> Any:
    """A function layer -> why its model is to have it in float32, None if it is not.

    The rule is that of quantisers in transformers (``should_convert_module``): a pattern is a suffix of the name, or a
    regular expression for the beginning of it that ends between two parts.
    """
    rules = []
    for path, module in model.named_modules():
        for attribute in KEPT_IN_FLOAT32:
            for pattern in vars(module).get(attribute, getattr(type(module), attribute, None)) or ():
                beginning = re.compile(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))")
                rules.append((join(path, ""), pattern, beginning, attribute))

    def reason(layer: Layer) -> str | None:
        module = layer.full_name.rpartition(".")[0]
        for prefix, pattern, beginning, attribute in rules:
            for full_name in (module, layer.full_name):
                name = full_name.removeprefix(prefix)
                if full_name.startswith(prefix) and (name.endswith(pattern) or beginning.match(name)):
                    return f"kept in float32 by the model's {attribute}: {pattern!r}, left unless selected"
        return None

    return reason


def _leave_trainable(layers: list[Layer]) -> None:
    """Excludes what is trained while the weights of other linear layers are frozen, as adapters are."""
    chosen = [layer for layer in layers if layer.reason is None]
    if any(not layer.weight.requires_grad and layer.recipe.kind is not Kind.CONVOLUTION for layer in chosen):
        for layer in chosen:
            if layer.weight.requires_grad:
                layer.reason = TRAINABLE
