"""``int8fx.convert`` of modules: what it covers, leaves and refuses, and that nothing is ever half done."""

import copy
import gc
import importlib
import threading
import weakref
from collections.abc import Callable
from contextlib import contextmanager, nullcontext

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from support import models
from support.helpers import DTYPES, activation, assert_within_budget, generator, kernels_linear
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

import int8fx
from int8fx.conversion.packed import PackedModule
from int8fx.schemes.quantize import MAX_K, dequantize, quantize_weight

EVERYTHING = {"select": lambda name, module: True}


@contextmanager
def no_fast_path():
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def outputs(model: nn.Module, inputs: dict) -> dict[str, Tensor]:
    """The float outputs of ``model``, by name, without torch's fused attention, which calls no submodule."""
    with torch.no_grad(), no_fast_path():
        y = model(**inputs)
    if isinstance(y, Tensor):
        return {"y": y}
    if isinstance(y, (tuple, list)):
        return {str(i): t for i, t in enumerate(y) if isinstance(t, Tensor)}
    return {k: t for k, t in y.items() if isinstance(t, Tensor) and t.is_floating_point()}


def converted_names(model: nn.Module) -> set[str]:
    return {row.name for row in int8fx.summary(model).converted}


def reasons(model: nn.Module) -> dict[str, str]:
    return {row.name: row.reason for row in int8fx.summary(model).left}


def codes_of(module: nn.Module, name: str = "weight") -> tuple[Tensor, Tensor]:
    return module._buffers[name], module._buffers[name + "_scale"]


def snapshot(model: nn.Module) -> dict:
    """All that a failed conversion must leave: classes, tensors (the same ones), attributes."""
    return {
        name: (type(m), dict(m._parameters), dict(m._buffers), {k: v for k, v in vars(m).items() if k[0] != "_"})
        for name, m in model.named_modules()
    }


def assert_left_as_it_was(model: nn.Module, before: dict) -> None:
    after = snapshot(model)
    assert after.keys() == before.keys()
    for name, (cls, parameters, buffers, attributes) in before.items():
        assert after[name][0] is cls
        for old, new in ((parameters, after[name][1]), (buffers, after[name][2])):
            assert old.keys() == new.keys()
            assert all(new[k] is v for k, v in old.items())
        assert after[name][3].keys() == attributes.keys()
        assert all(after[name][3][k] is v or after[name][3][k] == v for k, v in attributes.items() if k != "training")


# ---- the reference model: made from the float model with `reference.linear`, without anything of the recipes --------


def reference_linear(module: nn.Module, weight: Tensor, bias: Tensor | None, threshold: float) -> Callable:
    codes, scale = quantize_weight(weight.detach())
    return lambda x: kernels_linear(x, codes, scale, bias, threshold)


def reference_experts(module: nn.Module, threshold: float) -> Callable:
    """Experts one by one, token by token: the definition."""
    names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    packed = {}
    for name in names:
        w = getattr(module, name).detach()
        packed[name] = quantize_weight(w.transpose(1, 2) if module.is_transposed else w)

    def product(x: Tensor, name: str, e: int) -> Tensor:
        bias = getattr(module, name + "_bias")[e] if module.has_bias else None
        return kernels_linear(x, packed[name][0][e], packed[name][1][e], bias, threshold)

    def forward(hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        y = torch.zeros_like(hidden)
        for e in range(module.num_experts):
            token, position = torch.where(index == e)
            if len(token):
                h = product(hidden[token], names[0], e)
                h = product(module._apply_gate(h) if module.has_gate else module.act_fn(h), "down_proj", e)
                y.index_add_(0, token, (h * weights[token, position, None]).to(y.dtype))
        return y

    return forward


def as_reference(model: nn.Module, names: set[str], threshold: float = 6.0) -> nn.Module:
    """The float ``model`` with its layers ``names`` done by the reference; weights not read by a linear layer are
    dequantised. Changes and returns ``model``."""
    for path, module in model.named_modules():
        for parameter, p in list(module._parameters.items()):
            name = path if parameter == "weight" and path else f"{path}.{parameter}" if path else parameter
            if name not in names:
                continue
            if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
                module.forward = reference_linear(module, p, module.bias, threshold)
            if isinstance(module, Conv1D):
                module.forward = reference_linear(module, p.t(), module.bias, threshold)
            if hasattr(module, "is_transposed"):
                module.forward = reference_experts(module, threshold)
    for path, module in model.named_modules():
        for parameter, p in list(module._parameters.items()):
            name = path if parameter == "weight" and path else f"{path}.{parameter}" if path else parameter
            if name in names:
                kn = isinstance(module, Conv1D) or getattr(module, "is_transposed", False)
                kn = kn or getattr(module, "OPERANDS", {}).get(parameter) == "KN"
                with torch.no_grad():
                    w = p.transpose(-1, -2) if kn else p
                    w = dequantize(*quantize_weight(w), p.dtype)
                module._parameters[parameter] = nn.Parameter(w.transpose(-1, -2) if kn else w)
    return model


def assert_as_good_as_the_reference(y: dict, y_reference: dict, y_float: dict) -> None:
    """``norm(y - reference) <= 0.05 * norm(reference - float)`` for every output: the house's 1.05 for whole models."""
    assert y.keys() == y_reference.keys() == y_float.keys()
    for name in y_float:
        assert y[name].dtype == y_float[name].dtype
        assert y[name].shape == y_float[name].shape
        allowed = 0.05 * (y_reference[name] - y_float[name]).norm()
        found = (y[name] - y_reference[name]).norm()
        assert 0 < allowed < 0.05 * 0.25 * y_float[name].norm(), (name, allowed, y_float[name].norm())
        assert found <= allowed, f"{name}: {found:.3e} > {allowed:.3e}"


EXPECTED = {
    "llama": {f"model.layers.{i}.{n}" for i in (0, 1) for n in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
        "mlp.down_proj")},
    "gpt2": {f"transformer.h.{i}.{n}" for i in (0, 1) for n in (
        "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")},
    "mixtral": {f"model.layers.{i}.{n}" for i in (0, 1) for n in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.experts.gate_up_proj",
        "mlp.experts.down_proj")},
    "t5": {f"encoder.block.{i}.layer.{n}" for i in (0, 1) for n in (
        "0.SelfAttention.q", "0.SelfAttention.k", "0.SelfAttention.v", "0.SelfAttention.o",
        "1.DenseReluDense.wi_0", "1.DenseReluDense.wi_1", "1.DenseReluDense.wo")}
    | {f"decoder.block.{i}.layer.{n}" for i in (0, 1) for n in (
        "0.SelfAttention.q", "0.SelfAttention.k", "0.SelfAttention.v", "0.SelfAttention.o",
        "1.EncDecAttention.q", "1.EncDecAttention.k", "1.EncDecAttention.v", "1.EncDecAttention.o",
        "2.DenseReluDense.wi_0", "2.DenseReluDense.wi_1", "2.DenseReluDense.wo")},
    "bert": {f"encoder.layer.{i}.{n}" for i in (0, 1) for n in (
        "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
        "intermediate.dense", "output.dense")} | {"pooler.dense"},
    "transformer": {f"encoder.layers.{i}.{n}" for i in (0, 1) for n in (
        "self_attn.in_proj_weight", "self_attn.out_proj", "linear1", "linear2")}
    | {f"decoder.layers.{i}.{n}" for i in (0, 1) for n in (
        "self_attn.in_proj_weight", "self_attn.out_proj", "multihead_attn.in_proj_weight", "multihead_attn.out_proj",
        "linear1", "linear2")},
    "bare_products": set(models.BareProducts.OPERANDS),
    "tied_lm": {"up", "up_again", "down"},
}  # fmt: skip
EXPECTED["gpt_oss"] = EXPECTED["mixtral"]


