"""Models converted with rotated int8: packing, checkpoints, graphs, compilation, batch invariance, calibration."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from support import models
from support.helpers import NO_THRESHOLD, generator
from torch import Tensor, nn

import int8fx
from int8fx.calibration.calibrate import Calibration, calibrate
from int8fx.conversion.packed import COLUMNS, COLUMNS_WEIGHT, SCALE
from int8fx.passes import PASSES, count_ops
from int8fx.schemes import reference
from int8fx.schemes.quantize import dequantize, quantize_weight

SCHEMES = {
    "static": int8fx.rotated(16, 0.05),
    "dynamic": int8fx.rotated(16, 0.05, "dynamic"),
    "none": int8fx.rotated(16, columns=None),
    "budget 0": int8fx.rotated(16, 0.0),
    "kept": int8fx.llm_int8(6.0, keep=0.05),
}
K = 60


class Attention(nn.Module):
    """q, k, v of one input, a gated feed-forward, a bare Parameter: what `share` and `fold` have work with."""

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


def model_of(dtype: torch.dtype = torch.float32, seed: int = 0) -> Attention:
    torch.manual_seed(seed)
    return Attention(dtype).eval()


def batch(*lead: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    x = torch.randn(*lead, K, generator=generator(seed))
    x[..., 7] *= 30
    return x.to(dtype)


def linear_of(name: str, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    layer = nn.Linear(K, 24, dtype=dtype)
    x = batch(9, dtype=dtype)
    twin = copy.deepcopy(layer)
    return layer, twin, x, SCHEMES[name]


# ---- one layer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(SCHEMES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_converted_layer_is_the_reference(name, dtype):
    layer, twin, x, scheme = linear_of(name, dtype)
    calibration = calibrate(twin, [x])
    int8fx.convert(layer, scheme, calibration=calibration)
    count = scheme.static_columns(K)
    columns = x.abs().amax(0).float().topk(count).indices.sort().values if count else None
    kept = None if columns is None else twin.weight[:, columns]
    packed = quantize_weight(twin.weight.detach(), scheme.block, columns)
    assert torch.equal(layer._buffers["weight"], packed[0])
    assert torch.equal(layer._buffers["weight" + SCALE], packed[1])
    if columns is not None:
        assert 7 in columns
        assert torch.equal(layer._buffers["weight" + COLUMNS], columns)
        assert torch.equal(layer._buffers["weight" + COLUMNS_WEIGHT], kept)
        assert layer._buffers["weight" + COLUMNS_WEIGHT].dtype == dtype
    assert set(layer.state_dict()) == {"bias", *layer._buffers}
    rotation = (scheme.block, columns, kept, scheme.dynamic_columns(K))
    expected = int8fx.ops.linear(x, *packed, layer.bias, scheme.threshold, "none", None, "none", *rotation)
    assert torch.equal(layer(x), expected)
    exact = reference.linear(x, *packed, layer.bias, scheme.threshold, "none", None, "none", *rotation)
    step = torch.finfo(dtype).eps * exact.abs().max() + 2**-20
    assert (layer(x) - exact).abs().max() <= step
    assert torch.equal(layer.weight, dequantize(*packed, dtype, scheme.block, columns, kept))


@pytest.mark.parametrize("name", list(SCHEMES))
def test_layers_survive_state_dicts_copies_and_pickles(name, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model, x = int8fx.convert(model_of(), SCHEMES[name]), batch(2, 5)
    y = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), y)
    fresh = int8fx.convert(model_of(seed=3), SCHEMES[name])
    assert not torch.equal(fresh(x), y)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), y)
    safetensors.save_file(model.state_dict(), tmp_path / "model.safetensors")
    fresh = int8fx.convert(model_of(seed=4), SCHEMES[name])
    fresh.load_state_dict(safetensors.load_file(tmp_path / "model.safetensors"), assign=True)
    assert torch.equal(fresh(x), y)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), y)


@pytest.mark.parametrize("name", list(SCHEMES))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_casts_leave_codes_and_kept_columns(name, dtype):
    model = int8fx.convert(model_of(), SCHEMES[name])
    before = {k: v for k, v in model.state_dict().items() if "bias" not in k}
    model.to(dtype)
    after = model.state_dict()
    for k, v in before.items():
        assert after[k].dtype == v.dtype
        assert torch.equal(after[k], v)
    assert model.q.weight.dtype == dtype
    assert model(batch(3, dtype=dtype)).dtype == dtype


def test_equal_columns_are_tied_and_come_apart_when_others_are_loaded():
    x, scheme = batch(4, 5), SCHEMES["static"]

    def converted(data: Tensor) -> nn.Module:
        model = model_of()
        return int8fx.convert(model, scheme, calibration=calibrate(model, [data]))

    def columns(model: nn.Module, name: str) -> Tensor:
        return model.get_submodule(name)._buffers["weight" + COLUMNS]

    model = converted(x)
    assert columns(model, "q") is columns(model, "k") is columns(model, "v")
    assert columns(model, "gate") is columns(model, "up")
    for moved in (copy.deepcopy(model), copy.deepcopy(model).to(torch.bfloat16)):
        assert columns(moved, "q") is columns(moved, "k") is columns(moved, "v")
    other = x.roll(5, -1)
    apart = converted(other)
    state = model.state_dict()
    state["q.weight" + COLUMNS] = apart.state_dict()["q.weight" + COLUMNS]
    state["q.weight" + COLUMNS_WEIGHT] = apart.state_dict()["q.weight" + COLUMNS_WEIGHT]
    state["q.weight"], state["q.weight" + SCALE] = apart.q._buffers["weight"], apart.q._buffers["weight" + SCALE]
    assert not torch.equal(columns(apart, "q"), columns(model, "k"))
    k = model.k(x)
    model.load_state_dict(state)
    assert torch.equal(columns(model, "q"), columns(apart, "q"))
    assert columns(model, "k") is columns(model, "v")
    assert torch.equal(model.k(x), k)
    assert torch.equal(model.q(x), apart.q(x))


def test_columns_of_another_number_are_refused():
    few, many = (int8fx.convert(model_of(), int8fx.rotated(16, budget)) for budget in (0.02, 0.2))
    with pytest.raises(RuntimeError, match=r"size mismatch for q\.weight_columns"):
        few.load_state_dict(many.state_dict())


def test_summary_counts_kept_columns():
    model = nn.Sequential(nn.Linear(K, 24, bias=False))
    int8fx.convert(model, int8fx.rotated(budget=0.05))
    (row,) = int8fx.summary(model).rows
    assert row.bytes_after == 24 * K + 24 * 4 + 3 * 8 + 24 * 3 * 4


@pytest.mark.parametrize("name", list(SCHEMES))
def test_tied_embeddings_give_rows_of_the_weight_that_the_head_has(name):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(30, K)
            self.lm_head = nn.Linear(K, 30, bias=False)
            self.lm_head.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.lm_head(self.table(ids))

    torch.manual_seed(0)
    model, ids = Tied().eval(), torch.arange(12).view(3, 4)
    graph = torch.export.export(copy.deepcopy(model), (ids,))
    int8fx.convert(model, SCHEMES[name], select="lm_head")
    assert torch.equal(model.table(ids), model.lm_head.weight[ids])
    int8fx.convert(graph, SCHEMES[name], select="lm_head")
    assert torch.equal(graph.module()(ids), model(ids))
    assert count_ops(graph.graph).get("linear") == 1


def test_attention_and_experts():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(K, 4, batch_first=True).eval()
    x = batch(2, 6)
    exact = attention(x, x, x)[0]
    calibration = calibrate(attention, [(x, x, x)])
    assert set(calibration.absmax) == {"in_proj_weight", "out_proj"}
    int8fx.convert(attention, SCHEMES["static"], calibration=calibration)
    assert 7 in attention._buffers["in_proj_weight" + COLUMNS]
    found = attention(x, x, x)[0]
    assert (found - exact).norm() < 0.02 * exact.norm()


@pytest.fixture
def no_graphs_from_caches():
    """The passes run and report."""
    torch._dynamo.reset()
    with torch._inductor.config.patch(fx_graph_cache=False), torch._functorch.config.patch(enable_autograd_cache=False):
        yield


# ---- graphs and compilation -----------------------------------------------------------------------------------------


def graph_of(kind: str, model: nn.Module, x: Tensor):
    if kind == "fx":
        return torch.fx.symbolic_trace(copy.deepcopy(model))
    return torch.export.export(copy.deepcopy(model), (x,), dynamic_shapes={"x": {0: torch.export.Dim.DYNAMIC}})


@pytest.mark.parametrize("name", list(SCHEMES))
@pytest.mark.parametrize("kind", ["fx", "export"])
def test_converted_graphs_are_the_converted_module(name, kind):
    model, x = model_of(), batch(3, 5)
    calibration = calibrate(model, [x])
    graph = graph_of(kind, model, x)
    int8fx.convert(graph, SCHEMES[name], calibration=calibration, skip="w")
    int8fx.convert(model, SCHEMES[name], calibration=calibration, skip="w")
    run = graph.module() if kind == "export" else graph
    assert torch.equal(run(x), model(x))
    assert count_ops(graph.graph) == ({"linear": 6} if kind == "export" else {})  # fx calls the packed modules
    state = graph.state_dict if kind == "export" else graph.state_dict()
    assert {k for k in state if not k.endswith("bias")} == {k for k in model.state_dict() if not k.endswith("bias")}
    if kind == "fx":
        for other in (copy.deepcopy(graph), copy.deepcopy(graph).double().float()):
            assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("name", list(SCHEMES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_models_share_fold_and_agree(name, dtype, no_graphs_from_caches):
    model, x = model_of(dtype), batch(8, 40, dtype=dtype)
    twin = copy.deepcopy(model).float()
    int8fx.convert(model, SCHEMES[name], calibration=calibrate(model, [x]))
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        y, exact = compiled(x), twin(x.float())
        model.w_product = lambda x: model.packed_linear(x, "w")
        eager = model(x)
    report = PASSES.reports[-1]
    assert (report.linears, report.lowered, report.dequantized) == (7, 1, 0)
    assert report.shared == 3  # k and v with q, up with gate
    assert report.folded >= 3
    assert (y - exact).norm() <= 1.05 * (eager - exact).norm()


@pytest.mark.parametrize("name", list(SCHEMES))
def test_exported_programs_survive_a_file(name, tmp_path):
    model, x = model_of(), batch(3, 5)
    int8fx.convert(model, SCHEMES[name])
    program = torch.export.export(model, (x,))
    torch.export.save(program, tmp_path / "model.pt2")
    assert torch.equal(torch.export.load(tmp_path / "model.pt2").module()(x), model(x))


@pytest.mark.parametrize("name", models.ALL)
def test_architectures_are_calibrated_whole_and_converted(name):
    """Experts, Conv1D, packed attention projections, bare Parameters: each product's input is seen."""
    model, inputs = models.ALL[name]()
    plain = int8fx.convert(copy.deepcopy(model), int8fx.llm_int8(float("inf")))
    calibration = calibrate(model, [inputs], moments=True)
    gptq = int8fx.convert(copy.deepcopy(model), int8fx.rotated(16, 0.05, rounding="gptq"), calibration=calibration)

    def output(model: nn.Module) -> Tensor:
        with torch.no_grad():
            y = model(**inputs)
        return y if isinstance(y, Tensor) else y[0] if not isinstance(y, dict) else next(iter(y.values()))

    before = output(model)
    int8fx.convert(model, SCHEMES["static"], calibration=calibration)
    names = {row.name for row in int8fx.summary(model).converted}
    assert names
    assert names <= set(calibration.absmax)
    assert 0 < (output(model) - before).norm() < (output(plain) - before).norm()
    assert 0 < (output(gptq) - before).norm() < 1.1 * (output(model) - before).norm()  # of the data that it has seen


