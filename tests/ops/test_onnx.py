"""ONNX export of a converted model says what to do instead."""

import io
import warnings

import pytest
import torch
import torch.onnx
from support.installed import Bare
from support.samples import SAMPLES, overload
from torch import nn

import int8fx
from int8fx.ops import schemas

ADVICE = "torch.onnx.export of a converted model; legal: export the model before int8fx.convert, and quantise the ONNX"
MODELS = {"linear": lambda: nn.Sequential(nn.Linear(24, 8)), "dequantize": Bare}
"""The op that a graph of the model has -> the model."""


def export(model: nn.Module, dynamo: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about its older exporter
        torch.onnx.export(model, (torch.ones(2, 24),), io.BytesIO(), dynamo=dynamo)


@pytest.mark.parametrize("op", MODELS)
def test_export_by_tracing(op):
    model = int8fx.convert(MODELS[op]().eval())
    with pytest.raises(NotImplementedError, match=f"int8fx::{op}: {ADVICE}"):
        export(model, dynamo=False)
    torch.jit.trace(model, torch.ones(2, 24))  # the same trace, not for ONNX


@pytest.mark.slow
@pytest.mark.parametrize("op", MODELS)
def test_export_by_dynamo(op):
    pytest.importorskip("onnxscript")
    with pytest.raises(Exception, match=f"int8fx::{op}: {ADVICE}"):
        export(int8fx.convert(MODELS[op]().eval()), dynamo=True)


@pytest.mark.parametrize("op", schemas.NAMES)
def test_fakes_refuse_while_onnx_exports(op, monkeypatch):
    """``dynamo=True`` begins with ``torch.export``, which runs them. Outside of it they are fakes like others."""
    sample, mode = next(iter(SAMPLES[op]())), torch._subclasses.FakeTensorMode()
    args = [mode.from_tensor(a.detach()) if isinstance(a, torch.Tensor) else a for a in sample.args]
    with mode:
        overload(op)(*args, **sample.kwargs)
        monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
        with pytest.raises(NotImplementedError, match=f"int8fx::{op}: {ADVICE}"):
            overload(op)(*args, **sample.kwargs)


def test_float_models_export():
    pytest.importorskip("onnx")
    export(nn.Linear(24, 8), dynamo=False)