# ---- what is covered ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", models.ALL)
def test_whole_models_are_as_good_as_the_reference(name):
    model, inputs = models.ALL[name]()
    y_float, twin = outputs(model, inputs), copy.deepcopy(model)
    assert int8fx.convert(model) is model
    found = converted_names(model)
    if name in EXPECTED:
        assert found == EXPECTED[name]
    assert found
    y_reference = outputs(as_reference(twin, found), inputs)
    assert_as_good_as_the_reference(outputs(model, inputs), y_reference, y_float)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gpt_oss", "bert"])
@pytest.mark.parametrize("threshold", [0.0, float("inf")])
def test_the_threshold_reaches_every_layer(name, threshold):
    model, inputs = models.ALL[name]()
    y_float, twin = outputs(model, inputs), copy.deepcopy(model)
    int8fx.convert(model, int8fx.llm_int8(threshold=threshold))
    for module in model.modules():
        if isinstance(module, PackedModule):
            assert {p.threshold for p in module.packed_weights.values()} == {threshold}
    y_reference = outputs(as_reference(twin, converted_names(model), threshold), inputs)
    y = outputs(model, inputs)
    for key in y:
        error = (y_reference[key] - y_float[key]).norm()
        assert (y[key] - y_reference[key]).norm() <= 0.05 * error


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit", "t5"])
def test_every_linear_layer_is_within_its_budget(name):
    """Layer by layer, on the inputs that each layer really sees."""
    model, inputs = models.ALL[name]()
    biases = {n: m.bias for n, m in model.named_modules() if hasattr(m, "bias")}
    int8fx.convert(model)
    calls = []
    for path, module in model.named_modules():
        if isinstance(module, PackedModule):
            module.register_forward_hook(lambda m, args, y, path=path: calls.append((path, args[0], y)))
    outputs(model, inputs)
    assert len({path for path, _, _ in calls}) == len(converted_names(model))
    for path, x, y in calls:
        bias = biases[path]
        codes, scale = codes_of(model.get_submodule(path))
        assert_within_budget(y, x, codes, scale, None if bias is None else bias.detach(), 6.0)
    if name != "t5":
        assert any((x.abs() >= 6).any() for _, x, _ in calls), "no layer saw an outlier"


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gpt_oss", "bert", "transformer", "bare_products"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(name, dtype):
    model, inputs = models.ALL[name](**{"experts_implementation": "eager"} if name in ("mixtral", "gpt_oss") else {})
    model.to(dtype)
    inputs = {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    twin = copy.deepcopy(model)
    exact = outputs(
        copy.deepcopy(model).double(),
        {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()},
    )
    y_float = outputs(twin, inputs)
    int8fx.convert(model)
    y_reference = outputs(as_reference(twin, converted_names(model)), inputs)
    y = outputs(model, inputs)
    for key in y:
        assert y[key].dtype == dtype
        rounding = (y_float[key].double() - exact[key]).norm()
        error = (y_reference[key].double() - exact[key]).norm()
        assert (y[key].double() - exact[key]).norm() <= 1.05 * error + 2 * rounding
        assert error < 0.25 * exact[key].norm()


class TestIdentity:
    def test_the_object_its_class_config_and_generate_stay(self):
        model, _ = models.llama()
        cls, config, generate = type(model), model.config, type(model).generate
        modules = dict(model.named_modules())
        parameters = dict(model.named_parameters())
        assert int8fx.convert(model) is model
        assert type(model) is cls
        assert model.config is config
        assert type(model).generate is generate
        assert all(m is modules[n] for n, m in model.named_modules())
        assert all(isinstance(m, nn.Linear) for n, m in model.named_modules() if n in converted_names(model))
        left = dict(model.named_parameters())
        assert all(p is parameters[n] for n, p in left.items())
        assert parameters.keys() - left.keys() == {f"{n}.weight" for n in converted_names(model)}
        before = sum(p.numel() * p.itemsize for n, p in parameters.items() if n not in left)
        after = sum(b.numel() * b.itemsize for m in model.modules() if isinstance(m, PackedModule) for b in m.buffers())
        assert after < 0.3 * before

    @pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gpt_oss"])
    def test_generate(self, name):
        model, inputs = models.ALL[name]()
        int8fx.convert(model)
        ids = inputs["input_ids"][:1]
        y = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
        assert y.shape == (1, ids.shape[1] + 6)
        with torch.no_grad():  # the cache changes nothing but the batch that outliers are looked for in
            logits = [model(y[:, :n], use_cache=False).logits[:, -1] for n in range(ids.shape[1], y.shape[1])]
        assert torch.stack([t.argmax(-1) for t in logits[:1]], 1).equal(y[:, ids.shape[1] : ids.shape[1] + 1])

    def test_memory_footprint_of_transformers(self):
        model, _ = models.llama()
        before = model.get_memory_footprint()
        int8fx.convert(model)
        summary = int8fx.summary(model)
        assert before - model.get_memory_footprint() == summary.bytes_before - summary.bytes_after

    def test_hooks_run(self):
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        calls = []
        model[0].register_forward_hook(lambda m, args, y: calls.append("forward"))
        model[0].register_forward_pre_hook(lambda m, args: calls.append("pre"))
        model[1].register_full_backward_hook(lambda m, gin, gout: calls.append("backward"))
        model[0].register_state_dict_post_hook(lambda m, state, prefix, meta: calls.append("state_dict"))
        int8fx.convert(model)
        model(torch.randn(2, 8, requires_grad=True)).sum().backward()
        model.state_dict()
        assert calls == ["pre", "forward", "backward", "state_dict"]

    def test_a_shared_module_stays_one_module(self):
        shared = nn.Linear(8, 8)
        model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared), "c": nn.Linear(8, 8)})
        int8fx.convert(model)
        assert model["a"] is model["b"][0] is shared
        assert isinstance(shared, PackedModule)
        assert converted_names(model) == {"a", "c"}

    def test_attributes_set_by_others_stay(self):
        linear = nn.Linear(8, 8)
        linear.note = {"a": 1}
        linear.train(False)
        int8fx.convert(linear)
        assert linear.note == {"a": 1}
        assert not linear.training

    def test_the_model_may_be_a_layer_itself(self):
        linear = nn.Linear(40, 24)
        x = activation(5, 40, outliers="column")
        bias = linear.bias.detach()
        assert int8fx.convert(linear) is linear
        assert isinstance(linear, nn.Linear)
        assert_within_budget(linear(x).detach(), x, *codes_of(linear), bias, 6.0)
        assert converted_names(linear) == {"weight"}


