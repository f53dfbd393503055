"""Converted models under torch.compile and AOTInductor, by scheme."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support import models
from support.conversion import SCHEMES, converted_names, outputs
from support.helpers import generator
from torch import Tensor, nn

import int8fx

pytestmark = pytest.mark.slow

K = 60


class Attention(nn.Module):
    """q, k, v of one input, a gated feed-forward, a bare Parameter: what `lower`, `share` and `fold` have work with."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(K, K, bias=i == 0) for i in range(3))
        self.gate, self.up, self.down = nn.Linear(K, 100), nn.Linear(K, 100, bias=False), nn.Linear(100, K)
        self.w = nn.Parameter(torch.randn(K, 20) / 8)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.tanh(self.q(x)) * self.k(x) + self.v(x)
        x = x + self.down(F.relu(self.gate(x)) * self.up(x))
        return self.w_product(x)

    def w_product(self, x: Tensor) -> Tensor:
        return x @ self.w


class Rows(nn.Module):
    """Linear layers and activations that `fold` takes into them: nothing else, so rows depend on int8fx alone."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(K, 1100), nn.Linear(K, 1100), nn.Linear(1100, K)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


def batch(*lead: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(*lead, K, generator=generator(1))
    x[..., 7] *= 30
    return x.to(dtype)


@pytest.fixture
def no_graphs_from_caches():
    """The passes run and report."""
    torch._dynamo.reset()
    with torch._inductor.config.patch(fx_graph_cache=False), torch._functorch.config.patch(enable_autograd_cache=False):
        yield


CASES = [(scheme, dtype, True) for scheme in SCHEMES for dtype in (torch.float32, torch.bfloat16)]
CASES += [(name, torch.float32, False) for name, scheme in SCHEMES.items() if scheme.needs_columns]


@pytest.mark.parametrize(("scheme", "dtype", "with_data"), CASES)
def test_compiled_models_share_fold_and_agree(scheme, dtype, with_data, no_graphs_from_caches):
    model, x = Attention(dtype).eval(), batch(8, 40, dtype=dtype)
    twin = copy.deepcopy(model).float()
    calibration = int8fx.calibrate(model, [x]) if with_data else None
    int8fx.convert(model, SCHEMES[scheme], calibration=calibration)
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        y, exact = compiled(x), twin(x.float())
        model.w_product = lambda x: model.packed_linear(x, "w")
        eager = model(x)
    report = int8fx.reports()[-1]
    assert (report.linears, report.lowered, report.dequantized) == (7, 1, 0)
    assert report.shared == 3  # k and v with q, up with gate
    assert report.folded >= 3
    assert (y - exact).norm() <= 1.05 * (eager - exact).norm()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_aot_inductor_packages_hold_every_scheme(scheme, tmp_path):
    model, x = Rows().eval(), batch(9)
    twin = copy.deepcopy(model)
    int8fx.convert(model, SCHEMES[scheme], calibration=int8fx.calibrate(model, [x]))
    program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: torch.export.Dim.DYNAMIC}})
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    run = torch._inductor.aoti_load_package(path)
    with torch.no_grad():
        for rows in (9, 33):
            x = batch(rows)
            exact, eager = twin(x), model(x)
            assert (run(x) - exact).norm() <= 1.05 * (eager - exact).norm()


@pytest.mark.parametrize("scheme", ["rotated", "rotated columns"])
@pytest.mark.parametrize("compiled", [False, True])
def test_rows_are_bit_equal_for_every_batch(scheme, compiled, no_graphs_from_caches):
    model, x = Rows().eval(), batch(33)
    calibration = int8fx.calibrate(model, [x])
    if not compiled:
        model.forward = lambda x: x + model.down(F.relu(model.gate(x)) * model.up(x))  # eager silu has tails of its own
    int8fx.convert(model, SCHEMES[scheme], calibration=calibration)
    run = torch.compile(model, fullgraph=True, dynamic=True) if compiled else model
    with torch.no_grad():
        y = run(x)
        for M in range(2 if compiled else 1, 34):
            assert torch.equal(run(x[:M]), y[:M])
            assert torch.equal(run(x[33 - M :]), y[33 - M :])
        padded = torch.cat([x[:5], torch.zeros(9, K), 1e4 * x[5:9]])
        assert torch.equal(run(padded)[:5], y[:5])
        if compiled:
            assert int8fx.reports()[-1].folded == 3
            once = torch.compile(model, fullgraph=True, dynamic=False)
            assert torch.equal(once(x[:1]), y[:1])


@pytest.mark.parametrize("name", models.ALL)
def test_architectures_are_calibrated_and_converted(name):
    """Experts, Conv1D, packed attention projections, bare Parameters: data of each product's input help."""
    model, inputs = models.ALL[name]()
    plain = int8fx.convert(copy.deepcopy(model), int8fx.plain())
    calibration = int8fx.calibrate(model, [inputs], moments=True)
    gptq = int8fx.rotated(16, 0.05, rounding="gptq")
    gptq = int8fx.convert(copy.deepcopy(model), gptq, calibration=calibration)

    def output(model: nn.Module) -> Tensor:
        return next(iter(outputs(model, inputs).values()))

    y_float = output(model)
    int8fx.convert(model, SCHEMES["rotated columns"], calibration=calibration)
    assert converted_names(model)
    assert converted_names(model) <= set(calibration.absmax)
    assert 0 < (output(model) - y_float).norm() < (output(plain) - y_float).norm()
    assert 0 < (output(gptq) - y_float).norm() < 1.1 * (output(model) - y_float).norm()  # of the data that it has seen


