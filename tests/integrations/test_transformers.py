"""transformers: models are quantised while they load, say what they are, and come back as they were saved."""

import copy
import filecmp
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support import models
from support.conversion import SCHEMES, dequantized_in
from torch import Tensor, nn

import int8fx
from int8fx.conversion.packed import PackedModule, tensors_of

SHARDS = {"max_shard_size": "60KB"}
FAMILIES = ["llama", "gpt2", "mixtral", "gpt_oss", "t5", "bert", "vit"]
WITH_HEADS = ["llama", "gpt2", "t5"]
ROUND_TRIPS = [
    (name, scheme, None if select is None else ["*"])
    for name in FAMILIES
    for scheme in ("llm_int8", "rotated columns")
    for select in ((None, "*") if name in WITH_HEADS else (None,))
]


def made(name: str) -> tuple[transformers.PreTrainedModel, dict]:
    model, inputs = models.ALL[name]()
    inputs.pop("use_cache", None)
    return model.eval(), inputs


def outputs(model: nn.Module, inputs: dict) -> list[Tensor]:
    with torch.no_grad():
        y = model(**inputs)
    return [t for t in y.values() if isinstance(t, Tensor)]


def assert_same_tensors(model: nn.Module, other: nn.Module) -> None:
    state, expected = model.state_dict(), other.state_dict()
    assert state.keys() == expected.keys()
    assert [key for key in state if not torch.equal(state[key], expected[key])] == []
    assert [key for key in state if state[key].dtype != expected[key].dtype] == []


def assert_same_files(folder: Path, other: Path) -> None:
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    assert filecmp.cmpfiles(folder, other, names, shallow=False)[1:] == ([], [])


@pytest.fixture
def saved(tmp_path) -> Path:
    """A directory with a converted llama."""
    model, _ = made("llama")
    int8fx.convert(model, int8fx.rotated(16, columns=0.05)).save_pretrained(tmp_path / "int8")
    return tmp_path / "int8"


# ---- loading and saving ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "scheme", "select"), ROUND_TRIPS)
def test_a_model_is_quantised_while_it_loads_and_comes_back_bit_by_bit(name, scheme, select, tmp_path):
    model, inputs = made(name)
    cls, scheme = type(model), SCHEMES[scheme]
    model.save_pretrained(tmp_path / "float", **SHARDS)
    config = int8fx.Int8FxConfig(scheme, select=select)
    model = cls.from_pretrained(tmp_path / "float", quantization_config=config).eval()
    expected = int8fx.convert(cls.from_pretrained(tmp_path / "float").eval(), scheme, select=select)
    assert_same_tensors(model, expected)
    y = outputs(model, inputs)
    expected.save_pretrained(tmp_path / "converted", **SHARDS)
    model.save_pretrained(tmp_path / "loaded", **SHARDS)
    assert_same_files(tmp_path / "converted", tmp_path / "loaded")
    again = cls.from_pretrained(tmp_path / "loaded").eval()
    assert_same_tensors(again, model)
    assert all(torch.equal(a, b) for a, b in zip(outputs(again, inputs), y, strict=True))
    assert {(r.name, r.scheme) for r in int8fx.summary(again).rows} == {
        (r.name, r.scheme) for r in int8fx.summary(model).rows
    }
    again.save_pretrained(tmp_path / "again", **SHARDS)
    assert_same_files(tmp_path / "loaded", tmp_path / "again")


