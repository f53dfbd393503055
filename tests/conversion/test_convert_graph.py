"""``int8fx.convert`` of graphs: GraphModules by symbolic trace, export and make_fx, and exported programs."""

import copy
import gc
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import models
from support.helpers import activation, assert_within_budget, generator
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import int8fx
from int8fx.conversion import graph_module as convert_graph
from int8fx.conversion.packed import PackedModule
from int8fx.passes import count_ops
from int8fx.schemes.quantize import dequantize, quantize_weight

Program = GraphModule | ExportedProgram


def symbolic(model: nn.Module, inputs: dict) -> GraphModule:
    return torch.fx.symbolic_trace(model)


def exported(model: nn.Module, inputs: dict) -> ExportedProgram:
    return torch.export.export(model, (), inputs)


def decomposed(model: nn.Module, inputs: dict) -> ExportedProgram:
    return exported(model, inputs).run_decompositions()


def unlifted(model: nn.Module, inputs: dict) -> GraphModule:
    return exported(model, inputs).module()


def fx_of_aten(model: nn.Module, inputs: dict) -> GraphModule:
    graph = make_fx(lambda *args: model(**dict(zip(inputs, args, strict=True))))(*inputs.values())
    for node, name in zip(graph.graph.find_nodes(op="placeholder"), inputs, strict=True):
        node.target = name
    graph.recompile()
    return graph


PROGRAMS: dict[str, Callable[[nn.Module, dict], Program]] = {
    "symbolic": symbolic, "exported": exported, "decomposed": decomposed, "unlifted": unlifted, "make_fx": fx_of_aten,
}  # fmt: skip
GRAPH_MODULES = ["symbolic", "unlifted", "make_fx"]


def run(program: Program | nn.Module, inputs: dict) -> Any:
    with torch.no_grad():
        return (program.module() if isinstance(program, ExportedProgram) else program)(**inputs)


def graph_of(program: Program) -> torch.fx.Graph:
    return program.graph_module.graph if isinstance(program, ExportedProgram) else program.graph


def tensors(program: Program) -> dict[str, Tensor]:
    return dict(program.state_dict if isinstance(program, ExportedProgram) else program.state_dict())


def converted_names(program: Program) -> set[str]:
    return {row.name for row in int8fx.summary(program).converted}


def reasons(program: Program) -> dict[str, str]:
    return {row.name: row.reason for row in int8fx.summary(program).left}


class MLP(nn.Module):
    """Three products, the last of which is the output."""

    def __init__(self, size: int = 16) -> None:
        super().__init__()
        self.up, self.down, self.w = nn.Linear(size, 40), nn.Linear(40, size), nn.Parameter(torch.empty(size, 8))
        for i, p in enumerate(self.parameters()):
            p.data = torch.randn(p.shape, generator=generator(i)) / 4

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x))) @ self.w


def mlp(size: int = 16) -> tuple[nn.Module, dict]:
    x = activation(6, size, outliers="column")
    return MLP(size), {"x": x}


# ---- what is rewritten ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PROGRAMS)
def test_every_kind_of_product_is_an_int8_product(kind):
    model, inputs = models.bare_products()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    program = PROGRAMS[kind](model, inputs)
    assert int8fx.convert(program) is program
    counts = count_ops(graph_of(program))
    assert counts == {"linear": len(models.BareProducts.OPERANDS)}, counts
    y = run(program, inputs)
    x = inputs["x"]
    for name, layout in models.BareProducts.OPERANDS.items():
        codes, scale = quantize_weight(weights[name] if layout == "NK" else weights[name].transpose(-1, -2))
        bias = weights.get(f"{name.removesuffix('_t')}_bias")
        if name == "baddbmm":
            bias = bias.expand(codes.shape[0], -1)
        x_seen = x if codes.dim() == 3 else x.reshape(-1, x.shape[-1])
        assert_within_budget(y[name].reshape(*x_seen.shape[:-1], -1), x_seen, codes, scale, bias, 6.0)


