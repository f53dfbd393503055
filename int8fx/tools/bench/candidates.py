"""int8fx and each other library: how each computes a linear layer, or the linear layers of a model."""

from __future__ import annotations

import copy
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import int8fx
from int8fx.schemes import Scheme, of_bits
from int8fx.schemes.formats import Grouping, absmax_scales, encode, split_groups
from int8fx.schemes.quantize import DEFAULT_THRESHOLD, quantize_weight
from int8fx.schemes.weight import Int8Weight

from ..machine import missing
from .timing import Measured, failure, on_threads

Layer = Callable[[Any], object]
T = TypeVar("T")

FREEZING = {  # of Inductor: what its developers advise for CPUs; the weights become constants and are packed
    "freezing": True,
    "cpp_wrapper": True,
    "max_autotune": True,
    "max_autotune_gemm_backends": "CPP,ATEN",
}


@dataclass(frozen=True)
class Candidate:
    """A way to compute linear layers, with one label in every table.

    convert: takes a module of ``dtype`` (a ``nn.Linear``, a model's decoder or a whole encoder) and returns the one to
        time. It may change or store what it is given.
    dtype: of x, and of what is not quantised.
    prepare: x ``[M, K]`` in ``dtype`` -> what a layer takes; not timed.
    int8: whether its weights are int8. Then models are timed with their lm_head in 16 bits and converted.
    compiles_models: whether ``torch.compile`` compiles a model before it is timed.
    compiles_layers: likewise a single layer.
    frozen: whether it is compiled under `FREEZING`.
    needs: packages.
    """

    name: str
    convert: Callable[[Any], Any]
    dtype: torch.dtype = torch.bfloat16
    prepare: Callable[[Tensor], Any] = lambda x: x
    int8: bool = True
    compiles_models: bool = True
    compiles_layers: bool = False
    frozen: bool = False
    needs: tuple[str, ...] = ()

    def layers(self, linears: Sequence[nn.Linear]) -> list[Layer]:
        """A function from ``input(x)`` to y for a copy of each of ``linears``."""
        return [self._layer(copy.deepcopy(layer).to(self.dtype)) for layer in linears]

    def input(self, x: Tensor) -> Any:
        """What a layer takes for ``x [M, K]``."""
        return self.prepare(x.to(self.dtype))

    def compile(self, module: nn.Module) -> Callable[..., Any]:
        """``module`` compiled by itself, without a graph break."""
        compiled = torch.compile(module, dynamic=False, fullgraph=True)
        return _freezing(compiled) if self.frozen else compiled

    def _layer(self, layer: nn.Linear) -> Layer:
        converted = self.convert(layer)
        if not self.compiles_layers:
            return converted
        if self.frozen:
            return self.compile(converted)
        weight, bias = converted.weight, converted.bias
        compiled = torch.compile(F.linear, dynamic=False)  # the weight is an argument: one graph for all layers
        return lambda x: compiled(x, weight, bias)