def test_aot_inductor_packages_hold_the_scheme(tmp_path):
    torch.manual_seed(0)
    model, x = Rows().eval(), batch(9)
    twin = copy.deepcopy(model)
    int8fx.convert(model, SCHEMES["static"], calibration=calibrate(model, [x]))
    program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: torch.export.Dim.DYNAMIC}})
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    run = torch._inductor.aoti_load_package(path)
    with torch.no_grad():
        for rows in (9, 33):
            x = batch(rows)
            exact, eager = twin(x), model(x)
            assert (run(x) - exact).norm() <= 1.05 * (eager - exact).norm()


class Rows(nn.Module):
    """Products, bias, activations that `fold` takes in: nothing else, so rows depend on int8fx alone."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(K, 1100), nn.Linear(K, 1100), nn.Linear(1100, K)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


@pytest.mark.parametrize("name", ["static", "none", "budget 0"])
@pytest.mark.parametrize("compiled", [False, True])
def test_rows_are_bit_equal_for_every_batch(name, compiled, no_graphs_from_caches):
    torch.manual_seed(0)
    model, x = Rows().eval(), batch(33)
    calibration = calibrate(model, [x])
    if not compiled:
        model.forward = lambda x: x + model.down(F.relu(model.gate(x)) * model.up(x))  # eager silu has tails of its own
    int8fx.convert(model, SCHEMES[name], calibration=calibration)
    run = torch.compile(model, fullgraph=True, dynamic=True) if compiled else model
    with torch.no_grad():
        whole = run(x)
        for M in range(2 if compiled else 1, 34):
            assert torch.equal(run(x[:M]), whole[:M])
            assert torch.equal(run(x[33 - M :]), whole[33 - M :])
        padded = torch.cat([x[:5], torch.zeros(9, K), 1e4 * x[5:9]])
        assert torch.equal(run(padded)[:5], whole[:5])
        if compiled:
            assert PASSES.reports[-1].folded == 3
            once = torch.compile(model, fullgraph=True, dynamic=False)
            assert torch.equal(once(x[:1]), whole[:1])


# ---- calibration ----------------------------------------------------------------------------------------------------


def test_calibration_sees_every_products_input():
    model, batches = model_of(), [batch(2, 5), batch(3, 4, seed=2)]
    found = calibrate(model, batches, progress=False)
    x = torch.cat([b.reshape(-1, K) for b in batches])
    assert set(found.absmax) == {"q", "k", "v", "gate", "up", "down", "w"}
    assert torch.equal(found.absmax["q"], x.abs().amax(0))
    assert torch.equal(found.absmax["q"], found.absmax["v"])
    assert set(found.rows.values()) == {len(x)}


@pytest.mark.parametrize(
    "make",
    [
        lambda x: (x, (x,), {"x": x}),
        lambda x: iter([x]),
    ],
)
def test_batches_take_every_form(make):
    assert calibrate(model_of(), make(batch(2, 3))).rows["q"] in (6, 18)


def test_calibration_shows_a_bar(capsys):
    calibrate(model_of(), [batch(2)] * 3, progress=True)
    err = capsys.readouterr().err
    assert err.endswith("3/3\n")
    assert "calibrating" in err
    calibrate(model_of(), [batch(2)], progress=False)
    assert capsys.readouterr().err == ""


def test_calibration_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no batches"):
        calibrate(model_of(), [])
    model = int8fx.convert(model_of())
    with pytest.raises(ValueError, match="no product with a weight of the model"):
        calibrate(model, [batch(2)])
    with pytest.raises(TypeError, match=r"calibration is 6; legal: what int8fx\.calibrate returns"):
        int8fx.convert(model_of(), int8fx.rotated(), calibration=6)


def test_calibration_leaves_the_model_and_torch_as_they_were():
    model, x = nn.TransformerEncoderLayer(K, 4, 80, batch_first=True).eval(), batch(2, 5)
    before, fast = copy.deepcopy(model.state_dict()), torch.backends.mha.get_fastpath_enabled()
    calibrate(model, [x])
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_layers_without_data_keep_the_columns_of_largest_weight():
    layer = nn.Linear(K, 24)
    with torch.no_grad():
        layer.weight[:, [3, 50]] *= 9
    int8fx.convert(layer, int8fx.rotated(budget=2 / K), calibration=Calibration())
    assert layer._buffers["weight" + COLUMNS].tolist() == [3, 50]


def test_without_data_weights_beside_each_other_keep_the_same_columns():
    """So that products of one x share its quantisation; other widths and other modules choose for themselves."""
    model = nn.Sequential(model_of(), nn.Linear(K, 8))
    with torch.no_grad():
        model[0].q.weight[:, 11] *= 9
        model[0].v.weight[:, 40] *= 9
        model[1].weight[:, 3] *= 9
    size = torch.stack([getattr(model[0], n).weight.square().sum(0) for n in ("q", "k", "v", "gate", "up")]).sum(0)
    size += model[0].w.square().sum(1)
    int8fx.convert(model, int8fx.rotated(budget=2 / K))
    kept = {n: getattr(model[0], n)._buffers["weight" + COLUMNS] for n in ("q", "k", "v", "gate", "up", "down")}
    assert kept["q"].tolist() == size.topk(2).indices.sort().values.tolist() == [11, 40]
    assert all(kept[n] is kept["q"] for n in ("k", "v", "gate", "up"))
    assert kept["down"].shape != kept["q"].shape or not torch.equal(kept["down"], kept["q"])
    assert 3 in model[1]._buffers["weight" + COLUMNS]


def test_compiled_models_share_without_data(no_graphs_from_caches):
    model = int8fx.convert(model_of(), SCHEMES["static"])
    with torch.no_grad():
        torch.compile(model, fullgraph=True)(batch(8, 40))
    assert PASSES.reports[-1].shared == 3


# ---- the scheme -----------------------------------------------------------------------------------------------------


def test_defaults_and_counts():
    scheme = int8fx.rotated()
    assert (scheme.block, scheme.budget, scheme.columns, scheme.threshold) == (64, 0.01, "static", NO_THRESHOLD)
    assert [scheme.static_columns(k) for k in (0, 1, 60, 576, 1536)] == [0, 1, 1, 6, 15]
    assert int8fx.rotated(budget=0).static_columns(576) == 0
    dynamic = int8fx.rotated(columns="dynamic")
    assert (dynamic.static_columns(576), dynamic.dynamic_columns(576)) == (0, 6)
    assert int8fx.llm_int8(keep=0.5).static_columns(6) == 3


@pytest.mark.parametrize("block", [0, -1, 3, 96, 2.0, "64"])
def test_blocks_are_powers_of_two(block):
    with pytest.raises(ValueError, match="block must be a power of two"):
        int8fx.rotated(block)


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan"), None, "1%", True])
def test_budgets_are_shares(share):
    with pytest.raises(ValueError, match="budget must be a share"):
        int8fx.rotated(budget=share)
    with pytest.raises(ValueError, match="keep must be a share"):
        int8fx.llm_int8(keep=share)


def test_columns_are_named():
    with pytest.raises(ValueError, match="columns must be 'static', 'dynamic' or None, found 'some'"):
        int8fx.rotated(columns="some")