@pytest.mark.parametrize("kind", PROGRAMS)
def test_codes_and_scales_are_buffers_and_the_floats_are_gone(kind):
    model, inputs = models.bare_products()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    program = PROGRAMS[kind](model, inputs)
    int8fx.convert(program)
    state = tensors(program)
    assert len(state) == 2 * len(models.BareProducts.OPERANDS) + 2
    assert {name for name, t in state.items() if t.is_floating_point() and not name.endswith("_scale")} <= {
        "addmm_bias", "baddbmm_bias", *(name for name, t in state.items() if kind == "make_fx" and t.dim() == 1)
    }  # fmt: skip
    if kind != "make_fx":
        for name, layout in models.BareProducts.OPERANDS.items():
            codes, scale = quantize_weight(weights[name] if layout == "NK" else weights[name].transpose(-1, -2))
            assert torch.equal(state[name], codes)
            assert torch.equal(state[f"{name}_scale"], scale)
            assert state[f"{name}_scale"].dtype == torch.float32


@pytest.mark.parametrize("kind", PROGRAMS)
def test_gives_the_bits_of_the_converted_module(kind):
    model, inputs = mlp()
    program = PROGRAMS[kind](copy.deepcopy(model), inputs)
    int8fx.convert(program)
    int8fx.convert(model)
    y = inputs["x"]
    with torch.no_grad():
        h = model.down(torch.relu(model.up(y)))
        expected = torch.ops.int8fx.linear(h, model._buffers["w"], model._buffers["w_scale"], None, 6.0)
    assert torch.equal(run(program, inputs), expected)
    if kind != "symbolic":  # there, layers are calls of packed modules
        assert count_ops(graph_of(program)) == {"linear": 3}
    else:
        assert isinstance(program.up, PackedModule)
        assert isinstance(program.up, nn.Linear)
        assert count_ops(graph_of(program)) == {"linear": 1}


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


@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, "exported") for name in SMALL), ("llama", "unlifted"), ("t5", "unlifted"), ("bert", "decomposed")],
)
def test_whole_models(name, kind):
    model, inputs = models.ALL[name](**SMALL[name])
    model = First(model)
    y_float = run(model, inputs)
    program = PROGRAMS[kind](copy.deepcopy(model), inputs)
    int8fx.convert(program)
    int8fx.convert(model)
    expected = converted_names(model)
    if kind == "decomposed":  # which takes out what the first output does not need
        expected -= {"model.pooler.dense"}
    assert converted_names(program) == expected
    counts = count_ops(graph_of(program))
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
    assert reasons(program)["gate"] == "the router of experts: left in 16 bits unless selected"
    y = run(program, inputs)
    assert 0 < (y - y_float).norm() < 0.1 * y_float.norm()


@pytest.mark.parametrize("kind", ["symbolic", "exported", "unlifted"])
@pytest.mark.parametrize("threshold", [0.0, float("inf")])
def test_the_threshold_stands_in_every_node(kind, threshold):
    model, inputs = models.bare_products()
    program = PROGRAMS[kind](model, inputs)
    int8fx.convert(program, int8fx.llm_int8(threshold))
    nodes = graph_of(program).find_nodes(op="call_function", target=torch.ops.int8fx.linear.default)
    assert len(nodes) == len(models.BareProducts.OPERANDS)
    assert {node.args[4] for node in nodes} == {threshold}


def test_dynamic_shapes():
    model, inputs = mlp()
    shapes = {"x": {0: torch.export.Dim("rows", min=1, max=64)}}
    program = torch.export.export(model, (), inputs, dynamic_shapes=shapes)
    int8fx.convert(program)
    int8fx.convert(model)
    assert count_ops(graph_of(program)) == {"linear": 3}
    for rows in (1, 5, 33):
        x = activation(rows, 16, outliers="column", seed=rows)
        with torch.no_grad():
            h = model.down(torch.relu(model.up(x)))
            expected = torch.ops.int8fx.linear(h, model._buffers["w"], model._buffers["w_scale"], None, 6.0)
        assert torch.equal(run(program, {"x": x}), expected)