# ---- functional_call ------------------------------------------------------------------------------------------------

WITH_ITS_DTYPES = {name: scheme for name, scheme in SCHEMES.items() if scheme.grouping.is_plain}
THEIRS = {
    **WITH_ITS_DTYPES,
    "rotated(32)": int8fx.rotated(32, columns=0.0),
}  # its text is as long as that of rotated(16)


def two_layers(scheme: str, seed: int) -> nn.Sequential:
    layers = nn.Sequential(nn.Linear(K, 48), nn.ReLU(), nn.Linear(48, K))
    with torch.no_grad():
        for p in layers.parameters():
            p.copy_(torch.randn(p.shape, generator=generator(seed)))
    return int8fx.convert(layers, THEIRS[scheme])


def cloned(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("ours", ["llm_int8", "rotated", "rotated columns"])
def test_functional_call_takes_tensors_of_the_scheme_and_raises_for_others(ours, backend):
    torch._dynamo.reset()
    model, x, graphs = two_layers(ours, 0), batch(3), []

    def counted(graph, inputs):
        graphs.append(graph)
        return torch._inductor.compile(graph, inputs) if backend == "inductor" else graph

    run = torch.compile(
        lambda tensors, x: torch.func.functional_call(model, tensors, (x,)), backend=counted, fullgraph=True
    )
    for seed in (0, 1, 2):
        other = two_layers(ours, seed)
        torch.testing.assert_close(run(cloned(other), x), other(x))
    assert len(graphs) == 1
    for theirs in THEIRS.keys() - {ours}:
        with pytest.raises(RuntimeError, match="int8fx: '0' was given tensors of another format"):
            run(cloned(two_layers(theirs, 1)), x)
    other = two_layers(ours, 3)
    torch.testing.assert_close(run(cloned(other), x), other(x))
    torch.testing.assert_close(
        run({"0.bias": torch.ones(48)}, x), torch.func.functional_call(model, {"0.bias": torch.ones(48)}, (x,))
    )


def test_functional_call_is_checked_with_gradients_too():
    torch._dynamo.reset()
    model, x = two_layers("rotated", 0), batch(3).requires_grad_()
    run = torch.compile(lambda tensors, x: torch.func.functional_call(model, tensors, (x,)), fullgraph=True)
    run(cloned(two_layers("rotated", 1)), x).sum().backward()
    (expected,) = torch.autograd.grad(two_layers("rotated", 1)(x).sum(), x)
    torch.testing.assert_close(x.grad, expected)
    with pytest.raises(RuntimeError, match="int8fx: '0' was given tensors of another format"):
        run(cloned(two_layers("rotated(32)", 1)), x)


def test_functional_call_over_a_stack_of_models():
    torch._dynamo.reset()
    models, x = [two_layers("rotated", seed) for seed in range(3)], batch(3)
    stack = {name: torch.stack([m.state_dict()[name] for m in models]) for name in models[0].state_dict()}
    run = torch.vmap(lambda tensors: torch.func.functional_call(models[0], tensors, (x,)))
    y = torch.compile(run, fullgraph=True)(stack)
    torch.testing.assert_close(y, torch.stack([m(x) for m in models]))


def test_a_plain_graph_holds_no_format():
    torch._dynamo.reset()
    model, x, graphs = two_layers("rotated columns", 0), batch(3), []
    torch.compile(model, backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True)(x)
    (graph,) = graphs
    names = [n.name for n in graph.graph.nodes if n.op == "placeholder"]
    assert len(names) == 1 + 2 * 5  # x; of each layer codes, scale, columns, their weights, and the bias
    assert not any("format" in name for name in names)
    calls = [n.target for n in graph.graph.nodes if n.op == "call_function"]
    assert calls.count(torch.ops.int8fx.linear.default) == 2
    assert len(calls) == 2 + sum("relu" in str(t) for t in calls)
