"""Generation with a static cache compiles to one graph and gives eager's tokens; the demo's models are one graph."""

from __future__ import annotations

import pytest
import torch
from support import models
from support.compiled import LAYERS, frames, without_cpp
from transformers.generation.configuration_utils import CompileConfig

import int8fx
from int8fx.graph.count import count_ops

pytestmark = pytest.mark.usefixtures("no_graphs_from_caches")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "config", "matmuls", "backend"),
    [
        ("llama", {}, 7 * LAYERS, without_cpp),
        ("gpt2", {}, 4 * LAYERS, without_cpp),
        ("mixtral", {}, 6 * LAYERS, without_cpp),
        ("t5", {}, 8 * LAYERS, without_cpp),  # keys and values of the encoder's output are in the cache
        ("llama", {"num_hidden_layers": 1}, 7, "inductor"),
    ],
    ids=["llama", "gpt2", "mixtral", "t5", "llama-inductor"],
)
def test_generation_with_a_static_cache(name, config, matmuls, backend):
    model, inputs = models.ALL[name](seed=3, **config)
    int8fx.convert(model)
    arguments = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    arguments |= {"input_ids": inputs["input_ids"], "attention_mask": torch.ones_like(inputs["input_ids"])}
    eager = model.generate(**arguments)
    assert frames() == 0
    compilation = CompileConfig(fullgraph=True, backend=backend, mode=None, dynamic=False)
    compilation._compile_all_devices = True  # transformers' own switch for tests: else only GPUs compile
    tokens = model.generate(**arguments, cache_implementation="static", compile_config=compilation)
    assert tokens.tolist() == eager.tolist()
    assert frames() == 1  # the first token is made without compiling, the other seven by one graph
    [report] = int8fx.reports()
    assert (report.linears, report.dequantized) == (matmuls, 0)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "matmuls"), [("smollm2", 30 * 7), ("minilm", 6 * 6 + 1)])
def test_models_of_the_demo_are_one_graph(name, matmuls):
    """Dynamo only; the demo's own test runs them through Inductor."""
    from int8fx.tools.data.models import ModelError, load

    try:
        model, tokenizer, _ = load(name)
    except ModelError as error:
        pytest.skip(str(error))
    int8fx.convert(model)
    inputs = tokenizer("One graph.", return_tensors="pt")
    with torch.no_grad():
        explained = torch._dynamo.explain(model)(**inputs)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)
    assert [count_ops(gm.graph) for gm in explained.graphs] == [{"linear": matmuls}]
