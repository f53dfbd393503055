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
