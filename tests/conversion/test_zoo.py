"""Architectures of transformers, converted: layouts, biases, experts and ties are right, and routers stay float.

The fast lane has one class per family. ``HYPOTHESIS_PROFILE=thorough pytest tests/conversion/test_zoo.py`` sweeps all
model types whose tiny form the rules of `support.zoo` can build.
"""

from __future__ import annotations

import copy
import os

import pytest
import torch
from support import zoo
from support.conversion import converted_names, dequantised_twin, reasons
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import int8fx
from int8fx.conversion.layers import TASK_HEAD

FAMILIES = [
    ("causal", "llama"), ("causal", "falcon"), ("causal", "gpt2"), ("causal", "mamba"), ("causal", "mixtral"),
    ("causal", "qwen3_next"), ("causal", "jetmoe"), ("causal", "longcat_flash"), ("causal", "deepseek_v3"),
    ("masked", "bert"), ("seq2seq", "t5"), ("image", "vit"), ("audio", "wav2vec2-conformer"),
]  # fmt: skip
EVERYTHING = [(task, name) for task, names in zoo.TASKS.items() for name in names]
SWEEP = EVERYTHING if os.environ.get("HYPOTHESIS_PROFILE") == "thorough" else FAMILIES


class Dequantizations(TorchDispatchMode):
    """Counts calls of ``int8fx::dequantize``."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.int8fx.dequantize.default
        return func(*args, **(kwargs or {}))


def is_router(module: nn.Module) -> bool:
    """Whether the class of ``module`` says so. The rule for what `convert` leaves does not read names of classes."""
    return type(module).__name__.removeprefix("Int8").endswith(("Router", "RouterMLP", "MoEV1Gate"))


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        return next(t for t in model(**inputs).values() if isinstance(t, Tensor) and t.is_floating_point())


@pytest.mark.parametrize(("task", "name"), SWEEP, ids=lambda value: value)
def test_architecture(task, name):
    model, inputs = zoo.build_or_skip(task, name, required=(task, name) in FAMILIES)
    sharp, twin = copy.deepcopy(model), dequantised_twin(model)
    linears = {path for path, module in model.named_modules() if type(module) is nn.Linear}
    int8fx.convert(model)
    assert converted_names(model) or all(reasons(model)[path] == TASK_HEAD for path in linears)
    for path, module in model.named_modules():
        if is_router(module):
            assert not {n for n in converted_names(model) if f"{n}.".startswith(f"{path}.")}
    with Dequantizations() as dequantizations:
        y = logits(model, inputs)
    assert y.isfinite().all()
    assert dequantizations.count == 0
    int8fx.convert(sharp, int8fx.llm_int8(threshold=1e-37))
    assert converted_names(sharp) == converted_names(model)
    y, z = logits(sharp, inputs), logits(twin(sharp), inputs)
    assert (y - z).norm() <= 1e-4 * z.norm()
