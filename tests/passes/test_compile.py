"""What a user sees under ``torch.compile``: one graph, no recompiles, eager's error, generation, gradients.

Each family of models is measured in a process of its own, in which compiling is the first thing that happens; the tests
read what the process reports. Families marked ``inductor`` are compiled as users do; for the others Inductor stops
before it writes C++: its graph, after AOTAutograd and all joint-graph passes, is run as it is.
"""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from support import models, tiny_models
from support.helpers import activation, generator, unit_roundoff
from support.models import HIDDEN, Inputs
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code
from transformers import LlamaModel

import int8fx
from int8fx.conversion.packed import PackedModule
from int8fx.passes import PASSES, Report, count_ops, install, uninstall
from int8fx.schemes import reference
from int8fx.schemes.quantize import outlier_mask, quantize_weight

LAYERS = 2
LENGTHS = (7, 2, 3, 5, 8, 12, 16, 17, 31, 48)  # 1 is a graph of its own to Dynamo, as for every model
PLANTED = (5, 17)  # columns that `variants` makes outliers
VARIANTS = ("none", "appear", "move", "vanish")
NO_GRAPHS_FROM_CACHES = {"TORCHINDUCTOR_FX_GRAPH_CACHE": "0", "TORCHINDUCTOR_AUTOGRAD_CACHE": "0"}