def _freezing(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """``compiled`` under `FREEZING`.

    Inductor's settings are changed only in calls that compile, the first ones of each shape: a change takes as long as
    a small layer.
    """
    from torch._inductor import config

    known: set[tuple[torch.Size, ...]] = set()

    def call(*args: Any, **kwargs: Any) -> Any:
        shapes = tuple(value.shape for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        if shapes in known:
            return compiled(*args, **kwargs)
        with config.patch(FREEZING), open(os.devnull, "w") as null, redirect_stderr(null):
            result = compiled(*args, **kwargs)  # the tuner writes what it tries to stderr
        known.add(shapes)
        return result

    return call


def build_each(
    candidates: Sequence[Candidate], build: Callable[[Candidate], T]
) -> tuple[dict[str, T], dict[str, Measured]]:
    """Calls ``build`` on each candidate that can run here, each on as many threads as torch has now.

    auto-round's packing sets torch's threads to all of the machine's CPUs, or to 1 if OMP_PROC_BIND is true.

    Returns:
        What was built, and a note for each candidate that cannot run; both by the candidate's name.
    """
    built: dict[str, T] = {}
    absent: dict[str, Measured] = {}
    for candidate in candidates:
        if reason := missing(*candidate.needs):
            absent[candidate.name] = Measured(note=reason)
            continue
        try:
            with on_threads(torch.get_num_threads()):
                built[candidate.name] = build(candidate)
        except Exception as error:  # whatever a peer may raise
            absent[candidate.name] = Measured(note=failure(error))
    return built, absent


def linear(N: int, K: int) -> nn.Linear:
    """A random bfloat16 layer of weight ``[N, K]`` with a bias; its outputs are about as large as its inputs."""
    layer = nn.Linear(K, N, dtype=torch.bfloat16).requires_grad_(False)
    nn.init.normal_(layer.weight, std=K**-0.5)
    return layer


def inputs(M: int, K: int, outliers: int) -> Tensor:
    """Random bfloat16 ``[M, K]`` with ``outliers`` outlier columns, the same random ones in each call.

    Every value of these columns is at least 8 in size; every other value is at most 5.5.
    """
    x = torch.randn(M, K).clamp_(-5.5, 5.5)
    columns = random_columns(K, outliers)
    x[:, columns] = torch.copysign(8 + x[:, columns].abs(), x[:, columns])
    return x.bfloat16()


def random_columns(K: int, count: int) -> Tensor:
    """``min(count, K)`` distinct columns of K, the same ones in each call."""
    return torch.randperm(K, generator=torch.Generator().manual_seed(0))[:count]


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


def _each_linear(convert: Callable[[nn.Linear], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    """A conversion of a module that is a ``nn.Linear``, or of every one in it."""

    def convert_each(module: nn.Module) -> nn.Module:
        if isinstance(module, nn.Linear):
            return convert(module)
        for name, child in list(module.named_modules()):
            if isinstance(child, nn.Linear):
                module.set_submodule(name, convert(child))
        return module

    return convert_each


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


def _torchao_int4(module: nn.Module) -> nn.Module:
    """Converts every ``nn.Linear`` to torchao's int4 in groups of `GROUP`, on torch's tinygemm kernel: GPUs only."""
    from torchao import quantization

    parent = nn.Sequential(module)  # torchao converts children only
    config: Any = quantization.Int4WeightOnlyConfig
    packing = "tile_packed_to_4d"
    quantization.quantize_(parent, config(group_size=GROUP, set_inductor_config=False, int4_packing_format=packing))
    return parent[0]


def _quantize_dynamic(module: nn.Module) -> nn.Module:
    """``torch.ao.quantization.quantize_dynamic`` with a scale for each channel, by the engine that torch chooses."""
    from torch.ao import quantization

    parent = nn.Sequential(module)  # it converts children only
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, in favour of torchao
        config = {nn.Linear: quantization.per_channel_dynamic_qconfig}
        quantization.quantize_dynamic(parent, config, inplace=True)
    return parent[0]


class _Zentorch(nn.Module):
    """zentorch's int8 linear, with the weight packed in advance."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        import zentorch  # noqa: F401  # defines the ops

        codes, self.weight_scale = quantize_weight(layer.weight)
        self.packed = torch.ops.zentorch.zentorch_weight_prepack_for_dynamic_qlinear(codes)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.zentorch.zentorch_dynamic_qlinear(
            x, self.packed, self.weight_scale, self.bias, is_weight_prepacked=True
        )


def _onnxruntime(layer: nn.Linear) -> Layer:
    """The graph of onnxruntime's ``quantize_dynamic`` per channel: uint8 activations with one scale, int8 weights."""
    import numpy
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
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    session = _onnxruntime_session(model.SerializeToString())
    return lambda x: session.run(None, {"x": x})


def _onnxruntime_encoder(encoder: Any) -> Callable[..., Any]:
    """A text encoder, exported, with its linear layers quantised by onnxruntime's ``quantize_dynamic`` per channel."""
    from onnxruntime.quantization import quantize_dynamic

    class HiddenStates(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.encoder(input_ids=input_ids).last_hidden_state

    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # this exporter is deprecated; the other one needs another package
        floats, int8 = (os.path.join(directory, name) for name in ("float.onnx", "int8.onnx"))
        torch.onnx.export(
            HiddenStates(),
            (torch.ones(2, 8, dtype=torch.long),),
            floats,
            dynamo=False,
            input_names=["input_ids"],
            output_names=["y"],
            dynamic_axes={"input_ids": {0: "B", 1: "T"}},
        )
        quantize_dynamic(floats, int8, per_channel=True, op_types_to_quantize=["MatMul", "Gemm"])
        session = _onnxruntime_session(int8)

    def run(input_ids: Tensor) -> Any:
        [y] = session.run(None, {"input_ids": input_ids.numpy()})
        return SimpleNamespace(last_hidden_state=torch.from_numpy(y))

    return run


def _onnxruntime_session(model: bytes | str) -> Any:
    import onnxruntime

    _share_onnxruntime_threads()
    options = onnxruntime.SessionOptions()
    options.use_per_session_threads = False
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


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


GROUP = 128  # input channels with one scale, in the int4 weights of other libraries


def _int4(layer: nn.Linear) -> tuple[Tensor, Tensor]:
    """Codes ``[N, K]`` uint8, 8 for zero, and scales ``[N, K / GROUP]`` float32.

    Raises:
        ValueError: K is not a multiple of `GROUP`.
    """
    N, K = layer.weight.shape
    if K % GROUP:
        raise ValueError(f"K = {K} is not a multiple of {GROUP}")
    grouping, weight = Grouping("int4_clip", GROUP), layer.weight.float()
    scale = absmax_scales(weight, grouping).scale
    return encode(split_groups(weight, grouping), scale.unsqueeze(-1), None, grouping).view(N, K), scale


def _torch_int4(layer: nn.Linear) -> Layer:
    codes, scale = _int4(layer)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    scales_and_zeros = torch.stack([scale.T, torch.zeros_like(scale.T)], -1).bfloat16().contiguous()
    bias = layer.bias
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, GROUP, scales_and_zeros) + bias


def _auto_round_int4(compute: str) -> Callable[[nn.Linear], Layer]:
    """The calls of auto-round's ``QuantLinear`` with int4 weights. It packs for all of the machine's threads."""

    def convert(layer: nn.Linear) -> Layer:
        import auto_round_kernel as kernels

        codes, scale = _int4(layer)
        N, K = codes.shape
        options = (compute, "int4", "fp32", False)
        packed = kernels.repack_quantized_weight(
            (codes.to(torch.int8) - 8).t().contiguous(), scale.t().contiguous(), None, GROUP, *options
        )
        bias = layer.bias.float()
        return lambda x: kernels.woqgemm(x.float(), packed, bias, N, K, GROUP, *options).to(x.dtype)

    return convert


def _onnxruntime_int4(layer: nn.Linear) -> Layer:
    """onnxruntime's ``MatMulNBits`` with int8 activations (accuracy level 4)."""
    from onnx import TensorProto, helper, numpy_helper

    codes, scale = _int4(layer)
    N, K = codes.shape
    pairs = codes.view(N, K // GROUP, GROUP // 2, 2)
    constants = {"w": pairs[..., 0] | pairs[..., 1] << 4, "scale": scale.flatten(), "bias": layer.bias.float()}
    node = helper.make_node(
        "MatMulNBits", ["x", "w", "scale", "", "", "bias"], ["y"], domain="com.microsoft",
        K=K, N=N, bits=4, block_size=GROUP, accuracy_level=4,
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, K])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, N])],
        [numpy_helper.from_array(value.numpy(), name) for name, value in constants.items()],
    )
    domains = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    session = _onnxruntime_session(helper.make_model(graph, opset_imports=domains, ir_version=9).SerializeToString())
    return lambda x: session.run(None, {"x": x})


