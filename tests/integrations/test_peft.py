"""PEFT over packed models: adapters train, merges land within int8's rounding, what cannot be done is refused."""

import copy

import peft
import pytest
import torch
from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, PeftModel, RandLoraConfig, VeraConfig, get_peft_model
from support import models
from torch import Tensor, nn

import int8fx
from int8fx.conversion.packed import PackedModule
from int8fx.schemes import Scheme

MODELS = {
    "llama": {"target_modules": ["q_proj", "down_proj"]},
    "gpt2": {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True},
}
SCHEMES = {"llm_int8": int8fx.llm_int8(), "rotated columns": int8fx.rotated(16, columns=0.05)}


def packed(name: str, scheme: Scheme | None = None) -> tuple[nn.Module, Tensor]:
    model, inputs = models.ALL[name]()
    return int8fx.convert(model.eval(), scheme), inputs["input_ids"]


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The dequantised weights of packed modules, by their path without PEFT's parts."""
    return {
        path.replace("base_model.model.", "").replace(".base_layer", ""): module.dequantize().double()
        for path, module in model.named_modules()
        if isinstance(module, PackedModule)
    }


def deltas(model: PeftModel) -> dict[str, Tensor]:
    """What each adapter adds to its weight, by the same paths."""
    return {
        path.replace("base_model.model.", ""): module.get_delta_weight("default").detach().double()
        for path, module in model.named_modules()
        if hasattr(module, "get_delta_weight") and hasattr(module, "base_layer")
    }


def step_of(module: PackedModule) -> Tensor:
    """The step of each output channel, in the shape of the weight."""
    scale = module._buffers["weight_scale"].double()
    return scale if module.packed_weights["weight"].layout == "KN" else scale[:, None]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("how", ["merge_and_unload", "safe_merge", "merge_adapter"])
def test_a_merge_is_the_sum_rounded_to_int8(name, scheme, how):
    model, ids = packed(name, SCHEMES[scheme])
    model = get_peft_model(model, LoraConfig(r=8, init_lora_weights=False, **MODELS[name])).eval()
    before, added, y = weights(model), deltas(model), logits(model, ids)
    if how == "merge_adapter":
        model.merge_adapter()
        merged = model
    else:
        merged = model.merge_and_unload(safe_merge=how == "safe_merge")
    after, modules = weights(merged), {id(m): m for m in merged.modules() if isinstance(m, PackedModule)}
    assert added
    changed = 0
    for module in modules.values():
        path = next(p for p, m in merged.named_modules() if m is module)
        path = path.replace("base_model.model.", "").replace(".base_layer", "")
        error = (after[path] - before[path] - added.get(path, 0)).abs()
        changed += int((after[path] - before[path]).abs().max() > 0)
        block = abs(module.packed_weights["weight"].scheme.rotation)
        half_step = step_of(module) / 2 * block**0.5  # a rotation spreads one rounding over a block
        assert (error <= half_step * 1.01 + 1e-6 * after[path].abs().max()).all(), path
    assert changed == len(added)
    assert (logits(merged, ids) - y).norm() < 0.05 * y.norm()