# ---- what is expected -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """int8fx ops in Dynamo's graph (``captured``) and after the passes (``rewritten``), and what the passes report.

    lowered, shared, folded: as in `int8fx.passes.Report`.
    inductor: whether the test compiles with Inductor's C++.
    """

    captured: dict[str, int]
    rewritten: dict[str, int]
    shared: int
    folded: int
    lowered: int = 0
    inductor: bool = False


FAMILIES = {
    # q, k, v, o, gate, up, down; folds: the residual of o; silu and its product with up; the residual of down
    "llama": Family(
        captured={"linear": 7 * LAYERS},
        rewritten={"quantize_rowwise": 2 * LAYERS, "linear_quantized": 5 * LAYERS, "linear": 2 * LAYERS},
        shared=3 * LAYERS,
        folded=4 * LAYERS,
        inductor=True,
    ),
    # q, k, v, o and two grouped products; folds: the residual of o
    "mixtral": Family(
        captured={"linear": 4 * LAYERS, "grouped_linear": 2 * LAYERS},
        rewritten={
            "quantize_rowwise": LAYERS, "linear_quantized": 3 * LAYERS, "linear": LAYERS, "grouped_linear": 2 * LAYERS,
        },
        shared=2 * LAYERS,
        folded=LAYERS,
        inductor=True,
    ),
    # qkv, o, up, down; folds: gelu, two residuals
    "gpt2": Family(captured={"linear": 4 * LAYERS}, rewritten={"linear": 4 * LAYERS}, shared=0, folded=3 * LAYERS),
    # q, k, v, o, up, down, and the pooler; folds: gelu, two residuals
    "bert": Family(
        captured={"linear": 6 * LAYERS + 1},
        rewritten={"quantize_rowwise": LAYERS, "linear_quantized": 3 * LAYERS, "linear": 3 * LAYERS + 1},
        shared=2 * LAYERS,
        folded=3 * LAYERS,
    ),
    "vit": Family(
        captured={"linear": 6 * LAYERS + 1},
        rewritten={"quantize_rowwise": LAYERS, "linear_quantized": 3 * LAYERS, "linear": 3 * LAYERS + 1},
        shared=2 * LAYERS,
        folded=3 * LAYERS,
        inductor=True,
    ),
    # encoder: q, k, v, o, gate, up, down; decoder: 4 more; T5 asks for the dtype of down's weight, twice per layer.
    # All decoder layers quantise the encoder's output once. Folds: gelu and gate; 2 residuals, 3 in the decoder
    "t5": Family(
        captured={"linear": 18 * LAYERS, "dequantize": 4 * LAYERS},
        rewritten={
            "quantize_rowwise": 4 * LAYERS + 1, "linear_quantized": 12 * LAYERS, "linear": 6 * LAYERS,
        },
        shared=8 * LAYERS - 1,
        folded=9 * LAYERS,
    ),
    # Attention reads two weights dequantised. Encoder: qkv, o, up, down; decoder: qkv, o, q, kv, o, up, down. All
    # decoder layers quantise the encoder's output once. Folds: relu and residual of each MLP, bias of each qkv, q, kv
    "transformer": Family(
        captured={"dequantize": 6 * LAYERS, "linear": 4 * LAYERS},
        rewritten={"quantize_rowwise": 1, "linear_quantized": LAYERS, "linear": 10 * LAYERS},
        shared=LAYERS - 1,
        folded=8 * LAYERS,
        lowered=7 * LAYERS,
    ),
}  # fmt: skip


# ---- in the measuring process ---------------------------------------------------------------------------------------


def _first(y: Any) -> Tensor:
    return y if isinstance(y, Tensor) else y[0]


def without_cpp(gm: torch.fx.GraphModule, example_inputs: list, **_: object) -> Callable:
    """A backend: Inductor up to and with its joint-graph passes; then the graph runs as it is."""
    from torch._inductor.compile_fx import compile_fx

    def inner_compile(graph: torch.fx.GraphModule, *_: object, **__: object) -> Callable:
        def run(args: list) -> Any:
            taken = list(args)
            args.clear()
            return graph(*taken)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    return compile_fx(gm, example_inputs, inner_compile=inner_compile)


def _plant(name: str, model: nn.Module) -> None:
    """Undoes the outliers of every input to ``model``, and has those of `variants` reach its first layer."""
    with torch.no_grad():
        for module in model.modules():
            if "norm" in type(module).__name__.lower() and module.weight.shape == (HIDDEN,):
                module.weight.clamp_(max=1.5)
        if name == "vit":
            kernel = model.embeddings.patch_embeddings.projection.weight  # [HIDDEN, 3, 4, 4]
            kernel -= kernel.mean((-1, -2), keepdim=True)
            kernel[PLANTED[0], 0] = kernel[PLANTED[1], 2] = 1 / 16
        elif name != "transformer":
            table = model.get_input_embeddings().weight
            for i, column in enumerate(PLANTED):
                table[-1 - i, column] = 100.0


def _inputs(name: str, length: int, seed: int = 0) -> Inputs:
    """Inputs without outliers. An image's tokens cannot change in number: ``length`` is the size of its batch."""
    _, inputs = models.ALL[name](length if name == "vit" else 2, *([] if name == "vit" else [length]), seed=seed)
    if name == "t5":
        inputs["decoder_input_ids"] = inputs["input_ids"].flip(0)
    elif name == "transformer":
        inputs["tgt"] = inputs["src"].flip(0)
    for key in ("input_ids", "decoder_input_ids"):
        if key in inputs:
            inputs[key] = inputs[key].clamp(max=models.VOCAB - 1 - len(PLANTED))
    return inputs


def variants(name: str) -> dict[str, Inputs]:
    """Inputs of one shape, for a model that `_plant` has prepared: no outliers, one, another one, none."""

    def planted(which: int) -> Inputs:
        inputs = _inputs(name, LENGTHS[0])
        for key, x in inputs.items():
            if key.endswith("_ids"):
                x[0, 2] = models.VOCAB - 1 - which
            elif name == "vit":
                x[:, 2 * which] += 100
            elif name == "transformer":
                x[..., PLANTED[which]] += 100
        return inputs

    none, vanished = (_inputs(name, LENGTHS[0], seed=seed) for seed in (0, 1))
    return dict(zip(VARIANTS, (none, planted(0), planted(1), vanished), strict=True))