class TestLayers:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
    def test_linear_and_conv1d(self, kind, bias, dtype):
        if kind is Conv1D:
            module = Conv1D(24, 40).to(dtype)
            nn.init.normal_(module.bias)
        else:
            module = nn.Linear(40, 24, bias=bias, dtype=dtype)
        b = None if module.bias is None else module.bias.detach()
        w = module.weight.detach()
        int8fx.convert(module)
        expected = quantize_weight(w.t() if kind is Conv1D else w)
        assert all(map(torch.equal, codes_of(module), expected))
        for lead in ((), (5,), (2, 0), (2, 3)):
            x = activation(max(1, 6), 40, outliers="some", dtype=dtype)[: int(torch.tensor(lead).prod())].reshape(
                *lead, 40
            )
            assert_within_budget(module(x).detach(), x, *expected, b, 6.0)

    @pytest.mark.parametrize(("K", "N"), [(0, 8), (8, 0), (0, 0), (1, 1)])
    @pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
    def test_zero_size(self, K, N):
        module = nn.Linear(K, N)
        y = module(torch.randn(3, K))
        int8fx.convert(module)
        assert isinstance(module, PackedModule)
        z = module(torch.randn(3, K))
        assert z.shape == y.shape
        if K == 0:
            assert torch.equal(z, module.bias.expand(3, N))

    def test_a_subclass_with_its_own_forward_runs_it(self):
        class Scaled(nn.Linear):
            def forward(self, x):
                return super().forward(x) * 2

        class Own(nn.Linear):
            def forward(self, x):
                return torch.matmul(x, self.weight.t()) - 1

        for cls in (Scaled, Own):
            module = cls(16, 8, bias=cls is Scaled)
            x, twin = torch.randn(3, 16), copy.deepcopy(module)
            int8fx.convert(module)
            assert isinstance(module, PackedModule)
            assert isinstance(module, cls)
            twin.weight = nn.Parameter(dequantize(*codes_of(module)))
            assert torch.allclose(module(x), twin(x), rtol=1e-6, atol=1e-6)

    def test_a_subclass_that_uses_its_weight_otherwise_is_left(self):
        class Square(nn.Linear):
            def forward(self, x):
                return F.linear(x, self.weight**2)

        module = nn.Sequential(Square(8, 8), nn.Linear(8, 8))
        int8fx.convert(module)
        assert converted_names(module) == {"1"}
        assert reasons(module) == {"0": "not the weight of a product"}

    def test_a_weight_read_by_another_module(self):
        class Reader(nn.Module):
            def __init__(self):
                super().__init__()
                self.other = nn.ModuleDict({"proj": nn.Linear(16, 8)})

            def forward(self, x):
                return F.linear(x, self.other["proj"].weight) + self.other["proj"](x)

        model = Reader()
        x, w = torch.randn(3, 16), model.other["proj"].weight.detach()
        int8fx.convert(model)
        codes, scale = codes_of(model.other["proj"])
        assert torch.equal(codes, quantize_weight(w)[0])
        y = F.linear(x, dequantize(codes, scale)) + kernels_linear(x, codes, scale, model.other["proj"].bias)
        assert torch.allclose(model(x), y, rtol=1e-5, atol=1e-5)

    def test_modules_that_are_no_products_are_listed_and_run(self):
        model = nn.ModuleDict({
            "bilinear": nn.Bilinear(4, 4, 4), "lstm": nn.LSTM(4, 4), "gru": nn.GRUCell(4, 4),
            "bag": nn.EmbeddingBag(4, 4), "deconv": nn.ConvTranspose1d(4, 4, 1),
            "list": nn.ParameterList([torch.randn(4, 4)]), "linear": nn.Linear(4, 4),
        })  # fmt: skip
        x = torch.randn(2, 4)
        y = [model["bilinear"](x, x), model["lstm"](x)[0], model["gru"](x), model["deconv"](x[..., None])]
        int8fx.convert(model)
        assert converted_names(model) == {"linear"}
        left = reasons(model)
        assert set(left) == {
            "bilinear", "lstm.weight_ih_l0", "lstm.weight_hh_l0", "gru.weight_ih", "gru.weight_hh", "bag", "deconv",
            "list.0",
        }  # fmt: skip
        assert all(left.values())
        z = [model["bilinear"](x, x), model["lstm"](x)[0], model["gru"](x), model["deconv"](x[..., None])]
        assert all(map(torch.equal, y, z))

    @pytest.mark.parametrize(
        "how", ["weight_norm", "old weight_norm", "spectral_norm", "orthogonal", "pruned", "old spectral_norm"]
    )
    def test_parametrised_and_pruned_layers_are_left_and_run(self, how):
        apply = {
            "weight_norm": nn.utils.parametrizations.weight_norm,
            "old weight_norm": nn.utils.weight_norm,
            "spectral_norm": nn.utils.parametrizations.spectral_norm,
            "orthogonal": nn.utils.parametrizations.orthogonal,
            "pruned": lambda m: nn.utils.prune.l1_unstructured(m, "weight", 0.5) and m,
            "old spectral_norm": nn.utils.spectral_norm,
        }[how]
        with pytest.warns() if how == "old weight_norm" else nullcontext():
            model = nn.Sequential(apply(nn.Linear(8, 8)), nn.Linear(8, 8)).eval()
        x = torch.randn(3, 8)
        first = model[0](x)
        int8fx.convert(model)
        assert converted_names(model) == {"1"}
        assert torch.equal(model[0](x), first)
        if how == "pruned":
            nn.utils.prune.remove(model[0], "weight")
            assert torch.equal(model[0](x), first)

    def test_lazy_layers_are_refused_until_they_have_run(self):
        model = nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 8))
        before = snapshot(model)
        with pytest.raises(ValueError, match="layer '0' has no weight yet; run the model once before converting"):
            int8fx.convert(model)
        assert_left_as_it_was(model, before)
        model(torch.randn(2, 4))
        int8fx.convert(model)
        assert converted_names(model) == {"0", "1"}

    def test_buffers_are_never_packed(self):
        class Rotary(nn.Module):
            def __init__(self):
                super().__init__()
                self.w = nn.Parameter(torch.randn(8, 8))
                self.register_buffer("inv_freq", torch.randn(8, 8))

            def forward(self, x):
                return x @ self.inv_freq + x @ self.w

        model = int8fx.convert(Rotary())
        assert converted_names(model) == {"w"}
        assert model.inv_freq.dtype == torch.float32

    def test_parameters_used_both_ways_round_or_changed_in_place_are_left(self):
        class Both(nn.Module):
            def __init__(self):
                super().__init__()
                self.both, self.changed = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8, 8))
                self.view_changed, self.fine = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8, 8))

            def forward(self, x):
                self.changed.mul_(0.5)
                self.view_changed[0].mul_(0.5)
                return F.linear(x, self.both) + x @ self.both + x @ self.changed + x @ self.view_changed + x @ self.fine

        model = Both()
        twin = copy.deepcopy(model)
        int8fx.convert(model)
        assert converted_names(model) == {"fine"}
        x = torch.randn(3, 8)
        with torch.no_grad():
            twin.fine.copy_(dequantize(*codes_of(model, "fine")).t())
            assert torch.allclose(model(x), twin(x), rtol=1e-5, atol=1e-5)
            assert torch.equal(model.changed, twin.changed)

    def test_modules_that_use_the_names_of_packed_ones_are_left(self):
        class OwnScale(nn.Linear):
            def __init__(self):
                super().__init__(8, 8)
                self.register_buffer("weight_scale", torch.ones(8))

        class Codebook(nn.Module):
            def __init__(self):
                super().__init__()
                self.codes = nn.Parameter(torch.randn(8, 8))

            def dequantize(self, ids):
                return self.codes[ids]

            def forward(self, x):
                return F.linear(x, self.codes) + self.dequantize(0)

        model = nn.ModuleDict({"scale": OwnScale(), "codebook": Codebook(), "linear": nn.Linear(8, 8)})
        x = torch.randn(3, 8)
        y = [model["scale"](x), model["codebook"](x)]
        int8fx.convert(model)
        assert converted_names(model) == {"linear"}
        assert reasons(model) == {
            "scale": "its module has a 'weight_scale' of its own",
            "codebook.codes": "its module has a 'dequantize' of its own",
        }
        assert all(map(torch.equal, y, [model["scale"](x), model["codebook"](x)]))