@pytest.mark.parametrize("name", MODELS)
def test_unmerging_gives_the_base_back_up_to_rounding(name):
    model, ids = packed(name)
    y = logits(model, ids)
    model = get_peft_model(model, LoraConfig(r=8, init_lora_weights=False, **MODELS[name])).eval()
    model.merge_adapter()
    model.unmerge_adapter()
    with model.disable_adapter():
        assert (logits(model, ids) - y).norm() < 0.05 * y.norm()


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=8, use_dora=True, init_lora_weights=False, target_modules=["q_proj", "down_proj"]),
        LoraConfig(r=8, use_rslora=True, init_lora_weights=False, target_modules=["q_proj", "down_proj"]),
        LoHaConfig(r=4, init_weights=False, target_modules=["q_proj", "down_proj"], alpha=64),
        LoKrConfig(r=4, init_weights=False, target_modules=["q_proj", "down_proj"], alpha=64),
        VeraConfig(r=4, init_weights=False, target_modules=["q_proj"]),
    ],
    ids=lambda c: "DoRA" if getattr(c, "use_dora", False) else type(c).__name__,
)
def test_other_adapters_merge(config):
    model, ids = packed("llama")
    y0 = logits(model, ids)
    model = get_peft_model(model, config).eval()
    y = logits(model, ids)
    z = logits(model.merge_and_unload(), ids)
    assert (y - y0).norm() > 0.02 * y0.norm()  # the adapter does something
    assert (z - y).norm() < 0.05 * y.norm()
    assert not torch.equal(z, y0)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_delta_that_outweighs_the_base_is_merged_to_half_a_step(scheme):
    """RandLora's, drawn at random, is ten times as large as the weight."""
    model, _ = packed("llama", SCHEMES[scheme])
    config = RandLoraConfig(r=4, init_weights=False, randlora_alpha=40, target_modules=["q_proj", "down_proj"])
    model = get_peft_model(model, config).eval()
    before, added = weights(model), deltas(model)
    model.merge_adapter()
    after, modules = weights(model), dict(model.named_modules())
    assert added
    for path, delta in added.items():
        assert delta.norm() > 3 * before[path].norm()
        module = modules[f"base_model.model.{path}.base_layer"]
        half_step = step_of(module) / 2 * abs(module.packed_weights["weight"].scheme.rotation) ** 0.5
        assert ((after[path] - before[path] - delta).abs() <= 1.01 * half_step).all(), path


@pytest.mark.parametrize("init", ["pissa", "olora", "gaussian", "pissa_niter_4"])
def test_initialisations_that_change_the_base_weight(init):
    """PiSSA and OLoRA move a part of the weight into the adapter: the sum stays, up to int8's rounding."""
    model, ids = packed("llama")
    y = logits(model, ids)
    model = get_peft_model(model, LoraConfig(r=4, init_lora_weights=init, target_modules=["q_proj", "down_proj"]))
    assert (logits(model.eval(), ids) - y).norm() < 0.05 * y.norm()


IA3 = {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}


def test_ia3_runs_and_peft_refuses_its_merge():
    model, ids = packed("llama")
    model = get_peft_model(model, IA3Config(init_ia3_weights=False, **IA3)).eval()
    y = logits(model, ids)
    with model.disable_adapter():
        assert not torch.equal(logits(model, ids), y)
    with pytest.raises(ValueError, match="Cannot merge ia3 layers when the model is loaded in 8-bit mode"):
        model.merge_and_unload()


TRAINED = {
    "llama": ("llama", LoraConfig(r=4, init_lora_weights=False, **MODELS["llama"])),
    "gpt2": ("gpt2", LoraConfig(r=4, init_lora_weights=False, **MODELS["gpt2"])),
    "IA3": ("llama", IA3Config(init_ia3_weights=False, **IA3)),
}


@pytest.mark.parametrize("case", TRAINED)
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_are_those_over_the_dequantised_model(case, compiled):
    name, config = TRAINED[case]
    floats, inputs = models.ALL[name]()
    ids, model = inputs["input_ids"], int8fx.convert(copy.deepcopy(floats).eval(), int8fx.weight_only())
    floats.eval()
    for path, module in model.named_modules():
        if isinstance(module, PackedModule):
            floats.get_submodule(path).weight.data = module.dequantize()
    gradients = []
    for base in (model, floats):
        torch.manual_seed(0)
        tuned = get_peft_model(base, config)
        run = torch.compile(tuned, backend="aot_eager") if compiled and base is model else tuned
        run(input_ids=ids, use_cache=False).logits.square().mean().backward()
        gradients.append({n: p.grad for n, p in tuned.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() != set()
    for key, gradient in gradients[1].items():
        assert (gradients[0][key] - gradient).norm() <= 1e-4 * gradient.norm(), key
    torch._dynamo.reset()


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_k_bit_recipe(reentrant):
    model, ids = packed("llama")
    model = peft.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert model.is_gradient_checkpointing
    assert model.get_input_embeddings()(ids).requires_grad
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"])).train()
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_" in n)


TRAINING = {
    "DoRA": LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "down_proj"]),
    "rsLoRA": LoraConfig(r=4, use_rslora=True, target_modules=["q_proj", "down_proj"]),
    "PiSSA": LoraConfig(r=4, init_lora_weights="pissa", target_modules=["q_proj", "down_proj"]),
    "OLoRA": LoraConfig(r=4, init_lora_weights="olora", target_modules=["q_proj", "down_proj"]),
    "LoHa": LoHaConfig(r=4, target_modules=["q_proj", "down_proj"]),
    "LoKr": LoKrConfig(r=4, target_modules=["q_proj", "down_proj"]),
    "VeRA": VeraConfig(r=4, target_modules=["q_proj"]),
    "IA3": IA3Config(**IA3),
}


