"""Conversion of a ``torch.export.ExportedProgram``: its Parameters are placeholders of its graph."""

from __future__ import annotations

from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, TensorArgument
from torch.fx import Node

from ..graph.count import count_ops
from ..passes.lower import lower
from ..schemes.weight import SCALE, PackedTensors
from .graph_weights import READINGS, packed_in, read_recipes, replace_weight
from .layers import Layer, PackedLayer, grouped
from .packed import is_codes
from .quantizer import Quantizer


def root_of(program: ExportedProgram) -> nn.Module:
    return program.graph_module


def packed_of(program: ExportedProgram) -> list[PackedLayer]:
    holder = nn.Module()
    for name, tensor in program.state_dict.items():
        (holder._parameters if is_codes(name, tensor) else holder._buffers)[name] = tensor
    readings = program.graph_module.meta.get(READINGS, {})
    return packed_in(holder, readings) if count_ops(program.graph) else []


def layers_of(program: ExportedProgram) -> list[Layer]:
    """The Parameters of the program, each in a new module that only its `Layer` uses."""
    signature, state = program.graph_signature, program.state_dict
    names = dict(signature.inputs_to_parameters)  # placeholder name -> Parameter name
    weights: dict[str, Tensor] = {
        name: state[name] for name in names.values() if state[name].dim() >= 2 and not is_codes(name, state[name])
    }

    def name_of(node: Node) -> str | None:
        return names.get(node.name) if node.op == "placeholder" else None

    written = {*signature.buffers_to_mutate.values(), *signature.parameters_to_mutate.values()} & weights.keys()
    recipes = read_recipes(program.graph, name_of, weights, written)
    return [Layer(name, _holder(program, name), recipes[name]) for name in weights]


def _holder(program: ExportedProgram, name: str) -> nn.Module:
    """A module with the Parameter ``name``, and with the tensor that has the name of its scale, if there is one."""
    holder, parameter = nn.Module(), name.rpartition(".")[2]
    holder._parameters[parameter] = program.state_dict[name]
    if name + SCALE in program.state_dict:
        holder._buffers[parameter + SCALE] = program.state_dict[name + SCALE]
    return holder


def pack(program: ExportedProgram, chosen: list[Layer], quantizer: Quantizer) -> None:
    """Packs the weights of ``chosen``. Each float weight is freed when its uses are replaced."""
    graph = program.graph
    uses = {program.graph_signature.inputs_to_parameters.get(n.name): n for n in graph.find_nodes(op="placeholder")}
    try:
        for tied in grouped(chosen, lambda layer: id(layer.weight)):
            tensors = quantizer(tied)
            for layer in tied:
                _pack_layer(program, uses[layer.full_name], layer, tensors, quantizer)
    finally:
        try:
            lower(graph)
        finally:
            for spec, value in zip(program.graph_signature.output_specs, graph.output_node().args[0], strict=True):
                if isinstance(value, Node):  # a rewritten matmul may be an output
                    spec.arg.name = value.name
            program.graph_module.recompile()
        program.validate()


def _pack_layer(
    program: ExportedProgram, use: Node, layer: Layer, tensors: PackedTensors, quantizer: Quantizer
) -> None:
    """Replaces one Parameter of the program by its buffers: nodes, signature and state dict together."""
    graph, mode, nodes = use.graph, use.meta["val"].fake_mode, {}
    reading = program.graph_module.meta.setdefault(READINGS, {})[layer.name] = quantizer.reading(layer)
    with graph.inserting_before(use):
        for suffix, tensor in tensors.named("").items():
            nodes[suffix] = graph.placeholder(f"{use.name}_int8{suffix}")
            nodes[suffix].meta["val"] = mode.from_tensor(tensor, static_shapes=True)
    replace_weight(use, reading.weight(PackedTensors.of(nodes, "")), layer, reading.dtype)
    specs: list[InputSpec] = []
    for spec in program.graph_signature.input_specs:
        if spec.arg.name != use.name:
            specs.append(spec)
            continue
        for suffix, node in nodes.items():
            argument = TensorArgument(node.name)
            specs.append(InputSpec(InputKind.BUFFER, argument, layer.full_name + suffix, persistent=True))
    graph.erase_node(use)
    program._graph_signature = ExportGraphSignature(specs, program.graph_signature.output_specs)
    del program._state_dict[layer.full_name]
    program._state_dict.update(tensors.named(layer.full_name))
    del layer.module._parameters[layer.parameter]  # the last reference to the float weight