def _linear_4bit(layer: nn.Linear) -> nn.Module:
    """bitsandbytes' ``Linear4bit`` of nf4, in groups of 64."""
    import bitsandbytes

    N, K = layer.weight.shape
    with torch.device("cpu"):  # moving it from there quantises it
        quantised = bitsandbytes.nn.Linear4bit(K, N, compute_dtype=layer.weight.dtype, quant_type="nf4")
    quantised.load_state_dict(layer.state_dict())
    return quantised.to(layer.weight.device).eval()


# ---- the candidates --------------------------------------------------------------------------------------------------

INT8FX = Candidate("int8fx", _int8fx(int8fx.llm_int8()))
ROTATED = Candidate("int8fx rotated", _int8fx(int8fx.rotated()))
FLOAT32 = Candidate("float32", lambda module: module, torch.float32, int8=False)
BFLOAT16 = Candidate("bfloat16", lambda module: module, int8=False)
BFLOAT16_FROZEN = Candidate("bfloat16, frozen", BFLOAT16.convert, int8=False, compiles_layers=True, frozen=True)
BFLOAT16_EAGER = Candidate("bfloat16, eager", BFLOAT16.convert, int8=False, compiles_models=False)
BITSANDBYTES = Candidate("bitsandbytes", _each_linear(_linear_8bit_lt), compiles_models=False, needs=("bitsandbytes",))
TORCHAO_DYNAMIC = Candidate("torchao dynamic", _torchao(False), compiles_layers=True, needs=("torchao",))
TORCHAO_FROZEN = Candidate(
    "torchao dynamic, frozen", _torchao(False), compiles_layers=True, frozen=True, needs=("torchao",)
)
TORCHAO_WEIGHT_ONLY = Candidate("torchao weight-only", _torchao(True), compiles_layers=True, needs=("torchao",))
ZENTORCH = Candidate("zentorch dynamic", _each_linear(_Zentorch), needs=("zentorch",))
QUANTIZE_DYNAMIC = Candidate("quantize_dynamic, float32", _quantize_dynamic, torch.float32, compiles_models=False)
ONNXRUNTIME = Candidate(
    "onnxruntime dynamic, float32",
    _onnxruntime,
    torch.float32,
    prepare=lambda x: x.numpy(),
    needs=("onnx", "onnxruntime", "numpy"),
)
ONNXRUNTIME_ENCODER = replace(ONNXRUNTIME, convert=_onnxruntime_encoder, compiles_models=False)
AUTO_ROUND = Candidate("auto-round kernels", _auto_round, needs=("auto_round_kernel",))