class TestBareParameters:
    def test_each_product_is_the_one_with_the_dequantised_weight(self):
        model, inputs = models.bare_products()
        twin = as_reference(copy.deepcopy(model), set(models.BareProducts.OPERANDS))
        int8fx.convert(model)
        y, z = outputs(model, inputs), outputs(twin, inputs)
        assert set(y) == set(models.BareProducts.OPERANDS)
        for name, layout in models.BareProducts.OPERANDS.items():
            assert model.packed_weights[name].layout == layout, name
            assert torch.equal(y[name], z[name]), name

    def test_a_forward_that_cannot_be_traced_is_left(self):
        class Branch(nn.Module):
            def __init__(self):
                super().__init__()
                self.w = nn.Parameter(torch.randn(8, 8))

            def forward(self, x):
                return x @ self.w if x.sum() > 0 else x

        model = Branch()
        with pytest.warns(UserWarning, match="no layer was converted"):
            int8fx.convert(model)
        assert "its use is not known: forward cannot be traced" in reasons(model)["w"]

    def test_the_trace_leaves_nothing_behind(self):
        class Stateful(nn.Module):
            def __init__(self):
                super().__init__()
                self.w = nn.Parameter(torch.randn(8, 8))
                self.calls, self.seen, self.last = 0, [], {}

            def forward(self, x):
                self.calls += 1
                self.seen.append(x)
                self.last["x"] = x
                return x @ self.w

        model = int8fx.convert(Stateful())
        assert converted_names(model) == {"w"}
        assert (model.calls, model.seen, model.last) == (0, [], {})


# ---- attention ------------------------------------------------------------------------------------------------------


def dequantised_twin(model: nn.Module) -> nn.Module:
    """A function that gives back, after conversion, the float model with dequantised weights."""
    twin = copy.deepcopy(model)

    def fill(converted: nn.Module) -> nn.Module:
        with torch.no_grad():
            for path, module in converted.named_modules():
                if isinstance(module, PackedModule):
                    for name in module.packed_weights:
                        twin.get_submodule(path)._parameters[name].copy_(module.dequantize(name))
        return twin

    return fill


