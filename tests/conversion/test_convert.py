"""``int8fx.convert``: its arguments, plans, errors, log lines, and the contexts in which it may be called."""

import copy
import logging
import threading
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import models
from support.conversion import (
    EVERYTHING,
    NAMED,
    PROGRAMS,
    SCHEMES,
    assert_left_as_it_was,
    converted_names,
    equal,
    outputs,
    reasons,
    run,
    snapshot,
    tensors,
)
from support.helpers import assert_within_budget, generator
from torch import Tensor, nn

import int8fx
from int8fx.conversion.layers import HEAD
from int8fx.conversion.packed import PackedModule
from int8fx.ops import native
from int8fx.schemes.calibration import Calibration
from int8fx.schemes.formats import FORMATS
from int8fx.schemes.quantize import MAX_K
from int8fx.schemes.weight import SCALE


def three() -> nn.ModuleDict:
    return nn.ModuleDict({"first": nn.Linear(8, 8), "bad": nn.Linear(8, 8), "last": nn.Linear(8, 8)})


@pytest.fixture
def kernels_loaded(monkeypatch):
    """The calls of `native.load` that a conversion makes."""
    calls = []
    monkeypatch.setattr(native, "load", lambda: calls.append(True))
    return calls


@pytest.mark.parametrize("kind", ["module", "graph_module", "exported"])
def test_the_kernels_of_a_model_on_the_cpu_are_loaded_by_the_conversion(kernels_loaded, kind):
    """And built, if they have to be. Not in the first forward."""
    model = nn.Sequential(nn.Linear(8, 8)).eval()
    if kind == "graph_module":
        model = torch.fx.symbolic_trace(model)
    elif kind == "exported":
        model = torch.export.export(model, (torch.ones(2, 8),))
    int8fx.convert(model)
    assert kernels_loaded == [True]


@pytest.mark.parametrize("place", ["on meta", "fake", "nothing to convert"])
def test_no_kernels_are_loaded_without_packed_weights_on_the_cpu(kernels_loaded, place):
    if place == "nothing to convert":
        with pytest.warns(UserWarning, match="no layer was converted"):
            int8fx.convert(nn.Sequential(nn.ReLU()))
    else:
        with torch.device("meta") if place == "on meta" else torch._subclasses.FakeTensorMode():
            int8fx.convert(nn.Sequential(nn.Linear(8, 8)))
    assert kernels_loaded == []


def test_arguments_of_the_wrong_kind():
    with pytest.raises(TypeError, match=r"found dict; legal: nn\.Module, torch\.fx\.GraphModule"):
        int8fx.convert({})
    with pytest.raises(TypeError, match=r"scheme is 6.0; legal: int8fx.llm_int8\(threshold=...\), int8fx.rotated"):
        int8fx.convert(nn.Linear(2, 2), 6.0)
    with pytest.raises(TypeError, match="found type"):
        int8fx.convert(nn.Linear)
    with pytest.raises(TypeError, match="ScriptModule"):
        int8fx.convert(torch.jit.script(nn.Linear(2, 2)))
    with pytest.raises(TypeError, match="positional"):
        int8fx.convert(nn.Linear(2, 2), None, "lm_head")
    with pytest.raises(TypeError, match=r"calibration is 6; legal: what int8fx\.calibrate returns"):
        int8fx.convert(nn.Linear(2, 2), int8fx.rotated(), calibration=6)


def test_a_model_without_products_warns():
    for model in (nn.ReLU(), nn.Sequential(nn.LayerNorm(8)), nn.Embedding(4, 4)):
        with pytest.warns(UserWarning, match="no layer was converted"):
            assert int8fx.convert(model) is model


# ---- plans ----------------------------------------------------------------------------------------------------------


def plan_of(calibration: Calibration | None = None, **schemes) -> SimpleNamespace:
    return SimpleNamespace(schemes=schemes, calibration=calibration)


