"""Models under ``torch.compile``: a backend without C++, and what a fresh process measures of a family of models."""

from __future__ import annotations

import copy
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from support import models
from support.models import HIDDEN, Inputs
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor import config
from torch._inductor.compile_fx import compile_fx
from torch.fx import Graph, GraphModule

import int8fx
from int8fx.conversion.packed import PackedModule
from int8fx.graph.count import count_ops
from int8fx.passes import Report
from int8fx.schemes import reference
from int8fx.schemes.quantize import DEFAULT_THRESHOLD, outlier_mask, quantize_weight
from int8fx.schemes.weight import Epilogue, Int8Weight

LAYERS = 2


def without_cpp(gm: GraphModule, example_inputs: list, **_: object) -> Callable:
    """A backend: Inductor up to and with its joint-graph passes; then the graph runs as it is."""

    def inner_compile(graph: GraphModule, *_: object, **__: object) -> Callable:
        def run(args: list) -> Any:
            taken = list(args)
            args.clear()
            return graph(*taken)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    return compile_fx(gm, example_inputs, inner_compile=inner_compile)


def frames() -> int:
    """How many graphs Dynamo has compiled in this process."""
    return counters["stats"]["unique_graphs"]


# ---- what is expected of a family ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """What the passes do to one of `models.ALL`.

    captured, rewritten: int8fx ops in Dynamo's graph and after the passes.
    lowered, shared, folded: as in `int8fx.passes.Report`.
    inductor: whether Inductor compiles it to C++. The others run as graphs (`without_cpp`).
    """

    captured: dict[str, int]
    rewritten: dict[str, int]
    shared: int
    folded: int
    lowered: int = 0
    inductor: bool = False


FAMILIES = {
    # q, k, v, o, gate, up, down. Folds: the skip connection of o; silu, and gate times up; the skip connection of down
    "llama": Family(
        captured={"linear": 7 * LAYERS},
        rewritten={"quantize_rowwise": 2 * LAYERS, "linear_quantized": 5 * LAYERS, "linear": 2 * LAYERS},
        shared=3 * LAYERS,
        folded=4 * LAYERS,
        inductor=True,
    ),
    # q, k, v, o and two grouped products; folds: the skip connection of o
    "mixtral": Family(
        captured={"linear": 4 * LAYERS, "grouped_linear": 2 * LAYERS},
        rewritten={
            "quantize_rowwise": LAYERS, "linear_quantized": 3 * LAYERS, "linear": LAYERS, "grouped_linear": 2 * LAYERS,
        },
        shared=2 * LAYERS,
        folded=LAYERS,
        inductor=True,
    ),
    # qkv, o, up, down; folds: gelu, two skip connections
    "gpt2": Family(captured={"linear": 4 * LAYERS}, rewritten={"linear": 4 * LAYERS}, shared=0, folded=3 * LAYERS),
    # q, k, v, o, up, down, and the pooler; folds: gelu, two skip connections
    "bert": Family(
        captured={"linear": 6 * LAYERS + 1},
        rewritten={"quantize_rowwise": LAYERS, "linear_quantized": 3 * LAYERS, "linear": 3 * LAYERS + 1},
        shared=2 * LAYERS,
        folded=3 * LAYERS,
    ),
    "vit": Family(
        captured={"linear": 6 * LAYERS + 1},
        rewritten={"quantize_rowwise": LAYERS, "linear_quantized": 3 * LAYERS, "linear": 3 * LAYERS + 1},
        shared=2 * LAYERS,
        folded=3 * LAYERS,
    ),
    # encoder: q, k, v, o, gate, up, down; decoder: 4 more; down stays float, as T5 asks.
    # All decoder layers quantise the encoder's output once. Folds: gelu and gate; the skip connections of attention
    "t5": Family(
        captured={"linear": 16 * LAYERS},
        rewritten={
            "quantize_rowwise": 4 * LAYERS + 1, "linear_quantized": 12 * LAYERS, "linear": 4 * LAYERS,
        },
        shared=8 * LAYERS - 1,
        folded=7 * LAYERS,
    ),
    # Attention reads two weights dequantised. Encoder: qkv, o, up, down; decoder: qkv, o, q, kv, o, up, down. All
    # decoder layers quantise the encoder's output once. Folds: relu and skip connection of each MLP; the biases of qkv,
    # q and kv
    "transformer": Family(
        captured={"dequantize": 6 * LAYERS, "linear": 4 * LAYERS},
        rewritten={"quantize_rowwise": 1, "linear_quantized": LAYERS, "linear": 10 * LAYERS},
        shared=LAYERS - 1,
        folded=8 * LAYERS,
        lowered=7 * LAYERS,
    ),
}  # fmt: skip


# ---- inputs ----------------------------------------------------------------------------------------------------------

LENGTHS = (7, 2, 16, 48)  # 1 is a graph of its own to Dynamo, as for every model
PLANTED = (5, 17)  # columns that `variants` makes outliers
VARIANTS = ("none", "appear", "move", "vanish")


def _plant(name: str, model: nn.Module) -> None:
    """Undoes the outliers of every input to ``model``, and has those of `variants` reach its first layer."""
    with torch.no_grad():
        for module in model.modules():
            if "norm" in type(module).__name__.lower() and module.weight.shape == (HIDDEN,):
                module.weight.clamp_(max=1.5)
        if name == "vit":
            kernel = model.embeddings.patch_embeddings.projection.weight  # [HIDDEN, 3, 4, 4]
            kernel -= kernel.mean((-1, -2), keepdim=True)
            kernel[PLANTED[0], 0] = kernel[PLANTED[1], 2] = 1 / 16
        elif name != "transformer":
            table = model.get_input_embeddings().weight
            for i, column in enumerate(PLANTED):
                table[-1 - i, column] = 100.0


def _inputs(name: str, length: int, seed: int = 0) -> Inputs:
    """Inputs without outliers. An image's tokens cannot change in number: ``length`` is the size of its batch."""
    _, inputs = models.ALL[name](length if name == "vit" else 2, *([] if name == "vit" else [length]), seed=seed)
    if name == "t5":
        inputs["decoder_input_ids"] = inputs["input_ids"].flip(0)
    elif name == "transformer":
        inputs["tgt"] = inputs["src"].flip(0)
    for key in ("input_ids", "decoder_input_ids"):
        if key in inputs:
            inputs[key] = inputs[key].clamp(max=models.VOCAB - 1 - len(PLANTED))
    return inputs