ATTENTION = {
    "self": {},
    "batch_first": {"batch_first": True},
    "no bias": {"bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero attn": {"add_zero_attn": True},
    "kdim and vdim": {"kdim": 24, "vdim": 20},
    "all": {"kdim": 24, "vdim": 20, "add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("unbatched", [False, True])
@pytest.mark.parametrize("settings", ATTENTION)
def test_multihead_attention(settings, unbatched, training):
    settings = ATTENTION[settings]
    attention = nn.MultiheadAttention(32, 4, **settings).train(training)
    nn.init.normal_(attention.in_proj_bias) if attention.in_proj_bias is not None else None
    L, S, B = 5, 7, 3
    g = generator(0)

    def randn(length: int, size: int) -> Tensor:
        shape = (length, size) if unbatched else (B, length, size) if attention.batch_first else (length, B, size)
        return torch.randn(shape, generator=g)

    query, key, value = randn(L, 32), randn(S, settings.get("kdim", 32)), randn(S, settings.get("vdim", 32))
    padding = torch.zeros(S, dtype=torch.bool) if unbatched else torch.zeros(B, S, dtype=torch.bool)
    padding[..., -2:] = True
    causal = torch.ones(L, S, dtype=torch.bool).triu(1)
    additive = torch.randn((4, L, S) if unbatched else (B * 4, L, S), generator=g)
    calls = [
        {}, {"need_weights": False}, {"key_padding_mask": padding}, {"attn_mask": causal},
        {"attn_mask": causal, "is_causal": True, "need_weights": False}, {"attn_mask": additive},
        {"average_attn_weights": False}, {"key_padding_mask": padding.float() * -1e9, "attn_mask": additive},
    ]  # fmt: skip
    fill = dequantised_twin(attention)
    int8fx.convert(attention)
    names = {"q_proj_weight", "k_proj_weight", "v_proj_weight"} if "kdim" in settings else {"in_proj_weight"}
    assert converted_names(attention) == names | {"out_proj"}
    assert isinstance(attention, nn.MultiheadAttention)
    twin = fill(attention)
    tensors = (
        [(query, key, value)] if "kdim" in settings else [(query, key, value), (query, query, query), (query, key, key)]
    )
    for q, k, v in tensors:
        for call in calls:
            if k is q:
                call = {n: t[..., :L] if n in ("attn_mask", "key_padding_mask") else t for n, t in call.items()}
            with torch.no_grad():
                (y, weights), (z, expected) = attention(q, k, v, **call), twin(q, k, v, **call)
            assert y.shape == z.shape
            assert torch.allclose(y, z, rtol=1e-5, atol=1e-5)
            assert (weights is None) == (expected is None)
            if weights is not None:
                assert weights.shape == expected.shape
                assert torch.allclose(weights, expected, rtol=1e-5, atol=1e-6)


def test_multihead_attention_converted_in_part():
    attention = nn.MultiheadAttention(32, 4, kdim=24, vdim=20).eval()
    fill = dequantised_twin(attention)
    int8fx.convert(attention, select="k_proj_weight")
    assert converted_names(attention) == {"k_proj_weight"}
    q, k, v = torch.randn(5, 2, 32), torch.randn(7, 2, 24), torch.randn(7, 2, 20)
    assert torch.allclose(attention(q, k, v)[0], fill(attention)(q, k, v)[0], rtol=1e-5, atol=1e-5)
    attention = nn.MultiheadAttention(32, 4, batch_first=True).eval()
    fill = dequantised_twin(attention)
    int8fx.convert(attention, select="out_proj")
    x = torch.randn(2, 5, 32)
    with torch.no_grad():  # the fast path of attention that is not converted
        y, z = attention(x, x, x, need_weights=False)[0], fill(attention)(x, x, x, need_weights=False)[0]
    assert torch.allclose(y, z, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_transformer_encoder_in_eval_with_padding(norm_first, batch_first, activation):
    """The fast path with nested tensors, which float models take here, knows float weights only.

    In float64: of so few rows, one activation on a rounding boundary would be a visible part of the error.
    """
    settings = {"batch_first": batch_first, "norm_first": norm_first, "activation": activation}
    layer = nn.TransformerEncoderLayer(32, 4, 48, **settings, dtype=torch.float64)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first and batch_first).eval()
    src = torch.randn((3, 6, 32) if batch_first else (6, 3, 32), generator=generator(0), dtype=torch.float64)
    padding = torch.zeros(3, 6, dtype=torch.bool)
    padding[0, 4:] = padding[1, 5:] = True
    fill = dequantised_twin(encoder)
    int8fx.convert(encoder)
    assert len(converted_names(encoder)) == 8
    twin = fill(encoder)
    feed_forward = {f"layers.{i}.{n}" for i in (0, 1) for n in ("linear1", "linear2")}
    for grad in (False, True):
        for call in (
            {},
            {"src_key_padding_mask": padding},
            {"mask": nn.Transformer.generate_square_subsequent_mask(6, dtype=torch.float64)},
        ):
            with torch.set_grad_enabled(grad):
                y = encoder(src, **call).detach()
                z = twin(src, **call).detach()  # by the fast path, if there is no grad and batch_first
            keep = ~padding if "src_key_padding_mask" in call else torch.ones_like(padding)
            keep = keep if batch_first else keep.t()
            assert y.shape == z.shape
            y, z = y[keep], z[keep]
            r = outputs(as_reference(copy.deepcopy(twin), feed_forward), {"src": src, **call})["y"][keep]
            assert (y - r).norm() <= 0.05 * (r - z).norm()


def test_layers_of_an_encoder_converted_alone_run_in_it():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, batch_first=True), 2).eval()
    int8fx.convert(encoder, select="layers.1.linear1")
    src, padding = torch.randn(2, 5, 32), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        assert encoder(src, src_key_padding_mask=padding).isfinite().all()


def test_an_encoder_whose_layer_is_converted_behind_its_back_says_so():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, batch_first=True), 2).eval()
    int8fx.convert(encoder.layers[0])
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        assert encoder(torch.randn(2, 5, 32)).isfinite().all()
        with pytest.raises(ValueError, match=r"convert the nn\.TransformerEncoder with its layers"):
            encoder(torch.randn(2, 5, 32), src_key_padding_mask=padding)


# ---- convolutions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("unbatched", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_1x1_convolutions_on_request(dims, stride, unbatched, bias):
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    conv = kind(40, 24, 1, stride=stride, bias=bias)
    x = activation(2 * 5**dims, 40, outliers="column").reshape(2, *[5] * dims, 40).movedim(-1, 1)
    x = (x[0] if unbatched else x).contiguous()
    y, b = conv(x), None if conv.bias is None else conv.bias.detach()
    model = nn.Sequential(conv, nn.Flatten())
    with pytest.warns(UserWarning, match="no layer was converted"):
        int8fx.convert(model)
    assert reasons(model) == {"0": "a 1x1 convolution: converted if selected"}
    weight = conv.weight.detach()
    int8fx.convert(model, select="0")
    assert isinstance(conv, kind)
    assert conv.weight.shape == weight.shape
    assert torch.equal(codes_of(conv)[0], quantize_weight(weight.flatten(1))[0])
    z = conv(x).detach()
    assert z.shape == y.shape
    assert z.stride() == y.stride()  # what follows may view it
    rows = x.movedim(-dims - 1, -1)[(..., *[slice(None, None, stride)] * dims, slice(None))]
    assert_within_budget(z.movedim(-dims - 1, -1), rows, *codes_of(conv), b, 6.0)


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_1x1_convolutions_with_padding_by_name(padding):
    conv = nn.Conv2d(8, 4, 1, padding=padding)
    x = torch.randn(2, 8, 3, 3)
    y = conv(x)
    int8fx.convert(conv, select=lambda name, module: True)
    assert isinstance(conv, PackedModule)
    assert conv(x).shape == y.shape


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, (1, 3)), nn.Conv2d(8, 8, 1, groups=2), nn.Conv2d(8, 8, 1, padding=1),
        nn.Conv1d(8, 8, 2), nn.Conv3d(8, 8, 1, padding=(0, 0, 1)),
        nn.Conv1d(8, 8, 1, padding=1, padding_mode="circular"),
    ],
)  # fmt: skip
def test_other_convolutions_are_left(conv):
    model = nn.Sequential(copy.deepcopy(conv), nn.Linear(8, 8))
    int8fx.convert(model, **EVERYTHING)
    assert converted_names(model) == {"1"}
    assert reasons(model)["0"] == "a convolution; only 1x1 convolutions without groups or padding are products"


