"""What is left unless it is selected: heads, routers, what models keep in float32, and what is being trained."""

import copy

import pytest
import torch
import transformers
from support.conversion import converted_names, reasons
from torch import nn

import int8fx
from int8fx.conversion.layers import HEAD, ROUTER, TASK_HEAD, TRAINABLE, TRAINED_WHOLE

HIDDEN, EXPERTS = 16, 4


def linear(N: int = HIDDEN, K: int = HIDDEN) -> nn.Linear:
    return nn.Linear(K, N)


def mlp() -> nn.ModuleDict:
    return nn.ModuleDict({"gate_proj": linear(), "up_proj": linear(), "down_proj": linear()})


class Tree(nn.Module):
    """A module with the given children and Parameters, whose forward multiplies by each Parameter of itself."""

    def __init__(self, **entries: nn.Module | torch.Tensor) -> None:
        super().__init__()
        for name, entry in entries.items():
            setattr(self, name, entry if isinstance(entry, nn.Module) else nn.Parameter(entry))
        self.names = list(self._parameters)

    def forward(self, x):
        return [x @ getattr(self, name) for name in self.names]


def fused_experts() -> Tree:
    return Tree(up=torch.randn(EXPERTS, HIDDEN, 8), down=torch.randn(EXPERTS, 8, HIDDEN))


def several(make=mlp, count: int = EXPERTS) -> nn.ModuleList:
    return nn.ModuleList(make() for _ in range(count))


def with_reason(model: nn.Module, reason: str) -> set[str]:
    return {name for name, found in reasons(model).items() if found == reason}


# ---- routers --------------------------------------------------------------------------------------------------------

ROUTERS = {
    "beside fused experts": ({"gate": linear(EXPERTS), "experts": fused_experts()}, {"gate"}),
    "of any name beside fused experts": ({"switch": linear(EXPERTS), "experts": fused_experts()}, {"switch"}),
    "with an output for no expert": ({"switch": linear(EXPERTS + 1), "experts": fused_experts()}, {"switch"}),
    "a module": ({"router": Tree(layer=linear(EXPERTS)), "experts": fused_experts()}, {"router.layer"}),
    "a module that holds the weight": ({"gate": Tree(w=torch.randn(HIDDEN, 9)), "experts": several()}, {"gate.w"}),
    "of several layers": ({"gate": Tree(down=linear(), mlp=Tree(out=linear(9))), "experts": several()},
        {"gate.down", "gate.mlp.out"}),
    "beside a list of experts": ({"gate": linear(EXPERTS), "experts": several()}, {"gate"}),
    "of any name beside a list": ({"pick": linear(EXPERTS), "experts": several()}, {"pick"}),
    "beside a dict of experts": ({"router": Tree(classifier=linear(EXPERTS)),
        "experts": nn.ModuleDict({f"expert_{i}": mlp() for i in range(EXPERTS)})}, {"router.classifier"}),
    "beside experts that stay": ({"pick": linear(EXPERTS + 3), "router_layer": linear(EXPERTS + 3),
        "experts": Tree(mlp=nn.Bilinear(4, 4, 12))}, {"router_layer"}),
    "in the module of the experts": ({"moe": Tree(gate=linear(EXPERTS), w=torch.randn(EXPERTS, HIDDEN, 8))},
        {"moe.gate"}),
    "one for each task": ({"gates": several(lambda: linear(EXPERTS), 2), "experts": several()},
        {"gates.0", "gates.1"}),
}  # fmt: skip


@pytest.mark.parametrize("what", ROUTERS)
def test_a_router_stays(what):
    entries, routers = ROUTERS[what]
    block = Tree(attention=linear(EXPERTS), mlp=Tree(**copy.deepcopy(entries)))
    for path, model in {"mlp.": block, "layers.0.mlp.": Tree(layers=nn.ModuleList([block]))}.items():
        model = copy.deepcopy(model)
        before = {name for name, row in ((r.name, r) for r in int8fx.summary(model).rows) if "float" in row.reason}
        int8fx.convert(model)
        assert with_reason(model, ROUTER) == {path + router for router in routers}
        assert converted_names(model) == before
        assert {path.replace("mlp.", "attention")} <= converted_names(model)


