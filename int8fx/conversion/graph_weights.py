"""How a graph uses its weights, and what replaces a float weight in it.

A packed weight ``w`` of a graph is held in buffers called as those of a packed module (`packed`). Each use of the float
weight becomes ``int8fx::dequantize``, transposed for a ``[..., K, N]`` use; then `passes.lower` turns them into
int8 matmuls. An embedding takes rows of the codes. Layers have the names that they have in modules: ``lm_head`` for
``lm_head.weight``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, Node

from ..graph.emit import call, call_int8
from ..graph.weights import follow
from ..schemes.quantize import compute_dtype
from ..schemes.weight import Int8Weight
from .layers import HEAD, Layer, PackedLayer, layer_name
from .packed import Reading, codes_in, join
from .recipes import TABLE, Kind, Recipe, recipe_of_usage
from .usage import read_layouts

aten = torch.ops.aten
READINGS = "int8fx_readings"  # in the meta of a graph module: layer name -> `Reading`


class Embedding(NamedTuple):
    """A node that takes rows ``ids`` of ``table``."""

    table: Node
    ids: Node


def read_recipes(
    graph: Graph, name_of: Callable[[Node], str | None], weights: Mapping[str, Tensor], written: set[str]
) -> dict[str, Recipe]:
    """Parameter name -> the recipe for it. Names of one tensor get the same: export gives all uses to one of them.

    A weight that is both an embedding and the weight of a matmul is an output embedding.

    Args:
        name_of: the Parameter that a node reads.
        weights: Parameter name -> its tensor.
        written: names of Parameters that the program writes to according to its signature.
    """

    def weight_of(node: Node) -> Tensor | None:
        name = name_of(node)
        return None if name is None else weights.get(name)

    def shape_of(node: Node) -> torch.Size | None:
        weight = weight_of(node)
        return None if weight is None else weight.shape

    def inputs_of(node: Node) -> set[int]:
        return {id(weight) for i in node.all_input_nodes if (weight := weight_of(i)) is not None}

    layouts = read_layouts(graph, weight_of)
    changed, in_subgraphs, tables = {id(weights[name]) for name in written}, set(), set()
    for node in graph.nodes:
        weight, embedding = weight_of(node), embedding_of(node)
        if weight is not None and follow(node, shape_of) is None:
            changed.add(id(weight))
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            in_subgraphs |= inputs_of(node)
        if embedding is not None and (table := weight_of(embedding.table)) is not None:
            tables.add(id(table))
        elif node.target is F.embedding:  # with max_norm it writes to its table
            changed |= inputs_of(node)
    recipes = {}
    for name, weight in weights.items():
        key, parameter = id(weight), name.rpartition(".")[2]
        if key in changed:
            recipe = Recipe(refused={parameter: "written to by the program"})
        elif key in in_subgraphs:
            recipe = Recipe(refused={parameter: "read by a subgraph"})
        elif key in layouts:
            recipe = recipe_of_usage({parameter: layouts[key]}, [parameter])
            if key in tables:
                recipe = Recipe(recipe.layouts, Kind.EMBEDDING, on_request=HEAD, refused=recipe.refused)
        else:
            recipe = Recipe(refused={parameter: TABLE} if key in tables else {})
        recipes[name] = recipe
    return recipes


def embedding_of(node: Node) -> Embedding | None:
    """The table and ids of ``node``, if it is an embedding that does not change its table; else None."""
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
    return Embedding(table, ids) if isinstance(table, Node) and isinstance(ids, Node) else None


def packed_in(holder: nn.Module, readings: Mapping[str, Reading]) -> list[PackedLayer]:
    """The packed weights that a graph reads from buffers of ``holder`` and of the modules inside it."""
    packed = [(layer_name(join(path, name)), owner, name) for path, owner, name in codes_in(holder)]
    return [PackedLayer(*layer, readings.get(layer[0])) for layer in packed]


def replace_weight(use: Node, packed: Int8Weight, layer: Layer, dtype: torch.dtype) -> None:
    """Makes the users of ``use``, a node that reads the float weight of ``layer``, use the packed weight.

    ``use`` stays in the graph, without users. ``packed`` holds nodes.
    """
    graph, shape = use.graph, layer.weight.shape
    for user in list(use.users):
        embedding = embedding_of(user)
        if embedding is not None and embedding.table is use and layer.layout == "NK":
            with graph.inserting_before(user):
                rows = _rows(graph, embedding.ids, packed, compute_dtype(dtype))
                user.replace_all_uses_with(call(graph, aten._to_copy.default, rows, dtype=dtype))
            graph.erase_node(user)
    if not use.users:
        return
    first = next(node for node in graph.nodes if node in use.users)
    val = use.meta.get("val")
    with graph.inserting_before(first):
        weight = call_int8(graph, torch.ops.int8fx.dequantize.default, *packed, dtype=dtype)
        stored = layer.oriented().shape
        weight.meta["val"] = torch.empty(stored, dtype=dtype, device="meta") if val is None else val.new_empty(stored)
        if layer.layout == "KN":
            order = [*range(len(shape) - 2), len(shape) - 1, len(shape) - 2]
            dequantized, weight = weight, graph.call_function(aten.permute.default, (weight, order))
            if val is not None:
                weight.meta["val"] = dequantized.meta["val"].permute(order)
    use.replace_all_uses_with(weight)


def _rows(graph: Graph, ids: Node, packed: Int8Weight, dtype: torch.dtype) -> Node:
    """Rows ``ids`` of the dequantised table."""

    def take(tensor: Any) -> Any:
        return call(graph, aten.index.Tensor, tensor, [ids])

    packed = packed.of_channels(take)
    if packed.block == 1 and packed.columns is None and packed.is_plain:
        scale = call(graph, aten._to_copy.default, call(graph, aten.unsqueeze.default, packed.scale, -1), dtype=dtype)
        return call(graph, aten.mul.Tensor, call(graph, aten._to_copy.default, packed.codes, dtype=dtype), scale)
    rows = call_int8(graph, torch.ops.int8fx.dequantize.default, *packed, dtype=dtype)
    return call(graph, aten.mul.Tensor, rows, 1)  # `lower` must not take rows for a weight: it follows no mul
