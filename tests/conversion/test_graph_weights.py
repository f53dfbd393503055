"""Conversion of graphs of five kinds: what is rewritten, what is not, and under which names."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import models
from support.conversion import (
    EVERYTHING,
    NAMED,
    PROGRAMS,
    SCHEMES,
    assert_equal_sums,
    converted_names,
    equal,
    exported,
    int8_weight,
    reasons,
    run,
    symbolic,
    tensors,
)
from support.helpers import activation, assert_within_budget, generator
from support.models import mlp
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx.experimental.proxy_tensor import make_fx

import int8fx
from int8fx.conversion.layers import HEAD, ROUTER
from int8fx.conversion.packed import PackedModule
from int8fx.conversion.recipes import NO_PRODUCT, TABLE
from int8fx.conversion.usage import MIXED
from int8fx.graph.count import count_ops
from int8fx.graph.emit import read_weight
from int8fx.schemes.quantize import dequantize
from int8fx.schemes.weight import CODES, COLUMNS, SCALE, Epilogue

OPERANDS = models.BareProducts.OPERANDS


def stored(weight: Tensor, layout: str) -> Tensor:
    """A weight as it is packed: ``[..., N, K]``."""
    return weight.detach() if layout == "NK" else weight.detach().transpose(-1, -2)


# ---- what is rewritten ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", PROGRAMS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_kind_of_product_is_an_int8_product(kind, scheme):
    scheme = SCHEMES[scheme]
    model, inputs = models.bare_products()
    floats = {name: p.detach() for name, p in model.named_parameters()}
    program = PROGRAMS[kind](model, inputs)
    assert int8fx.convert(program, scheme) is program
    counts = count_ops(program.graph)
    assert counts == {"linear": len(OPERANDS)}, counts
    nodes = program.graph.find_nodes(op="call_function", target=torch.ops.int8fx.linear.default)
    assert {(w.threshold, w.block) for w in map(read_weight, nodes)} == {(scheme.threshold, scheme.rotation)}
    y, x, state = run(program, inputs), inputs["x"], tensors(program)
    for name, layout in OPERANDS.items():
        columns = state.get(name + COLUMNS)
        if columns is None and scheme.static_columns(x.shape[-1]):
            continue  # make_fx gives Parameters other names
        weight = int8_weight(stored(floats[name], layout), scheme, columns)
        bias = floats.get(f"{name.removesuffix('_t')}_bias")
        if name == "baddbmm":
            bias = bias.expand(weight.codes.shape[0], -1)
        x_seen = x if weight.codes.dim() == 3 else x.reshape(-1, x.shape[-1])
        assert_within_budget(y[name].reshape(*x_seen.shape[:-1], -1), x_seen, weight, Epilogue(bias))


@pytest.mark.parametrize("kind", PROGRAMS)
def test_codes_and_scales_are_there_and_the_floats_are_gone(kind):
    model, inputs = models.bare_products()
    floats = {name: p.detach().clone() for name, p in model.named_parameters()}
    program = PROGRAMS[kind](model, inputs)
    int8fx.convert(program)
    state = tensors(program)
    assert len(state) == 2 * len(OPERANDS) + 2
    assert {name for name, t in state.items() if t.is_floating_point() and not name.endswith(SCALE)} <= {
        "addmm_bias", "baddbmm_bias", *(name for name, t in state.items() if kind == "make_fx" and t.dim() == 1)
    }  # fmt: skip
    if kind != "make_fx":
        for name, layout in OPERANDS.items():
            expected = int8_weight(stored(floats[name], layout), SCHEMES["llm_int8"])
            assert torch.equal(state[name + CODES], expected.codes)
            assert torch.equal(state[name + SCALE], expected.scale)
            assert state[name + SCALE].dtype == torch.float32


@pytest.mark.parametrize("kind", PROGRAMS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_gives_the_bits_and_the_tensors_of_the_converted_module(kind, scheme):
    model, inputs = mlp()
    calibration = int8fx.calibrate(model, [inputs]) if kind != "make_fx" else None  # which has other names
    program = PROGRAMS[kind](copy.deepcopy(model), inputs)
    int8fx.convert(program, SCHEMES[scheme], calibration=calibration)
    int8fx.convert(model, SCHEMES[scheme], calibration=calibration)
    with torch.no_grad():
        expected = model.packed_linear(model.down(torch.relu(model.up(inputs["x"]))), "w")
    if kind != "make_fx" or not SCHEMES[scheme].needs_columns:  # they choose columns by weights of one module
        assert torch.equal(run(program, inputs), expected)
    if kind != "make_fx":
        assert equal(tensors(program), tensors(model))
    if kind == "symbolic":  # layers are calls of packed modules
        assert isinstance(program.up, PackedModule)
        assert isinstance(program.up, nn.Linear)
    assert count_ops(program.graph) == {"linear": 1 if kind == "symbolic" else 3}


class First(nn.Module):
    """The first output of a model; caches of transformers cannot be exported."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Tensor:
        y = self.model(**inputs)
        return y if isinstance(y, Tensor) else y[0]