@pytest.mark.parametrize("kind", ["exported", "decomposed"])
def test_export_save_and_load(kind, tmp_path):
    model, inputs = models.bare_products()
    program = PROGRAMS[kind](model, inputs)
    int8fx.convert(program)
    y = run(program, inputs)
    torch.export.save(program, tmp_path / "program.pt2")
    other = torch.export.load(tmp_path / "program.pt2")
    assert all(torch.equal(t, y[k]) for k, t in run(other, inputs).items())
    state = tensors(program)
    assert tensors(other).keys() == state.keys()
    assert all(torch.equal(t, state[k]) and t.dtype == state[k].dtype for k, t in tensors(other).items())
    assert converted_names(other) == converted_names(program)


def test_a_converted_program_can_be_decomposed_copied_and_unlifted():
    model, inputs = mlp()
    program = exported(model, inputs)
    int8fx.convert(program)
    y = run(program, inputs)
    assert torch.equal(run(program.run_decompositions(), inputs), y)
    assert torch.equal(run(copy.deepcopy(program), inputs), y)
    assert torch.equal(run(program.module(), inputs), y)
    assert count_ops(program.run_decompositions().graph_module.graph) == {"linear": 3}


class Uses(nn.Module):
    """One weight, used as ``case`` says."""

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


@pytest.mark.parametrize("kind", PROGRAMS)
@pytest.mark.parametrize("case", ["output", "outputs", "twice", "both ways", "read", "returned", "activations"])
def test_uses_of_a_weight(case, kind):
    model, inputs = Uses(case), {"x": activation(6, 16, outliers="column")}
    program = PROGRAMS[kind](copy.deepcopy(model), inputs)
    int8fx.convert(program, int8fx.llm_int8(threshold=0.0))  # exact but for the weights
    used = {"w"} if case in ("output", "twice", "returned") else {"w", "v"}
    if kind != "make_fx":
        assert converted_names(program) == used
    assert len(converted_names(program)) == len(used)
    layouts = {"w": "KN", "v": "NK" if case == "outputs" else "KN"}
    with torch.no_grad():
        for name in used:
            w = getattr(model, name).data
            w.copy_(
                dequantize(*quantize_weight(w.t())).t() if layouts[name] == "KN" else dequantize(*quantize_weight(w))
            )
    y, z = run(program, inputs), run(model, inputs)
    y, z = (t if isinstance(t, tuple) else (t,) for t in (y, z))
    assert len(y) == len(z)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(y, z, strict=True))
    linears = {"output": 1, "outputs": 3, "twice": 2, "both ways": 2, "read": 2, "returned": 1, "activations": 2}
    assert count_ops(graph_of(program))["linear"] in (linears[case], linears[case] - (case == "outputs"))


@pytest.mark.parametrize("kind", ["symbolic", "exported", "make_fx"])
def test_a_product_of_two_weights_is_right(kind):
    model, inputs = Uses("both operands"), {"x": activation(6, 16)}
    program = PROGRAMS[kind](copy.deepcopy(model), inputs)
    y_float = run(model, inputs)
    int8fx.convert(program)
    assert (run(program, inputs) - y_float).norm() < 0.1 * y_float.norm()


