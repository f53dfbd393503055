"""Conversion of graphs: packs the Parameters that a graph's products use, and rewrites the products.

For every packed Parameter ``w`` the graph gets the buffers of `packing`: ``w`` (int8 codes ``[..., N, K]``), its scale
and those of columns that are kept. Each of its uses becomes ``int8fx::dequantize`` (transposed for a ``[..., K, N]``
use); then `passes.lower` runs on it. An embedding takes rows of the codes. Layers have the names that modules have:
``lm_head`` for ``lm_head.weight``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, TensorArgument
from torch.fx import Graph, GraphModule, Node

from ..graph.count import count_ops
from ..graph.emit import call, call_int8
from ..graph.products import read_product
from ..graph.weights import follow
from ..passes.lower import lower
from ..schemes import Scheme
from ..schemes.calibration import Calibration
from ..schemes.quantize import compute_dtype
from .convert import Pack, leave_reasons, pack_layers
from .layers import HEAD, Layer, check_modules, choose, layer_name, packed_layers, plan, walk
from .packed import COLUMNS, SCALE, SUFFIXES, PackedModule, PackedWeight, applied_to_packed, not_codes, untie_columns
from .recipes import EMBEDDING, Recipe, embedding_forward
from .selection import Selection

aten = torch.ops.aten
DTYPES = "int8fx_dtypes"  # in a graph module's meta: layer name -> the dtype that its weight had


def convert_graph(
    model: GraphModule | ExportedProgram,
    scheme: Scheme,
    calibration: Calibration | None,
    select: Selection | None,
    skip: Selection,
) -> int:
    """`convert` for graphs; returns how many weights it converted."""
    root = model.graph_module if isinstance(model, ExportedProgram) else model
    check_modules(root)
    packed = [*packed_layers(root), *packed_in_graph(model)]
    layers = plan(root, select, skip, graph_layers(model), packed)
    chosen = choose(layers)
    pack = Pack(scheme, calibration, chosen)
    leave_reasons(root, layers)
    root.meta.setdefault(DTYPES, {}).update((layer.name, layer.weight.dtype) for layer in chosen)
    count = len(chosen)
    del layers  # they hold float weights
    if isinstance(model, ExportedProgram):
        _pack_exported(model, chosen, pack)
    else:
        _pack_graph_module(model, chosen, pack)
    return count


def graph_layers(model: GraphModule | ExportedProgram) -> list[Layer]:
    """The Parameters of two or more dimensions that a graph reads."""
    return list(_exported_layers(model) if isinstance(model, ExportedProgram) else _graph_module_layers(model))


def packed_in_graph(model: GraphModule | ExportedProgram) -> list[tuple[str, nn.Module, str]]:
    """The packed weights that a graph reads: layer name, a module that holds codes and scale, the codes' name in it."""
    if isinstance(model, ExportedProgram):
        graph, holder = model.graph_module.graph, nn.Module()
        holder._buffers.update(model.state_dict)
    else:
        graph, holder = model.graph, model
    found = _codes(holder) if count_ops(graph) else []
    return [(layer_name(*_split(_join(path, name))), owner, name) for path, owner, name in found]