NO_ROUTERS = {
    "beside a 1x1 convolution": {"up": linear(EXPERTS), "conv": Tree(inner=nn.Conv1d(HIDDEN, EXPERTS, 1))},
    "called gate, without experts": {"gate": linear(EXPERTS), "up": linear()},
    "in a shared expert as wide as there are experts": {"experts": fused_experts(),
        "shared_expert": nn.ModuleDict({"gate_proj": linear(EXPERTS), "up_proj": linear(EXPERTS)})},
    "shared experts alone": {"gate": linear(2), "shared_experts": several(count=2)},
    "the gate of a shared expert": {"experts": fused_experts(), "shared_expert_gate": linear(1)},
    "of another width beside experts": {"experts": several(), "up": linear(EXPERTS + 2), "down": linear(EXPERTS - 1)},
    "gates inside experts": {"experts": several(lambda: nn.ModuleDict({"gate": linear(EXPERTS)}))},
    "a query of one row": {"up": linear(1), "pool": Tree(query=torch.randn(1, HIDDEN, 8))},
}  # fmt: skip


@pytest.mark.parametrize("what", NO_ROUTERS)
def test_no_router(what):
    model = Tree(mlp=Tree(**copy.deepcopy(NO_ROUTERS[what])))
    int8fx.convert(model)
    assert not with_reason(model, ROUTER)
    assert all("convolution" in reason for reason in reasons(model).values())


def test_a_router_stays_when_its_experts_were_converted_before():
    model = Tree(mlp=Tree(pick=linear(EXPERTS), experts=fused_experts(), out=linear()))
    int8fx.convert(model, select="experts")
    assert reasons(model) == {"mlp.pick": "not selected", "mlp.out": "not selected"}
    int8fx.convert(model, skip="experts")
    assert reasons(model) == {"mlp.pick": ROUTER}
    int8fx.convert(model, select="pick")
    assert reasons(model) == {}


class ConformerLayer(nn.Module):
    def __init__(self, d: int = 32) -> None:
        super().__init__()
        self.ff, self.q = nn.Sequential(nn.Linear(d, 4 * d), nn.SiLU(), nn.Linear(4 * d, d)), nn.Linear(d, d)
        self.conv = nn.Sequential(nn.Conv1d(d, 2 * d, 1), nn.GLU(1), nn.Conv1d(d, d, 1))


def test_the_layers_of_a_conformer_are_no_routers():
    model = nn.ModuleDict({"frontend": nn.Conv1d(32, 32, 1), "layer": ConformerLayer(), "proj": nn.Linear(32, 32)})
    int8fx.convert(model)
    assert {"layer.ff.0", "layer.ff.2", "layer.q", "proj"} <= converted_names(model)


MOE = {
    "vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "intermediate_size": 24, "moe_intermediate_size": 16, "num_experts_per_tok": 2,
}  # fmt: skip
SEQ2SEQ = {"vocab_size": 32, "d_model": 32, "d_kv": 16, "d_ff": 24, "num_layers": 2, "num_heads": 2}


def tiny(name: str, head: str = "ForCausalLM", **sizes) -> nn.Module:
    config = getattr(transformers, name + "Config")(**sizes)
    return getattr(transformers, name + head)(config)


