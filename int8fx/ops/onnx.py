"""``torch.onnx.export`` of int8fx ops fails with an error that says what to do: ONNX has no such ops."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NoReturn

from ..imports import when_imported
from .schemas import NAMES

OPSET = 7  # the lowest that torch exports


def _refuse(op: str) -> NoReturn:
    raise NotImplementedError(
        f"int8fx::{op}: torch.onnx.export of a converted model; legal: export the model before int8fx.convert, and "
        "quantise the ONNX file (onnxruntime.quantization: quantize_dynamic, or quantize_static, which writes "
        "QuantizeLinear and DequantizeLinear)"
    )


def refuse_export(op: str) -> None:
    """Raises NotImplementedError if ``torch.onnx.export`` runs. Fakes call this: ``dynamo=True`` runs them."""
    onnx = sys.modules.get("torch.onnx")
    if onnx is not None and onnx.is_in_onnx_export():
        _refuse(op)


def _symbolic(op: str) -> Callable[..., NoReturn]:
    def symbolic(*_: Any, **__: Any) -> NoReturn:
        _refuse(op)

    return symbolic


def register() -> None:
    """Registers what ``dynamo=False`` calls to translate the ops."""
    from torch.onnx import register_custom_op_symbolic

    for op in NAMES:
        register_custom_op_symbolic(f"int8fx::{op}", _symbolic(op), OPSET)


when_imported("torch.onnx", register)
