"""The code that Inductor writes: how many kernels a layer is, and when a cached graph is used again."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch
from support import tiny_models
from support.helpers import generator
from support.models import HIDDEN
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from transformers import LlamaModel

import int8fx
from int8fx.passes.inductor import PASSES


def _launches(layers: int) -> Counter[str]:
    """What the code that Inductor writes for a decoder calls, by name; its own kernels by whether they hold a norm."""
    config = tiny_models.lm_config()
    config.num_hidden_layers = layers
    decoder = int8fx.convert(LlamaModel(config).bfloat16().eval())
    compiled = torch.compile(decoder, fullgraph=True)
    with torch.no_grad():
        _, (code,) = run_and_get_code(lambda: compiled(input_ids=torch.arange(16)[None], use_cache=False))
    calls = re.findall(
        r"= torch\.ops\.([\w.]+)\.default\(|^ +(?:\w+\.)?(cpp_fused\w*)\(", code.split("def call(")[1], re.M
    )
    return Counter(op or ("norm" if "rsqrt" in kernel else "other kernel") for op, kernel in calls)


@pytest.mark.slow
def test_a_layer_is_so_many_kernels(no_graphs_from_caches):
    """One quantisation for q, k, v, one for gate, up. Bias, SiLU, gate and adds of skip connections leave no kernel."""
    two, three = _launches(2), _launches(3)
    assert three - two == {
        "int8fx.quantize_rowwise": 2,
        "int8fx.linear_quantized": 5,
        "int8fx.linear": 2,  # o_proj and down_proj with the adds of skip connections
        "aten._scaled_dot_product_flash_attention_for_cpu": 1,
        "norm": 2,
        "other kernel": 2,  # rotary embeddings of q and of k
    }


@pytest.mark.slow
def test_graphs_are_cached_until_a_pass_changes(empty_cache, monkeypatch):
    model = int8fx.convert(nn.Sequential(nn.Linear(HIDDEN, 24), nn.Sigmoid()).eval())
    x = torch.randn(3, HIDDEN, generator=generator(0))

    def compiled() -> Tensor:
        torch._dynamo.reset()
        with torch.no_grad():
            return torch.compile(model, fullgraph=True)(x)

    y = compiled()
    assert len(PASSES.reports) == 1
    assert torch.equal(compiled(), y)
    assert len(PASSES.reports) == 1, "compiled twice"
    monkeypatch.setattr(type(PASSES), "uuid", lambda self: "another version")
    assert torch.equal(compiled(), y)
    assert len(PASSES.reports) == 2, "a graph of other passes came out of the cache"