class _Captured:
    """A joint-graph pass behind all others that notes which int8fx ops are left for code generation."""

    def __init__(self) -> None:
        self.counts: list[dict[str, int]] = []

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.counts.append(count_ops(graph))

    def uuid(self) -> None:
        return None


def measure(name: str) -> dict[str, Any]:
    """What a fresh process finds out about a family. Nothing runs before the first compiled call."""
    import torch._inductor.config as config

    model, _ = models.ALL[name](seed=0)
    _plant(name, model)
    twins = {dtype: copy.deepcopy(model).to(dtype) for dtype in (torch.float32, torch.float64)}
    if name == "mixtral":
        twins[torch.float64].set_experts_implementation("eager")  # torch has no grouped product of float64
    int8fx.convert(model)
    config.joint_custom_post_pass = captured = _Captured()
    options = {} if FAMILIES[name].inductor else {"backend": without_cpp}
    compiled = torch.compile(model, fullgraph=True, **options)

    found: dict[str, Any] = {"torch": torch.__version__, "frames": [], "errors": {}, "outliers": {}}
    samples, outputs = variants(name), {}
    for which, inputs in samples.items():
        with torch.no_grad():
            outputs[which] = _first(compiled(**inputs)).clone()
        found["frames"].append(counters["stats"]["unique_graphs"])
    found["rewritten"] = list(captured.counts)
    found["reports"] = [vars(report) for report in PASSES.reports]
    found["frames_by_length"] = []
    for length in LENGTHS:
        with torch.no_grad():
            compiled(**_inputs(name, length))
        found["frames_by_length"].append(counters["stats"]["unique_graphs"])
    found["rewritten_dynamic"] = captured.counts[1:]

    seen: list[Tensor] = []
    first = next(module for module in model.modules() if isinstance(module, PackedModule))
    hook = first.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    for which, inputs in samples.items():
        with torch.no_grad():
            exact = _first(twins[torch.float64](**_cast(inputs)))
            results = {"compiled": outputs[which], "eager": _first(model(**inputs))}
            results["float32"] = _first(twins[torch.float32](**inputs))
            if FAMILIES[name].lowered:
                results["scheme"] = _first(_with_reference_products(twins[torch.float32], inputs))
        found["errors"][which] = {of: float((y.double() - exact).norm()) for of, y in results.items()}
        found["outliers"][which] = outlier_mask(seen.pop(), 6.0).nonzero().flatten().tolist()
    hook.remove()

    torch._dynamo.reset()
    with torch.no_grad():
        explained = torch._dynamo.explain(model)(**samples["none"])
    found["graphs"], found["breaks"] = explained.graph_count, explained.graph_break_count
    found["captured"] = [count_ops(gm.graph) for gm in explained.graphs]
    return found


def _with_reference_products(model: nn.Module, inputs: Inputs) -> Any:
    """What the float ``model`` gives if every product is the specification's."""

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return reference.linear(x, *quantize_weight(weight), bias, 6.0)

    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with mock.patch.object(F, "linear", linear):
            return model(**inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def _cast(inputs: Inputs) -> Inputs:
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


# ---- starting them --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def measured(request) -> Iterator[Callable[[str], dict[str, Any]]]:
    """``measured(family)``: what `measure` reports. The processes of the selected families run while other tests do."""
    here = Path(__file__)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"} | NO_GRAPHS_FROM_CACHES

    def run(name: str) -> dict[str, Any]:
        code = f"import json, {here.stem} as t; print(json.dumps(t.measure({name!r})))"
        command = [sys.executable, "-W", "ignore", "-c", code]
        done = subprocess.run(command, env=environment, cwd=here.parent, capture_output=True, text=True, timeout=1800)
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout.splitlines()[-1])

    parameters = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    selected = {p["family"] for p in parameters if p.get("family") in FAMILIES}
    ahead = [] if "PYTEST_XDIST_WORKER" in os.environ else [name for name in FAMILIES if name in selected]
    with ThreadPoolExecutor(2) as pool:
        running: dict[str, Future] = {name: pool.submit(run, name) for name in ahead}

        def result(name: str) -> dict[str, Any]:
            if name not in running:
                running[name] = pool.submit(run, name)
            return running[name].result()

        yield result
        for future in running.values():
            future.cancel()


