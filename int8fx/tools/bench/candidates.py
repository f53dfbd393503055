"""int8fx and each other library: how each computes a linear layer, or the linear layers of a model."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import int8fx
from int8fx.schemes import Scheme
from int8fx.schemes.quantize import DEFAULT_THRESHOLD, quantize_weight
from int8fx.schemes.weight import Int8Weight

from ..machine import missing
from .timing import Measured, failure

Layer = Callable[[Any], object]
T = TypeVar("T")


@dataclass(frozen=True)
class Candidate:
    """A way to compute linear layers, with one label in every table.

    convert: takes a bfloat16 module (a ``nn.Linear`` or a model's decoder) and returns the one to time. It may change
        or store what it is given.
    prepare: bfloat16 x ``[M, K]`` -> what a layer takes; not timed.
    int8: whether its weights are int8. Then models are timed with their lm_head in 16 bits and converted.
    compiles_models: whether ``torch.compile`` compiles a model before it is timed.
    compiles_layers: likewise a single layer.
    needs: packages.
    """

    name: str
    convert: Callable[[Any], Any]
    prepare: Callable[[Tensor], Any] = lambda x: x
    int8: bool = True
    compiles_models: bool = True
    compiles_layers: bool = False
    needs: tuple[str, ...] = ()

    def layers(self, linears: Sequence[nn.Linear]) -> list[Layer]:
        """A function from ``prepare(x)`` to y for a copy of each of ``linears``."""
        return [self._layer(copy.deepcopy(layer)) for layer in linears]

    def _layer(self, layer: nn.Linear) -> Layer:
        converted = self.convert(layer)
        if not self.compiles_layers:
            return converted
        weight, bias = converted.weight, converted.bias
        compiled = torch.compile(F.linear, dynamic=False)  # the weight is an argument: one graph for all layers
        return lambda x: compiled(x, weight, bias)


def build_each(
    candidates: Sequence[Candidate], build: Callable[[Candidate], T]
) -> tuple[dict[str, T], dict[str, Measured]]:
    """Calls ``build`` on each candidate that can run here.

    The number of torch's threads is restored after each: auto-round's packing sets it to all of the machine's CPUs, or
    to 1 if OMP_PROC_BIND is true.

    Returns:
        What was built, and a note for each candidate that cannot run; both by the candidate's name.
    """
    built: dict[str, T] = {}
    absent: dict[str, Measured] = {}
    threads = torch.get_num_threads()
    for candidate in candidates:
        if reason := missing(*candidate.needs):
            absent[candidate.name] = Measured(note=reason)
            continue
        try:
            built[candidate.name] = build(candidate)
        except Exception as error:  # whatever a peer may raise
            absent[candidate.name] = Measured(note=failure(error))
        finally:
            torch.set_num_threads(threads)
    return built, absent


def linear(N: int, K: int) -> nn.Linear:
    """A random bfloat16 layer of weight ``[N, K]`` with a bias; its outputs are about as large as its inputs."""
    layer = nn.Linear(K, N, dtype=torch.bfloat16).requires_grad_(False)
    nn.init.normal_(layer.weight, std=K**-0.5)
    return layer


def inputs(M: int, K: int, outliers: int) -> Tensor:
    """Random bfloat16 ``[M, K]`` with ``outliers`` outlier columns.

    Every value of these columns is at least 8 in size; every other value is at most 5.5.
    """
    x = torch.randn(M, K).clamp_(-5.5, 5.5)
    columns = torch.linspace(0, K - 1, min(outliers, K)).long()
    x[:, columns] = torch.copysign(8 + x[:, columns].abs(), x[:, columns])
    return x.bfloat16()


@contextmanager
def quiet() -> Iterator[None]:
    """Silences the line that bitsandbytes logs at every call, which would be timed."""
    logger = logging.getLogger("bitsandbytes.autograd._functions")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


# ---- conversions -----------------------------------------------------------------------------------------------------


def _int8fx(scheme: Scheme) -> Callable[[Any], Any]:
    return lambda module: int8fx.convert(module, scheme)


def _int8fx_op(layer: nn.Linear) -> Layer:
    weight = Int8Weight(*quantize_weight(layer.weight), threshold=DEFAULT_THRESHOLD)
    op, bias = int8fx.ops.linear, layer.bias
    return lambda x: op(x, *weight, bias)


def _functional(layer: nn.Linear) -> Layer:
    weight, bias = layer.weight, layer.bias
    return lambda x: F.linear(x, weight, bias)


def _bitsandbytes(module: nn.Module) -> nn.Module:
    if isinstance(module, nn.Linear):
        return _linear_8bit_lt(module)
    for name, child in list(module.named_modules()):
        if isinstance(child, nn.Linear):
            module.set_submodule(name, _linear_8bit_lt(child))
    return module


def _linear_8bit_lt(layer: nn.Linear) -> nn.Module:
    """``Linear8bitLt`` on ``layer``'s device, in eval mode: in training its CPU path is not int8."""
    import bitsandbytes

    N, K = layer.weight.shape
    with torch.device("cpu"):  # moving it from there quantises it
        int8_layer = bitsandbytes.nn.Linear8bitLt(
            K, N, layer.bias is not None, has_fp16_weights=False, threshold=DEFAULT_THRESHOLD
        )
    int8_layer.load_state_dict(layer.state_dict())
    return int8_layer.to(layer.weight.dtype).to(layer.weight.device).eval()


def _torchao(weight_only: bool) -> Callable[[nn.Module], nn.Module]:
    """Converts every ``nn.Linear`` to torchao's int8. Inductor's settings stay as they are."""

    def convert(module: nn.Module) -> nn.Module:
        from torchao import quantization

        config: Any = (
            quantization.Int8WeightOnlyConfig if weight_only else quantization.Int8DynamicActivationInt8WeightConfig
        )
        parent = nn.Sequential(module)  # torchao converts children only
        quantization.quantize_(parent, config(set_inductor_config=False))
        return parent[0]

    return convert


def _onnxruntime(layer: nn.Linear) -> Layer:
    """The graph of onnxruntime's ``quantize_dynamic`` per channel: uint8 activations with one scale, int8 weights."""
    import numpy
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    codes, scale = quantize_weight(layer.weight)
    N, K = codes.shape
    constants = {"w": codes.t().contiguous(), "w_scale": scale, "bias": layer.bias.float()}
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["codes", "x_scale", "zero"]),
        helper.make_node("MatMulInteger", ["codes", "w", "zero"], ["sums"]),
        helper.make_node("Cast", ["sums"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["x_scale", "w_scale"], ["scale"]),
        helper.make_node("Mul", ["floats", "scale"], ["scaled"]),
        helper.make_node("Add", ["scaled", "bias"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, K])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, N])],
        [numpy_helper.from_array(numpy.asarray(value), name) for name, value in constants.items()],
    )
    _share_onnxruntime_threads()
    options = onnxruntime.SessionOptions()
    options.use_per_session_threads = False
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"x": x})


