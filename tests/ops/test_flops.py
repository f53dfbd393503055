"""``torch.utils.flop_counter`` counts a packed layer as the float one."""

import copy
import subprocess
import sys

import pytest
import torch
from support import models
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import int8fx
from int8fx import ops


def flops(model: nn.Module, inputs: dict) -> int:
    with FlopCounterMode(display=False) as counter:  # with gradients: torch cannot count its fused encoder layers
        model(**inputs)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "bare_products", "transformer"])
def test_a_packed_model_counts_as_the_float_one(name):
    model, inputs = models.ALL[name](**({"experts_implementation": "eager"} if name == "mixtral" else {}))
    expected = flops(model, inputs)
    assert flops(int8fx.convert(copy.deepcopy(model)), inputs) == expected > 0


def test_every_matmul_counts():
    x, codes, scale = torch.ones(6, 24), torch.ones(3, 5, 24, dtype=torch.int8), torch.ones(3, 5)
    weight, product = (codes[0], scale[0]), 2 * 6 * 5 * 24
    quantized = ops.quantize_rowwise(x)
    calls = {
        "linear": (lambda: ops.linear(x, *weight), product),
        "batched linear": (lambda: ops.linear(x.expand(3, 6, 24), codes, scale), 3 * product),
        "linear_quantized": (lambda: ops.linear_quantized(x, *quantized, *weight), product),
        "grouped_linear": (lambda: ops.grouped_linear(x, torch.tensor([1, 4, 6]), codes, scale), product),
        "quantize_rowwise": (lambda: ops.quantize_rowwise(x), 0),
        "dequantize": (lambda: ops.dequantize(*weight, dtype=x.dtype), 0),
    }
    for name, (call, expected) in calls.items():
        with FlopCounterMode(display=False) as counter:
            call()
        assert counter.get_total_flops() == expected, name


def test_the_counter_may_be_imported_first():
    script = "import torch.utils.flop_counter as f, torch, int8fx; assert torch.ops.int8fx.linear in f.flop_registry"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