TORCH_INT4 = Candidate("torch int4pack", _torch_int4)
ONNXRUNTIME_INT4 = replace(ONNXRUNTIME, name="onnxruntime MatMulNBits, float32", convert=_onnxruntime_int4)
AUTO_ROUND_INT4 = replace(AUTO_ROUND, name="auto-round int4", convert=_auto_round_int4("int8"))
TORCHAO_INT4 = Candidate("torchao int4, 128", _torchao_int4, needs=("torchao",))
BITSANDBYTES_NF4 = Candidate("bitsandbytes nf4", _each_linear(_linear_4bit), needs=("bitsandbytes",))

ANYWHERE = (BITSANDBYTES, TORCHAO_DYNAMIC, TORCHAO_WEIGHT_ONLY)  # peers on CPUs and GPUs
ON_CPUS = (BFLOAT16_FROZEN, *ANYWHERE, TORCHAO_FROZEN, ZENTORCH, QUANTIZE_DYNAMIC)
FOR_LAYERS = (INT8FX, FLOAT32, BFLOAT16, *ON_CPUS, ONNXRUNTIME, AUTO_ROUND)
FOR_MODELS = (INT8FX, ROTATED, FLOAT32, BFLOAT16, BFLOAT16_EAGER, *ON_CPUS)
FOR_OUTLIERS = (INT8FX, ROTATED, BFLOAT16, BFLOAT16_FROZEN, BITSANDBYTES)  # others do the same for any values
FOR_ENCODERS = (INT8FX, ROTATED, FLOAT32, BFLOAT16, *ON_CPUS, ONNXRUNTIME_ENCODER)
FOR_FALLBACK = (FLOAT32, INT8FX, replace(INT8FX, name="int8fx, float32", dtype=torch.float32))
FOR_GPUS = (INT8FX, ROTATED, BFLOAT16, *ANYWHERE)
FOR_OVERHEAD = (
    Candidate("int8fx::linear", _int8fx_op),
    Candidate("F.linear", _functional, int8=False),
    Candidate("int8fx layer", INT8FX.convert),
    Candidate("nn.Linear", BFLOAT16.convert, int8=False),
)


def of_scheme(scheme: Scheme) -> Candidate:
    """int8fx under ``scheme``, whose text form is the candidate's name."""
    return Candidate(str(scheme), _int8fx(scheme))


WEIGHT_ONLY = of_scheme(int8fx.weight_only(compute="int8"))
WEIGHTS = (
    WEIGHT_ONLY,
    of_scheme(int8fx.weight_only("int8", 128, compute="int8")),
    of_scheme(of_bits(4)),
    of_scheme(int8fx.weight_only("int4_clip", 128, compute="int8")),
    of_scheme(int8fx.weight_only("int4_clip", 128)),
    of_scheme(int8fx.weight_only("nf4", 64, compute="int8")),
    of_scheme(int8fx.weight_only("nf4", 64)),
)
FOR_WEIGHTS = (*WEIGHTS, BFLOAT16, TORCH_INT4, AUTO_ROUND_INT4, ONNXRUNTIME_INT4, BITSANDBYTES_NF4)
FOR_DECODING = (*WEIGHTS, INT8FX, FLOAT32, BFLOAT16)
FOR_GPU_WEIGHTS = (
    of_scheme(int8fx.weight_only()),
    of_scheme(int8fx.weight_only("int8", 128)),
    of_scheme(of_bits(4)),
    of_scheme(int8fx.weight_only("int4_clip", 128)),
    of_scheme(int8fx.weight_only("int4_clip", 128, asymmetric=True, scale_dtype="bfloat16")),
    of_scheme(int8fx.weight_only("nf4", 64)),
    of_scheme(int8fx.weight_only("nf4", 64, double_quant=True)),
    of_scheme(int8fx.weight_only("fp4_e2m1_bnb", 64)),
    BFLOAT16,
    TORCHAO_INT4,
    BITSANDBYTES_NF4,
)