def test_whisper_comes_back(tmp_path):
    sizes = {"d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "max_source_positions": 50, "num_mel_bins": 16}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128}
    ids = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = transformers.WhisperConfig(**sizes, **heads, **ids)
    model = transformers.WhisperForConditionalGeneration(config).eval()
    inputs = {"input_features": torch.randn(1, 16, 100), "decoder_input_ids": torch.tensor([[1, 2]])}
    int8fx.convert(model).save_pretrained(tmp_path / "1")
    again = type(model).from_pretrained(tmp_path / "1").eval()
    assert all(torch.equal(a, b) for a, b in zip(outputs(again, inputs), outputs(model, inputs), strict=True))
    again.save_pretrained(tmp_path / "2")
    assert_same_files(tmp_path / "1", tmp_path / "2")


def test_a_scheme_for_each_layer_comes_back(tmp_path):
    model, inputs = made("llama")
    for select, scheme in {"q_proj": int8fx.rotated(32), "down_proj": int8fx.llm_int8(5.0)}.items():
        int8fx.convert(model, scheme, select=select)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert {(r.name, r.scheme) for r in int8fx.summary(again).converted} == {
        (r.name, r.scheme) for r in int8fx.summary(model).converted
    }
    assert torch.equal(outputs(again, inputs)[0], outputs(model, inputs)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_another_dtype(dtype, tmp_path):
    model, _ = made("llama")
    model.save_pretrained(tmp_path / "float")
    config = int8fx.Int8FxConfig("rotated(16, columns=0.05)")
    model = type(model).from_pretrained(tmp_path / "float", dtype=dtype, quantization_config=config)
    floats = type(model).from_pretrained(tmp_path / "float", dtype=dtype)
    assert_same_tensors(model, int8fx.convert(floats, config.scheme))
    assert model.dtype == dtype
    assert {b.dtype for n, b in model.named_buffers() if n.endswith("weight_scale")} == {torch.float32}
    model.save_pretrained(tmp_path / "int8")
    assert_same_tensors(type(model).from_pretrained(tmp_path / "int8"), model)


def test_a_base_model_loads_from_the_checkpoint_with_a_head_and_the_other_way_round(saved, tmp_path):
    with_head = transformers.LlamaForCausalLM.from_pretrained(saved)
    base = transformers.LlamaModel.from_pretrained(saved)
    assert_same_tensors(base, with_head.model)
    base.save_pretrained(tmp_path / "base")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    assert_same_tensors(again.model, base)
    assert not int8fx.is_packed(again.lm_head)


def test_float_weights_are_freed_group_by_group(tmp_path):
    """At most one group of weights, those whose columns are chosen together, is in float at a time."""
    from int8fx.integrations.transformers import Int8FxQuantizer

    model, _ = made("llama")
    model.save_pretrained(tmp_path)
    floats: list[int] = []
    take = Int8FxQuantizer.take

    def watched(self, model, name, value, missing_keys):
        take(self, model, name, value, missing_keys)
        waiting = {id(layer.weight): layer.weight for group in self.groups.values() for layer in group}
        floats.append(sum(w.nbytes for w in waiting.values() if not w.is_meta))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Int8FxQuantizer, "take", watched)
        type(model).from_pretrained(tmp_path, quantization_config=int8fx.Int8FxConfig(int8fx.llm_int8()))
        assert max(floats) == 0  # each weight alone
        type(model).from_pretrained(tmp_path, quantization_config=int8fx.Int8FxConfig(int8fx.rotated()))
    mlp = model.model.layers[0].mlp
    assert 0 < max(floats) <= mlp.gate_proj.weight.nbytes + mlp.up_proj.weight.nbytes


# ---- what goes wrong ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "mixtral"])
@pytest.mark.parametrize("imports", ["", "import int8fx", "import transformers, int8fx"])
def test_another_process_loads_it_rightly_or_not_at_all(name, imports, tmp_path):
    model, inputs = made(name)
    int8fx.convert(model).save_pretrained(tmp_path / "int8", **SHARDS)
    torch.save({"inputs": inputs, "y": outputs(model, inputs)[0]}, tmp_path / "expected.pt")
    script = f"""
        {imports}
        import sys, torch, transformers
        model = transformers.{type(model).__name__}.from_pretrained(sys.argv[1] + "/int8").eval()
        expected = torch.load(sys.argv[1] + "/expected.pt")
        with torch.no_grad():
            y = model(**expected["inputs"])
        y = [t for t in y.values() if isinstance(t, torch.Tensor)][0]
        assert torch.equal(y, expected["y"])
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if imports:
        assert done.returncode == 0, done.stderr
    else:
        assert "RuntimeError" in done.stderr
        assert "mismatch" in done.stderr.lower()


DAMAGES = {
    "no codes": (lambda s: s.pop("model.layers.0.mlp.up_proj.weight_codes"), "up_proj.weight_codes'; it is incomplete"),
    "no scale": (lambda s: s.pop("model.layers.0.mlp.up_proj.weight_scale"), "up_proj.weight_scale"),
    "no format": (lambda s: s.pop("model.layers.0.mlp.up_proj.weight_format"), "up_proj.weight_format"),
    "no columns": (lambda s: s.pop("model.layers.0.mlp.up_proj.weight_columns"), "up_proj.weight_columns"),
    "format": (lambda s: s["model.layers.0.mlp.up_proj.weight_format"].zero_(), "up_proj.weight_format"),
    "code": (lambda s: s["model.layers.0.mlp.up_proj.weight_codes"].fill_(-128), "has a code of -128"),
    "scale": (lambda s: s["model.layers.0.mlp.up_proj.weight_scale"].fill_(float("nan")), "NaN, inf, zero or negative"),
    "columns": (lambda s: s["model.layers.0.mlp.up_proj.weight_columns"].fill_(999), "column 999 is out of range"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_by_name(damage, saved):
    change, message = DAMAGES[damage]
    state = load_file(saved / "model.safetensors")
    change(state)
    save_file(state, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((ValueError, RuntimeError)) as error:
        transformers.LlamaForCausalLM.from_pretrained(saved)
    assert message in str(error.value)


def test_a_newer_format_is_refused(saved):
    config = json.loads((saved / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "int8fx"
    config["quantization_config"]["version"] = 99
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="format version 99; this int8fx reads up to"):
        transformers.LlamaForCausalLM.from_pretrained(saved)


def test_a_float_weight_that_cannot_be_packed_is_refused_by_name(tmp_path, caplog, monkeypatch):
    model, _ = made("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(transformers.utils.logging.get_logger("transformers"), "propagate", True)
    with pytest.raises(RuntimeError, match="issues during automatic conversion of the weights"):
        type(model).from_pretrained(tmp_path, quantization_config=int8fx.Int8FxConfig())
    assert "layer 'model.layers.1.mlp.up_proj' has NaN or inf in its weight; legal: finite weights" in caplog.text


# ---- the configuration ----------------------------------------------------------------------------------------------


def test_the_configuration_round_trips_through_json():
    for config in (
        int8fx.Int8FxConfig(),
        int8fx.Int8FxConfig("rotated(block=32, columns=0)", skip="lm_head"),
        int8fx.Int8FxConfig(int8fx.plain(), select=["*.q_proj"], modules_to_not_convert=["a"]),
    ):
        again = int8fx.Int8FxConfig.from_dict(json.loads(json.dumps(config.to_dict())))
        assert (again.scheme, again.skip, again.select) == (config.scheme, config.skip, config.select)
        assert json.loads(again.to_json_string()) == config.to_dict()


def test_bitsandbytes_names():
    config = int8fx.Int8FxConfig(
        llm_int8_threshold=5.0, llm_int8_skip_modules=["lm_head"], llm_int8_enable_fp32_cpu_offload=True
    )
    assert (config.scheme, config.skip) == (int8fx.llm_int8(5.0), ["lm_head"])
    assert int8fx.Int8FxConfig(llm_int8_threshold=0.0).scheme == int8fx.plain()
    with pytest.raises(ValueError, match="train adapters"):
        int8fx.Int8FxConfig(llm_int8_has_fp16_weight=True)
    with pytest.raises(ValueError, match="scheme and llm_int8_threshold"):
        int8fx.Int8FxConfig("rotated", llm_int8_threshold=6.0)
    with pytest.raises(TypeError, match="unknown arguments"):
        int8fx.Int8FxConfig(threshold=6.0)
    with pytest.raises(TypeError, match="scheme is 6"):
        int8fx.Int8FxConfig(6)
    with pytest.raises(ValueError, match="legal: llm_int8"):
        int8fx.Int8FxConfig("rotate")


# ---- a converted model among transformers' tools --------------------------------------------------------------------


def test_sizes_and_names():
    model, _ = made("llama")
    parameters, footprint = model.num_parameters(), model.get_memory_footprint()
    int8fx.convert(model)
    assert model.num_parameters() == parameters
    assert model.get_memory_footprint() == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert model.get_memory_footprint() < 0.45 * footprint
    assert (model.dtype, model.device.type) == (torch.float32, "cpu")
    assert model.is_loaded_in_8bit
    assert "int8" in str(model)


def test_weights_stay_when_transformers_initialises():
    model, inputs = made("llama")
    y = outputs(int8fx.convert(model), inputs)[0]
    model.init_weights()
    assert torch.equal(outputs(model, inputs)[0], y)


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_tie_weights(name):
    model, inputs = made(name)
    y = outputs(int8fx.convert(model, select=["*"]), inputs)[0]
    codes = model.get_input_embeddings().weight_codes
    model.tie_weights()
    assert model.get_output_embeddings().weight_codes is model.get_input_embeddings().weight_codes is codes
    assert torch.equal(outputs(model, inputs)[0], y)


def test_dequantize():
    model, inputs = made("gpt2")
    int8fx.convert(model, int8fx.weight_only())
    weights = {f"{p}.{n}": m.dequantize(n) for p, m in model.named_modules() for n in getattr(m, "packed_weights", ())}
    y = outputs(model, inputs)[0]
    assert model.dequantize() is model
    assert not int8fx.is_packed(model)
    assert not hasattr(model.config, "quantization_config")
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name], weight) for name, weight in weights.items())
    assert torch.allclose(outputs(model, inputs)[0], y, atol=1e-4)


def test_resizing_embeddings():
    model, inputs = made("llama")
    int8fx.convert(model)
    model.resize_token_embeddings(104)
    assert outputs(model, inputs)[0].shape[-1] == 104
    model, _ = made("llama")
    int8fx.convert(model, select=["*"])
    y = outputs(model, inputs)[0]
    model.resize_token_embeddings(104)  # the resized layers are float ones, with the dequantised weights
    assert not isinstance(model.lm_head, PackedModule)
    resized = outputs(model, inputs)[0][..., :96]
    assert (resized - y).norm() < 0.03 * y.norm()


@pytest.mark.parametrize("name", ["t5", "bert", "transformer", "vit"])
def test_no_forward_dequantises_a_weight(name):
    model, inputs = models.ALL[name]()
    int8fx.convert(model.eval())
    with torch.no_grad():
        assert dequantized_in(lambda: model(**inputs)) == 0


def test_generate_and_assisted_generation(saved):
    model = transformers.LlamaForCausalLM.from_pretrained(saved).eval()
    ids = torch.arange(3, 9)[None]
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    y = model.generate(ids, **settings)
    assert y.shape == (1, 12)
    assert model.generate(ids, assistant_model=copy.deepcopy(model), **settings).shape == (1, 12)
    assert model.generate(ids, cache_implementation="static", disable_compile=True, **settings).equal(y)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_maps(device_map, saved):
    model = transformers.LlamaForCausalLM.from_pretrained(saved, device_map=device_map)
    assert_same_tensors(model, transformers.LlamaForCausalLM.from_pretrained(saved))


def test_offload_to_disk(saved, tmp_path):
    ids = torch.arange(3, 9)[None]
    y = outputs(transformers.LlamaForCausalLM.from_pretrained(saved).eval(), {"input_ids": ids})[0]
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
              "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip
    settings = {"device_map": places, "offload_folder": str(tmp_path / "offload")}
    model = transformers.LlamaForCausalLM.from_pretrained(saved, **settings).eval()
    assert torch.equal(outputs(model, {"input_ids": ids})[0], y)
    assert model.model.layers[1].mlp.up_proj.weight_codes.is_meta
    made("llama")[0].save_pretrained(tmp_path / "float")
    config = int8fx.Int8FxConfig()
    with pytest.raises(ValueError, match="does not offload to disk; legal: save the int8 model first"):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path / "float", **settings, quantization_config=config)


def test_pipeline(saved):
    model = transformers.AutoModelForCausalLM.from_pretrained(saved).eval()
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=_Letters())
    ids = pipe("abc", max_new_tokens=4, do_sample=False, return_tensors=True)[0]["generated_token_ids"]
    assert ids[:3] == [65, 66, 67]
    assert 3 < len(ids) <= 7


class _Letters(transformers.PreTrainedTokenizer):
    """Letters as tokens."""

    vocab_size = 96

    def __init__(self) -> None:
        super().__init__(pad_token="`", eos_token="~")

    def get_vocab(self) -> dict[str, int]:
        return {chr(32 + i): i for i in range(96)}

    def _tokenize(self, text: str) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return ord(token) - 32

    def _convert_id_to_token(self, index: int) -> str:
        return chr(32 + index)


def test_a_trainer_refuses_to_train_a_converted_model_without_adapters(saved, tmp_path):
    model = transformers.LlamaForCausalLM.from_pretrained(saved)
    arguments = transformers.TrainingArguments(str(tmp_path / "out"), report_to=[], use_cpu=True)
    with pytest.raises(ValueError, match="quantized"):
        transformers.Trainer(model=model, args=arguments, train_dataset=[])


def test_a_model_inside_another_one_says_what_it_is(tmp_path):
    model, inputs = made("llama")
    wrapper = nn.ModuleDict({"inner": nn.Sequential(model)})
    int8fx.convert(wrapper, int8fx.rotated(16))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(outputs(again, inputs)[0], outputs(model, inputs)[0])
    assert not hasattr(wrapper, "hf_quantizer")


def test_other_models_are_left_alone():
    model = int8fx.convert(nn.Sequential(nn.Linear(8, 8)))
    assert not hasattr(model, "hf_quantizer")
    floats, _ = made("llama")
    with pytest.warns(UserWarning, match="no layer was converted"):
        int8fx.convert(floats, skip="*")
    assert not hasattr(floats.config, "quantization_config")


def test_packed_tensors_are_what_their_names_say(saved):
    model = transformers.LlamaForCausalLM.from_pretrained(saved)
    for module in model.modules():
        if isinstance(module, PackedModule):
            tensors = tensors_of(module, "weight")
            assert isinstance(tensors.codes, nn.Parameter)
            assert not tensors.codes.requires_grad
            assert "weight_scale" in module._buffers