class Rotary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(16, 16))
        self.register_buffer("inv_freq", torch.randn(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.inv_freq + x @ self.w


@pytest.mark.parametrize("kind", PROGRAMS)
def test_buffers_are_never_packed(kind):
    inputs = {"x": torch.randn(3, 16)}
    program = PROGRAMS[kind](Rotary(), inputs)
    int8fx.convert(program)
    floats = [t for n, t in tensors(program).items() if t.is_floating_point() and t.dim() == 2]
    assert len(converted_names(program)) == 1
    if kind != "make_fx":
        assert converted_names(program) == {"w"}
        assert len(floats) == 1
    assert count_ops(graph_of(program)) == {"linear": 1}


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
    model, inputs = Written(view), {"x": torch.randn(3, 16)}
    twin = copy.deepcopy(model)
    program = PROGRAMS[kind](model, inputs)
    before = (model if kind == "make_fx" else twin).changed.detach().clone()  # make_fx runs the model
    int8fx.convert(program, int8fx.llm_int8(threshold=0.0))
    assert len(converted_names(program)) == 1
    if kind != "make_fx":
        assert converted_names(program) == {"fine"}
        in_subgraph = kind in ("exported", "unlifted")  # that of the no_grad block
        assert reasons(program)["changed"] == ("read by a subgraph" if in_subgraph else "written to by the program")
    with torch.no_grad():
        before[0 if view else slice(None)] *= 0.5
        fine = dequantize(*quantize_weight(twin.fine.detach().t())).t()
        expected = inputs["x"] @ before + inputs["x"] @ fine
    assert torch.allclose(run(program, inputs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["symbolic", "exported", "unlifted"])
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
    assert reasons(program) == {"w": "not the weight of a product"}


def test_weights_that_are_inputs_are_not_parameters():
    program = make_fx(lambda x, w: x @ w)(torch.randn(3, 4), torch.randn(4, 5))
    with pytest.warns(UserWarning, match="no layer was converted"):
        int8fx.convert(program)


# ---- ties and output embeddings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["exported", "decomposed", "unlifted"])
def test_tied_weights_stay_tied_and_the_head_stays(kind):
    model, inputs = models.tied_lm()
    program = PROGRAMS[kind](model, inputs)
    int8fx.convert(program)
    assert converted_names(program) == {"up", "up_again", "down"}
    head = "the output embeddings: left in 16 bits unless selected"
    assert reasons(program) == {"lm_head": head, "embed": head}
    state = (
        program.state_dict
        if isinstance(program, ExportedProgram)
        else dict(program.named_buffers(remove_duplicate=False))
    )
    assert state["up.weight"] is state["up_again.weight"]
    assert state["up.weight_scale"] is state["up_again.weight_scale"]
    assert state["up.weight"].dtype == torch.int8
    int8fx.convert(model)
    assert torch.equal(run(program, inputs), run(model, inputs))
    if kind == "unlifted":
        program.half()._apply(torch.clone)  # what a move to another device does: new memory
        assert program.up.weight is program.up_again.weight
        assert program.up.weight_scale is program.up_again.weight_scale
        assert program.up.weight_scale.dtype == torch.float32


@pytest.mark.parametrize("kind", ["exported", "decomposed", "unlifted"])
@pytest.mark.parametrize("padding_idx", [None, 0])
def test_a_selected_head_takes_its_embedding_along(kind, padding_idx):
    model, inputs = models.tied_lm(padding_idx=padding_idx)
    program = PROGRAMS[kind](model, inputs)
    int8fx.convert(program, select=["lm_head", "down", "up", "up_again"])
    assert converted_names(program) == {"up", "up_again", "down", "lm_head", "embed"}
    assert count_ops(graph_of(program)) == {"linear": 4}  # rows of the table are not read through dequantize
    floats = [n for n, t in tensors(program).items() if t.is_floating_point() and t.dim() == 2]
    assert not floats
    int8fx.convert(model, select=lambda name, module: True)
    assert torch.equal(run(program, inputs), run(model, inputs))


def test_a_head_that_is_not_tied_stays_in_graphs_too():
    model, inputs = models.llama()
    program = exported(First(model), inputs)
    int8fx.convert(program)
    assert reasons(program)["model.lm_head"] == "the output embeddings: left in 16 bits unless selected"
    assert reasons(program)["model.model.embed_tokens"] == "an embedding: a table of rows, not a product"


def test_functional_embedding_in_a_symbolic_trace():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(10, 16))
            self.scaled = nn.Parameter(torch.randn(10, 16))

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
    assert count_ops(graph_of(program)) == {"linear": 1}
    assert (run(program, inputs) - y_float).norm() < 0.05 * y_float.norm()


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


# ---- selection, refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["symbolic", "exported", "unlifted"])
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


@pytest.mark.parametrize("kind", ["symbolic", "exported", "unlifted", "make_fx"])
@pytest.mark.parametrize("select", [None, "all"])
def test_a_second_convert_is_refused(kind, select):
    model, inputs = mlp()
    program = PROGRAMS[kind](model, inputs)
    int8fx.convert(program, select=None if select is None else lambda name, module: True)
    y, code = run(program, inputs), str(graph_of(program))
    first = min(converted_names(program))
    for again in ({}, {"select": first}, {"select": lambda name, module: True}):
        with pytest.raises(ValueError, match=r"layer '.*' is already converted by int8fx; legal: float weights"):
            int8fx.convert(program, **again)
    assert str(graph_of(program)) == code
    assert torch.equal(run(program, inputs), y)


@pytest.mark.parametrize("kind", ["symbolic", "exported", "unlifted"])
def test_the_rest_can_be_converted_later(kind):
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
    assert count_ops(program.graph_module.graph) == {"linear": 2}
    with pytest.raises(ValueError, match=r"layer '(up|down)' is already converted by int8fx"):
        int8fx.convert(program)
    assert converted_names(program) == {"up", "down"}
    int8fx.convert(program, select="w")
    assert count_ops(program.graph_module.graph) == {"linear": 3}


@pytest.mark.parametrize("kind", ["symbolic", "exported", "unlifted"])
@pytest.mark.parametrize(("weight", "message"), [(float("nan"), "has NaN or inf in its weight"), (None, "K = 133145")])
def test_illegal_weights_are_refused_by_name_and_the_graph_is_left(kind, weight, message):
    class Bad(nn.Module):
        def __init__(self):
            super().__init__()
            self.fine = nn.Parameter(torch.randn(1, 4))
            self.bad = nn.Parameter(torch.zeros(1, 133_145) if weight is None else torch.full((1, 4), weight))

        def forward(self, x, z):
            return F.linear(x, self.fine) + F.linear(z, self.bad)

    model = Bad()
    inputs = {"x": torch.randn(2, 4), "z": torch.randn(2, model.bad.shape[1])}
    program = PROGRAMS[kind](model, inputs)
    code, state = str(graph_of(program)), tensors(program)
    with pytest.raises(ValueError, match=f"layer 'bad' .*{message}"):
        int8fx.convert(program)
    assert str(graph_of(program)) == code
    assert all(torch.equal(t, state[k]) or weight is not None for k, t in tensors(program).items())
    assert not converted_names(program)
    int8fx.convert(program, skip="bad")
    assert converted_names(program) == {"fine"}


@pytest.mark.parametrize("kind", ["symbolic", "exported", "unlifted"])
def test_a_weight_beside_a_tensor_with_the_name_of_its_scale_is_left(kind):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.v = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8, 8))
            self.register_buffer("w_scale", torch.ones(8))

        def forward(self, x):
            return x @ self.w * self.w_scale + x @ self.v

    inputs = {"x": torch.randn(2, 8)}
    program = PROGRAMS[kind](Scaled(), inputs)
    int8fx.convert(program)
    assert converted_names(program) == {"v"}
    assert reasons(program) == {"w": "its module has a 'w_scale' of its own"}
    assert torch.equal(tensors(program)["w_scale"], torch.ones(8))


