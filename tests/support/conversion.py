"""What tests of conversions share: models as they run, as the reference has them, and as they were before."""

from __future__ import annotations

import copy
import filecmp
import io
import json
import pickle
import weakref
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from support.helpers import in_groups, kernels_linear, unit_roundoff
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

import int8fx
from int8fx.conversion.format import FORMAT
from int8fx.conversion.packed import PackedModule, tensors_of
from int8fx.schemes import Scheme
from int8fx.schemes.quantize import dequantize
from int8fx.schemes.weight import COLUMNS, Epilogue, Int8Weight

EVERYTHING = {"select": lambda name, module: True}
SCHEMES: dict[str, Scheme] = {
    "llm_int8": int8fx.llm_int8(),
    "weight_only": int8fx.weight_only(),
    "plain": int8fx.plain(),
    "llm_int8 columns": int8fx.llm_int8(columns=0.05),
    "int4": int8fx.weight_only("int4_fullrange", 16, compute="int8"),
    "nf4": int8fx.weight_only("nf4", 16, double_quant=True),
    "rotated": int8fx.rotated(16, columns=0.0),
    "rotated columns": int8fx.rotated(16, columns=0.05),
}


# ---- what was converted ---------------------------------------------------------------------------------------------


def converted_names(model: Any) -> set[str]:
    return {row.name for row in int8fx.summary(model).converted}


def reasons(model: Any) -> dict[str, str]:
    return {row.name: row.reason for row in int8fx.summary(model).left}


def codes_of(module: nn.Module, name: str = "weight") -> tuple[Tensor, Tensor]:
    return tensors_of(module, name)[:2]


def packed_modules(model: nn.Module) -> list[PackedModule]:
    return [module for module in model.modules() if isinstance(module, PackedModule)]


def int8_weight(weight: Tensor, scheme: Scheme, columns: Tensor | None = None) -> Int8Weight:
    """A float weight ``[..., N, K]`` as ``scheme`` has it, computed by `schemes` alone."""
    weight = weight.detach()
    return in_groups(weight, scheme.grouping, scheme.threshold, scheme.rotation, columns, weight.dtype)