@cache
def _share_onnxruntime_threads() -> None:
    """One pool for all sessions: with one each, the threads of hundreds of weights would spin against one another."""
    import onnxruntime

    onnxruntime.set_global_thread_pool_sizes(torch.get_num_threads(), 1)


def _auto_round(layer: nn.Linear) -> Layer:
    """The calls of auto-round's ``QuantLinear``: float32 inside, one group of K channels.

    It packs for all of the machine's threads. With fewer threads its results are wrong.
    """
    import auto_round_kernel as kernels

    codes, scale = quantize_weight(layer.weight)
    N, K = codes.shape
    options = ("auto", "int8", "fp32", False)
    packed = kernels.repack_quantized_weight(
        codes.t().contiguous(), scale[None].contiguous(), torch.empty(0, dtype=torch.int8), K, *options
    )
    bias = layer.bias.float()
    return lambda x: kernels.woqgemm(x.float(), packed, bias, N, K, K, *options).to(x.dtype)


# ---- the candidates --------------------------------------------------------------------------------------------------

INT8FX = Candidate("int8fx", _int8fx(int8fx.llm_int8()))
ROTATED = Candidate("int8fx rotated", _int8fx(int8fx.rotated()))
FLOAT32 = Candidate("float32", lambda module: module.float(), prepare=lambda x: x.float(), int8=False)
BFLOAT16 = Candidate("bfloat16", lambda module: module, int8=False)
BFLOAT16_EAGER = Candidate("bfloat16, eager", lambda module: module, int8=False, compiles_models=False)
BITSANDBYTES = Candidate("bitsandbytes", _bitsandbytes, compiles_models=False, needs=("bitsandbytes",))
TORCHAO_DYNAMIC = Candidate("torchao dynamic", _torchao(False), compiles_layers=True, needs=("torchao",))
TORCHAO_WEIGHT_ONLY = Candidate("torchao weight-only", _torchao(True), compiles_layers=True, needs=("torchao",))
ONNXRUNTIME = Candidate(
    "onnxruntime dynamic, float32",
    _onnxruntime,
    prepare=lambda x: x.float().numpy(),
    needs=("onnx", "onnxruntime", "numpy"),
)
AUTO_ROUND = Candidate("auto-round kernels", _auto_round, needs=("auto_round_kernel",))

PEERS = (BITSANDBYTES, TORCHAO_DYNAMIC, TORCHAO_WEIGHT_ONLY)
FOR_LAYERS = (INT8FX, FLOAT32, BFLOAT16, *PEERS, ONNXRUNTIME, AUTO_ROUND)
FOR_MODELS = (INT8FX, FLOAT32, BFLOAT16, BFLOAT16_EAGER, *PEERS)
FOR_GPUS = (INT8FX, ROTATED, BFLOAT16, *PEERS)
FOR_OVERHEAD = (
    Candidate("int8fx::linear", _int8fx_op),
    Candidate("F.linear", _functional, int8=False),
    Candidate("int8fx layer", INT8FX.convert),
    Candidate("nn.Linear", BFLOAT16.convert, int8=False),
)


def of_scheme(scheme: Scheme) -> Candidate:
    """int8fx under ``scheme``, whose text form is the candidate's name."""
    return Candidate(str(scheme), _int8fx(scheme))