class Uneven(nn.Module):
    """Three layers in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(20, 40), nn.Linear(40, 20)
        self.w = nn.Parameter(torch.randn(20, 8, generator=generator(0)))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x))) @ self.w


@pytest.mark.parametrize("kind", [None, *NAMED])
def test_a_plan_gives_each_layer_its_scheme(kind):
    model, inputs = Uneven(), {"x": torch.randn(9, 20)}
    inputs["x"][:, 3] *= 30
    calibration = int8fx.calibrate(model, [inputs["x"]])
    plan = plan_of(calibration, up=int8fx.rotated(16, columns=0.1), w=int8fx.weight_only())

    def program() -> nn.Module:
        twin = copy.deepcopy(model)
        return twin if kind is None else PROGRAMS[kind](twin, inputs)

    converted, one_by_one = int8fx.convert(program(), plan), program()
    for name, scheme in plan.schemes.items():
        int8fx.convert(one_by_one, scheme, select=name, calibration=calibration)
    assert equal(tensors(converted), tensors(one_by_one))
    assert torch.equal(run(converted, inputs), run(one_by_one, inputs))
    assert {r.name: r.scheme for r in int8fx.summary(converted).converted} == {
        "up": "rotated(block=16, columns=0.1)", "w": "weight_only",
    }  # fmt: skip
    assert reasons(converted) == {"down": "not in the plan"}


def test_a_plan_may_skip_layers_and_select_none():
    plan = plan_of(up=int8fx.plain(), w=int8fx.plain())
    model = int8fx.convert(Uneven(), plan, skip="w")
    assert reasons(model) == {"w": "skipped", "down": "not in the plan"}
    with pytest.raises(TypeError, match="select with a plan, which names its layers; legal: skip"):
        int8fx.convert(Uneven(), plan, select="up")


def test_a_plan_may_name_a_shared_module_by_any_of_its_paths():
    for name in ("one", "other"):
        shared = nn.Linear(8, 8)
        model = int8fx.convert(nn.ModuleDict({"one": shared, "other": shared}), plan_of(**{name: int8fx.plain()}))
        assert model["one"] is model["other"] is shared
        assert shared.packed_weights["weight"].scheme == int8fx.plain()


@pytest.mark.parametrize(
    ("plan", "error", "message"),
    [
        (plan_of(up=int8fx.plain(), wup=int8fx.plain()), ValueError, "a scheme for layer 'wup', which this model does"),
        (plan_of(up=int8fx.plain(), w="rotated"), TypeError, "the plan has 'rotated' for layer 'w'; legal: a scheme"),
        (plan_of(up=int8fx.plain(), w=int8fx.rotated(rounding="gptq")), ValueError, "needs moments of .* layer 'w'"),
        (plan_of("data", up=int8fx.plain()), TypeError, "calibration is 'data'"),
    ],
)
def test_a_plan_is_refused_before_any_layer_is_converted(plan, error, message):
    model = Uneven()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        int8fx.convert(model, plan)
    assert_left_as_it_was(model, before)


def test_layers_that_share_a_weight_need_one_scheme_of_a_plan():
    model, _ = models.tied_lm()
    plan = plan_of(up=int8fx.plain(), up_again=int8fx.rotated(), down=int8fx.plain())
    int8fx.convert(model, plan)
    assert converted_names(model) == {"down"}
    different = "the plan has different schemes for its weight: as up and as up_again"
    assert reasons(model) == {
        "up": different, "up_again": different, "embed": "an embedding: rows are looked up, no matmul",
        "lm_head": "not in the plan",
    }  # fmt: skip
    model, _ = models.tied_lm()
    int8fx.convert(model, plan_of(up=int8fx.plain(), up_again=int8fx.plain(), lm_head=int8fx.plain()))
    assert converted_names(model) == {"up", "up_again", "lm_head", "embed"}


# ---- what it says ---------------------------------------------------------------------------------------------------


def test_it_logs_what_was_left_and_why(caplog):
    model, _ = models.llama()
    with caplog.at_level(logging.INFO, "int8fx"):
        int8fx.convert(model, skip="k_proj")
    (line,) = [record.getMessage() for record in caplog.records if record.name == "int8fx"]
    assert line == (
        f"convert: 12 weights to int8; left: 2 (skipped), 1 (an embedding: rows are looked up, no matmul), 1 ({HEAD})"
    )


@pytest.mark.parametrize("kind", [None, *NAMED])
def test_it_shows_its_progress(kind, capsys):
    inputs = {"x": torch.randn(2, 20)}
    model = Uneven() if kind is None else PROGRAMS[kind](Uneven(), inputs)
    int8fx.convert(model, select="up")
    assert capsys.readouterr().err == ""  # small, and not on a terminal
    int8fx.convert(model, skip="up", progress=True)
    err = capsys.readouterr().err
    assert "converting" in err
    assert err.endswith("2/2\n")


def test_large_models_show_their_progress_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    int8fx.convert(Uneven())
    assert capsys.readouterr().err == ""
    monkeypatch.setitem(int8fx.convert.__globals__, "LARGE", 4 * (20 * 40 * 2 + 20 * 8))
    int8fx.convert(Uneven(), progress=False)
    assert capsys.readouterr().err == ""
    int8fx.convert(Uneven())
    assert capsys.readouterr().err.endswith("3/3\n")


# ---- refusals -------------------------------------------------------------------------------------------------------


def _with(weight: Callable[[], Tensor], requires_grad: bool = True) -> nn.Module:
    model = three()
    model["bad"].weight = nn.Parameter(weight(), requires_grad=requires_grad)
    return model


def _bitsandbytes() -> nn.Module:
    import bitsandbytes

    model = nn.ModuleDict({"first": nn.Linear(8, 8), "bad": bitsandbytes.nn.Linear8bitLt(8, 8, has_fp16_weights=False)})
    return model.to("cpu")


def _bitsandbytes_4bit() -> nn.Module:
    import bitsandbytes

    return nn.ModuleDict({"first": nn.Linear(64, 64), "bad": bitsandbytes.nn.Linear4bit(64, 64)}).to("cpu")


def _torchao() -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, PerGroup, quantize_

    model = nn.ModuleDict({"first": nn.Linear(64, 64), "bad": nn.Linear(64, 64)})
    quantize_(model["bad"], Int8WeightOnlyConfig(granularity=PerGroup(32), set_inductor_config=False))
    return model


REFUSED = {
    "integer": (lambda: _with(lambda: torch.ones(8, 8, dtype=torch.int32), False), "has torch.int32 weights"),
    "int8": (lambda: _with(lambda: torch.ones(8, 8, dtype=torch.int8), False), "has torch.int8 weights"),
    "bool": (lambda: _with(lambda: torch.ones(8, 8, dtype=torch.bool), False), "has torch.bool weights"),
    "complex": (lambda: _with(lambda: torch.ones(8, 8, dtype=torch.complex64)), "has torch.complex64 weights"),
    "float8": (
        lambda: _with(lambda: torch.ones(8, 8).to(torch.float8_e4m3fn), False),
        "has torch.float8_e4m3fn weights",
    ),
    "nan": (lambda: _with(lambda: torch.full((8, 8), float("nan"))), "has NaN or inf in its weight"),
    "inf": (lambda: _with(lambda: torch.eye(8) / (1 - torch.eye(8))), "has NaN or inf in its weight"),
    "huge in float64": (
        lambda: _with(lambda: torch.full((8, 8), 1e45, dtype=torch.float64)),
        "has a weight whose scale overflows float32",
    ),
    "huge and rotated": (
        lambda: _with(lambda: torch.full((8, 8), 3e38)),
        "has a weight whose rotation overflows float32: 3e[+]38",
        int8fx.rotated(),
    ),
    "long": (lambda: _with(lambda: torch.zeros(1, MAX_K + 1)), f"has K = {MAX_K + 1} input channels"),
    "sparse": (lambda: _with(lambda: torch.eye(8).to_sparse()), "has a sparse_coo weight"),
    "bitsandbytes 4 bit": (_bitsandbytes_4bit, "is already quantised by bitsandbytes"),
    "torchao in groups": (_torchao, "is already quantised by torchao"),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_refused_by_name_and_the_model_is_left_as_it_was(what):
    make, message, *scheme = REFUSED[what]
    model = make()
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"int8fx.convert: layer 'bad' {message}.*; legal: "):
        int8fx.convert(model, *scheme)
    assert_left_as_it_was(model, before)
    if "quantised" not in message:
        int8fx.convert(model, *scheme, skip="bad")
        assert converted_names(model) == {"first", "last"}


@given(st.sampled_from(sorted(SCHEMES)), st.floats(0.5, 1), st.integers(1, 70), st.integers(0, 99))
def test_the_largest_weights_are_converted_rightly(scheme, part, K, seed):
    """Those of a block are summed before they are scaled: `absmax` times the block must fit float32."""
    scheme, layer = SCHEMES[scheme], nn.Linear(K, 5, bias=False)
    limit = torch.finfo(torch.float32).max / abs(scheme.rotation)
    tolerance = 0.01 if FORMATS[scheme.grouping.format].bits == 8 else 0.15
    signs = torch.randint(2, (5, K), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1
    with torch.no_grad():
        layer.weight.copy_(signs * (part * limit))
    weight = layer.weight.detach().double()
    values = int8fx.convert(layer, scheme).dequantize().double()
    assert (values - weight).norm() <= tolerance * weight.norm()


@pytest.mark.parametrize("kind", NAMED)
@pytest.mark.parametrize(("weight", "message"), [(float("nan"), "has NaN or inf in its weight"), (None, "K = 133145")])
def test_illegal_weights_are_refused_by_name_and_the_graph_is_left(kind, weight, message):
    class Bad(nn.Module):
        def __init__(self):
            super().__init__()
            self.fine = nn.Parameter(torch.randn(1, 4))
            self.bad = nn.Parameter(torch.zeros(1, 133_145) if weight is None else torch.full((1, 4), weight))

        def forward(self, x, z):
            return nn.functional.linear(x, self.fine) + nn.functional.linear(z, self.bad)

    model = Bad()
    inputs = {"x": torch.randn(2, 4), "z": torch.randn(2, model.bad.shape[1])}
    program = PROGRAMS[kind](model, inputs)
    code, state = str(program.graph), tensors(program)
    with pytest.raises(ValueError, match=f"layer 'bad' .*{message}"):
        int8fx.convert(program)
    assert str(program.graph) == code
    torch.testing.assert_close(tensors(program), state, rtol=0, atol=0, equal_nan=True)
    assert not converted_names(program)
    int8fx.convert(program, skip="bad")
    assert converted_names(program) == {"fine"}


@pytest.mark.parametrize("make", [_bitsandbytes, _torchao])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_summary_of_a_model_that_is_quantised_already_lists_it(make):
    rows = {row.name: row for row in int8fx.summary(make()).rows}
    assert rows["bad"].reason == f"already quantised by {make.__name__[1:]}"
    assert not rows["bad"].converted
    assert rows["first"].reason == "float (not converted yet)"


def test_the_longest_k_is_legal():
    model = nn.Linear(MAX_K, 1, bias=False)
    nn.init.ones_(model.weight)
    int8fx.convert(model)
    x = torch.full((5, MAX_K), -2.0)
    assert_within_budget(model(x), x, model.packed())


def test_a_parameter_of_a_long_row_that_is_no_product_does_not_matter():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.w = nn.Parameter(torch.zeros(1, MAX_K + 1)), nn.Parameter(torch.randn(8, 8))

        def forward(self, x):
            return x @ self.w + self.table[0, :8]

    assert converted_names(int8fx.convert(Table())) == {"w"}


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "transformer", "bare_products", "tied_lm"])
def test_a_second_convert_is_refused_by_name(name):
    model, inputs = models.ALL[name]()
    int8fx.convert(model)
    y, before = outputs(model, inputs), snapshot(model)
    first = next(iter(int8fx.summary(model).converted)).name
    for again in ({}, {"select": first}, EVERYTHING, {"skip": "lm_head"} if name in ("llama", "tied_lm") else {}):
        with pytest.raises(ValueError, match=r"layer '.*' is already converted by int8fx; legal: float weights"):
            int8fx.convert(model, **again)
    assert_left_as_it_was(model, before)
    assert equal(outputs(model, inputs), y)


def test_what_is_left_can_be_converted_later():
    model, inputs = models.llama()
    int8fx.convert(model, select="self_attn")
    int8fx.convert(model, select=["mlp", "lm_head"])
    once, _ = models.llama()
    int8fx.convert(once, **EVERYTHING)
    assert converted_names(model) == converted_names(once)
    assert equal(outputs(model, inputs), outputs(once, inputs))
    model, _ = models.llama()
    int8fx.convert(model, select="self_attn")
    int8fx.convert(model, skip="self_attn")
    assert converted_names(model) == converted_names(once) - {"lm_head"}


# ---- contexts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_converting_in_any_grad_mode_makes_ordinary_tensors(context):
    model, _ = models.bert()
    with context():
        int8fx.convert(model, int8fx.rotated(16))
    assert not any(b.is_inference() or b.requires_grad for b in model.buffers())
    x = torch.randn(2, 64, requires_grad=True)
    model.encoder.layer[0].output.dense.weight  # noqa: B018
    model.pooler.dense(x).sum().backward()
    assert x.grad is not None


def test_converting_under_default_device_dtype_and_autocast():
    model, _ = models.bert()
    twin = copy.deepcopy(model)
    with torch.device("meta"):
        int8fx.convert(model, int8fx.rotated(16))
    assert {b.device.type for b in model.buffers()} == {"cpu"}
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            int8fx.convert(twin, int8fx.rotated(16))
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("scheme", [int8fx.llm_int8(), int8fx.rotated(rounding="nearest")])
def test_fake_models(scheme, inside):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4))
        if inside:
            int8fx.convert(model, scheme)
    if not inside:
        int8fx.convert(model, scheme)
    assert converted_names(model) == {"0", "1"}
    with mode:
        y = model(torch.empty(3, 16))
    assert (y.shape, y.dtype, y.device.type) == ((3, 4), torch.float32, "cpu")
    assert model[0].weight_codes.dtype == torch.int8
    assert model[0]._buffers["weight" + SCALE].dtype == torch.float32


def test_a_compiled_model_is_converted_in_place():
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = torch.randn(3, 16)
    with torch.no_grad():
        compiled(x)
        assert int8fx.convert(compiled) is compiled
        assert isinstance(model[0], PackedModule)
        assert torch.equal(compiled(x), model(x))
    torch._dynamo.reset()


@pytest.mark.parametrize("same", [False, True])
def test_many_threads_convert_at_once(same):
    """Eight models, some with bare Parameters, whose use is read by a symbolic trace, while others run."""
    kinds = ["bare_products", "bare_products", "llama", "mixtral", "gpt2", "bare_products", "transformer"]
    kinds = ["bare_products"] * 8 if same else [*kinds, "bare_products"]
    built = [models.ALL[kind](seed=i) for i, kind in enumerate(kinds)]
    expected = [outputs(int8fx.convert(copy.deepcopy(model)), inputs) for model, inputs in built]
    running, _ = models.llama()
    ids = {"input_ids": torch.arange(3, 10)[None], "use_cache": False}
    y_running = outputs(running, ids)
    call = nn.Module.__call__
    start, stop, errors = threading.Barrier(9), threading.Event(), []

    def guarded(work: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            try:
                start.wait()
                work()
            except BaseException as error:
                errors.append(error)

        return run

    def serve() -> None:
        while not stop.is_set():
            assert equal(outputs(running, ids), y_running)

    threads = [threading.Thread(target=guarded(lambda m=model: int8fx.convert(m))) for model, _ in built]
    server = threading.Thread(target=guarded(serve))
    for t in (*threads, server):
        t.start()
    for t in threads:
        t.join()
    stop.set()
    server.join()
    assert not errors, errors
    assert nn.Module.__call__ is call
    assert all(equal(outputs(model, inputs), y) for (model, inputs), y in zip(built, expected, strict=True))