# ---- experts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_experts_give_the_same_whatever_implementation_is_set(name, implementation):
    model, inputs = models.ALL[name](experts_implementation=implementation)
    y_float, twin = outputs(model, inputs), copy.deepcopy(model)
    int8fx.convert(model)
    twin = as_reference(twin, converted_names(model))
    assert_as_good_as_the_reference(outputs(model, inputs), outputs(twin, inputs), y_float)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts_alone_within_the_budget_of_their_products(name):
    model, _ = models.ALL[name]()
    experts = model.model.layers[0].mlp.experts
    int8fx.convert(model, select="experts")
    codes, scale = codes_of(experts, "gate_up_proj")
    assert codes.shape == (4, 144, 64)
    hidden = activation(9, 64, outliers="column")
    seen = []
    experts._apply_gate = lambda y, gate=experts._apply_gate: seen.append(y) or gate(y)
    index = torch.randint(0, 4, (9, 2), generator=generator(1))
    experts(hidden, index, torch.rand(9, 2, generator=generator(2)))
    ids, order = index.flatten().sort(stable=True)
    for e in range(4):
        rows = hidden[order[ids == e] // 2]
        bias = experts.gate_up_proj_bias[e].detach() if experts.has_bias else None
        assert_within_budget(seen[0][ids == e].detach(), rows, codes[e], scale[e], bias, 6.0)


def test_experts_that_see_no_token_and_experts_of_another_rank():
    model, _ = models.mixtral()
    experts = model.model.layers[0].mlp.experts
    twin = copy.deepcopy(experts)
    int8fx.convert(experts)
    hidden, weights = torch.randn(3, 64), torch.rand(3, 2)
    index = torch.tensor([[0, 0], [0, 4], [4, 4]])  # 4: the id of experts that live elsewhere
    forward = reference_experts(twin, 6.0)
    assert torch.allclose(experts(hidden, index, weights), forward(hidden, index, weights), rtol=1e-4, atol=1e-4)
    assert torch.equal(experts(hidden, index, weights)[2], torch.zeros(64))
    assert experts(hidden[:0], index[:0], weights[:0]).shape == (0, 64)


def test_routers_stay_unless_selected():
    for name, router in (("mixtral", "mlp.gate"), ("gpt_oss", "mlp.router")):
        model, _ = models.ALL[name]()
        int8fx.convert(model)
        assert reasons(model)[f"model.layers.0.{router}"] == "the router of experts: left in 16 bits unless selected"
        model, inputs = models.ALL[name]()
        int8fx.convert(model, select=router)
        assert converted_names(model) == {f"model.layers.{i}.{router}" for i in (0, 1)}
        assert outputs(model, inputs)["logits"].isfinite().all()


def test_a_router_that_is_a_linear_layer_stays_too():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 8, 8))

        def forward(self, x):
            return torch.einsum("emk,enk->emn", x, self.w)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.router, self.experts, self.out = nn.Linear(8, 4), Experts(), nn.Linear(8, 8)

    model = nn.ModuleDict({"block": Block()})
    int8fx.convert(model)
    assert converted_names(model) == {"block.experts.w", "block.out"}
    assert reasons(model)["block.router"] == "the router of experts: left in 16 bits unless selected"


# ---- tied weights, embeddings ---------------------------------------------------------------------------------------


class TestTies:
    def test_linear_layers_share_codes(self):
        model, _ = models.tied_lm()
        int8fx.convert(model)
        assert converted_names(model) == {"up", "up_again", "down"}
        assert codes_of(model.up)[0] is codes_of(model.up_again)[0]
        assert codes_of(model.up)[1] is codes_of(model.up_again)[1]
        assert model.lm_head.weight is model.embed.weight
        assert reasons(model)["lm_head"] == "the output embeddings: left in 16 bits unless selected"

    @pytest.mark.parametrize("padding_idx", [None, 0, 5])
    def test_a_selected_head_takes_its_embedding_along(self, padding_idx):
        model, inputs = models.tied_lm(padding_idx=padding_idx)
        table, x = model.embed.weight.detach(), torch.randn(3, 64)
        int8fx.convert(model, select="lm_head")
        assert converted_names(model) == {"embed", "lm_head"}
        assert codes_of(model.embed)[0] is codes_of(model.lm_head)[0]
        assert codes_of(model.embed)[1] is codes_of(model.lm_head)[1]
        assert isinstance(model.embed, nn.Embedding)
        expected = quantize_weight(table)
        ids = inputs["ids"]
        assert torch.equal(model.embed(ids), dequantize(*expected)[ids])
        assert torch.equal(model.embed.weight, dequantize(*expected))
        if padding_idx is not None:
            assert torch.equal(model.embed(torch.tensor(padding_idx)), torch.zeros(64))
        assert_within_budget(model.lm_head(x), x, *expected, None, 6.0)

    @pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
    def test_heads_of_transformers_models(self, name):
        model, inputs = models.ALL[name](tie_word_embeddings=True)
        y_float = outputs(model, inputs)["logits"]
        int8fx.convert(model, select="lm_head")
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        assert codes_of(embedding)[0] is codes_of(head)[0]
        assert {"lm_head"} < converted_names(model)
        y = outputs(model, inputs)["logits"]
        assert (y - y_float).norm() < 0.25 * y_float.norm()

    def test_a_subset_of_tied_layers_is_left(self):
        model, _ = models.tied_lm()
        with pytest.warns(UserWarning, match="no layer was converted"):
            int8fx.convert(model, select="up")
        assert reasons(model)["up"] == "tied to up_again, which stays as it is"
        assert model.up.weight is model.up_again.weight
        int8fx.convert(model, skip="up")
        assert converted_names(model) == {"down"}
        assert reasons(model)["up_again"] == "tied to up, which stays as it is"

    def test_layers_that_read_a_shared_weight_differently_are_left(self):
        model = nn.ModuleDict({"linear": nn.Linear(8, 8), "conv1d": Conv1D(8, 8), "other": nn.Linear(8, 8)})
        model["conv1d"].weight = model["linear"].weight
        int8fx.convert(model)
        assert converted_names(model) == {"other"}
        assert model["conv1d"].weight is model["linear"].weight
        assert reasons(model)["linear"] == "its weight is shared with conv1d, which reads it the other way round"
        assert reasons(model)["conv1d"] == "its weight is shared with linear, which reads it the other way round"

    def test_an_embedding_with_a_forward_of_its_own_stays_and_so_does_its_head(self):
        class Scaled(nn.Embedding):  # as in Gemma
            def forward(self, ids):
                return super().forward(ids) * 8

        model, inputs = models.tied_lm()
        scaled = Scaled(96, 64, padding_idx=0)
        scaled.weight = model.lm_head.weight
        model.embed = scaled
        y = outputs(model, inputs)
        with pytest.warns(UserWarning, match="no layer was converted"):
            int8fx.convert(model, select="lm_head")
        assert reasons(model)["lm_head"] == "tied to embed, which stays as it is"
        assert torch.equal(outputs(model, inputs)["y"], y["y"])
        assert model.lm_head.weight is model.embed.weight

    def test_an_embedding_with_max_norm_changes_its_table_and_stays(self):
        model, _ = models.tied_lm()
        model.embed.max_norm = 1.0
        with pytest.warns(UserWarning, match="no layer was converted"):
            int8fx.convert(model, select="lm_head")
        assert model.lm_head.weight is model.embed.weight

    def test_a_skipped_embedding_keeps_its_head(self):
        model, _ = models.tied_lm()
        with pytest.warns(UserWarning, match="no layer was converted"):
            int8fx.convert(model, select="lm_head", skip="embed")
        assert reasons(model)["lm_head"] == "tied to embed, which stays as it is"

    def test_a_head_that_is_not_tied(self):
        model, _ = models.llama()
        x = torch.randn(3, 64)
        int8fx.convert(model, select="lm_head")
        assert converted_names(model) == {"lm_head"}
        assert_within_budget(model.lm_head(x), x, *codes_of(model.lm_head), None, 6.0)

    def test_heads_of_any_name_and_depth_stay(self):
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
            assert (
                reasons(model)[f"{prefix}lm_head.decoder"] == "the output embeddings: left in 16 bits unless selected"
            )
            assert f"{prefix}lm_head.dense" in converted_names(model)

    def test_one_parameter_under_two_names_of_a_module(self):
        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                self.a = nn.Parameter(torch.randn(8, 8))
                self.b = self.a

            def forward(self, x):
                return x @ self.a + x @ self.b

        model = int8fx.convert(Twice())
        assert converted_names(model) in ({"a", "b"}, set()) or model.a is model.b
        x = torch.randn(2, 8)
        assert torch.allclose(model(x), x @ (model.a + model.b), rtol=1e-5, atol=1e-5)