SMALL = {
    "llama": {"num_hidden_layers": 1}, "gpt2": {"n_layer": 1}, "t5": {"num_layers": 1, "num_decoder_layers": 1},
    "bert": {"num_hidden_layers": 1}, "vit": {"num_hidden_layers": 1}, "transformer": {},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, "exported") for name in SMALL), ("llama", "unlifted"), ("t5", "unlifted"), ("bert", "decomposed")],
)
def test_whole_models(name, kind):
    model, inputs = models.ALL[name](**SMALL[name])
    model = First(model)
    y_float = run(model, inputs)
    program = PROGRAMS[kind](copy.deepcopy(model), inputs)
    int8fx.convert(model)
    kept = [n for n, reason in reasons(model).items() if reason.startswith("kept in float32")]  # no graph knows of it
    int8fx.convert(program, skip=kept)
    expected = converted_names(model)
    if kind == "decomposed":  # which takes out what the first output does not need
        expected -= {"model.pooler.dense"}
    assert converted_names(program) == expected
    counts = count_ops(program.graph)
    assert counts.get("dequantize", 0) == 0
    assert counts["linear"] >= len(expected)
    y, z = run(program, inputs), run(model, inputs)
    if name != "transformer":  # eager attention multiplies by dequantised weights
        assert (y - z).norm() <= 0.05 * (z - y_float).norm()
    assert 0 < (y - y_float).norm() < 0.25 * y_float.norm()


@pytest.mark.parametrize("kind", ["exported", "unlifted"])
def test_experts_of_an_exported_model(kind):
    model, inputs = models.mixtral(experts_implementation="batched_mm")
    model.config.use_cache = False
    block = model.model.layers[0].mlp
    inputs = {"hidden_states": activation(1 * 7, 64, outliers="column").reshape(1, 7, 64)}
    with torch.no_grad():
        y_float = run(block, inputs)
        program = PROGRAMS[kind](copy.deepcopy(block), inputs)
    int8fx.convert(program)
    assert converted_names(program) == {"experts.gate_up_proj", "experts.down_proj"}
    assert reasons(program)["gate"] == ROUTER
    y = run(program, inputs)
    assert 0 < (y - y_float).norm() < 0.1 * y_float.norm()


class Uses(nn.Module):
    """Two weights, used as ``case`` says."""

    def __init__(self, case: str) -> None:
        super().__init__()
        self.case = case
        self.w = nn.Parameter(torch.randn(16, 16, generator=generator(0)) / 4)
        self.v = nn.Parameter(torch.randn(16, 16, generator=generator(1)) / 4)

    def forward(self, x: Tensor) -> Any:
        w, v = self.w, self.v
        return {
            "output": lambda: x @ w,
            "outputs": lambda: (x @ w, F.linear(x, v), x @ w + 1),
            "twice": lambda: torch.relu(x @ w) @ w,
            "both ways": lambda: torch.relu(x @ w) @ w.t() + x @ v,
            "read": lambda: x @ w + w.sum() + v.sum() + x @ v,
            "returned": lambda: (x @ w, w, v),
            "activations": lambda: (x @ w) @ (x @ v).t(),
            "both operands": lambda: x @ (w @ v),
        }[self.case]()


