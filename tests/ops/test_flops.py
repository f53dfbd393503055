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


def flops(model: nn.Module, inputs: dict) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_a_packed_model_counts_as_the_float_one(name):
    model, inputs = models.ALL[name](**({"experts_implementation": "eager"} if name == "mixtral" else {}))
    expected = flops(model, inputs)
    assert flops(int8fx.convert(copy.deepcopy(model)), inputs) == expected > 0


def test_the_counter_may_be_imported_first():
    script = "import torch.utils.flop_counter as f, torch, int8fx; assert torch.ops.int8fx.linear in f.flop_registry"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