@pytest.mark.parametrize("name", TRAINING)
def test_training_lowers_the_loss(name):
    model, ids = packed("llama")
    model = get_peft_model(model, copy.deepcopy(TRAINING[name]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.03
    if name != "IA3":
        merged = model.merge_and_unload()
        assert merged(input_ids=ids, labels=ids).loss < losses[0] - 0.03


def test_adapters_that_are_there_before_stay_trainable():
    model, inputs = models.llama()
    ids = inputs["input_ids"]
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    before = {n for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    int8fx.convert(model)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == before
    assert len(int8fx.summary(model).converted) == 14
    y = logits(model, ids)
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(logits(model, ids), y)


@pytest.mark.parametrize("source", ["float", "int8"])
def test_an_adapter_moves_between_float_and_int8(source, tmp_path):
    floats, inputs = models.llama()
    int8, ids = int8fx.convert(copy.deepcopy(floats)), inputs["input_ids"]
    first, second = (floats, int8) if source == "float" else (int8, floats)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    tuned = get_peft_model(first, config).eval()
    y = logits(tuned, ids)
    tuned.save_pretrained(tmp_path)
    z = logits(PeftModel.from_pretrained(second, str(tmp_path)).eval(), ids)
    assert (z - y).norm() < 0.1 * y.norm()


def test_attention_is_refused_and_left_as_it_was():
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(64, 4, batch_first=True)}).eval()
    int8fx.convert(model)
    x = torch.randn(2, 5, 64)
    y = model["attn"](x, x, x)[0]
    with pytest.raises(TypeError, match=r"'attn.in_proj_weight' is a packed nn.MultiheadAttention"):
        get_peft_model(model, LoraConfig(r=4, target_modules=["attn"]))
    assert torch.equal(model["attn"](x, x, x)[0], y)


@pytest.mark.parametrize(
    ("named", "layer"),
    [("layers.1.mlp.up_proj", "model.layers.1.mlp.up_proj"), ("layers.1.mlp", "model.layers.1.mlp.gate_proj")],
)
def test_a_copy_of_a_packed_layer_that_is_to_be_trained_is_refused(named, layer):
    model, _ = packed("llama")
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=[named])
    with pytest.raises(TypeError, match=rf"modules_to_save .* '{layer}'.*skip=\['{layer}'\]"):
        get_peft_model(model, config)
    with pytest.raises(TypeError, match="is int8 and is not trained; train adapters"):
        model.model.layers[0].mlp.up_proj.requires_grad_()


def test_a_layer_in_16_bits_is_trained_whole_and_packed_layers_are_still_copied():
    model, inputs = models.llama()
    int8fx.convert(model.eval(), skip=["layers.1.mlp.up_proj"])
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["layers.1.mlp.up_proj"])
    model = get_peft_model(model, config)
    model(input_ids=inputs["input_ids"], labels=inputs["input_ids"]).loss.backward()
    trained = model.base_model.model.model.layers[1].mlp.up_proj.modules_to_save["default"]
    assert trained.weight.grad.norm() > 0
    assert len(int8fx.summary(copy.deepcopy(model)).converted) == 13


# ---- adapters for a Parameter (target_parameters) --------------------------------------------------------------------

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize(
    ("targets", "modules"),
    [(EXPERTS, []), (EXPERTS[:1], ["q_proj"]), (["down_proj"], ["q_proj"]), (["experts.gate_up_proj_codes"], [])],
)
def test_an_adapter_for_packed_experts_is_refused(name, targets, modules):
    model, ids = packed(name)
    y = logits(model, ids)
    with pytest.raises(TypeError, match=r"target_parameters .* 'model.layers.0.mlp.experts.\w+_proj' is int8.*skip="):
        get_peft_model(model, LoraConfig(r=4, target_modules=modules, target_parameters=targets))
    assert torch.equal(logits(model, ids), y)