# ---- in this process ------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _from_scratch(request):
    """Dynamo forgets what other tests compiled."""
    torch._dynamo.reset()
    counters.clear()
    PASSES.reports.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def no_graphs_from_caches():
    """Passes and code generation run; compiled C++, which is stored by its content, is used again."""
    with torch._inductor.config.patch(fx_graph_cache=False), torch._functorch.config.patch(enable_autograd_cache=False):
        yield


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))


def frames() -> int:
    return counters["stats"]["unique_graphs"]


BACKENDS = pytest.mark.parametrize("backend", [without_cpp, "inductor"], ids=["without_cpp", "inductor"])


@pytest.mark.parametrize(
    ("name", "config", "products", "backend"),
    [
        ("llama", {}, 7 * LAYERS, without_cpp),
        ("gpt2", {}, 4 * LAYERS, without_cpp),
        ("mixtral", {}, 6 * LAYERS, without_cpp),
        ("t5", {}, 9 * LAYERS, without_cpp),  # keys and values of the encoder's output are in the cache
        ("llama", {"num_hidden_layers": 1}, 7, "inductor"),
    ],
    ids=["llama", "gpt2", "mixtral", "t5", "llama-inductor"],
)
def test_generation_with_a_static_cache(name, config, products, backend, no_graphs_from_caches):
    from transformers.generation.configuration_utils import CompileConfig

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
    [report] = PASSES.reports
    assert (report.linears, report.dequantized) == (products, 0)


def test_bfloat16_code_of_inductor_is_within_the_error_of_eager(no_graphs_from_caches):
    model, inputs = models.llama(num_hidden_layers=1)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(**inputs).logits
        rounded = copy.deepcopy(model).bfloat16()(**inputs).logits
        int8fx.convert(model.bfloat16())
        eager = model(**inputs).logits
        compiled = torch.compile(model, fullgraph=True)(**inputs).logits
    error, of_eager, of_rounding = (float((y.double() - exact).norm()) for y in (compiled, eager, rounded))
    assert compiled.dtype == torch.bfloat16
    assert 0 < error <= 1.05 * of_eager + of_rounding


class Adapted(nn.Module):
    """LoRA: a packed weight that is frozen and two small ones that train."""

    def __init__(self, K: int = 40, N: int = 24, rank: int = 4) -> None:
        super().__init__()
        g = generator(0)
        self.base = nn.Linear(K, N)
        self.a = nn.Parameter(torch.randn(K, rank, generator=g))
        self.b = nn.Parameter(torch.randn(rank, N, generator=g))
        with torch.no_grad():
            self.base.weight.copy_(torch.randn(N, K, generator=g))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a @ self.b