ROUTERS_OF_MODELS = {  # a model, the names of its routers below a block, and how many blocks it has
    "Mixtral": (lambda: tiny("Mixtral", **MOE, num_local_experts=4), {"mlp.gate"}, 2),
    "Qwen3Next": (
        # as many experts as a shared expert has channels, as in its default configuration
        lambda: tiny("Qwen3Next", **MOE, num_experts=16, shared_expert_intermediate_size=16, head_dim=16),
        {"mlp.gate"}, 2),
    "Switch": (
        lambda: tiny("SwitchTransformers", "ForConditionalGeneration", **SEQ2SEQ, num_experts=4,
            num_sparse_encoder_layers=1, num_sparse_decoder_layers=1), {"mlp.router.classifier"}, 2),
    "LongcatFlash": (
        lambda: tiny("LongcatFlash", **MOE, ffn_hidden_size=24, expert_ffn_hidden_size=16, n_routed_experts=4,
            zero_expert_num=2, moe_topk=2, q_lora_rank=16, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8,
            v_head_dim=8, num_layers=2), {"mlp.router.classifier"}, 1),
    "DBRX": (
        lambda: tiny("Dbrx", vocab_size=32, d_model=32, n_heads=2, n_layers=2, max_seq_len=32,
            attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
            ffn_config={"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32}),
        {"ffn.router.layer"}, 2),
    "JetMoe": (
        lambda: tiny("JetMoe", vocab_size=32, hidden_size=32, num_hidden_layers=2, num_key_value_heads=2,
            kv_channels=16, intermediate_size=24, num_local_experts=4, num_experts_per_tok=2),
        {"mlp.router.layer", "self_attention.experts.router.layer"}, 4),
}  # fmt: skip


@pytest.mark.parametrize("name", ROUTERS_OF_MODELS)
def test_routers_of_models(name):
    make, expected, count = ROUTERS_OF_MODELS[name]
    model = make()
    int8fx.convert(model)
    left, converted = reasons(model), converted_names(model)
    assert all(any(n.endswith(end) for end in expected) for n in with_reason(model, ROUTER)), left
    assert not {n for n in converted if any(n.endswith(end) for end in expected)}
    assert len([n for n in left if any(n.endswith(end) for end in expected)]) == count
    if name == "Qwen3Next":
        assert "model.layers.0.mlp.shared_expert.gate_proj" in converted


# ---- heads ----------------------------------------------------------------------------------------------------------

ENCODER = {
    "vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 32,
}  # fmt: skip
DECODER = {**ENCODER, "num_key_value_heads": 2, "pad_token_id": 0}
IMAGES = {**ENCODER, "image_size": 16, "patch_size": 8}
HEADS_OF_MODELS = {
    ("Llama", "ForSequenceClassification"): (DECODER, {"score"}),
    ("Llama", "ForQuestionAnswering"): (DECODER, {"qa_outputs"}),
    ("Llama", "ForTokenClassification"): (DECODER, {"score"}),
    ("Bert", "ForSequenceClassification"): (ENCODER, {"classifier"}),
    ("Bert", "ForTokenClassification"): (ENCODER, {"classifier"}),
    ("Bert", "ForQuestionAnswering"): (ENCODER, {"qa_outputs"}),
    ("Bert", "ForNextSentencePrediction"): (ENCODER, {"cls.seq_relationship"}),
    ("Roberta", "ForSequenceClassification"): (ENCODER, {"classifier.dense", "classifier.out_proj"}),
    ("T5", "ForTokenClassification"): (SEQ2SEQ, {"classifier"}),
    ("ViT", "ForImageClassification"): (IMAGES, {"classifier"}),
    ("Bert", "Model"): (ENCODER, set()),
    ("Llama", "Model"): (DECODER, set()),
    ("Llama", "ForCausalLM"): (DECODER, set()),
    ("Bert", "ForMaskedLM"): (ENCODER, set()),
    ("ViTMAE", "ForPreTraining"): (  # its decoder stands beside the base model, and is no head
        {**IMAGES, "decoder_hidden_size": 16, "decoder_intermediate_size": 16, "decoder_num_attention_heads": 2,
         "decoder_num_hidden_layers": 1}, set()),
}  # fmt: skip


@pytest.mark.parametrize(("name", "head"), HEADS_OF_MODELS)
@pytest.mark.parametrize("wrapped", [False, True])
def test_the_heads_of_models_stay(name, head, wrapped):
    sizes, heads = HEADS_OF_MODELS[name, head]
    model = tiny(name, head, **sizes)
    holder = nn.ModuleDict({"inner": model}) if wrapped else model
    prefix = "inner." if wrapped else ""
    int8fx.convert(holder)
    assert with_reason(holder, TASK_HEAD) == {prefix + n for n in heads}
    if name == "Bert" and head in ("Model", "ForSequenceClassification"):
        assert any(n.endswith("pooler.dense") for n in converted_names(holder))
    if heads:
        int8fx.convert(holder, select=sorted(heads))
        assert {prefix + n for n in heads} <= converted_names(holder)


def test_heads_of_other_models_by_name():
    model = nn.ModuleDict({n: linear() for n in ("score", "classifier", "qa_outputs", "lm_head", "scores", "head")})
    model["vgg"] = nn.ModuleDict({"classifier": nn.Sequential(linear(), nn.ReLU(), linear())})
    int8fx.convert(model)
    assert converted_names(model) == {"scores", "head", "vgg.classifier.0", "vgg.classifier.2"}
    assert with_reason(model, TASK_HEAD) == {"score", "classifier", "qa_outputs"}
    assert with_reason(model, HEAD) == {"lm_head"}


# ---- kept in float32 ------------------------------------------------------------------------------------------------


class Keeping(nn.Module):
    def __init__(self, patterns, strict=()) -> None:
        super().__init__()
        self._keep_in_fp32_modules, self._keep_in_fp32_modules_strict = patterns, strict
        self.former = nn.ModuleDict({"wo": linear(), "wo2": linear()})
        self.layers = several(lambda: nn.ModuleDict({"wo": linear(), "two": linear(), "other": linear()}), 12)


PATTERNS = {
    "a suffix": ("layers.3.wo", {"layers.3.wo"}),
    "a suffix, of a part": ("wo", {"former.wo", *(f"layers.{i}.{n}" for i in range(12) for n in ("wo", "two"))}),
    "the beginning": ("former", {"former.wo", "former.wo2"}),
    "the beginning, up to the end of a part": ("layers.1", {f"layers.1.{n}" for n in ("wo", "two", "other")}),
    "a regular expression": (r"layers\.\d+\.other", {f"layers.{i}.other" for i in range(12)}),
    "alternatives": ("nothing|former", {"former.wo", "former.wo2"}),
    "a parameter": ("former.wo.weight", {"former.wo"}),
    "the middle": ("3", set()),
    "nothing": ("form", set()),
}


@pytest.mark.parametrize("what", PATTERNS)
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("prefix", ["", "outer.0."])
def test_what_a_model_keeps_in_float32_stays(what, strict, prefix):
    pattern, names = PATTERNS[what]
    inner = Keeping([], {pattern}) if strict else Keeping([pattern])
    model = nn.ModuleDict({"outer": nn.ModuleList([inner]), "beside": linear()}) if prefix else inner
    int8fx.convert(model)
    attribute = "_keep_in_fp32_modules_strict" if strict else "_keep_in_fp32_modules"
    reason = f"kept in float32 by the model's {attribute}: {pattern!r}, left unless selected"
    assert with_reason(model, reason) == set(reasons(model)) == {prefix + name for name in names}


def test_what_models_of_transformers_keep_in_float32():
    """As quantisers in transformers do: T5's ``wo``, also inside another model."""
    model = tiny("T5", "ForConditionalGeneration", **SEQ2SEQ)
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    patterns = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    linears = {n for n, m in model.named_modules() if type(m) is nn.Linear}
    expected = {n for n in linears if should_convert_module(n, patterns)}
    assert any(n.endswith("wo") for n in linears - expected)
    assert any(n.endswith("wi") for n in expected)
    int8fx.convert(model)
    assert converted_names(model) == expected
    int8fx.convert(model, select="wo")
    assert converted_names(model) == linears - {"lm_head"}


# ---- what is being trained ------------------------------------------------------------------------------------------


def adapted() -> nn.ModuleDict:
    """Two frozen layers, one of them with an adapter."""
    model = nn.ModuleDict({"base": linear(), "other": linear(), "adapter": Tree(a=linear(4), b=torch.randn(4, HIDDEN))})
    for name in ("base", "other"):
        model[name].requires_grad_(False)
    return model


def test_what_is_trained_beside_frozen_weights_stays_and_trains():
    model = adapted()
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    forecast = {r.name: r.reason for r in int8fx.summary(model).rows}
    int8fx.convert(model)
    assert converted_names(model) == {"base", "other"}
    assert reasons(model) == {"adapter.a": TRAINABLE, "adapter.b": TRAINABLE}
    assert {n for n, reason in forecast.items() if reason == TRAINABLE} == {"adapter.a", "adapter.b"}
    assert all(dict(model.named_parameters())[n] is p and p.requires_grad for n, p in parameters.items())
    int8fx.convert(model, select="adapter.a")
    assert reasons(model) == {"adapter.b": "not selected"}


NOT_TRAINED = {
    "all require grad": lambda model: model.requires_grad_(True),
    "none requires grad": lambda model: model.requires_grad_(False),
    "only a bias is frozen": lambda model: model.requires_grad_(True)["base"].bias.requires_grad_(False),
    "only biases are trained": lambda model: [p.requires_grad_(p.dim() == 1) for p in model.parameters()],
    "only a table is frozen": lambda model: (
        model.requires_grad_(True).update({"table": nn.Embedding(4, HIDDEN).requires_grad_(False)})),
    "only a convolution is frozen": lambda model: (
        model.requires_grad_(True).update({"conv": nn.Conv2d(4, HIDDEN, 1).requires_grad_(False)})),
    "only the head is frozen": lambda model: (
        model.requires_grad_(True).update({"lm_head": linear().requires_grad_(False)})),
}  # fmt: skip


@pytest.mark.parametrize("what", NOT_TRAINED)
def test_a_model_without_adapters_is_converted(what):
    model = adapted()
    NOT_TRAINED[what](model)
    int8fx.convert(model)
    assert {"base", "other", "adapter.a", "adapter.b"} <= converted_names(model)


@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "vera"])
def test_adapters_of_peft_that_are_there_before(kind):
    import peft

    target = {"target_modules": ["q_proj", "v_proj"]}
    config = {
        "lora": lambda: peft.LoraConfig(**target, r=4, init_lora_weights=False),
        "dora": lambda: peft.LoraConfig(**target, r=4, use_dora=True, init_lora_weights=False),
        "loha": lambda: peft.LoHaConfig(**target, r=4, init_weights=False),
        "vera": lambda: peft.VeraConfig(**target, r=4),
    }[kind]()
    model = peft.get_peft_model(tiny("Llama", **DECODER), config)
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    linears = {n for n, m in model.named_modules() if type(m) is nn.Linear and not n.endswith("lm_head")}
    adapters = {n.removesuffix(".weight") for n in trainable}
    optimizer = torch.optim.SGD(trainable.values(), lr=1.0)
    int8fx.convert(model)
    assert converted_names(model) == linears - adapters
    assert any(n.endswith("q_proj.base_layer") for n in linears - adapters)
    assert {n: p for n, p in model.named_parameters() if p.requires_grad} == trainable
    ids = torch.randint(32, (2, 5))
    before = model(input_ids=ids).logits.detach()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert not torch.equal(model(input_ids=ids).logits, before)


def test_modules_that_peft_trains_whole_stay():
    import peft

    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"], modules_to_save=["score", "up_proj"])
    model = peft.get_peft_model(tiny("Llama", "ForSequenceClassification", **DECODER), config)
    int8fx.convert(model)
    wrapped = {
        f"base_model.model.{path}.{copy_}"
        for path in ("score", "model.layers.0.mlp.up_proj")
        for copy_ in ("original_module", "modules_to_save.default")
    }
    assert with_reason(model, TRAINED_WHOLE) == wrapped
    assert "base_model.model.model.layers.0.mlp.down_proj" in converted_names(model)
