"""Converted models: within the reference's error, layer by layer and in every dtype, and still the same object."""

import copy

import pytest
import torch
from support import models
from support.conversion import (
    SCHEMES,
    as_reference,
    assert_as_good_as_the_reference,
    assert_equal_sums,
    converted_names,
    dequantised_twin,
    floats_to,
    outputs,
    packed_modules,
)
from support.helpers import activation, assert_within_budget
from torch import Tensor, nn

import int8fx
from int8fx.conversion.format import FORMAT
from int8fx.conversion.packed import PackedModule
from int8fx.schemes.formats import FORMATS
from int8fx.schemes.weight import CODES, Epilogue

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
        "1.DenseReluDense.wi_0", "1.DenseReluDense.wi_1")}
    | {f"decoder.block.{i}.layer.{n}" for i in (0, 1) for n in (
        "0.SelfAttention.q", "0.SelfAttention.k", "0.SelfAttention.v", "0.SelfAttention.o",
        "1.EncDecAttention.q", "1.EncDecAttention.k", "1.EncDecAttention.v", "1.EncDecAttention.o",
        "2.DenseReluDense.wi_0", "2.DenseReluDense.wi_1")},
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
FEW = ["llama", "gpt2", "mixtral", "gpt_oss", "bert"]
VIEWED = {"transformer", "bare_products"}  # the reference dequantises weights of matmuls outside of linear layers


@pytest.mark.parametrize(
    ("name", "scheme"),
    [(n, s) for n in models.ALL for s in SCHEMES if s == ("weight_only" if n in VIEWED else "llm_int8") or n in FEW],
)
def test_whole_models_are_as_good_as_the_reference(name, scheme):
    scheme = SCHEMES[scheme]
    model, inputs = models.ALL[name]()
    y_float, twin = outputs(model, inputs), copy.deepcopy(model)
    assert int8fx.convert(model, scheme) is model
    names = converted_names(model)
    assert names == EXPECTED.get(name, names)
    assert names
    assert {r.scheme for module in packed_modules(model) for r in module.packed_weights.values()} == {scheme}
    y_reference = outputs(as_reference(twin, model, scheme), inputs)
    coarsest = 0.25 if FORMATS[scheme.grouping.format].bits == 8 else 1.0  # random weights, not trained ones
    assert_as_good_as_the_reference(outputs(model, inputs), y_reference, y_float, coarsest)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit", "t5"])
def test_every_linear_layer_is_within_its_budget(name):
    """Layer by layer, on the inputs that each layer really sees."""
    model, inputs = models.ALL[name]()
    int8fx.convert(model)
    calls = []
    for module in packed_modules(model):
        module.register_forward_hook(lambda m, args, y: calls.append((m, args[0], y)))
    outputs(model, inputs)
    assert len({id(module) for module, _, _ in calls}) == len(converted_names(model))
    for module, x, y in calls:
        assert_within_budget(y, x, module.packed(), Epilogue(None if module.bias is None else module.bias.detach()))
    if name != "t5":
        assert any((x.abs() >= 6).any() for _, x, _ in calls), "no layer saw an outlier"


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gpt_oss", "bert", "transformer", "bare_products"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(name, dtype):
    model, inputs = models.ALL[name](**{"experts_implementation": "eager"} if name in ("mixtral", "gpt_oss") else {})
    model.to(dtype)
    inputs = floats_to(inputs, dtype)
    twin = copy.deepcopy(model)
    exact = outputs(copy.deepcopy(model).double(), floats_to(inputs, torch.float64))
    y_float = outputs(twin, inputs)
    scheme = SCHEMES["weight_only" if name in VIEWED else "llm_int8"]
    int8fx.convert(model, scheme)
    y_reference = outputs(as_reference(twin, model, scheme), inputs)
    y = outputs(model, inputs)
    for key in y:
        assert y[key].dtype == dtype
        rounding = (y_float[key].double() - exact[key]).norm()
        error = (y_reference[key].double() - exact[key]).norm()
        assert (y[key].double() - exact[key]).norm() <= 1.05 * error + 2 * rounding
        assert error < 0.25 * exact[key].norm()


# ---- the model stays what it was ------------------------------------------------------------------------------------