def full_names(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Layer name -> the module that holds the Parameter or the packed weight, and its name there."""
    names = {}
    for path, module in model.named_modules():
        for parameter in {**module._parameters, **getattr(module, "packed_weights", {})}:
            name = path if parameter == "weight" and path else f"{path}.{parameter}" if path else parameter
            names[name] = (module, parameter)
    return names


# ---- what a model gives ---------------------------------------------------------------------------------------------


@contextmanager
def no_fast_path():
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def outputs(model: nn.Module, inputs: dict) -> dict[str, Tensor]:
    """The float outputs of ``model``, by name, without torch's fused attention, which calls no submodule."""
    with torch.no_grad(), no_fast_path():
        y = model(**inputs)
    if isinstance(y, Tensor):
        return {"y": y}
    if isinstance(y, (tuple, list)):
        return {str(i): t for i, t in enumerate(y) if isinstance(t, Tensor)}
    return {k: t for k, t in y.items() if isinstance(t, Tensor) and t.is_floating_point()}


def close(y: Tensor, z: Tensor) -> bool:
    """Whether two float results differ by no more than the rounding of their sums."""
    return y.shape == z.shape and bool((y - z).norm() <= 1e-5 * z.norm())


def dequantized_in(run: Callable[[], Any]) -> int:
    """How many weights ``run`` dequantises."""
    with torch.autograd.profiler.profile() as profile:
        run()
    return sum(event.count for event in profile.key_averages() if event.key == "int8fx::dequantize")


def equal(y: dict[str, Tensor], z: dict[str, Tensor]) -> bool:
    return y.keys() == z.keys() and all(torch.equal(y[name], z[name]) for name in z)


def floats_to(inputs: dict, dtype: torch.dtype) -> dict:
    return {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


def assert_as_good_as_the_reference(y: dict, y_reference: dict, y_float: dict, coarsest: float = 0.25) -> None:
    """``norm(y - reference) <= 0.05 * norm(reference - float)`` for every output: the house's 1.05 for whole models.

    ``coarsest``: the relative error of the reference from which the test would say nothing.
    """
    assert y.keys() == y_reference.keys() == y_float.keys()
    for name in y_float:
        assert y[name].dtype == y_float[name].dtype
        assert y[name].shape == y_float[name].shape
        allowed = 0.05 * (y_reference[name] - y_float[name]).norm()
        error = (y[name] - y_reference[name]).norm()
        assert 0 < allowed < 0.05 * coarsest * y_float[name].norm(), (name, allowed, y_float[name].norm())
        assert error <= allowed, f"{name}: {error:.3e} > {allowed:.3e}"


def assert_equal_sums(y: Tensor, z: Tensor, magnitude: Tensor, roundings: int) -> None:
    """y and z are the same sums in another order.

    Args:
        magnitude: the sum of the absolute values of all terms.
        roundings: how many each term goes through.
    """
    assert y.shape == z.shape
    u = roundings * unit_roundoff(y.dtype)
    assert ((y - z).abs() <= 2 * u / (1 - u) * magnitude).all(), (y - z).abs().max()


# ---- the reference model: made from the float model with `reference.linear`, without anything of the recipes --------


def as_reference(model: nn.Module, converted: nn.Module | set[str], scheme: Scheme = SCHEMES["llm_int8"]) -> nn.Module:
    """The float ``model`` with the layers of ``converted`` done by the reference. Changes and returns ``model``.

    Weights that no linear layer and no experts read are dequantised. Only the choice of columns is taken from
    ``converted``; it may be a set of names for a scheme without columns.
    """
    is_model, layers = isinstance(converted, nn.Module), full_names(model)
    packed, twins = full_names(converted) if is_model else {}, {}
    for name in converted_names(converted) if is_model else converted:
        module, parameter = layers[name]
        columns = packed[name][0]._buffers.get(packed[name][1] + COLUMNS) if packed else None
        weight = module._parameters[parameter]
        transposed = isinstance(module, Conv1D) or getattr(module, "is_transposed", False)
        transposed = transposed or getattr(module, "OPERANDS", {}).get(parameter) == "KN"
        twin = int8_weight(weight.transpose(-1, -2) if transposed else weight, scheme, columns)
        twins.setdefault(module, {})[parameter] = twin
        w = dequantize(twin, weight.dtype)
        module._parameters[parameter] = nn.Parameter(w.transpose(-1, -2) if transposed else w)
    for module, weights in twins.items():
        if isinstance(module, Conv1D) or type(module).forward is nn.Linear.forward:
            module.forward = _reference_linear(weights["weight"], module.bias)
        if hasattr(module, "is_transposed"):
            module.forward = _reference_experts(module, weights)
    return model


def _reference_linear(weight: Int8Weight, bias: Tensor | None) -> Callable:
    return lambda x: kernels_linear(x, weight, Epilogue(bias))


def _reference_experts(module: nn.Module, weights: dict[str, Int8Weight]) -> Callable:
    """Experts one by one, token by token: the definition."""

    def linear(x: Tensor, name: str, e: int) -> Tensor:
        bias = getattr(module, name + "_bias")[e] if module.has_bias else None
        return kernels_linear(x, weights[name].of_expert(e), Epilogue(bias))

    def forward(hidden: Tensor, index: Tensor, routing: Tensor) -> Tensor:
        y = torch.zeros_like(hidden)
        for e in range(module.num_experts):
            token, position = torch.where(index == e)
            if len(token):
                h = linear(hidden[token], "gate_up_proj" if module.has_gate else "up_proj", e)
                h = linear(module._apply_gate(h) if module.has_gate else module.act_fn(h), "down_proj", e)
                y.index_add_(0, token, (h * routing[token, position, None]).to(y.dtype))
        return y

    return forward


def dequantised_twin(model: nn.Module) -> Callable[[nn.Module], nn.Module]:
    """A function that returns, given the converted model, the float model with its dequantised weights."""
    twin = copy.deepcopy(model)

    def fill(converted: nn.Module) -> nn.Module:
        for path, module in converted.named_modules():
            for name in getattr(module, "packed_weights", ()):
                weight = nn.Parameter(module.dequantize(name), requires_grad=False)  # torch folds a matmul by it
                twin.get_submodule(path)._parameters[name] = weight
        return twin

    return fill


# ---- before and after -----------------------------------------------------------------------------------------------


def snapshot(model: nn.Module) -> dict:
    """All that a failed conversion must leave: classes, tensors (the same ones), attributes."""
    return {
        name: (type(m), dict(m._parameters), dict(m._buffers), {k: v for k, v in vars(m).items() if k[0] != "_"})
        for name, m in model.named_modules()
    }


def assert_left_as_it_was(model: nn.Module, before: dict) -> None:
    after = snapshot(model)
    assert after.keys() == before.keys()
    for name, (cls, parameters, buffers, attributes) in before.items():
        assert after[name][0] is cls
        for old, new in ((parameters, after[name][1]), (buffers, after[name][2])):
            assert old.keys() == new.keys()
            assert all(new[k] is v for k, v in old.items())
        assert after[name][3].keys() == attributes.keys()
        assert all(after[name][3][k] is v or after[name][3][k] == v for k, v in attributes.items() if k != "training")


COPIES = ("deepcopy", "pickle", "torch.save")


def copied(model: Any, how: str) -> Any:
    """A copy of ``model``, made in one of the `COPIES` ways."""
    if how == "deepcopy":
        return copy.deepcopy(model)
    return pickle.loads(pickle.dumps(model)) if how == "pickle" else saved(model, weights_only=False)


def saved(value: Any, weights_only: bool = True) -> Any:
    """``value``, by way of ``torch.save`` and ``torch.load``."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


class Interrupt:
    """``function``, which raises ``error`` at call number ``at``."""

    def __init__(self, function: Callable, at: int | None = None, error: type[BaseException] | None = None) -> None:
        self.function, self.at, self.error, self.count = function, at, error, 0

    def __call__(self, *args: Any) -> Any:
        if self.count == self.at:
            raise self.error("now")
        self.count += 1
        return self.function(*args)

    def __get__(self, owner: Any, _: type) -> Callable:
        """Also if it replaces a method."""
        return self if owner is None else lambda *args: self(owner, *args)


class LiveBytes(TorchDispatchMode):
    """The bytes of the tensors ``there`` and of tensors made since this mode began, less those that were freed."""

    def __init__(self, there: list[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.watched: set[int] = set()
        for tensor in there:
            self.watch(tensor)
        self.start = self.peak = self.live

    def watch(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.watched:
            return
        self.watched.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)

        def freed() -> None:
            self.watched.discard(key)
            self.live -= size

        weakref.finalize(storage, freed)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor):
                self.watch(t)
        return out


# ---- graphs ---------------------------------------------------------------------------------------------------------

Program = GraphModule | ExportedProgram


def symbolic(model: nn.Module, inputs: dict) -> GraphModule:
    return torch.fx.symbolic_trace(model)


def exported(model: nn.Module, inputs: dict) -> ExportedProgram:
    return torch.export.export(model, (), inputs)


def decomposed(model: nn.Module, inputs: dict) -> ExportedProgram:
    return exported(model, inputs).run_decompositions()


def unlifted(model: nn.Module, inputs: dict) -> GraphModule:
    return exported(model, inputs).module()


def fx_of_aten(model: nn.Module, inputs: dict) -> GraphModule:
    graph = make_fx(lambda *args: model(**dict(zip(inputs, args, strict=True))))(*inputs.values())
    for node, name in zip(graph.graph.find_nodes(op="placeholder"), inputs, strict=True):
        node.target = name
    graph.recompile()
    return graph


PROGRAMS: dict[str, Callable[[nn.Module, dict], Program]] = {
    "symbolic": symbolic, "exported": exported, "decomposed": decomposed, "unlifted": unlifted, "make_fx": fx_of_aten,
}  # fmt: skip
NAMED = ["symbolic", "exported", "unlifted"]  # in which Parameters have the names that they have in the module
GRAPH_MODULES = ["symbolic", "unlifted", "make_fx"]


def run(program: Program | nn.Module, inputs: dict) -> Any:
    with torch.no_grad():
        return (program.module() if isinstance(program, ExportedProgram) else program)(**inputs)


def tensors(program: Program | nn.Module) -> dict[str, Tensor]:
    """The tensors of a model or program by name, without those that say what their scheme is."""
    state = program.state_dict if isinstance(program, ExportedProgram) else program.state_dict()
    return {name: tensor for name, tensor in state.items() if not name.endswith(FORMAT)}


# ---- saved and loaded -----------------------------------------------------------------------------------------------


def assert_same_tensors(model: nn.Module, other: nn.Module) -> None:
    """Both have state dicts with the same names, dtypes and values."""
    state, expected = model.state_dict(), other.state_dict()
    assert state.keys() == expected.keys()
    assert [key for key in state if not torch.equal(state[key], expected[key])] == []
    assert [key for key in state if state[key].dtype != expected[key].dtype] == []


def flip_last_bit(file: Path, name: str) -> None:
    """Changes the last bit of the last byte of the tensor ``name`` in a safetensors file."""
    raw = bytearray(file.read_bytes())
    size = int.from_bytes(raw[:8], "little")
    raw[8 + size + json.loads(raw[8 : 8 + size])[name]["data_offsets"][1] - 1] ^= 1
    file.write_bytes(raw)


def assert_same_files(folder: Path, other: Path) -> None:
    """Both folders have files of the same names and bytes."""
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    assert filecmp.cmpfiles(folder, other, names, shallow=False)[1:] == ([], [])
