"""Which weights of a model are converted, which are not and why, and how tied weights stay tied."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from support import models
from support.conversion import (
    EVERYTHING,
    SCHEMES,
    as_reference,
    assert_left_as_it_was,
    close,
    codes_of,
    converted_names,
    dequantised_twin,
    dequantized_in,
    equal,
    int8_weight,
    outputs,
    reasons,
    run,
    snapshot,
    tensors,
)
from support.helpers import DTYPES, activation, assert_within_budget
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import int8fx
from int8fx.conversion.layers import HEAD, ROUTER, Layer, layer_name
from int8fx.conversion.packed import PackedModule
from int8fx.conversion.recipes import NO_PRODUCT, UNREAD, Recipe
from int8fx.conversion.usage import MIXED
from int8fx.graph.count import count_ops
from int8fx.schemes.quantize import dequantize, quantize_weight
from int8fx.schemes.weight import COLUMNS, COLUMNS_WEIGHT, Epilogue


class Bare(nn.Module):
    """Parameters ``names [8, 8]``, used as ``forward`` says."""

    def __init__(self, *names: str, forward) -> None:
        super().__init__()
        for name in names:
            setattr(self, name, nn.Parameter(torch.randn(8, 8)))
        self.__class__ = type("Bare", (Bare,), {"forward": forward})


@pytest.mark.parametrize(
    ("full_name", "name"),
    [("lm_head.weight", "lm_head"), ("weight", "weight"), ("weight.weight", "weight"), ("a.b.w", "a.b.w"), ("w", "w")],
)
def test_names(full_name, name):
    layer = Layer(full_name, nn.Module(), Recipe())
    assert (layer.name, layer_name(full_name)) == (name, name)
    assert layer.parameter == full_name.rpartition(".")[2]


# ---- what is converted ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_linear_and_conv1d(scheme, kind, bias, dtype):
    scheme = SCHEMES[scheme]
    module = Conv1D(24, 60).to(dtype) if kind is Conv1D else nn.Linear(60, 24, bias=bias, dtype=dtype)
    if module.bias is not None:
        nn.init.normal_(module.bias)
    x, weight = activation(9, 60, outliers="column", dtype=dtype), module.weight.detach()
    calibration = int8fx.calibrate(module, [x])
    int8fx.convert(module, scheme, calibration=calibration)
    count = scheme.static_columns(60)
    columns = x.abs().amax(0).float().topk(count).indices.sort().values if count else None
    expected = int8_weight(weight.t() if kind is Conv1D else weight, scheme, columns)
    assert all(map(torch.equal, codes_of(module), expected[:2]))
    assert (columns is None) == ("weight" + COLUMNS not in module._buffers)
    if columns is not None:
        assert x.abs().amax(0).argmax() in columns
        assert torch.equal(module._buffers["weight" + COLUMNS], columns)
        assert torch.equal(module._buffers["weight" + COLUMNS_WEIGHT], expected.columns_weight)
        assert module._buffers["weight" + COLUMNS_WEIGHT].dtype == dtype
    w = dequantize(expected, dtype)
    assert torch.equal(module.weight, w.t() if kind is Conv1D else w)
    epilogue = Epilogue(None if module.bias is None else module.bias.detach())
    for lead in ((), (5,), (9,), (2, 0), (2, 3)):
        rows = x[: int(torch.tensor(lead).prod())].reshape(*lead, 60)
        assert_within_budget(module(rows).detach(), rows, expected, epilogue)


@pytest.mark.parametrize(("K", "N"), [(0, 8), (8, 0), (0, 0), (1, 1)])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_zero_size(K, N):
    module = nn.Linear(K, N)
    y = module(torch.randn(3, K))
    int8fx.convert(module)
    assert isinstance(module, PackedModule)
    z = module(torch.randn(3, K))
    assert z.shape == y.shape
    if K == 0:
        assert torch.equal(z, module.bias.expand(3, N))


def test_a_subclass_with_a_forward_of_its_own_runs_it():
    class Scaled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    class Matmul(nn.Linear):
        def forward(self, x):
            return torch.matmul(x, self.weight.t()) - 1

    for cls in (Scaled, Matmul):
        module = cls(16, 8, bias=cls is Scaled)
        x, fill = torch.randn(3, 16), dequantised_twin(module)
        int8fx.convert(module, int8fx.weight_only())
        assert isinstance(module, PackedModule)
        assert isinstance(module, cls)
        assert close(module(x), fill(module)(x))
        assert dequantized_in(lambda module=module, x=x: module(x)) == 0


def test_a_weight_read_by_another_module():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.other = nn.ModuleDict({"proj": nn.Linear(16, 8)})

        def forward(self, x):
            return F.linear(x, self.other["proj"].weight), self.other["proj"](x)

    model, x = Reader(), torch.randn(3, 16)
    proj, expected = model.other["proj"], int8_weight(model.other["proj"].weight, SCHEMES["llm_int8"])
    int8fx.convert(model)
    assert torch.equal(codes_of(proj)[0], expected.codes)
    read, y = model(x)
    assert close(read, y - proj.bias)
    assert_within_budget(y.detach(), x, expected, Epilogue(proj.bias.detach()))


def test_each_bare_product_is_the_one_with_the_dequantised_weight():
    model, inputs = models.bare_products()
    scheme = int8fx.weight_only()
    twin = as_reference(copy.deepcopy(model), set(models.BareProducts.OPERANDS), scheme)
    int8fx.convert(model, scheme)
    assert dequantized_in(lambda: outputs(model, inputs)) == 0
    y, z = outputs(model, inputs), outputs(twin, inputs)
    assert set(y) == set(models.BareProducts.OPERANDS)
    for name, layout in models.BareProducts.OPERANDS.items():
        assert model.packed_weights[name].layout == layout, name
        assert close(y[name], z[name]), name


# ---- what is left ---------------------------------------------------------------------------------------------------


def test_a_subclass_that_uses_its_weight_otherwise_is_left():
    class Square(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight**2)

    module = nn.Sequential(Square(8, 8), nn.Linear(8, 8))
    int8fx.convert(module)
    assert converted_names(module) == {"1"}
    assert reasons(module) == {"0": NO_PRODUCT}


def test_modules_that_are_no_products_are_listed_and_run():
    model = nn.ModuleDict({
        "bilinear": nn.Bilinear(4, 4, 4), "lstm": nn.LSTM(4, 4), "gru": nn.GRUCell(4, 4),
        "bag": nn.EmbeddingBag(4, 4), "deconv": nn.ConvTranspose1d(4, 4, 1),
        "list": nn.ParameterList([torch.randn(4, 4)]), "linear": nn.Linear(4, 4),
    })  # fmt: skip
    x = torch.randn(2, 4)

    def results() -> list[Tensor]:
        return [model["bilinear"](x, x), model["lstm"](x)[0], model["gru"](x), model["deconv"](x[..., None])]

    y = results()
    int8fx.convert(model)
    assert converted_names(model) == {"linear"}
    left = reasons(model)
    assert set(left) == {
        "bilinear", "lstm.weight_ih_l0", "lstm.weight_hh_l0", "gru.weight_ih", "gru.weight_hh", "bag", "deconv",
        "list.0",
    }  # fmt: skip
    assert all(left.values())
    assert all(map(torch.equal, y, results()))


PARAMETRISED = {
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "old weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.parametrizations.spectral_norm,
    "orthogonal": nn.utils.parametrizations.orthogonal,
    "pruned": lambda m: nn.utils.prune.l1_unstructured(m, "weight", 0.5) and m,
    "old spectral_norm": nn.utils.spectral_norm,
}


@pytest.mark.parametrize("how", PARAMETRISED)
def test_parametrised_and_pruned_layers_are_left_and_run(how):
    with pytest.warns() if how == "old weight_norm" else nullcontext():
        model = nn.Sequential(PARAMETRISED[how](nn.Linear(8, 8)), nn.Linear(8, 8)).eval()
    x = torch.randn(3, 8)
    y = model[0](x)
    int8fx.convert(model)
    assert converted_names(model) == {"1"}
    assert torch.equal(model[0](x), y)
    if how == "pruned":
        nn.utils.prune.remove(model[0], "weight")
        assert torch.equal(model[0](x), y)


def test_lazy_layers_are_refused_until_they_have_run():
    model = nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 8))
    before = snapshot(model)
    with pytest.raises(ValueError, match="layer '0' has no weight yet; run the model once before converting"):
        int8fx.convert(model)
    assert_left_as_it_was(model, before)
    model(torch.randn(2, 4))
    int8fx.convert(model)
    assert converted_names(model) == {"0", "1"}


def test_parameters_used_both_ways_round_or_changed_in_place_are_left():
    def forward(self, x):
        self.changed.mul_(0.5)
        self.view_changed[0].mul_(0.5)
        return F.linear(x, self.both) + x @ self.both + x @ self.changed + x @ self.view_changed + x @ self.fine

    model, x = Bare("both", "changed", "view_changed", "fine", forward=forward), torch.randn(3, 8)
    fill = dequantised_twin(model)
    int8fx.convert(model, int8fx.weight_only())
    assert converted_names(model) == {"fine"}
    assert reasons(model)["both"] == MIXED
    twin = fill(model)
    with torch.no_grad():
        assert close(model(x), twin(x))
        assert torch.equal(model.changed, twin.changed)


FORWARDS = {
    "both ways": (lambda self, x: F.linear(torch.relu(x @ self.w), self.w) + x @ self.v, {"v": "KN"}),
    "both ways, linear first": (lambda self, x: torch.relu(F.linear(x, self.w)) @ self.w + x @ self.v, {"v": "KN"}),
    "twice": (lambda self, x: torch.relu(x @ self.w) @ self.w + F.linear(x, self.v), {"w": "KN", "v": "NK"}),
    "a transposed view": (lambda self, x: x @ self.w.t() + F.linear(x, self.w) + x @ self.v, {"w": "NK", "v": "KN"}),
    "read as well": (lambda self, x: x @ self.w + self.w.sum() + x @ self.v, {"w": "KN", "v": "KN"}),
}


@pytest.mark.parametrize("case", FORWARDS)
@pytest.mark.parametrize("kind", ["symbolic", "exported"])
def test_a_module_and_its_graph_are_converted_to_the_same(case, kind):
    """One rule says which way round a bare weight is used, before and after it is traced or exported."""
    forward, layouts = FORWARDS[case]
    model, x = Bare("w", "v", forward=forward), activation(6, 8, outliers="column")
    if kind == "symbolic":
        program = torch.fx.symbolic_trace(copy.deepcopy(model))
    else:
        program = torch.export.export(copy.deepcopy(model), (x,))
    int8fx.convert(program)
    int8fx.convert(model)
    assert {name: reading.layout for name, reading in model.packed_weights.items()} == layouts
    assert converted_names(program) == converted_names(model) == set(layouts)
    assert reasons(program) == reasons(model) == {name: MIXED for name in ("w", "v") if name not in layouts}
    assert equal(tensors(program), tensors(model))


def test_modules_that_use_the_names_of_packed_ones_are_left():
    class OwnScale(nn.Linear):
        def __init__(self):
            super().__init__(8, 8)
            self.register_buffer("weight_scale", torch.ones(8))

    codebook = Bare("codes", forward=lambda self, x: F.linear(x, self.codes) + self.dequantize(0))
    type(codebook).dequantize = lambda self, ids: self.codes[ids]
    model = nn.ModuleDict({"scale": OwnScale(), "codebook": codebook, "linear": nn.Linear(8, 8)})
    x = torch.randn(3, 8)
    y = [model["scale"](x), model["codebook"](x)]
    int8fx.convert(model)
    assert converted_names(model) == {"linear"}
    assert reasons(model) == {
        "scale": "its module already has a 'weight_scale'",
        "codebook.codes": "its module already has a 'dequantize'",
    }
    assert all(map(torch.equal, y, [model["scale"](x), model["codebook"](x)]))


def test_buffers_are_never_packed():
    model = Bare("w", forward=lambda self, x: x @ self.inv_freq + x @ self.w)
    model.register_buffer("inv_freq", torch.randn(8, 8))
    assert converted_names(int8fx.convert(model)) == {"w"}
    assert model.inv_freq.dtype == torch.float32


def test_a_forward_that_cannot_be_traced_is_left():
    model = Bare("w", forward=lambda self, x: x @ self.w * len(x))
    with pytest.warns(UserWarning, match="no layer was converted"):
        int8fx.convert(model)
    assert "its use cannot be determined: forward cannot be traced" in reasons(model)["w"]


def test_a_parameter_that_another_module_multiplies_by_is_left():
    """As in DBRX, whose experts read the Parameters of a module that they hold."""

    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.holder, self.proj = Bare("w", forward=lambda self, x, w: x @ w), nn.Linear(8, 8)

        def forward(self, x):
            return self.holder(self.proj(x), self.holder.w)

    model, x = Reader(), torch.randn(3, 8)
    int8fx.convert(model)
    assert reasons(model) == {"holder.w": UNREAD}
    assert model(x).shape == (3, 8)


@pytest.mark.parametrize(("name", "router"), [("mixtral", "mlp.gate"), ("gpt_oss", "mlp.router")])
def test_routers_stay_unless_selected(name, router):
    model, _ = models.ALL[name]()
    int8fx.convert(model)
    assert reasons(model)[f"model.layers.0.{router}"] == ROUTER
    model, inputs = models.ALL[name]()
    y_float = outputs(model, inputs)["logits"]
    int8fx.convert(model, select=router)
    assert converted_names(model) == {f"model.layers.{i}.{router}" for i in (0, 1)}
    assert outputs(model, inputs)["logits"].sub(y_float).norm() > 0


def test_a_1x1_convolution_is_no_set_of_experts():
    """Its weight has three dimensions too: linear layers with as many outputs as it has are no routers."""
    model = nn.ModuleDict({"block": nn.ModuleDict({"up": nn.Linear(8, 16)})})
    model["block"]["convolution"] = nn.ModuleDict({"pointwise": nn.Conv1d(8, 16, 1)})
    int8fx.convert(model)
    assert converted_names(model) == {"block.up"}


def test_a_router_that_is_a_linear_layer_stays_too():
    block = nn.ModuleDict({"router": nn.Linear(8, 4), "out": nn.Linear(8, 8)})
    block["experts"] = Bare(forward=lambda self, x: torch.einsum("emk,enk->emn", x, self.w))
    block["experts"].w = nn.Parameter(torch.randn(4, 8, 8))
    model = nn.ModuleDict({"block": block})
    int8fx.convert(model)
    assert converted_names(model) == {"block.experts.w", "block.out"}
    assert reasons(model)["block.router"] == ROUTER


# ---- tied weights, embeddings ---------------------------------------------------------------------------------------


def test_linear_layers_share_codes():
    model, _ = models.tied_lm()
    int8fx.convert(model)
    assert converted_names(model) == {"up", "up_again", "down"}
    assert all(a is b for a, b in zip(codes_of(model.up), codes_of(model.up_again), strict=True))
    assert model.lm_head.weight is model.embed.weight
    assert reasons(model)["lm_head"] == HEAD


@pytest.mark.parametrize("padding_idx", [None, 0, 5])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_selected_head_takes_its_embedding_along(scheme, padding_idx):
    model, inputs = models.tied_lm(padding_idx=padding_idx)
    table, x, ids = model.embed.weight.detach(), torch.randn(9, 64), inputs["ids"]
    graph = torch.export.export(copy.deepcopy(model), (), inputs)
    int8fx.convert(model, SCHEMES[scheme], **EVERYTHING)
    assert {"embed", "lm_head"} <= converted_names(model)
    assert all(a is b for a, b in zip(codes_of(model.embed), codes_of(model.lm_head), strict=True))
    assert isinstance(model.embed, nn.Embedding)
    expected = int8_weight(table, SCHEMES[scheme], model.embed._buffers.get("weight" + COLUMNS))
    assert torch.equal(model.embed(ids), dequantize(expected)[ids])
    assert torch.equal(model.embed.weight, dequantize(expected))
    if padding_idx is not None:
        assert torch.equal(model.embed(torch.tensor(padding_idx)), torch.zeros(64))
    assert_within_budget(model.lm_head(x), x, expected)
    int8fx.convert(graph, SCHEMES[scheme], **EVERYTHING)
    assert count_ops(graph.graph)["linear"] == 4
    assert torch.equal(run(graph, inputs), run(model, inputs))


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_heads_of_transformers_models(name):
    model, inputs = models.ALL[name](tie_word_embeddings=True)
    y_float = outputs(model, inputs)["logits"]
    int8fx.convert(model, select="lm_head")
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert codes_of(embedding)[0] is codes_of(head)[0]
    assert {"lm_head"} < converted_names(model)
    y = outputs(model, inputs)["logits"]
    assert 0 < (y - y_float).norm() < 0.25 * y_float.norm()


def test_a_subset_of_tied_layers_is_left():
    model, _ = models.tied_lm()
    with pytest.warns(UserWarning, match="no layer was converted"):
        int8fx.convert(model, select="up")
    assert reasons(model)["up"] == "tied to up_again, which is not converted"
    assert model.up.weight is model.up_again.weight
    int8fx.convert(model, skip="up")
    assert converted_names(model) == {"down"}
    assert reasons(model)["up_again"] == "tied to up, which is not converted"


def test_layers_that_read_a_shared_weight_differently_are_left():
    model = nn.ModuleDict({"linear": nn.Linear(8, 8), "conv1d": Conv1D(8, 8), "other": nn.Linear(8, 8)})
    model["conv1d"].weight = model["linear"].weight
    int8fx.convert(model)
    assert converted_names(model) == {"other"}
    assert model["conv1d"].weight is model["linear"].weight
    assert reasons(model)["linear"] == "its weight is shared with conv1d, which uses it transposed"
    assert reasons(model)["conv1d"] == "its weight is shared with linear, which uses it transposed"


def _scaled(model: nn.Module) -> dict:
    class Scaled(nn.Embedding):  # as in Gemma
        def forward(self, ids):
            return super().forward(ids) * 8

    scaled = Scaled(96, 64, padding_idx=0)
    scaled.weight = model.lm_head.weight
    model.embed = scaled
    return {}


UNFIT_EMBEDDINGS = {
    "a forward of its own": _scaled,
    "max_norm, by which it changes its table": lambda model: setattr(model.embed, "max_norm", 1e9) or {},
    "skipped": lambda model: {"skip": "embed"},
}


@pytest.mark.parametrize("what", UNFIT_EMBEDDINGS)
def test_an_embedding_that_stays_keeps_its_head(what):
    model, inputs = models.tied_lm()
    arguments = UNFIT_EMBEDDINGS[what](model)
    y = outputs(model, inputs)
    with pytest.warns(UserWarning, match="no layer was converted"):
        int8fx.convert(model, select="lm_head", **arguments)
    assert reasons(model)["lm_head"] == "tied to embed, which is not converted"
    assert equal(outputs(model, inputs), y)
    assert model.lm_head.weight is model.embed.weight


def test_a_head_that_is_not_tied():
    model, _ = models.llama()
    x = torch.randn(3, 64)
    int8fx.convert(model, select="lm_head")
    assert converted_names(model) == {"lm_head"}
    assert_within_budget(model.lm_head(x), x, model.lm_head.packed())


def test_heads_of_any_name_and_depth_stay():
    from transformers import RobertaConfig, RobertaForMaskedLM

    config = RobertaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    inner = RobertaForMaskedLM(config)
    assert inner.lm_head.decoder.weight is not inner.get_input_embeddings().weight
    wrapped = nn.ModuleDict({"inner": nn.ModuleDict({"lm": copy.deepcopy(inner)})})
    for model, prefix in ((inner, ""), (wrapped, "inner.lm.")):
        int8fx.convert(model)
        assert reasons(model)[f"{prefix}lm_head.decoder"] == HEAD
        assert f"{prefix}lm_head.dense" in converted_names(model)


def test_one_parameter_under_two_names_of_a_module():
    model = Bare("a", forward=lambda self, x: x @ self.a + x @ self.b)
    model.b = model.a
    weight = model.a.detach()
    fill = dequantised_twin(model)
    int8fx.convert(model, int8fx.weight_only())
    assert converted_names(model) == {"a", "b"}
    assert model.a_codes is model.b_codes
    assert torch.equal(model.a_codes, quantize_weight(weight.t())[0])
    x = torch.randn(2, 8)
    assert close(model(x), fill(model)(x))