def test_the_object_its_class_config_and_generate_stay():
    model, _ = models.llama()
    cls, config, generate = type(model), model.config, type(model).generate
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    assert int8fx.convert(model) is model
    assert type(model) is cls
    assert model.config is config
    assert type(model).generate is generate
    assert all(m is modules[n] for n, m in model.named_modules())
    assert all(isinstance(m, nn.Linear) for n, m in model.named_modules() if n in converted_names(model))
    left = dict(model.named_parameters())
    assert all(p is parameters[n] for n, p in left.items() if not n.endswith(CODES))
    assert parameters.keys() - left.keys() == {f"{n}.weight" for n in converted_names(model)}
    assert left.keys() - parameters.keys() == {f"{n}.weight{CODES}" for n in converted_names(model)}
    assert sum(p.numel() for p in left.values()) == sum(p.numel() for p in parameters.values())
    before = sum(p.nbytes for n, p in parameters.items() if n not in left)
    assert sum(t.nbytes for m in packed_modules(model) for t in (*m.parameters(), *m.buffers())) < 0.3 * before


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("scheme", ["llm_int8", "weight_only"])
def test_generate(name, scheme):
    model, inputs = models.ALL[name]()
    int8fx.convert(model, SCHEMES[scheme])
    ids = inputs["input_ids"][:1]
    y = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert y.shape == (1, ids.shape[1] + 6)
    if scheme == "weight_only":  # others look for outliers, or round, in a batch that is larger without a cache
        with torch.no_grad():
            logits = [model(y[:, :n], use_cache=False).logits[:, -1] for n in range(ids.shape[1], y.shape[1])]
        assert torch.stack([t.argmax(-1) for t in logits], 1).equal(y[:, ids.shape[1] :])


def test_memory_footprint_of_transformers():
    model, _ = models.llama()
    before = model.get_memory_footprint()
    int8fx.convert(model)
    summary = int8fx.summary(model)
    formats = sum(b.nbytes for name, b in model.named_buffers() if name.endswith(FORMAT))
    assert before - model.get_memory_footprint() + formats == summary.bytes_before - summary.bytes_after


def test_hooks_run():
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


def test_a_shared_module_stays_one_module():
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared), "c": nn.Linear(8, 8)})
    int8fx.convert(model)
    assert model["a"] is model["b"][0] is shared
    assert isinstance(shared, PackedModule)
    assert converted_names(model) == {"a", "c"}


def test_attributes_set_by_others_stay():
    linear = nn.Linear(8, 8)
    linear.note = {"a": 1}
    linear.train(False)
    int8fx.convert(linear)
    assert linear.note == {"a": 1}
    assert not linear.training


def test_the_model_may_be_a_layer_itself():
    linear, x = nn.Linear(40, 24), activation(5, 40, outliers="column")
    assert int8fx.convert(linear) is linear
    assert isinstance(linear, nn.Linear)
    assert_within_budget(linear(x).detach(), x, linear.packed(), Epilogue(linear.bias.detach()))
    assert converted_names(linear) == {"weight"}


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
    biases = [p for n, p in model.named_parameters() if p.requires_grad and "bias" in n and p.numel() > 1]
    assert all(p.grad is not None for p in biases)
    assert not any(b.requires_grad or b.grad is not None for b in model.buffers())


class LoRA(nn.Module):
    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base
        self.a, self.b = nn.Linear(base.in_features, 4, bias=False), nn.Linear(4, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x))


def test_the_gradient_of_a_lora_adapter_is_that_of_the_dequantised_model():
    model = nn.Sequential(LoRA(nn.Linear(16, 16)), LoRA(nn.Linear(16, 8))).double()
    fill = dequantised_twin(model)
    int8fx.convert(model, int8fx.weight_only(), select="base")
    twin, x = fill(model), torch.randn(5, 16, dtype=torch.float64)
    magnitude = copy.deepcopy(twin)
    with torch.no_grad():
        for p in magnitude.parameters():
            p.abs_()
    model(x).pow(2).sum().backward()
    twin(x).pow(2).sum().backward()
    magnitude(x.abs()).pow(2).sum().backward()
    for i in (0, 1):
        for name in ("a", "b"):
            grads = (getattr(m[i], name).weight.grad for m in (model, twin, magnitude))
            assert_equal_sums(*grads, roundings=200)  # eleven sums of 4 to 16 terms follow one another
