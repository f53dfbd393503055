"""Conversions that end early leave a model that runs, and none takes more memory than one layer."""

import copy
import gc
import importlib
import weakref

import pytest
import torch
from support import models
from support.conversion import (
    EVERYTHING,
    NAMED,
    PROGRAMS,
    Interrupt,
    LiveBytes,
    codes_of,
    converted_names,
    equal,
    outputs,
    run,
)
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import int8fx
from int8fx.conversion.format import FORMAT
from int8fx.conversion.packed import PackedModule
from int8fx.conversion.quantizer import Quantizer
from int8fx.graph.count import count_ops


def assert_float_or_packed(model: nn.Module) -> None:
    """Every layer is one of the two, and nothing in between."""
    for module in model.modules():
        if isinstance(module, PackedModule):
            for name in module.packed_weights:
                codes, scale = codes_of(module, name)
                assert codes.dtype == torch.int8
                assert scale.shape == codes.shape[:-1]
                assert name not in module._parameters
        else:
            tensors = (*module._parameters.values(), *module._buffers.values())
            assert not any(t is not None and t.dtype == torch.int8 for t in tensors)
            assert "packed_weights" not in vars(module)


def ties(model: nn.Module) -> set[tuple[str, str]]:
    buffers = list(model.named_buffers(remove_duplicate=False))
    return {(a, b) for a, s in buffers for b, t in buffers if s is t}


@pytest.mark.parametrize("name", ["llama", "mixtral", "transformer", "bare_products", "tied_lm"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("where", ["quantizer.pack_weight", "packed.packed_class"])
def test_an_interrupted_convert_leaves_a_model_that_runs(name, error, where, monkeypatch):
    path, function = where.split(".")
    module = importlib.import_module(f"int8fx.conversion.{path}")
    model, inputs = models.ALL[name]()
    y_float = outputs(model, inputs)
    finished, _ = models.ALL[name]()
    calls = Interrupt(getattr(module, function))
    with monkeypatch.context() as patch:
        patch.setattr(module, function, calls)
        int8fx.convert(finished, **EVERYTHING)
    everything = converted_names(finished)
    assert calls.count > 0
    for k in range(0, calls.count, max(1, calls.count // 3)):
        model, inputs = models.ALL[name]()
        with monkeypatch.context() as patch:
            patch.setattr(module, function, Interrupt(getattr(module, function), k, error))
            with pytest.raises(error):
                int8fx.convert(model, **EVERYTHING)
        assert_float_or_packed(model)
        done = converted_names(model)
        assert done < everything
        y = outputs(model, inputs)
        assert all((y[key] - y_float[key]).norm() < 0.25 * y_float[key].norm() for key in y)
        int8fx.convert(model, select=lambda name, module, done=done: name not in done)
        assert converted_names(model) == everything
        assert equal(outputs(model, inputs), outputs(finished, inputs))
        assert ties(model) == ties(finished)


@pytest.mark.parametrize("kind", ["symbolic", "exported", "make_fx"])
@pytest.mark.parametrize("where", ["quantizer", "lower"])
def test_an_interrupted_convert_leaves_a_graph_that_runs(kind, where, monkeypatch):
    model, inputs = models.bare_products()
    y_float, products = run(model, inputs), len(models.BareProducts.OPERANDS)
    lowered_in = importlib.import_module(f"int8fx.conversion.{'exported' if kind == 'exported' else 'graph_module'}")
    owner, name = (Quantizer, "__call__") if where == "quantizer" else (lowered_in, "lower")
    for k in (0, 7) if where == "quantizer" else (0,):
        program = PROGRAMS[kind](copy.deepcopy(model), inputs)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, Interrupt(getattr(owner, name), k, KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                int8fx.convert(program)
        done = converted_names(program)
        assert len(done) == (k if where == "quantizer" else products)
        y = run(program, inputs)
        assert all((y[n] - t).norm() < 0.05 * t.norm() for n, t in y_float.items())
        if where == "quantizer":
            assert any(torch.equal(y[n], t) for n, t in y_float.items())
            int8fx.convert(program, select=lambda name, module, done=done: name not in done)
            assert len(converted_names(program)) == products
            assert count_ops(program.graph) == {"linear": products}
            y = run(program, inputs)
            assert all(0 < (y[n] - t).norm() < 0.05 * t.norm() for n, t in y_float.items())


# ---- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_peak_memory_is_the_source_model_plus_one_layer(kind, dtype):
    layers, size = 6, 1536
    make = (lambda: nn.Linear(size, size, bias=False)) if kind == "linear" else lambda: Conv1D(size, size)
    model = nn.Sequential(*(make().to(dtype) for _ in range(layers)))
    one = size * size * dtype.itemsize
    gc.collect()
    gc.disable()  # float weights must go at once, not when the collector comes by
    try:
        with LiveBytes(list(model.parameters())) as mode:
            int8fx.convert(model)
    finally:
        gc.enable()
    codes = layers * (size * size + 4 * size)
    assert mode.start >= layers * one
    formats = sum(b.nbytes for name, b in model.named_buffers() if name.endswith(FORMAT))
    left = sum(p.nbytes for p in model.parameters() if p.dtype != torch.int8)
    assert mode.live == codes + formats + left  # nothing else is held
    block = (1 << 20) * 4  # what is quantised at a time, in float32
    assert mode.peak <= mode.start + size * size + 4 * size + 5 * block
    assert mode.peak - mode.start <= max(one, 6 * block)


class Stack(nn.Module):
    def __init__(self, layers: int, size: int) -> None:
        super().__init__()
        self.w = nn.ParameterList([torch.randn(size, size) for _ in range(layers)])

    def forward(self, x: Tensor) -> Tensor:
        for w in self.w:
            x = x @ w
        return x


@pytest.mark.slow
@pytest.mark.parametrize("kind", NAMED)
@pytest.mark.parametrize("scheme", [int8fx.llm_int8(), int8fx.rotated()])
def test_float_weights_of_graphs_are_freed_one_by_one(kind, scheme, monkeypatch):
    model = Stack(5, 256)
    program = PROGRAMS[kind](model, {"x": torch.randn(2, 256)})
    weights = [weakref.ref(p.untyped_storage()) for p in model.parameters()]
    del model
    gc.collect()
    alive, quantize = [sum(w() is not None for w in weights)], Quantizer.__call__

    def count(self, tied):
        alive.append(sum(w() is not None for w in weights))
        return quantize(self, tied)

    monkeypatch.setattr(Quantizer, "__call__", count)
    gc.disable()
    try:
        int8fx.convert(program, scheme)
        alive.append(sum(w() is not None for w in weights))
    finally:
        gc.enable()
    assert alive == [5, 5, 4, 3, 2, 1, 0]