def variants(name: str) -> dict[str, Inputs]:
    """Inputs of one shape, for a model that `_plant` has prepared: no outliers, one, another one, none."""

    def planted(which: int) -> Inputs:
        inputs = _inputs(name, LENGTHS[0])
        for key, x in inputs.items():
            if key.endswith("_ids"):
                x[0, 2] = models.VOCAB - 1 - which
            elif name == "vit":
                x[:, 2 * which] += 100
            elif name == "transformer":
                x[..., PLANTED[which]] += 100
        return inputs

    none, vanished = (_inputs(name, LENGTHS[0], seed=seed) for seed in (0, 1))
    return dict(zip(VARIANTS, (none, planted(0), planted(1), vanished), strict=True))


# ---- the measurement -------------------------------------------------------------------------------------------------


@dataclass
class Measured:
    """What one process finds out about a family, from its first compiled call on.

    frames, frames_by_length: how many graphs Dynamo has compiled after each of the `VARIANTS`, and then after each of
        the `LENGTHS`.
    captured, rewritten: the int8fx ops of each of these graphs, as Dynamo gives it and as code generation gets it.
    reports: what the passes said of the graph of the variants.
    errors: variant -> way to run the model -> distance of its result from the float64 model's.
    outliers: variant -> the outlier columns of the first packed layer's input.
    """

    frames: list[int] = field(default_factory=list)
    frames_by_length: list[int] = field(default_factory=list)
    captured: list[dict[str, int]] = field(default_factory=list)
    rewritten: list[dict[str, int]] = field(default_factory=list)
    reports: list[Report] = field(default_factory=list)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    outliers: dict[str, list[int]] = field(default_factory=dict)


@cache
def measured(name: str) -> Measured:
    """`measure` in a process in which nothing ran before."""
    environment = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    environment |= {"TORCHINDUCTOR_FX_GRAPH_CACHE": "0", "TORCHINDUCTOR_AUTOGRAD_CACHE": "0"}
    with (
        mock.patch.dict(os.environ, environment),
        ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh_process,
    ):
        return fresh_process.submit(measure, name).result()


def measure(name: str) -> Measured:
    """Nothing that int8fx or Dynamo does in this process precedes the first compiled call, but for the conversion."""
    family, found = FAMILIES[name], Measured()
    model, _ = models.ALL[name](seed=0)
    _plant(name, model)
    twins = {dtype: copy.deepcopy(model).to(dtype) for dtype in (torch.float32, torch.float64)}
    if name == "mixtral":
        twins[torch.float64].set_experts_implementation("eager")  # torch has no grouped matmul of float64
    int8fx.convert(model)
    config.joint_custom_post_pass = _NoteOps(found.rewritten)

    def backend(gm: GraphModule, example_inputs: list) -> Callable:
        found.captured.append(count_ops(gm.graph))
        return (compile_fx if family.inductor else without_cpp)(gm, example_inputs)

    compiled = torch.no_grad()(torch.compile(model, fullgraph=True, backend=backend))
    outputs = {}
    for variant, inputs in variants(name).items():
        outputs[variant] = _first(compiled(**inputs)).clone()
        found.frames.append(frames())
    found.reports = int8fx.reports()
    for length in LENGTHS:
        compiled(**_inputs(name, length))
        found.frames_by_length.append(frames())
    first = next(module for module in model.modules() if isinstance(module, PackedModule))
    seen: list[Tensor] = []
    first.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for variant, inputs in variants(name).items():
            results = {"compiled": outputs[variant], "eager": _first(model(**inputs))}
            results["float32"] = _first(twins[torch.float32](**inputs))
            if family.lowered:
                results["scheme"] = _first(_with_reference_linears(twins[torch.float32], inputs))
            exact = _first(twins[torch.float64](**_cast(inputs)))
            found.errors[variant] = {way: float((y.double() - exact).norm()) for way, y in results.items()}
            found.outliers[variant] = outlier_mask(seen.pop(), DEFAULT_THRESHOLD).nonzero().flatten().tolist()
    return found


class _NoteOps:
    """A joint-graph pass after all others: which int8fx ops are left for code generation."""

    def __init__(self, counts: list[dict[str, int]]) -> None:
        self.counts = counts

    def __call__(self, graph: Graph) -> None:
        self.counts.append(count_ops(graph))

    def uuid(self) -> None:
        return None


def _first(y: Any) -> Tensor:
    return y if isinstance(y, Tensor) else y[0]


def _cast(inputs: Inputs) -> Inputs:
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


def _with_reference_linears(model: nn.Module, inputs: Inputs) -> Any:
    """What the float ``model`` gives if every linear layer is the specification's."""

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return reference.linear(x, Int8Weight(*quantize_weight(weight), DEFAULT_THRESHOLD), Epilogue(bias))

    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with mock.patch.object(F, "linear", linear):
            return model(**inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
