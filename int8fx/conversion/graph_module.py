"""Conversion of a ``torch.fx.GraphModule``: Parameters that its graph reads, and the modules that it calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

from torch import nn
from torch._guards import detect_fake_mode
from torch.fx import GraphModule, Node

from ..graph.count import count_ops
from ..passes.lower import lower
from ..schemes import Scheme
from ..schemes.weight import PackedTensors
from .graph_weights import READINGS, packed_in, read_recipes, replace_weight
from .layers import Layer, PackedLayer, grouped, layer_name, packed_layers, walk
from .modules import pack_layers
from .packed import PackedState, codes_in, is_codes, join, store
from .quantizer import Quantizer
from .recipes import Recipe


def root_of(model: GraphModule) -> nn.Module:
    return model


def packed_of(model: GraphModule) -> list[PackedLayer]:
    in_graph = packed_in(model, model.meta.get(READINGS, {})) if count_ops(model.graph) else []
    return [*packed_layers(model), *in_graph]


def layers_of(model: GraphModule) -> list[Layer]:
    return list(_layers(model))


def _layers(model: GraphModule) -> Iterator[Layer]:
    parameters = model.named_parameters(remove_duplicate=False)
    weights = {name: p for name, p in parameters if p.dim() >= 2 and not is_codes(name, p)}
    called = sorted({str(node.target) for node in model.graph.find_nodes(op="call_module")})
    in_calls = {id(p) for target in called for p in model.get_submodule(target).parameters()}
    read = {id(weights[name]) for node in model.graph.nodes if (name := _attribute(node)) in weights}
    recipes = read_recipes(model.graph, _attribute, weights, set())
    for name, weight in weights.items():
        path, _, parameter = name.rpartition(".")
        if id(weight) in read:
            recipe = recipes[name]
            if id(weight) in in_calls:
                recipe = Recipe(refused={parameter: "read by the graph and by a module that it calls"})
            yield Layer(name, model.get_submodule(path), recipe)
    for target in called:
        for layer in walk(model.get_submodule(target), target):
            if id(layer.weight) not in read:
                yield layer


def _attribute(node: Node) -> str | None:
    return str(node.target) if node.op == "get_attr" else None


def pack(model: GraphModule, chosen: list[Layer], quantizer: Quantizer) -> None:
    """Packs the weights of ``chosen``: those of called modules as `modules` does, the others in the graph.

    Each float weight is freed when its uses are replaced.
    """
    calls = [model.get_submodule(str(node.target)) for node in model.graph.find_nodes(op="call_module")]
    in_calls = {id(module) for called in calls for module in called.modules()}
    _mix_in(model)
    pack_layers([layer for layer in chosen if id(layer.module) in in_calls], quantizer)
    in_graph = [layer for layer in chosen if id(layer.module) not in in_calls]
    vals = [node.meta.get("val") for node in model.graph.nodes if node.op in ("placeholder", "get_attr")]
    one_mode = len({id(detect_fake_mode([val])) for val in vals}) == 1  # make_fx has a mode for each tensor
    try:
        for tied in grouped(in_graph, lambda layer: id(layer.weight)):
            tensors = quantizer(tied)
            for layer in tied:
                _pack_layer(model, layer, tensors, quantizer, one_mode)
    finally:
        try:
            lower(model.graph)
        finally:
            model.graph.lint()
            model.recompile()


def _pack_layer(model: GraphModule, layer: Layer, tensors: PackedTensors, quantizer: Quantizer, with_val: bool) -> None:
    """Replaces one Parameter by its buffers, in the graph and in the module that holds it."""
    reading = model.meta.setdefault(READINGS, {})[layer.name] = quantizer.reading(layer)
    for use in model.graph.find_nodes(op="get_attr", target=layer.full_name):
        nodes = {}
        with model.graph.inserting_before(use):
            for name, tensor in tensors.named(layer.full_name).items():
                nodes[name] = model.graph.create_node("get_attr", name)
                if with_val and "val" in use.meta:
                    nodes[name].meta["val"] = use.meta["val"].new_empty(tensor.shape, dtype=tensor.dtype)
        replace_weight(use, reading.weight(PackedTensors.of(nodes, layer.full_name)), layer, reading.dtype)
        model.graph.erase_node(use)
    store(layer.module, layer.parameter, tensors, reading.scheme)


# ---- the class of a converted GraphModule ---------------------------------------------------------------------------


class Int8GraphModule(PackedState, GraphModule):
    """The class of a converted GraphModule: what `packed.PackedModule` is for other modules."""

    def _packed_places(self) -> list[tuple[str, nn.Module, str, Scheme | None]]:
        readings = self.meta.get(READINGS, {})
        places = []
        for path, owner, name in codes_in(self):
            reading = readings.get(layer_name(join(path, name)))
            places.append((path, owner, name, reading and reading.scheme))
        return places

    def __reduce__(self):
        return _unpickle, super().__reduce__()[:2]


def _unpickle(function: Callable[..., GraphModule], args: tuple) -> GraphModule:
    model = function(*args)
    _mix_in(model)
    model.recompile()
    return model


@cache
def _int8_class(base: type[GraphModule]) -> type[GraphModule]:
    return type(f"Int8{base.__name__}", (Int8GraphModule, base), {})


def _mix_in(model: GraphModule) -> None:
    """Gives ``model`` a class with `Int8GraphModule` in it. Torch makes a class for every GraphModule."""
    base = next(c for c in type(model).__mro__ if c.__qualname__.rpartition(".")[2] != "GraphModuleImpl")
    if not issubclass(base, Int8GraphModule):
        cls = type("GraphModuleImpl", (_int8_class(base),), {})  # type: ignore[arg-type]  # classes are hashable
        cls.__name__ = type(model).__name__
        model.__class__ = cls
