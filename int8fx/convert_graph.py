"""Conversion of graphs: packs the Parameters that a graph's products use, and rewrites the products.

For every packed Parameter ``w`` the graph gets two buffers, ``w`` (int8 codes ``[..., N, K]``) and ``w_scale``, and each
of its uses becomes ``int8fx::dequantize`` (transposed for a ``[..., K, N]`` use); then `passes.lower` runs on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, TensorArgument
from torch.fx import Graph, GraphModule, Node

from .convert import Layer, choose, leave_reasons, pack_layers, pack_weight, plan, walk
from .packing import SCALE
from .passes.lower import lower
from .passes.products import read_product
from .quantize import quantize_weight
from .recipes import Recipe
from .schemes import LLMInt8
from .selection import Selection


def convert_graph(
    model: GraphModule | ExportedProgram, scheme: LLMInt8, select: Selection | None, skip: Selection
) -> int:
    """`convert` for graphs; returns how many weights it converted."""
    if isinstance(model, ExportedProgram):
        return _convert_exported(model, scheme, select, skip)
    return _convert_graph_module(model, scheme, select, skip)


def _layouts(graph: Graph, name_of: Callable[[Node], str | None], weights: dict[str, Tensor]) -> dict[str, str]:
    """Parameter name -> the layout that the first product with it uses."""

    def shape_of(node: Node) -> torch.Size | None:
        name = name_of(node)
        return weights[name].shape if name in weights else None

    found: dict[str, str] = {}
    for node in graph.nodes:
        product = read_product(node, shape_of)
        if product is not None and product.layout is not None:
            found.setdefault(name_of(product.w.source), product.layout)  # type: ignore[arg-type]
    return found


def _layer(name: str, owner: nn.Module, parameter: str, layout: str | None) -> Layer:
    recipe = Recipe({parameter: layout} if layout else {})
    return Layer(name, owner, parameter, layout, recipe)


def _insert_dequantize(use: Node, codes: Node, scale: Node, layer: Layer, threshold: float) -> None:
    graph, weight = use.graph, layer.oriented()
    with graph.inserting_after(scale if use.op == "placeholder" else use):
        read = graph.call_function(torch.ops.int8fx.dequantize.default, (codes, scale, weight.dtype, threshold))
        val = use.meta.get("val")
        read.meta["val"] = (
            torch.empty(weight.shape, dtype=weight.dtype, device="meta") if val is None else val.new_empty(weight.shape)
        )
    new = read
    if layer.layout == "KN":
        with graph.inserting_after(read):
            order = [*range(weight.dim() - 2), weight.dim() - 1, weight.dim() - 2]
            new = graph.call_function(torch.ops.aten.permute.default, (read, order))
            if val is not None:
                new.meta["val"] = read.meta["val"].permute(order)
    use.replace_all_uses_with(new)


# ---- torch.fx.GraphModule -------------------------------------------------------------------------------------------


class Int8GraphModule(GraphModule):
    """Mixed into the class of a converted GraphModule: casts of it leave the scales of packed weights in float32."""

    def _apply(self, fn, recurse: bool = True):
        scales = {name: b for name, b in self.named_buffers() if name.endswith(SCALE)}
        packed = {name: b for name, b in scales.items() if self.get_buffer(name[: -len(SCALE)]).dtype == torch.int8}
        super()._apply(fn, recurse)
        for name, scale in packed.items():
            path, _, leaf = name.rpartition(".")
            owner = self.get_submodule(path)
            moved = owner._buffers[leaf]
            assert moved is not None
            if moved.dtype != scale.dtype:
                owner._buffers[leaf] = scale.to(moved.device)
        return self


@cache
def _int8_class(base: type[GraphModule]) -> type[GraphModule]:
    return type(f"Int8{base.__name__}", (Int8GraphModule, base), {})


def _keep_scales(model: GraphModule) -> None:
    """Gives ``model`` an `Int8GraphModule` class. Every GraphModule has a class of its own, known by its qualified name."""
    base = next(c for c in type(model).__mro__ if c.__qualname__.rpartition(".")[2] != "GraphModuleImpl")
    if not issubclass(base, Int8GraphModule):
        own = type("GraphModuleImpl", (_int8_class(base),), {})
        own.__name__ = type(model).__name__
        model.__class__ = own


def _convert_graph_module(model: GraphModule, scheme: LLMInt8, select: Selection | None, skip: Selection) -> int:
    def name_of(node: Node) -> str | None:
        return node.target if node.op == "get_attr" else None  # type: ignore[return-value]

    weights = dict(model.named_parameters(remove_duplicate=False))
    layouts = _layouts(model.graph, name_of, weights)
    called = {node.target for node in model.graph.nodes if node.op == "call_module"}
    read = {name_of(node) for node in model.graph.nodes}

    def candidates() -> Iterator[Layer]:
        for name, weight in weights.items():
            if name in read and weight.dim() >= 2:
                path, _, leaf = name.rpartition(".")
                yield _layer(name, model.get_submodule(path), leaf, layouts.get(name))
        modules = dict(model.named_modules())
        for target in sorted(called):
            yield from walk(modules[target], target)

    layers = plan(model, select, skip, candidates)
    chosen = [layer for layer in layers if layer.reason is None]
    for layer in chosen:
        check_weight(layer.name, layer.weight, layer.oriented().shape[-1])
    leave_reasons(model, layers)
    in_graph = [layer for layer in chosen if layer.name in read]
    pack_layers([layer for layer in chosen if layer.name not in read], scheme)
    if in_graph:
        _keep_scales(model)
    try:
        for layer in in_graph:
            codes, scale = quantize_weight(layer.oriented())
            for use in model.graph.find_nodes(op="get_attr", target=layer.name):
                with model.graph.inserting_before(use):
                    nodes = [model.graph.create_node("get_attr", layer.name + suffix) for suffix in ("", SCALE)]
                _insert_dequantize(use, *nodes, layer, scheme.threshold)
                model.graph.erase_node(use)
            del layer.module._parameters[layer.parameter]
            layer.module._buffers[layer.parameter] = codes
            layer.module._buffers[layer.parameter + SCALE] = scale
    finally:
        lower(model.graph)
        model.graph.lint()
        model.recompile()
    return len(chosen)


# ---- torch.export.ExportedProgram -----------------------------------------------------------------------------------


def _convert_exported(program: ExportedProgram, scheme: LLMInt8, select: Selection | None, skip: Selection) -> int:
    graph = program.graph_module.graph
    signature = program.graph_signature
    names = dict(signature.inputs_to_parameters)  # placeholder name -> Parameter name
    weights = {name: program.state_dict[name] for name in names.values()}

    def name_of(node: Node) -> str | None:
        return names.get(node.name) if node.op == "placeholder" else None

    layouts = _layouts(graph, name_of, weights)

    def candidates() -> Iterator[Layer]:
        for name, weight in weights.items():
            if weight.dim() >= 2:
                owner = nn.Module()
                owner._parameters["weight"] = weight
                yield _layer(name, owner, "weight", layouts.get(name))

    converted = [n for n in graph.nodes if isinstance(n.target, torch._ops.OpOverload) and n.target.namespace == "int8fx"]
    if converted and not layouts:
        raise ValueError("int8fx.convert: the program is already converted by int8fx; legal: float weights")
    layers = plan(program.graph_module, select, skip, candidates)
    chosen = [layer for layer in layers if layer.reason is None]
    for layer in chosen:
        check_weight(layer.name, layer.weight, layer.oriented().shape[-1])
    mutated = set(signature.buffers_to_mutate.values()) | set(getattr(signature, "parameters_to_mutate", {}).values())
    placeholders = {name_of(node): node for node in graph.nodes if node.op == "placeholder"}
    for layer in chosen:
        if layer.name in mutated:
            raise ValueError(f"int8fx.convert: layer {layer.name!r} is written to by the program; legal: constant weights")
    try:
        for layer in chosen:
            _pack_placeholder(program, graph, placeholders[layer.name], layer, scheme.threshold)
    finally:
        lower(graph)
        for spec, value in zip(program.graph_signature.output_specs, graph.output_node().args[0], strict=True):
            if isinstance(value, Node):  # a rewritten product may be an output
                spec.arg.name = value.name
        program.graph_module.recompile()
        program.validate()
    return len(chosen)


def _pack_placeholder(program: ExportedProgram, graph: Graph, use: Node, layer: Layer, threshold: float) -> None:
    """Replaces one Parameter of the program by its codes and scale: nodes, signature and state dict together."""
    codes, scale = quantize_weight(layer.oriented())
    mode = use.meta["val"].fake_mode
    nodes = []
    with graph.inserting_before(use):
        for suffix, tensor in (("", codes), (SCALE, scale)):
            node = graph.placeholder(f"{use.name}_int8{suffix}")
            node.meta["val"] = mode.from_tensor(tensor, static_shapes=True)
            nodes.append(node)
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    with graph.inserting_after(last):
        marker = graph.call_function(torch.ops.aten.alias.default, (use,))
    marker.meta["val"] = use.meta["val"]
    use.replace_all_uses_with(marker, delete_user_cb=lambda user: user is not marker)
    _insert_dequantize(marker, *nodes, layer, threshold)
    graph.erase_node(marker)
    specs = []
    for spec in program.graph_signature.input_specs:
        if spec.arg.name != use.name:
            specs.append(spec)
            continue
        for node, suffix in zip(nodes, ("", SCALE), strict=True):
            specs.append(InputSpec(InputKind.BUFFER, TensorArgument(node.name), layer.name + suffix, persistent=True))
    graph.erase_node(use)
    program._graph_signature = ExportGraphSignature(specs, program.graph_signature.output_specs)
    state = program._state_dict
    state[layer.name], state[layer.name + SCALE] = codes, scale  # type: ignore[assignment]