# ---- interruptions and memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["symbolic", "exported", "make_fx"])
@pytest.mark.parametrize("where", ["Pack", "lower"])
def test_an_interrupted_convert_leaves_a_graph_that_runs(kind, where, monkeypatch):
    model, inputs = models.bare_products()
    y_float = run(model, inputs)
    owner, name = (convert_graph.Pack, "__call__") if where == "Pack" else (convert_graph, "lower")
    for k in (0, 7) if where == "Pack" else (0,):
        program = PROGRAMS[kind](copy.deepcopy(model), inputs)
        real, calls = getattr(owner, name), 0

        def interrupted(*args, real=real, k=k):
            nonlocal calls
            calls += 1
            if calls == k + 1:
                raise KeyboardInterrupt
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                int8fx.convert(program)
        done = converted_names(program)
        assert len(done) == (k if where == "Pack" else len(models.BareProducts.OPERANDS))
        y = run(program, inputs)
        assert all((y[n] - t).norm() < 0.05 * t.norm() for n, t in y_float.items())
        if where == "Pack":
            assert any(torch.equal(y[n], t) for n, t in y_float.items())
            int8fx.convert(program, select=lambda name, module, done=done: name not in done)
            assert len(converted_names(program)) == len(models.BareProducts.OPERANDS)
            assert count_ops(graph_of(program)) == {"linear": len(models.BareProducts.OPERANDS)}
            y = run(program, inputs)
            assert all(0 < (y[n] - t).norm() < 0.05 * t.norm() for n, t in y_float.items())