# ---- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gpt_oss", "transformer", "bare_products"])
def test_gradients_flow_to_adapters_and_biases_and_to_nothing_int8(name):
    model, inputs = models.ALL[name]()
    int8fx.convert(model)
    for p in model.parameters():
        p.requires_grad_(p.dim() < 2)
    key = next(k for k, v in inputs.items() if isinstance(v, Tensor))
    if inputs[key].is_floating_point():
        leaf = inputs[key].requires_grad_()
    else:
        leaf = model.get_input_embeddings()(inputs.pop(key)).detach().requires_grad_()
        inputs["inputs_embeds"] = leaf
    y = model(**inputs)
    y = y.logits if hasattr(y, "logits") else y if isinstance(y, Tensor) else sum(t.sum() for t in y.values())
    y.float().pow(2).sum().backward()
    assert leaf.grad.isfinite().all()
    assert leaf.grad.abs().sum() > 0
    if name not in ("bare_products",):
        biases = {n: p for n, p in model.named_parameters() if p.requires_grad and "bias" in n and p.numel() > 1}
        assert all(p.grad is not None for p in biases.values())
    assert not any(b.requires_grad or b.grad is not None for b in model.buffers())


def test_the_gradient_of_a_lora_adapter_is_that_of_the_dequantised_model():
    class LoRA(nn.Module):
        def __init__(self, base: nn.Linear):
            super().__init__()
            self.base = base
            self.a, self.b = nn.Linear(base.in_features, 4, bias=False), nn.Linear(4, base.out_features, bias=False)

        def forward(self, x):
            return self.base(x) + self.b(self.a(x))

    model = nn.Sequential(LoRA(nn.Linear(16, 16)), nn.Tanh(), LoRA(nn.Linear(16, 8))).double()
    fill = dequantised_twin(model)
    int8fx.convert(model, llm_int8_exact := int8fx.llm_int8(threshold=0.0), select="base")
    assert llm_int8_exact.threshold == 0
    twin, x = fill(model), torch.randn(5, 16, dtype=torch.float64)
    model(x).pow(2).sum().backward()
    twin(x).pow(2).sum().backward()
    for i in (0, 2):
        for name in ("a", "b"):
            grad, expected = getattr(model[i], name).weight.grad, getattr(twin[i], name).weight.grad
            assert torch.allclose(grad, expected, rtol=1e-10, atol=1e-12)


# ---- refusals -------------------------------------------------------------------------------------------------------


def _with(weight: Callable[[], Tensor], requires_grad: bool = True) -> nn.Module:
    model = nn.ModuleDict({"first": nn.Linear(8, 8), "bad": nn.Linear(8, 8), "last": nn.Linear(8, 8)})
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
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = nn.ModuleDict({"first": nn.Linear(64, 64), "bad": nn.Linear(64, 64)})
    quantize_(model["bad"], Int8WeightOnlyConfig())
    return model


REFUSED = {
    "meta": (lambda: _with(lambda: torch.empty(8, 8, device="meta")), "is on the meta device"),
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
    "long": (lambda: _with(lambda: torch.zeros(1, MAX_K + 1)), f"has K = {MAX_K + 1} input channels"),
    "sparse": (lambda: _with(lambda: torch.eye(8).to_sparse()), "has a sparse_coo weight"),
    "bitsandbytes": (_bitsandbytes, "is already quantised by bitsandbytes"),
    "bitsandbytes 4 bit": (_bitsandbytes_4bit, "is already quantised by bitsandbytes"),
    "torchao": (_torchao, "is already quantised by torchao"),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_refused_by_name_and_the_model_is_left_as_it_was(what):
    make, message = REFUSED[what]
    model = make()
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"int8fx.convert: layer 'bad' {message}.*; legal: "):
        int8fx.convert(model)
    assert_left_as_it_was(model, before)
    if "quantised" not in message:
        int8fx.convert(model, skip="bad")
        assert converted_names(model) == {"first", "last"}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_summary_of_a_model_that_is_quantised_already_lists_it():
    for make in (_bitsandbytes, _torchao):
        package = make.__name__[1:]
        rows = {row.name: row for row in int8fx.summary(make()).rows}
        assert rows["bad"].reason == f"already quantised by {package}"
        assert not rows["bad"].converted
        assert rows["first"].reason == "float (not converted yet)"


def test_the_longest_k_is_legal():
    model = nn.Linear(MAX_K, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    int8fx.convert(model)
    x = torch.full((1, MAX_K), -2.0)
    assert_within_budget(model(x), x, *codes_of(model), None, 6.0)


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
    assert all(torch.equal(t, y[k]) for k, t in outputs(model, inputs).items())


def test_what_is_left_can_be_converted_later():
    model, inputs = models.llama()
    int8fx.convert(model, select="self_attn")
    int8fx.convert(model, select=["mlp", "lm_head"])
    once, _ = models.llama()
    int8fx.convert(once, **EVERYTHING)
    assert converted_names(model) == converted_names(once)
    assert torch.equal(outputs(model, inputs)["logits"], outputs(once, inputs)["logits"])
    model, _ = models.llama()
    int8fx.convert(model, select="self_attn")
    int8fx.convert(model, skip="self_attn")
    assert converted_names(model) == EXPECTED["llama"]


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


def test_a_model_without_products_warns():
    for model in (nn.ReLU(), nn.Sequential(nn.LayerNorm(8)), nn.Embedding(4, 4)):
        with pytest.warns(UserWarning, match="no layer was converted"):
            assert int8fx.convert(model) is model


# ---- contexts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_converting_in_any_grad_mode_makes_ordinary_tensors(context):
    model, _ = models.bert()
    with context():
        int8fx.convert(model)
    assert not any(b.is_inference() or b.requires_grad for b in model.buffers())
    x = torch.randn(2, 64, requires_grad=True)
    model.encoder.layer[0].output.dense.weight  # noqa: B018
    model.pooler.dense(x).sum().backward()
    assert x.grad is not None


def test_converting_under_default_device_dtype_and_autocast():
    model, _ = models.bert()
    twin = copy.deepcopy(model)
    with torch.device("meta"):
        int8fx.convert(model)
    assert {b.device.type for b in model.buffers()} == {"cpu"}
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            int8fx.convert(twin)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))