USED = {  # case -> how each converted weight is read, and the int8 products
    "output": ({"w": "KN"}, 1), "outputs": ({"w": "KN", "v": "NK"}, 3), "twice": ({"w": "KN"}, 2),
    "both ways": ({"v": "KN"}, 1), "read": ({"w": "KN", "v": "KN"}, 2), "returned": ({"w": "KN"}, 1),
    "activations": ({"w": "KN", "v": "KN"}, 2),
}  # fmt: skip


@pytest.mark.parametrize("kind", PROGRAMS)
@pytest.mark.parametrize("case", USED)
def test_uses_of_a_weight(case, kind):
    model, inputs = Uses(case), {"x": activation(6, 16, outliers="column")}
    program = PROGRAMS[kind](copy.deepcopy(model), inputs)
    int8fx.convert(program, int8fx.weight_only())
    layouts, products = USED[case]
    assert len(converted_names(program)) == len(layouts)
    if kind != "make_fx":
        assert converted_names(program) == set(layouts)
        assert reasons(program).get("w") in (None, MIXED)
    with torch.no_grad():
        for name, layout in layouts.items():
            weight = getattr(model, name).data
            twin = dequantize(int8_weight(stored(weight, layout), int8fx.weight_only()))
            weight.copy_(stored(twin, layout))
    absolute = copy.deepcopy(model)
    with torch.no_grad():
        absolute.w.abs_(), absolute.v.abs_()
    y, z, magnitude = run(program, inputs), run(model, inputs), run(absolute, {"x": inputs["x"].abs()})
    y, z, magnitude = (t if isinstance(t, tuple) else (t,) for t in (y, z, magnitude))
    assert len(y) == len(z)
    for sums in zip(y, z, magnitude, strict=True):
        assert_equal_sums(*sums, roundings=300)  # two sums of 16 products follow one another, or one of 256 values
    linears = count_ops(program.graph)["linear"]
    assert linears in (products, products - (case == "outputs"))  # some graphs have x @ w once


@pytest.mark.parametrize("kind", ["symbolic", "exported", "make_fx"])
def test_a_product_of_two_weights_is_right(kind):
    model, inputs = Uses("both operands"), {"x": activation(6, 16)}
    program = PROGRAMS[kind](copy.deepcopy(model), inputs)
    y_float = run(model, inputs)
    int8fx.convert(program)
    assert 0 < (run(program, inputs) - y_float).norm() < 0.1 * y_float.norm()


# ---- what is left ---------------------------------------------------------------------------------------------------