class Stack(nn.Module):
    def __init__(self, layers: int, size: int) -> None:
        super().__init__()
        self.w = nn.ParameterList([torch.randn(size, size) for _ in range(layers)])

    def forward(self, x: Tensor) -> Tensor:
        for w in self.w:
            x = x @ w
        return x


@pytest.mark.parametrize("kind", ["symbolic", "exported", "unlifted"])
def test_float_weights_go_one_by_one(kind, monkeypatch):
    import weakref

    model = Stack(5, 256)
    program = PROGRAMS[kind](model, {"x": torch.randn(2, 256)})
    weights = [weakref.ref(p.untyped_storage()) for p in model.parameters()]
    del model
    gc.collect()
    assert all(w() is not None for w in weights)
    alive, real = [], convert_graph.Pack.__call__

    def count(self, tied):
        alive.append(sum(w() is not None for w in weights))
        return real(self, tied)

    monkeypatch.setattr(convert_graph.Pack, "__call__", count)
    gc.disable()
    try:
        int8fx.convert(program)
        alive.append(sum(w() is not None for w in weights))
    finally:
        gc.enable()
    assert alive == [5, 4, 3, 2, 1, 0]


# ---- what torch does to a converted GraphModule ---------------------------------------------------------------------


def copies(program: GraphModule, how: str) -> GraphModule:
    if how == "deepcopy":
        return copy.deepcopy(program)
    if how == "pickle":
        return pickle.loads(pickle.dumps(program))
    saved = io.BytesIO()
    torch.save(program, saved)
    saved.seek(0)
    return torch.load(saved, weights_only=False)


def scales(program: GraphModule) -> dict[str, Tensor]:
    return {n: b.clone() for n, b in program.named_buffers() if n.endswith("_scale")}


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        (kind, how)
        for kind in GRAPH_MODULES
        for how in ("deepcopy", "pickle", "torch.save")
        if kind != "unlifted" or how == "deepcopy"
    ],
)  # torch cannot pickle a module that export made
def test_copies_and_what_they_are_cast_to(kind, how):
    model, inputs = mlp()
    program = PROGRAMS[kind](model, inputs)
    int8fx.convert(program)
    y, expected = run(program, inputs), scales(program)
    other = copies(program, how)
    assert torch.equal(run(other, inputs), y)
    assert converted_names(other) == converted_names(program)
    for model in (copies(other, how), other, program):
        model.half()
        found = scales(model)
        assert found.keys() == expected.keys()
        assert all(t.dtype == torch.float32 and torch.equal(t, expected[n]) for n, t in found.items())
        z = run(model, {"x": inputs["x"].half()})
        assert z.dtype == torch.float16
        assert (z.float() - y).norm() < 0.01 * y.norm()
        with pytest.raises(ValueError, match="already converted"):
            int8fx.convert(model)