@pytest.mark.parametrize("inside", [False, True])
def test_fake_models(inside):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4))
        if inside:
            int8fx.convert(model)
    if not inside:
        int8fx.convert(model)
    assert converted_names(model) == {"0", "1"}
    with mode:
        y = model(torch.empty(3, 16))
    assert (y.shape, y.dtype, y.device.type) == ((3, 4), torch.float32, "cpu")
    assert model[0]._buffers["weight"].dtype == torch.int8


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
    kinds = [
        "bare_products",
        "bare_products",
        "llama",
        "mixtral",
        "gpt2",
        "bare_products",
        "transformer",
        "bare_products",
    ]
    built = [models.ALL["bare_products" if same else kind](seed=i) for i, kind in enumerate(kinds)]
    expected = []
    for model, inputs in built:
        expected.append(outputs(int8fx.convert(copy.deepcopy(model)), inputs))
    running, _ = models.llama()
    ids = {"input_ids": torch.arange(3, 10)[None], "use_cache": False}
    y_running = outputs(running, ids)["logits"]
    call = nn.Module.__call__
    start, stop, errors, found = threading.Barrier(9), threading.Event(), [], [None] * 8

    def work(i: int) -> None:
        try:
            start.wait()
            found[i] = int8fx.convert(built[i][0])
        except BaseException as error:
            errors.append(error)

    def serve() -> None:
        try:
            start.wait()
            while not stop.is_set():
                assert torch.equal(outputs(running, ids)["logits"], y_running)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    server = threading.Thread(target=serve)
    for t in (*threads, server):
        t.start()
    for t in threads:
        t.join()
    stop.set()
    server.join()
    assert not errors, errors
    assert nn.Module.__call__ is call
    for (model, inputs), y in zip(built, expected, strict=True):
        assert all(torch.equal(t, y[k]) for k, t in outputs(model, inputs).items())


# ---- interruptions --------------------------------------------------------------------------------------------------


def assert_whole(model: nn.Module) -> None:
    """Every layer is wholly float or wholly packed."""
    for module in model.modules():
        if isinstance(module, PackedModule):
            for name in module.packed_weights:
                codes, scale = codes_of(module, name)
                assert codes.dtype == torch.int8
                assert scale.shape == codes.shape[:-1]
                assert name not in module._parameters
        else:
            assert not any(b is not None and b.dtype == torch.int8 for b in module._buffers.values())
            assert "packed_weights" not in vars(module)


@pytest.mark.parametrize("name", ["llama", "mixtral", "transformer", "bare_products", "tied_lm"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize(
    "where", ["int8fx.conversion.convert.quantize_weight", "int8fx.conversion.packed.packed_class"]
)
def test_an_interrupted_convert_leaves_whole_layers_and_a_model_that_runs(name, error, where, monkeypatch):
    path, _, function = where.rpartition(".")
    module = importlib.import_module(path)  # int8fx.convert is a function, too
    model, inputs = models.ALL[name]()
    y_float = outputs(model, inputs)
    finished, _ = models.ALL[name]()
    calls = Interrupt(getattr(module, function))
    with monkeypatch.context() as patch:
        patch.setattr(module, function, calls)
        int8fx.convert(finished, **EVERYTHING)
    everything = converted_names(finished)
    assert calls.count > 0
    for k in range(0, calls.count, max(1, calls.count // 3)):
        model, inputs = models.ALL[name]()
        with monkeypatch.context() as patch:
            patch.setattr(module, function, Interrupt(getattr(module, function), k, error))
            with pytest.raises(error):
                int8fx.convert(model, **EVERYTHING)
        assert_whole(model)
        done = converted_names(model)
        assert done < everything
        y = outputs(model, inputs)
        for key in y:
            assert (y[key] - y_float[key]).norm() < 0.25 * y_float[key].norm()
        int8fx.convert(model, select=lambda name, module, done=done: name not in done)
        assert converted_names(model) == everything
        assert_same(model, finished, inputs)


class Interrupt:
    """``function``, which raises ``error`` at call number ``at``."""

    def __init__(self, function: Callable, at: int | None = None, error: type[BaseException] | None = None) -> None:
        self.function, self.at, self.error, self.count = function, at, error, 0

    def __call__(self, *args):
        if self.count == self.at:
            raise self.error("now")
        self.count += 1
        return self.function(*args)


def assert_same(model: nn.Module, other: nn.Module, inputs: dict) -> None:
    y, z = outputs(model, inputs), outputs(other, inputs)
    assert all(torch.equal(y[k], z[k]) for k in z)
    shared = [
        {(a, b) for a, s in names for b, t in names if s is t}
        for names in ([(n, t) for n, t in m.named_buffers(remove_duplicate=False)] for m in (model, other))
    ]
    assert shared[0] == shared[1]


# ---- memory ---------------------------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """The bytes of tensors made since this mode began, less those freed of tensors that were there before: `peak`."""

    def __init__(self, there: list[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()
        for tensor in there:
            self.watch(tensor, count=True)
        self.start = self.peak = self.live

    def watch(self, tensor: Tensor, count: bool = True) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)

        def freed() -> None:
            self.known.discard(key)
            self.live -= size

        weakref.finalize(storage, freed)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor):
                self.watch(t)
        return out


class Stack(nn.Module):
    def __init__(self, kind: str, layers: int, size: int, dtype: torch.dtype):
        super().__init__()
        if kind == "linear":
            self.layers = nn.ModuleList([nn.Linear(size, size, bias=False, dtype=dtype) for _ in range(layers)])
        else:
            self.layers = nn.ModuleList([Conv1D(size, size).to(dtype) for _ in range(layers)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_peak_memory_is_the_source_model_plus_one_layer(kind, dtype):
    layers, size = 6, 1536
    model = Stack(kind, layers, size, dtype)
    one = size * size * dtype.itemsize
    gc.collect()
    gc.disable()  # float weights must go at once, not when the collector comes by
    try:
        with LiveBytes(list(model.parameters())) as mode:
            int8fx.convert(model)
    finally:
        gc.enable()
    codes = layers * (size * size + 4 * size)
    assert mode.start >= layers * one
    left = sum(p.nbytes for p in model.parameters())
    assert mode.live == codes + left  # nothing else is held
    block = (1 << 20) * 4  # what is quantised at a time, in float32
    assert mode.peak <= mode.start + size * size + 4 * size + 5 * block
    assert mode.peak - mode.start <= max(one, 6 * block)