def _codes(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """Codes in buffers of a graph's modules: path and module, name. Those of packed modules are their own affair."""
    return [
        (path, owner, name)
        for path, owner in model.named_modules()
        if not isinstance(owner, PackedModule)
        for name, codes in owner._buffers.items()
        if codes is not None and codes.dtype == torch.int8 and name + SCALE in owner._buffers
    ]


def _split(name: str) -> tuple[str, str]:
    path, _, leaf = name.rpartition(".")
    return path, leaf


def _join(path: str, leaf: str) -> str:
    return f"{path}.{leaf}" if path else leaf


# ---- how a graph uses its weights -----------------------------------------------------------------------------------


def _recipes(
    graph: Graph, name_of: Callable[[Node], str | None], weights: Mapping[str, Tensor], written: set[str]
) -> dict[str, Recipe]:
    """Parameter name -> the recipe for it. Names of one tensor get the same: export gives all uses to one of them.

    The layout is that of the first product with the weight. A weight that also is an embedding is an output embedding.
    """
    of = {name: id(weight) for name, weight in weights.items()}
    layouts: dict[int, str] = {}
    tables: set[int] = set()
    inner: set[int] = set()  # read by graphs inside this one
    changed = {of[name] for name in written}

    def shape_of(node: Node) -> torch.Size | None:
        name = name_of(node)
        return weights[name].shape if name in weights else None

    for node in graph.nodes:
        name = name_of(node)
        if name in weights and follow(node, shape_of) is None:
            changed.add(of[name])
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            inner.update(of[n] for i in node.all_input_nodes if (n := name_of(i)) in weights)
        if node.target is F.embedding and _embedding(node) is None:  # max_norm
            changed.update(of[n] for i in node.all_input_nodes if (n := name_of(i)) in weights)
        table = _embedding(node)
        if table is not None and name_of(table[0]) in weights:
            tables.add(of[name_of(table[0])])
        product = read_product(node, shape_of)
        if product is not None and product.layout is not None:
            layouts.setdefault(of[name_of(product.w.source)], product.layout)
    recipes = {}
    for name, key in of.items():
        _, leaf = _split(name)
        if key in changed:
            recipes[name] = Recipe(refused={leaf: "written to by the program"})
        elif key in inner:
            recipes[name] = Recipe(refused={leaf: "read by a subgraph"})
        elif key in layouts and key in tables:
            recipes[name] = Recipe({leaf: layouts[key]}, embedding_forward, on_request=HEAD)
        elif key in layouts:
            recipes[name] = Recipe({leaf: layouts[key]})
        else:
            recipes[name] = Recipe(refused={leaf: EMBEDDING} if key in tables else {})
    return recipes


def _embedding(node: Node) -> tuple[Node, Node] | None:
    """``(table, ids)`` if ``node`` takes rows of a table and leaves the table as it is."""
    if node.op != "call_function" or node.target not in (aten.embedding.default, torch.embedding, F.embedding):
        return None
    if node.target is F.embedding:
        names = ("input", "weight", "padding_idx", "max_norm")
        given = dict(zip(names, node.args, strict=False)) | node.kwargs
        table, ids = given.get("weight"), given.get("input")
        if given.get("max_norm") is not None:
            return None
    else:
        table, ids = (*node.args, None, None)[:2]
    return (table, ids) if isinstance(table, Node) and isinstance(ids, Node) else None


def _read_packed(use: Node, packed: list[Node], layer: Layer, described: PackedWeight) -> None:
    """Gives the users of the float weight ``use`` what they need of its buffers; ``use`` stays, without users."""
    graph, weight, (codes, scale, *kept) = use.graph, layer.oriented(), packed
    columns, columns_weight = kept or (None, None)
    for user in list(use.users):
        table = _embedding(user)
        if table is not None and table[0] is use and layer.layout == "NK":
            with graph.inserting_before(user):
                rows = _embedding_rows(graph, table[1], packed, described, compute_dtype(weight.dtype))
                user.replace_all_uses_with(call(graph, aten._to_copy.default, rows, dtype=weight.dtype))
            graph.erase_node(user)
    if not use.users:
        return
    first = next(node for node in graph.nodes if node in use.users)
    val = use.meta.get("val")
    with graph.inserting_before(first):
        args = (codes, scale, described.threshold, described.block, columns, columns_weight)
        new = call_int8(graph, torch.ops.int8fx.dequantize.default, *args, dtype=weight.dtype)
        new.meta["val"] = (
            torch.empty(weight.shape, dtype=weight.dtype, device="meta") if val is None else val.new_empty(weight.shape)
        )
        if layer.layout == "KN":
            read, order = new, [*range(weight.dim() - 2), weight.dim() - 1, weight.dim() - 2]
            new = graph.call_function(aten.permute.default, (read, order))
            if val is not None:
                new.meta["val"] = read.meta["val"].permute(order)
    use.replace_all_uses_with(new)


def _embedding_rows(graph: Graph, ids: Node, packed: list[Node], described: PackedWeight, dtype: torch.dtype) -> Node:
    codes, scale, *kept = packed
    codes, scale = (call(graph, aten.index.Tensor, t, [ids]) for t in (codes, scale))
    if described.block == 1 and not kept:
        scale = call(graph, aten._to_copy.default, call(graph, aten.unsqueeze.default, scale, -1), dtype=dtype)
        return call(graph, aten.mul.Tensor, call(graph, aten._to_copy.default, codes, dtype=dtype), scale)
    if kept:
        kept = [kept[0], call(graph, aten.index.Tensor, kept[1], [ids])]
    args = (codes, scale, described.threshold, described.block, *kept)
    rows = call_int8(graph, torch.ops.int8fx.dequantize.default, *args, dtype=dtype)
    return call(graph, aten.mul.Tensor, rows, 1)  # `lower` must not take rows for a weight: it looks behind no mul


# ---- torch.fx.GraphModule -------------------------------------------------------------------------------------------


class Int8GraphModule(GraphModule):
    """Mixed into the class of a converted GraphModule: what `packing.PackedModule` is for other modules."""

    def _apply(self, fn, recurse: bool = True):
        keys = [(owner._buffers, name + suffix) for _, owner, name in _codes(self) for suffix in SUFFIXES]
        places = [(buffers, key) for buffers, key in keys if key in buffers]
        with applied_to_packed(places, fn):
            super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        for path, owner, name in _codes(self):
            key = prefix + _join(path, name)
            untie_columns(owner._buffers, name, state_dict.get(key + COLUMNS))
            if key in state_dict and state_dict[key].dtype != torch.int8:
                errors.append(not_codes(key, state_dict.pop(key)))  # it would be cast to int8
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    def __reduce__(self):
        return _unpickle, super().__reduce__()[:2]


def _unpickle(function: Callable[..., GraphModule], args: tuple) -> GraphModule:
    model = function(*args)
    _guard(model)
    model.recompile()
    return model


@cache
def _int8_class(base: type[GraphModule]) -> type[GraphModule]:
    return type(f"Int8{base.__name__}", (Int8GraphModule, base), {})


def _guard(model: GraphModule) -> None:
    """Gives ``model`` an `Int8GraphModule` class; every GraphModule has one of its own, known by its qualified name."""
    base = next(c for c in type(model).__mro__ if c.__qualname__.rpartition(".")[2] != "GraphModuleImpl")
    if not issubclass(base, Int8GraphModule):
        own = type("GraphModuleImpl", (_int8_class(base),), {})
        own.__name__ = type(model).__name__
        model.__class__ = own


def _attribute(node: Node) -> str | None:
    return node.target if node.op == "get_attr" else None  # type: ignore[return-value]


def _graph_module_layers(model: GraphModule) -> Iterator[Layer]:
    weights = {name: p for name, p in model.named_parameters(remove_duplicate=False) if p.dim() >= 2}
    called = sorted({node.target for node in model.graph.find_nodes(op="call_module")})
    in_calls = {id(p) for target in called for p in model.get_submodule(target).parameters()}
    read = {id(weights[name]) for node in model.graph.nodes if (name := _attribute(node)) in weights}
    recipes = _recipes(model.graph, _attribute, weights, set())
    for name, weight in weights.items():
        path, leaf = _split(name)
        if id(weight) in read:
            recipe = recipes[name]
            if id(weight) in in_calls:
                recipe = Recipe(refused={leaf: "read by the graph and by a module that it calls"})
            yield Layer(layer_name(path, leaf), model.get_submodule(path), leaf, recipe.layouts.get(leaf), recipe)
    for target in called:
        for layer in walk(model.get_submodule(target), target):
            if id(layer.weight) not in read:
                yield layer


def _pack_graph_module(model: GraphModule, chosen: list[Layer], pack: Pack) -> None:
    calls = [model.get_submodule(node.target) for node in model.graph.find_nodes(op="call_module")]
    in_calls = {id(module) for called in calls for module in called.modules()}
    pack_layers([layer for layer in chosen if id(layer.module) in in_calls], pack)
    in_graph = [layer for layer in chosen if id(layer.module) not in in_calls]
    if not in_graph:
        return
    _guard(model)
    names = {id(module): path for path, module in model.named_modules()}
    vals = [node.meta.get("val") for node in model.graph.nodes if node.op in ("placeholder", "get_attr")]
    one_mode = len({id(detect_fake_mode([val])) for val in vals}) == 1  # make_fx has one per tensor
    tied: dict[int, list[Layer]] = {}
    for layer in in_graph:
        tied.setdefault(id(layer.weight), []).append(layer)
    try:
        for group in tied.values():
            packed = pack(group)
            for layer in group:
                name = _join(names[id(layer.module)], layer.parameter)
                for use in model.graph.find_nodes(op="get_attr", target=name):
                    _read_packed(use, _get_attrs(use, name, *packed, with_val=one_mode), layer, pack.describe(layer))
                    model.graph.erase_node(use)
                del layer.module._parameters[layer.parameter]
                suffixed = zip(SUFFIXES, packed, strict=False)
                layer.module._buffers.update((layer.parameter + suffix, tensor) for suffix, tensor in suffixed)
    finally:
        try:
            lower(model.graph)
        finally:
            model.graph.lint()
            model.recompile()


def _get_attrs(use: Node, name: str, *tensors: Tensor, with_val: bool) -> list[Node]:
    """Nodes that read a weight's buffers, in front of ``use``."""
    nodes = []
    with use.graph.inserting_before(use):
        for suffix, tensor in zip(SUFFIXES, tensors, strict=False):
            node = use.graph.create_node("get_attr", name + suffix)
            if with_val and "val" in use.meta:
                node.meta["val"] = use.meta["val"].new_empty(tensor.shape, dtype=tensor.dtype)
            nodes.append(node)
    return nodes


# ---- torch.export.ExportedProgram -----------------------------------------------------------------------------------


def _exported_layers(program: ExportedProgram) -> Iterator[Layer]:
    signature = program.graph_signature
    names = dict(signature.inputs_to_parameters)  # placeholder name -> Parameter name
    weights = {name: program.state_dict[name] for name in names.values() if program.state_dict[name].dim() >= 2}

    def name_of(node: Node) -> str | None:
        return names.get(node.name) if node.op == "placeholder" else None

    written = {*signature.buffers_to_mutate.values(), *signature.parameters_to_mutate.values()} & weights.keys()
    recipes = _recipes(program.graph_module.graph, name_of, weights, written)
    for name, weight in weights.items():
        path, leaf = _split(name)
        owner = nn.Module()
        owner._parameters[leaf] = weight
        owner._buffers.update({leaf + SCALE: t for n, t in program.state_dict.items() if n == name + SCALE})
        yield Layer(layer_name(path, leaf), owner, leaf, recipes[name].layouts.get(leaf), recipes[name])


def _pack_exported(program: ExportedProgram, chosen: list[Layer], pack: Pack) -> None:
    graph = program.graph_module.graph
    uses = {program.graph_signature.inputs_to_parameters.get(n.name): n for n in graph.nodes if n.op == "placeholder"}
    tied: dict[int, list[Layer]] = {}
    for layer in chosen:
        tied.setdefault(id(layer.weight), []).append(layer)
    chosen.clear()
    try:
        while tied:
            _pack_placeholders(program, uses, tied.pop(next(iter(tied))), pack)
    finally:
        try:
            lower(graph)
        finally:
            for spec, value in zip(program.graph_signature.output_specs, graph.output_node().args[0], strict=True):
                if isinstance(value, Node):  # a rewritten product may be an output
                    spec.arg.name = value.name
            program.graph_module.recompile()
        program.validate()


def _pack_placeholders(program: ExportedProgram, uses: dict, group: list[Layer], pack: Pack) -> None:
    """Packs the weight that the layers of ``group`` share."""
    packed = pack(group)
    for layer in group:
        name = f"{layer.name}.weight" if layer.parameter == "weight" and layer.name != "weight" else layer.name
        _pack_placeholder(program, uses[name], name, layer, packed, pack.describe(layer))


def _pack_placeholder(
    program: ExportedProgram, use: Node, name: str, layer: Layer, packed: tuple[Tensor, ...], described: PackedWeight
) -> None:
    """Replaces one Parameter of the program by its buffers: nodes, signature and state dict together."""
    graph, mode, nodes = use.graph, use.meta["val"].fake_mode, []
    with graph.inserting_before(use):
        for suffix, tensor in zip(SUFFIXES, packed, strict=False):
            node = graph.placeholder(f"{use.name}_int8{suffix}")
            node.meta["val"] = mode.from_tensor(tensor, static_shapes=True)
            nodes.append(node)
    _read_packed(use, nodes, layer, described)
    specs = []
    for spec in program.graph_signature.input_specs:
        if spec.arg.name != use.name:
            specs.append(spec)
            continue
        for node, suffix in zip(nodes, SUFFIXES, strict=False):
            specs.append(InputSpec(InputKind.BUFFER, TensorArgument(node.name), name + suffix, persistent=True))
    graph.erase_node(use)
    program._graph_signature = ExportGraphSignature(specs, program.graph_signature.output_specs)
    program._state_dict.update((name + suffix, tensor) for suffix, tensor in zip(SUFFIXES, packed, strict=False))