@pytest.mark.parametrize("kind", GRAPH_MODULES)
@pytest.mark.parametrize("cast", ["bfloat16", "double", "share_memory", "meta", "type"])
def test_casts_leave_codes_and_scales(kind, cast):
    model, inputs = mlp()
    program = PROGRAMS[kind](model, inputs)
    int8fx.convert(program)
    y, expected = run(program, inputs), {n: t.clone() for n, t in program.named_buffers()}
    if cast == "meta":
        program.to("meta")
        assert {t.device.type for t in program.buffers()} == {"meta"}
        program.to_empty(device="cpu")
        program.load_state_dict(
            {**{n: p for n, p in model.state_dict().items() if n.endswith("bias")}, **expected}, strict=False
        )
        assert {n: t.dtype for n, t in program.named_buffers()} == {n: t.dtype for n, t in expected.items()}
        return
    program.type(torch.float64) if cast == "type" else getattr(program, cast)()
    found = dict(program.named_buffers())
    assert all(found[n].dtype == t.dtype and torch.equal(found[n], t) for n, t in expected.items())
    dtype = {"bfloat16": torch.bfloat16, "share_memory": torch.float32}.get(cast, torch.float64)
    z = run(program, {"x": inputs["x"].to(dtype)})
    assert z.dtype == dtype
    assert (z.double() - y.double()).norm() < 0.05 * y.double().norm()


@pytest.mark.parametrize("kind", GRAPH_MODULES)
@pytest.mark.parametrize("strict", [True, False])
def test_state_dicts(kind, strict):
    model, inputs = mlp()
    program = PROGRAMS[kind](copy.deepcopy(model), inputs)
    floats = program.state_dict()
    floats = {n: t.clone() for n, t in floats.items()}
    int8fx.convert(program)
    y, state = run(program, inputs), {n: t.clone() for n, t in program.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"is packed and takes int8 codes, found torch\.float32"):
        program.load_state_dict(floats, strict=strict)
    assert all(torch.equal(t, state[n]) for n, t in program.state_dict().items())
    assert torch.equal(run(program, inputs), y)
    for p in model.parameters():
        p.data.mul_(-1)
    other = PROGRAMS[kind](model, inputs)
    int8fx.convert(other)
    assert not torch.equal(run(other, inputs), y)
    other.load_state_dict(state)
    assert torch.equal(run(other, inputs), y)
    other.load_state_dict(torch.load(_saved(state), weights_only=True), assign=True)
    assert torch.equal(run(other, inputs), y)


def _saved(state: dict) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("kind", GRAPH_MODULES)
def test_the_graph_module_itself_stays(kind):
    model, inputs = mlp()
    program = PROGRAMS[kind](model, inputs)
    cls, graph = type(program), program.graph
    bases = cls.__mro__[1:]
    program.note = "kept"
    assert int8fx.convert(program) is program
    assert program.graph is graph
    assert program.note == "kept"
    assert all(isinstance(program, base) for base in bases)
    assert type(program).__name__ == cls.__name__
    program.graph.lint()
    assert "int8fx.linear" in program.code


@pytest.mark.parametrize("kind", ["symbolic", "unlifted"])
def test_gradients_flow_through_a_converted_graph(kind):
    model, inputs = mlp()
    program = PROGRAMS[kind](model, inputs)
    int8fx.convert(program)
    x = inputs["x"].clone().requires_grad_()
    program(x=x).sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad.abs().sum() > 0
    assert all(p.grad is not None for p in program.parameters())