def test_an_adapter_for_the_parameter_of_a_packed_linear_layer_is_refused():
    model, _ = packed("llama")
    with pytest.raises(TypeError, match=r"'q_proj.weight', and the weight 'model.layers.0.self_attn.q_proj' is int8"):
        get_peft_model(model, LoraConfig(r=4, target_modules=[], target_parameters=["q_proj.weight"]))


def test_other_parameters_of_a_packed_model_take_an_adapter():
    """A name that only ends alike is another Parameter; one in 16 bits is adapted beside packed layers."""
    model, inputs = models.mixtral()
    model = int8fx.convert(model.eval(), skip=["*.experts.*"])
    config = LoraConfig(r=4, target_modules=[], target_parameters=EXPERTS, init_lora_weights=False)
    y = logits(model, inputs["input_ids"])
    model = get_peft_model(model, config)
    assert len(int8fx.summary(model).converted) == 8
    assert not torch.allclose(logits(model, inputs["input_ids"]), y)
    packed_model, _ = packed("llama")
    with pytest.raises(ValueError, match="no `target_parameters` found"):
        get_peft_model(packed_model, LoraConfig(r=4, target_modules=[], target_parameters=["proj.weight"]))


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("targets", [EXPERTS, EXPERTS[:1]])
def test_experts_with_adapters_stay_in_16_bits(name, targets):
    """Outputs and gradients are those over the model whose packed layers are dequantised, and a merge is exact."""
    floats, inputs = models.ALL[name]()
    ids, config = inputs["input_ids"], LoraConfig(r=4, target_modules=["q_proj"], target_parameters=targets)
    config.init_lora_weights = False
    torch.manual_seed(0)
    model = get_peft_model(floats.eval(), config)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    reference = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="PEFT adapts a Parameter of its module"):
        int8fx.convert(model, int8fx.weight_only())
    rows = int8fx.summary(model)
    assert {row.name.rpartition(".")[2] for row in rows.converted} >= {"base_layer", "k_proj", "v_proj", "o_proj"}
    assert all("experts" not in row.name for row in rows.converted)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trainable
    for path, module in model.named_modules():
        if isinstance(module, PackedModule):
            reference.get_submodule(path).weight.data = module.dequantize()
    gradients = []
    for tuned in (model, reference):
        y = tuned(input_ids=ids, use_cache=False).logits
        y.square().mean().backward()
        gradients.append([y.detach(), *(p.grad for p in tuned.parameters() if p.requires_grad)])
    for mine, expected in zip(*gradients, strict=True):
        assert expected.norm() > 0
        assert (mine - expected).norm() <= 1e-4 * expected.norm()
    merged, expected = model.merge_and_unload(), reference.merge_and_unload()
    for target in targets:
        path = f"model.layers.0.mlp.{target}"
        assert torch.equal(merged.get_parameter(path), expected.get_parameter(path))


def test_merged_experts_are_converted_when_they_are_selected():
    model, inputs = models.mixtral()
    config = LoraConfig(r=4, target_modules=[], target_parameters=EXPERTS, init_lora_weights=False)
    model = get_peft_model(model.eval(), config)
    with pytest.warns(UserWarning, match="PEFT adapts a Parameter of its module"):
        int8fx.convert(model)
    y = logits(model, inputs["input_ids"])
    model = int8fx.convert(model.merge_and_unload(), select=["*.experts.*"])
    assert len(int8fx.summary(model).converted) == 8 + 4
    assert 0 < (logits(model, inputs["input_ids"]) - y).norm() < 0.05 * y.norm()


def test_experts_with_adapters_are_not_converted_even_if_selected():
    model, _ = models.mixtral()
    model = get_peft_model(model.eval(), LoraConfig(r=4, target_modules=[], target_parameters=EXPERTS))
    with pytest.warns(UserWarning, match="no layer was converted"):
        int8fx.convert(model, select=["*.gate_up_proj"])
    reasons = {row.reason for row in int8fx.summary(model).left if "gate_up_proj" in row.name}
    assert len(reasons) == 1
    assert "PEFT adapts a Parameter of its module" in reasons.pop()
