"""One linear layer, by int8fx and by each peer: what is called, and what it takes."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import int8fx
from int8fx.schemes import Scheme
from int8fx.schemes.quantize import quantize_weight

from .machine import missing

INT8FX, FLOAT32, BFLOAT16 = "int8fx", "float32", "bfloat16"
BITSANDBYTES = "bitsandbytes"
TORCHAO_DYNAMIC, TORCHAO_WEIGHT_ONLY = "torchao dynamic, compiled", "torchao weight-only, compiled"
ONNXRUNTIME, AUTO_ROUND = "onnxruntime dynamic, float32", "auto-round kernels"

Layer = Callable[[Any], object]


@dataclass(frozen=True)
class Candidate:
    """A way to compute a linear layer.

    build: bfloat16 ``nn.Linear`` -> the layer. It may keep what it is given.
    prepare: bfloat16 x ``[M, K]`` -> what the layer takes; not timed.
    needs: packages.
    """

    name: str
    build: Callable[[nn.Linear], Layer]
    prepare: Callable[[Tensor], Any] = lambda x: x
    needs: tuple[str, ...] = ()

    def missing(self) -> str:
        """Why it cannot run here; empty if it can."""
        return missing(*self.needs)


def linear(N: int, K: int) -> nn.Linear:
    """A random bfloat16 layer with a bias, its outputs of the size of its inputs."""
    layer = nn.Linear(K, N, dtype=torch.bfloat16).requires_grad_(False)
    nn.init.normal_(layer.weight, std=K**-0.5)
    return layer


def inputs(M: int, K: int, outliers: int) -> Tensor:
    """Random bfloat16 ``[M, K]``, ``outliers`` columns of it beyond 6 in every element, the others within 5.5."""
    x = torch.randn(M, K).clamp_(-5.5, 5.5)
    columns = torch.linspace(0, K - 1, min(outliers, K)).long()
    x[:, columns] = torch.copysign(8 + x[:, columns].abs(), x[:, columns])
    return x.bfloat16()


def converted(scheme: Scheme | None = None) -> Callable[[nn.Linear], Layer]:
    """Builds the layer that `int8fx.convert` makes by ``scheme``, its default if None; it runs eagerly."""
    return lambda layer: int8fx.convert(layer, scheme or int8fx.llm_int8())


def int8fx_op(layer: nn.Linear) -> Layer:
    """``int8fx::linear`` without a module around it."""
    codes, scale = quantize_weight(layer.weight)
    op, bias = int8fx.ops.linear, layer.bias
    return lambda x: op(x, codes, scale, bias, 6.0)


def functional(layer: nn.Linear) -> Layer:
    """``F.linear`` without a module around it."""
    weight, bias = layer.weight, layer.bias
    return lambda x: F.linear(x, weight, bias)


def bitsandbytes_linear(layer: nn.Linear) -> nn.Module:
    """``Linear8bitLt`` with threshold 6 where ``layer`` is, in eval mode: its CPU path is not int8 while it trains."""
    import bitsandbytes

    N, K = layer.weight.shape
    with torch.device("cpu"):  # moving it from there quantises it
        theirs = bitsandbytes.nn.Linear8bitLt(K, N, layer.bias is not None, has_fp16_weights=False, threshold=6.0)
    theirs.load_state_dict(layer.state_dict())
    return theirs.to(layer.weight.dtype).to(layer.weight.device).eval()


def torchao_quantize(model: nn.Module, weight_only: bool) -> nn.Module:
    """``model`` with every ``nn.Linear`` in torchao's int8; Inductor's settings stay as they are."""
    from torchao import quantization

    config: Any = (
        quantization.Int8WeightOnlyConfig if weight_only else quantization.Int8DynamicActivationInt8WeightConfig
    )
    quantization.quantize_(model, config(set_inductor_config=False))
    return model


def _torchao(weight_only: bool) -> Callable[[nn.Linear], Layer]:
    def build(layer: nn.Linear) -> Layer:
        torchao_quantize(nn.Sequential(layer), weight_only)
        weight, bias = layer.weight, layer.bias
        compiled = torch.compile(F.linear, dynamic=False)  # the weight is an argument: one graph for all layers
        return lambda x: compiled(x, weight, bias)

    return build


def _onnxruntime(layer: nn.Linear) -> Layer:
    """What its ``quantize_dynamic`` makes per channel: uint8 activations with one scale, int8 weights."""
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
    """As its own ``QuantLinear`` calls them: float32 inside, one group of K channels.

    Its packing sets OpenMP, and so torch, to all of the machine's threads; with fewer its products are wrong.
    """
    import auto_round_kernel as kernels

    codes, scale = quantize_weight(layer.weight)
    N, K = codes.shape
    how = ("auto", "int8", "fp32", False)
    packed = kernels.repack_quantized_weight(
        codes.t().contiguous(), scale[None].contiguous(), torch.empty(0, dtype=torch.int8), K, *how
    )
    bias = layer.bias.float()
    return lambda x: kernels.woqgemm(x.float(), packed, bias, N, K, K, *how).to(x.dtype)


CANDIDATES = (
    Candidate(INT8FX, converted()),
    Candidate(FLOAT32, lambda layer: layer.float(), prepare=lambda x: x.float()),
    Candidate(BFLOAT16, lambda layer: layer),
    Candidate(BITSANDBYTES, bitsandbytes_linear, needs=("bitsandbytes",)),
    Candidate(TORCHAO_DYNAMIC, _torchao(weight_only=False), needs=("torchao",)),
    Candidate(TORCHAO_WEIGHT_ONLY, _torchao(weight_only=True), needs=("torchao",)),
    Candidate(ONNXRUNTIME, _onnxruntime, prepare=lambda x: x.float().numpy(), needs=("onnx", "onnxruntime", "numpy")),
    Candidate(AUTO_ROUND, _auto_round, needs=("auto_round_kernel",)),
)
OVERHEAD = (
    Candidate(f"{INT8FX}::linear", int8fx_op),
    Candidate("F.linear", functional),
    Candidate(f"{INT8FX} layer", converted()),
    Candidate("nn.Linear", lambda layer: layer),
)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the line that bitsandbytes logs at every call, which would be timed."""
    logger = logging.getLogger("bitsandbytes.autograd._functions")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def build(candidate: Candidate, layers: list[nn.Linear]) -> list[Layer]:
    """The candidate's form of copies of ``layers``."""
    return [candidate.build(copy.deepcopy(layer)) for layer in layers]