@BACKENDS
def test_gradients_of_a_compiled_lora_layer(backend, no_graphs_from_caches):
    """No quantisation but the weight's enters a gradient: its value and its bound are known in float64."""
    model = int8fx.convert(Adapted(), select="base")
    x = activation(6, 40, outliers="column").requires_grad_()
    grad = torch.randn(6, 24, generator=generator(1))
    tensors = {"x": x, "a": model.a, "b": model.b, "bias": model.base.bias}

    def exact(of: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        w, a, b, x2, g = (of(t.detach().double()) for t in (model.base.weight, model.a, model.b, x, grad))
        return {"x": g @ w + (g @ b.T) @ a.T, "a": x2.T @ (g @ b.T), "b": (x2 @ a).T @ g, "bias": g.sum(0)}

    expected, magnitudes = exact(lambda t: t), exact(torch.abs)
    n = (24 + 2) + (4 + 2)  # the longest chain of roundings: of two products and the sum of two of them
    outputs = []
    for run in (model, torch.compile(model, fullgraph=True, backend=backend)):
        model.zero_grad()
        x.grad = None
        y = run(x)
        (y * grad).sum().backward()
        outputs.append(y.detach())
        for name, t in tensors.items():
            error = (t.grad.double() - expected[name]).abs()
            assert (error <= n * unit_roundoff(torch.float32) * magnitudes[name]).all(), name
    assert frames() == 1
    [report] = PASSES.reports
    assert report.linears == 1
    assert torch.equal(outputs[0], outputs[1])


class Block(nn.Module):
    """What `fold` takes up: a bias that is added by itself, an activation, a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.bias = nn.LayerNorm(HIDDEN), nn.Parameter(torch.ones(96))
        self.up, self.gate = (nn.Linear(HIDDEN, 96, bias=False) for _ in range(2))
        self.down = nn.Linear(96, HIDDEN, bias=False)
        g = generator(0)
        with torch.no_grad():
            for layer in (self.up, self.gate, self.down):
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=g) / 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down(F.gelu(self.gate(h)) * (self.up(h) + self.bias))


@BACKENDS
def test_training_through_folded_products(backend, no_graphs_from_caches):
    """The passes see forward and backward in one graph; what the backward needs stays."""
    model = Block()
    values, grad = activation(20, HIDDEN, outliers="some"), torch.randn(20, HIDDEN, generator=generator(1))

    def gradients(run: Callable, of: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
        x = values.to(dtype).requires_grad_()
        grads = torch.autograd.grad(run(x), (x, of.bias), grad.to(dtype))
        return torch.cat([g.double().flatten() for g in grads])

    twins = {dtype: copy.deepcopy(model).to(dtype) for dtype in (torch.float32, torch.float64)}
    exact, rounded = (gradients(twins[dtype], twins[dtype], dtype) for dtype in (torch.float64, torch.float32))
    int8fx.convert(model)
    eager = gradients(model, model)
    compiled = gradients(torch.compile(model, fullgraph=True, backend=backend), model)
    error, of_eager, of_rounding = (float((g - exact).norm()) for g in (compiled, eager, rounded))
    assert 0 < of_rounding < of_eager < float(exact.norm()) / 10
    assert error <= 1.05 * of_eager + of_rounding
    [report] = PASSES.reports
    assert (report.linears, report.shared) == (3, 1)
    assert report.folded > 0


class Mixed(nn.Module):
    """A Linear, a bare Parameter that only the passes make an int8 product, and code between them."""

    def __init__(self) -> None:
        super().__init__()
        g = generator(0)
        self.up, self.down = nn.Linear(HIDDEN, 96), nn.Parameter(torch.randn(96, HIDDEN, generator=g) / 8)
        with torch.no_grad():
            self.up.weight.copy_(torch.randn(96, HIDDEN, generator=g) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(F.gelu(self.up(x)) @ self.down)


@pytest.mark.parametrize("start", ["cold", "warm"])
def test_eight_threads_get_the_bits_that_one_gets(start, empty_cache):
    """One compiled model, called by eight threads at once, each with its own outliers; cold: these calls compile it."""
    model = int8fx.convert(Mixed().eval())
    xs = [activation(24, HIDDEN, outliers="column", seed=seed) for seed in range(8)]
    compiled = torch.compile(model, fullgraph=True, backend="int8fx")
    if start == "warm":
        with torch.no_grad():
            compiled(xs[0])
    barrier = threading.Barrier(8)

    def work(x: Tensor) -> list[Tensor]:
        barrier.wait()
        with torch.no_grad():
            return [compiled(x) for _ in range(20)]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(work, xs))
    graphs = frames()  # Dynamo has every thread compile that comes before the first is done
    with torch.no_grad():
        expected = [compiled(x) for x in xs]
    assert frames() == graphs
    assert graphs == 1 or start == "cold"
    assert {(report.lowered, report.linears, report.dequantized) for report in PASSES.reports} == {(1, 2, 0)}
    assert len({tuple(outlier_mask(x, 6.0).tolist()) for x in xs}) > 1
    for ys, y in zip(found, expected, strict=True):
        assert all(torch.equal(y, again) for again in ys)


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


def test_a_layer_is_so_many_kernels(no_graphs_from_caches):
    """One quantisation for q, k and v, one for gate and up; bias, SiLU, gate and residual adds leave no kernel."""
    two, three = _launches(2), _launches(3)
    assert three - two == {
        "int8fx.quantize_rowwise": 2,
        "int8fx.linear_quantized": 5,
        "int8fx.linear": 2,  # o_proj and down_proj with their residual adds
        "aten._scaled_dot_product_flash_attention_for_cpu": 1,
        "norm": 2,
        "other kernel": 2,  # rotary embeddings of q and of k
    }


def test_the_backend_named_int8fx_brings_the_passes_along(no_graphs_from_caches):
    model, inputs = models.bare_products()
    int8fx.convert(model)
    uninstall()
    try:
        with torch.no_grad():
            torch.compile(model, fullgraph=True, backend=without_cpp)(**inputs)
            assert not PASSES.reports
            torch._dynamo.reset()
            torch.compile(model, fullgraph=True, backend="int8fx")(**inputs)
    finally:
        install()
    [report] = PASSES.reports
    assert (report.lowered, report.linears, report.dequantized) == (len(model.OPERANDS), len(model.OPERANDS), 0)


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


# ---- the models of the demo -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "products"), [("smollm2", 30 * 7), ("minilm", 6 * 6 + 1)])
def test_models_of_the_demo_are_one_graph(name, products):
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
    assert [count_ops(gm.graph) for gm in explained.graphs] == [{"linear": products}]


# ---- families -------------------------------------------------------------------------------------------------------


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


def test_the_first_call_of_a_process_compiles_to_one_full_graph(measured, family):
    found, expected = measured(family), FAMILIES[family]
    assert found["frames"][0] == 1
    assert (found["graphs"], found["breaks"]) == (1, 0)
    assert found["captured"] == [expected.captured]


def test_passes_rewrite_every_product(measured, family):
    found, expected = measured(family), FAMILIES[family]
    assert found["rewritten"] == [expected.rewritten]
    products = sum(n for op, n in expected.rewritten.items() if op != "quantize_rowwise")
    report = Report(expected.lowered, expected.shared, expected.folded, products, dequantized=0)
    assert found["reports"] == [vars(report)]


def test_outliers_that_appear_move_and_vanish_do_not_recompile(measured, family):
    found = measured(family)
    assert list(found["outliers"].values()) == [[], [PLANTED[0]], [PLANTED[1]], []]
    assert found["frames"] == [1, 1, 1, 1]


def test_ten_lengths_recompile_once_at_most(measured, family):
    frames = measured(family)["frames_by_length"]
    assert len(frames) == len(set(LENGTHS)) == 10
    assert frames[0] == 1
    assert frames[-1] <= 2


def test_dynamic_shapes_are_rewritten_alike(measured, family):
    found = measured(family)
    assert found["rewritten_dynamic"] == [FAMILIES[family].rewritten] * (found["frames_by_length"][-1] - 1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_compiled_output_is_within_the_error_of_the_eager_one(measured, family, variant):
    """Against float64. What a different order of operations may add is measured: it is what float32 itself is off by.

    Products that eager mode makes with dequantised weights are more exact there than LLM.int8(), which `lower` makes.
    """
    error = measured(family)["errors"][variant]
    allowed = error.get("scheme", error["eager"])
    assert 0 < error["float32"] < error["eager"]
    assert error["compiled"] <= 1.05 * allowed + error["float32"]