class Rotary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(16, 16))
        self.register_buffer("inv_freq", torch.randn(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.inv_freq + x @ self.w


@pytest.mark.parametrize("kind", PROGRAMS)
def test_buffers_are_never_packed(kind):
    program = PROGRAMS[kind](Rotary(), {"x": torch.randn(3, 16)})
    int8fx.convert(program)
    assert len(converted_names(program)) == 1
    if kind != "make_fx":
        assert converted_names(program) == {"w"}
        assert len([t for t in tensors(program).values() if t.is_floating_point() and t.dim() == 2]) == 1
    assert count_ops(program.graph) == {"linear": 1}


class Written(nn.Module):
    def __init__(self, view: bool) -> None:
        super().__init__()
        self.view = view
        self.changed, self.fine = nn.Parameter(torch.randn(16, 16)), nn.Parameter(torch.randn(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            (self.changed[0] if self.view else self.changed).mul_(0.5)
        return x @ self.changed + x @ self.fine


@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize("kind", PROGRAMS)
def test_weights_that_the_graph_writes_to_are_left(kind, view):
    model, x = Written(view), torch.randn(3, 16)
    twin = copy.deepcopy(model)
    program = PROGRAMS[kind](model, {"x": x})
    changed = (model if kind == "make_fx" else twin).changed.detach().clone()  # make_fx runs the model
    int8fx.convert(program, int8fx.weight_only())
    assert len(converted_names(program)) == 1
    if kind != "make_fx":
        assert converted_names(program) == {"fine"}
        in_subgraph = kind in ("exported", "unlifted")  # that of the no_grad block
        assert reasons(program)["changed"] == ("read by a subgraph" if in_subgraph else "written to by the program")
    changed[0 if view else slice(None)] *= 0.5
    fine = dequantize(int8_weight(twin.fine.t(), int8fx.weight_only())).t()
    magnitude = x.abs() @ changed.abs() + x.abs() @ fine.abs()
    assert_equal_sums(run(program, {"x": x}), x @ changed + x @ fine, magnitude, roundings=16 + 3)


@pytest.mark.parametrize("kind", NAMED)
def test_a_graph_without_products_warns(kind):
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            return x * self.w

    inputs = {"x": torch.randn(4, 4)}
    program = PROGRAMS[kind](Scale(), inputs)
    y = run(program, inputs)
    with pytest.warns(UserWarning, match=r"no layer was converted; int8fx.summary\(model\) says why"):
        assert int8fx.convert(program) is program
    assert torch.equal(run(program, inputs), y)
    assert reasons(program) == {"w": NO_PRODUCT}


def test_weights_that_are_inputs_are_not_parameters():
    program = make_fx(lambda x, w: x @ w)(torch.randn(3, 4), torch.randn(4, 5))
    with pytest.warns(UserWarning, match="no layer was converted"):
        int8fx.convert(program)


def test_a_weight_that_the_graph_and_a_module_of_it_read_is_left():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj, self.other = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.proj(x) + F.linear(x, self.proj.weight) + self.other(x)

    model, inputs = Reader(), {"x": torch.randn(2, 8)}
    program = symbolic(model, inputs)
    int8fx.convert(program)
    assert converted_names(program) == {"other"}
    assert reasons(program) == {"proj": "read by the graph and by a module that it calls"}
    run(program, inputs)


@pytest.mark.parametrize("kind", NAMED)
def test_a_weight_next_to_a_tensor_with_the_name_of_its_scale_is_left(kind):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.v = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8, 8))
            self.register_buffer("w_scale", torch.ones(8))

        def forward(self, x):
            return x @ self.w * self.w_scale + x @ self.v

    program = PROGRAMS[kind](Scaled(), {"x": torch.randn(2, 8)})
    int8fx.convert(program)
    assert converted_names(program) == {"v"}
    assert reasons(program) == {"w": "its module already has a 'w_scale'"}
    assert torch.equal(tensors(program)["w_scale"], torch.ones(8))


# ---- ties and output embeddings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["exported", "decomposed", "unlifted"])
def test_tied_weights_stay_tied_and_the_head_stays(kind):
    model, inputs = models.tied_lm()
    program = PROGRAMS[kind](model, inputs)
    int8fx.convert(program)
    assert converted_names(program) == {"up", "up_again", "down"}
    assert reasons(program) == {"lm_head": HEAD, "embed": HEAD}
    is_program = isinstance(program, ExportedProgram)
    names = (program.named_parameters, program.named_buffers) if not is_program else ()
    state = program.state_dict if is_program else {k: t for of in names for k, t in of(remove_duplicate=False)}
    assert state["up.weight_codes"] is state["up_again.weight_codes"]
    assert state["up.weight_scale"] is state["up_again.weight_scale"]
    assert state["up.weight_codes"].dtype == torch.int8
    int8fx.convert(model)
    assert torch.equal(run(program, inputs), run(model, inputs))
    if kind == "unlifted":
        program.half()._apply(torch.clone)  # what a move to another device does: new memory
        assert program.up.weight_codes is program.up_again.weight_codes
        assert program.up.weight_scale is program.up_again.weight_scale
        assert program.up.weight_scale.dtype == torch.float32


@pytest.mark.parametrize("kind", ["exported", "decomposed", "unlifted"])
@pytest.mark.parametrize("padding_idx", [None, 0])
def test_a_selected_head_takes_its_embedding_along(kind, padding_idx):
    model, inputs = models.tied_lm(padding_idx=padding_idx)
    program = PROGRAMS[kind](model, inputs)
    int8fx.convert(program, select=["lm_head", "down", "up", "up_again"])
    assert converted_names(program) == {"up", "up_again", "down", "lm_head", "embed"}
    assert count_ops(program.graph) == {"linear": 4}  # rows of the table are not read through dequantize
    assert not [n for n, t in tensors(program).items() if t.is_floating_point() and t.dim() == 2]
    int8fx.convert(model, **EVERYTHING)
    assert torch.equal(run(program, inputs), run(model, inputs))


def test_a_head_that_is_not_tied_stays_in_graphs_too():
    model, inputs = models.llama()
    program = exported(First(model), inputs)
    int8fx.convert(program)
    assert reasons(program)["model.lm_head"] == HEAD
    assert reasons(program)["model.model.embed_tokens"] == TABLE


def test_functional_embedding_in_a_symbolic_trace():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.scaled = nn.Parameter(torch.randn(10, 16)), nn.Parameter(torch.randn(10, 16))

        def forward(self, ids):
            h = F.embedding(ids, self.table) + F.embedding(ids, self.scaled, max_norm=1.0)
            return F.linear(h, self.table) + F.linear(h, self.scaled)

    model, inputs = Functional(), {"ids": torch.tensor([[1, 2, 3]])}
    program = symbolic(copy.deepcopy(model), inputs)
    with pytest.warns(UserWarning, match="no layer was converted"):
        int8fx.convert(program)
    program = symbolic(copy.deepcopy(model), inputs)
    y_float = run(program, inputs)
    int8fx.convert(program, select="table")
    assert converted_names(program) == {"table"}
    assert count_ops(program.graph) == {"linear": 1}
    assert 0 < (run(program, inputs) - y_float).norm() < 0.05 * y_float.norm()


# ---- selection, second conversions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NAMED)
def test_selection_by_the_names_that_modules_have(kind):
    model, inputs = mlp()
    program = PROGRAMS[kind](model, inputs)
    int8fx.convert(program, select=["up", "w"])
    assert converted_names(program) == {"up", "w"}
    assert reasons(program) == {"down": "not selected"}
    program = PROGRAMS[kind](mlp()[0], inputs)
    int8fx.convert(program, skip="*w*n")
    assert converted_names(program) == {"up", "w"}
    with pytest.raises(ValueError, match="select: 'upp' matches no layer of this model; close: up"):
        int8fx.convert(PROGRAMS[kind](mlp()[0], inputs), select="upp")


@pytest.mark.parametrize("kind", [*NAMED, "make_fx"])
@pytest.mark.parametrize("selection", [{}, EVERYTHING])
def test_a_second_convert_is_refused(kind, selection):
    model, inputs = mlp()
    program = PROGRAMS[kind](model, inputs)
    int8fx.convert(program, **selection)
    y, code = run(program, inputs), str(program.graph)
    for again in ({}, {"select": min(converted_names(program))}, EVERYTHING):
        with pytest.raises(ValueError, match=r"layer '.*' is already converted by int8fx; legal: float weights"):
            int8fx.convert(program, **again)
    assert str(program.graph) == code
    assert torch.equal(run(program, inputs), y)


@pytest.mark.parametrize("kind", NAMED)
def test_other_layers_can_be_converted_later(kind):
    model, inputs = mlp()
    once = PROGRAMS[kind](copy.deepcopy(model), inputs)
    int8fx.convert(once)
    program = PROGRAMS[kind](copy.deepcopy(model), inputs)
    int8fx.convert(program, select="up")
    int8fx.convert(program, skip="up")
    assert converted_names(program) == converted_names(once) == {"up", "down", "w"}
    assert torch.equal(run(program, inputs), run(once, inputs))


def test_a_graph_of_a_converted_module_is_converted_already():
    model, inputs = mlp()
    int8fx.convert(model, select=["up", "down"])
    program = exported(model, inputs)
    assert count_ops(program.graph) == {"linear": 2}
    with pytest.raises(ValueError, match=r"layer '(up|down)' is already converted by int8fx"):
        int8fx.convert(program)
    assert converted_names(program) == {"up", "down"}
    int8fx.convert(program, select="w")
    assert count_ops(program.graph) == {"linear": 3}
