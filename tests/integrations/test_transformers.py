"""transformers: models are quantised while they load, say what they are, and come back as they were saved."""

import copy
import json
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support import models
from support.conversion import SCHEMES, assert_same_files, assert_same_tensors, dequantized_in, flip_last_bit
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


@pytest.mark.parametrize(
    "scheme",
    [
        int8fx.rotated(16, rounding="gptq"),
        int8fx.weight_only("int4_clip", 16, asymmetric=True, scales="search", rounding="gptq"),
        int8fx.weight_only("nf4", 16, scales="hqq"),
    ],
    ids=str,
)
def test_a_model_that_was_rounded_by_data_comes_back_without_them(scheme, tmp_path):
    model, inputs = made("llama")
    calibration = int8fx.calibrate(model, [inputs], moments=True)
    int8fx.convert(model, scheme, calibration=calibration).save_pretrained(tmp_path / "1")
    again = type(model).from_pretrained(tmp_path / "1").eval()
    assert torch.equal(outputs(again, inputs)[0], outputs(model, inputs)[0])
    again.save_pretrained(tmp_path / "2")
    assert_same_files(tmp_path / "1", tmp_path / "2")


def test_a_scheme_that_needs_data_is_refused_before_any_weight_is_read(tmp_path):
    model, _ = made("llama")
    model.save_pretrained(tmp_path)
    config = int8fx.Int8FxConfig(int8fx.weight_only("int4_clip", 16, rounding="gptq"))
    with pytest.raises(ValueError, match=r"needs data, which from_pretrained does not have; legal: load the float mod"):
        type(model).from_pretrained(tmp_path, quantization_config=config)


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
        torch.set_num_threads({torch.get_num_threads()})  # float sums depend on it
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


W = "model.layers.0.mlp.up_proj.weight"
PARTS = ("_codes", "_scale", "_format", "_columns", "_columns_weight")
OTHER_SCHEME = b'{"format": "int8fx", "version": 2, "scheme": "llm_int8"}'


def without(*suffixes: str):
    return lambda state: [state.pop(W + suffix) for suffix in suffixes]


def changed(suffix: str, change):
    return lambda state: state.update({W + suffix: change(state[W + suffix])})


DAMAGES = {
    "no codes": (without("_codes"), "up_proj.weight_codes'; it is incomplete"),
    "no scale": (without("_scale"), "up_proj.weight_scale"),
    "no format": (without("_format"), "up_proj.weight_format"),
    "no columns": (without("_columns"), "up_proj.weight_columns"),
    "no weights of columns": (without("_columns_weight"), "up_proj.weight_columns_weight"),
    "only its format": (without("_codes", "_scale", "_columns", "_columns_weight"), "up_proj.weight_codes"),
    "only its codes": (without("", "_scale", "_format", "_columns", "_columns_weight"), "up_proj.weight_format"),
    "only its guard": (without(*PARTS), "up_proj.weight_codes"),
    "nothing of it": (without("", *PARTS), "says that 'model.layers.0.mlp.up_proj' is packed"),
    "format": (changed("_format", torch.zeros_like), "up_proj.weight_format"),
    "another scheme": (changed("_format", lambda _: torch.tensor([*OTHER_SCHEME], dtype=torch.uint8)), "_columns'"),
    "code": (changed("_codes", lambda t: t.fill_(-128)), "has a code of -128"),
    "codes as floats": (changed("_codes", Tensor.float), "takes int8 codes, found torch.float32"),
    "codes of another shape": (changed("_codes", lambda t: t[1:]), "has shape (135, 64); legal: (136, 64)"),
    "one code": (changed("_codes", lambda t: t[0, 0]), "has shape (); legal: (136, 64)"),
    "scale": (changed("_scale", lambda t: t * float("nan")), "NaN, inf, zero or negative"),
    "scale as halves": (changed("_scale", Tensor.half), "has dtype torch.float16; legal: torch.float32"),
    "one scale": (changed("_scale", lambda t: t[:1]), "has shape (1,); legal: (136,)"),
    "columns": (changed("_columns", lambda t: t.fill_(999)), "column 999 is out of range"),
    "columns as floats": (changed("_columns", Tensor.float), "as torch.int64, found torch.float32"),
    "fewer columns": (changed("_columns", lambda t: t[1:]), "has shape (2,); legal: (3,)"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("ignore", [False, True])
def test_a_damaged_checkpoint_is_refused_by_name(damage, ignore, saved):
    """``ignore_mismatched_sizes`` would leave tensors of another shape uninitialised."""
    change, message = DAMAGES[damage]
    state = load_file(saved / "model.safetensors")
    change(state)
    state = {key: tensor.contiguous() for key, tensor in state.items()}
    save_file(state, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((ValueError, RuntimeError)) as error:
        transformers.LlamaForCausalLM.from_pretrained(saved, ignore_mismatched_sizes=ignore)
    assert message in str(error.value)


@pytest.mark.parametrize("tensor", [W + "_codes", W + "_scale", W, "model.norm.weight", "model.embed_tokens.weight"])
def test_a_flipped_bit_is_refused(tensor, saved, tmp_path):
    """In one file, in one of several, in a subfolder, and if the model is offloaded to disk."""
    model = transformers.LlamaForCausalLM.from_pretrained(saved)
    for options in ({}, SHARDS):
        model.save_pretrained(tmp_path / "sub" / "again", **options)
        [file] = [f for f in (tmp_path / "sub" / "again").glob("*.safetensors") if tensor in load_file(f)]
        places = {"device_map": {"": "disk"}, "offload_folder": tmp_path / "offload"}
        flip_last_bit(file, tensor)
        for how in ({}, {"device_map": "auto"}, places, {"ignore_mismatched_sizes": True}):
            with pytest.raises(ValueError, match=f"{file}: tensor '{tensor}' has the checksum") as error:
                type(model).from_pretrained(tmp_path / "sub", subfolder="again", **how)
            assert "Legal: the file as it was saved" in str(error.value)
        flip_last_bit(file, tensor)
        assert_same_tensors(type(model).from_pretrained(tmp_path / "sub", subfolder="again"), model)
        for path in (tmp_path / "sub" / "again").glob("*.safetensors"):
            path.unlink()


def test_an_offloaded_model_is_saved_with_checksums(saved, tmp_path):
    """transformers reads the tensors of such a model from disk when it writes each file."""
    places = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu",
              "lm_head": "cpu"}  # fmt: skip
    settings = {"device_map": places, "offload_folder": str(tmp_path / "offload")}
    model = transformers.LlamaForCausalLM.from_pretrained(saved, **settings)
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (saved / "model.safetensors").read_bytes()


def test_files_without_checksums_load(saved):
    model = transformers.LlamaForCausalLM.from_pretrained(saved)
    save_file(load_file(saved / "model.safetensors"), saved / "model.safetensors", metadata={"format": "pt"})
    assert_same_tensors(type(model).from_pretrained(saved), model)


def test_a_file_of_torch_save_loads(saved):
    model = transformers.LlamaForCausalLM.from_pretrained(saved)
    (saved / "model.safetensors").unlink()
    state = model.state_dict()
    torch.save(state, saved / "pytorch_model.bin")
    assert_same_tensors(transformers.LlamaForCausalLM.from_pretrained(saved), model)
    del state[W + "_codes"]
    torch.save(state, saved / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"up_proj\.weight_codes'; it is incomplete"):
        transformers.LlamaForCausalLM.from_pretrained(saved)


def test_the_configuration_of_a_loaded_model_loads_another_one(saved):
    model = transformers.LlamaForCausalLM.from_pretrained(saved)
    assert_same_tensors(type(model).from_pretrained(saved, config=model.config), model)


def test_a_state_dict_in_place_of_files_is_refused(saved):
    """transformers does not show it to quantizers."""
    model = transformers.LlamaForCausalLM.from_pretrained(saved)
    with pytest.raises(ValueError, match=r"found no file .* legal: a folder"):
        type(model).from_pretrained(None, config=model.config, state_dict=model.state_dict())


def test_a_weight_that_is_renamed_away_is_refused(saved):
    """The last check, after loading: no packed tensor may be uninitialised memory."""
    mapping = {r"layers\.0\.mlp\.up_proj\.weight_codes": "layers.0.mlp.gate_proj.weight_codes"}
    with pytest.raises(RuntimeError, match=r"no 'model\.layers\.0\.mlp\.up_proj\.weight_codes' that fits"):
        transformers.LlamaForCausalLM.from_pretrained(saved, key_mapping=mapping)


def test_a_checkpoint_whose_configuration_does_not_say_that_it_is_int8_is_refused(saved):
    config = json.loads((saved / "config.json").read_text())
    del config["quantization_config"]
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        transformers.LlamaForCausalLM.from_pretrained(saved)


def test_the_scheme_of_a_checkpoint_is_its_own(saved):
    config = int8fx.Int8FxConfig(int8fx.plain())
    with pytest.warns(UserWarning, match="quantization_config` from the model will be used"):
        model = transformers.LlamaForCausalLM.from_pretrained(saved, quantization_config=config)
    assert {row.scheme for row in int8fx.summary(model).converted} == {"rotated(block=16, columns=0.05)"}


def test_tensors_of_packed_weights_keep_their_dtype(saved):
    """As `.to(dtype)` does: columns that are not quantised stay exact, and are saved as they were loaded."""
    model = transformers.LlamaForCausalLM.from_pretrained(saved, dtype=torch.bfloat16)
    expected = transformers.LlamaForCausalLM.from_pretrained(saved).to(torch.bfloat16)
    assert_same_tensors(model, expected)
    assert model.model.layers[0].mlp.up_proj.weight_columns_weight.dtype == torch.float32
    expected.save_pretrained(saved / "1")
    again = type(model).from_pretrained(saved / "1")
    assert_same_tensors(again, expected)


def test_a_newer_format_is_refused(saved):
    config = json.loads((saved / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "int8fx"
    config["quantization_config"] |= {"version": 99, "novelty": 1}
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


def test_a_configuration_of_a_file_keeps_its_meaning():
    """Files leave out Sylvester's matrices of 64 columns, and users `rotated`'s defaults."""
    stored = {"quant_method": "int8fx", "version": 2, "scheme": "rotated", "skip": []}
    config = int8fx.Int8FxConfig.from_dict(dict(stored))
    assert config.scheme == int8fx.rotated(64, hadamard="sylvester")
    assert config.to_dict() == stored
    for config in (int8fx.Int8FxConfig("rotated"), int8fx.Int8FxConfig.from_dict({"scheme": "rotated"})):
        assert config.scheme == int8fx.rotated()
        assert config.to_dict()["scheme"] == "rotated(block=256, hadamard='regular')"


def test_bits_choose_a_scheme():
    assert int8fx.Int8FxConfig(bits=8).scheme == int8fx.llm_int8()
    scheme = int8fx.Int8FxConfig(bits=4).scheme
    assert (scheme.dtype, scheme.group_size, scheme.compute) == ("int4_fullrange", 32, "int8")
    for bits in (3, 16, True, "4"):
        with pytest.raises(ValueError, match="bits must be 4 or 8"):
            int8fx.Int8FxConfig(bits=bits)
    with pytest.raises(ValueError, match="legal: one of them"):
        int8fx.Int8FxConfig("rotated", bits=4)


def test_bitsandbytes_names():
    config = int8fx.Int8FxConfig(
        llm_int8_threshold=5.0, llm_int8_skip_modules=["lm_head"], llm_int8_enable_fp32_cpu_offload=True
    )
    assert (config.scheme, config.skip) == (int8fx.llm_int8(5.0), ["lm_head"])
    assert int8fx.Int8FxConfig(llm_int8_threshold=0.0).scheme == int8fx.plain()
    with pytest.raises(ValueError, match="train adapters"):
        int8fx.Int8FxConfig(llm_int8_has_fp16_weight=True)
    with pytest.raises(ValueError, match="more than one of scheme, bits and llm_int8_threshold"):
        int8fx.Int8FxConfig("rotated", llm_int8_threshold=6.0)
    with pytest.raises(TypeError, match="unknown arguments"):
        int8fx.Int8FxConfig(threshold=6.0)
    with pytest.raises(TypeError, match="use convert"):
        int8fx.Int8FxConfig(skip=lambda name, module: True)
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


def test_dequantize_after_a_save(tmp_path):
    model, inputs = made("llama")
    int8fx.convert(model)
    y = outputs(model, inputs)[0]
    model.save_pretrained(tmp_path)
    assert not int8fx.is_packed(model.dequantize())
    assert (outputs(model, inputs)[0] - y).norm() < 0.05 * y.norm()  # x is not quantised now


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


@pytest.mark.parametrize("how", ["from_pretrained", "convert"])
def test_a_trainer_refuses_to_train_a_converted_model_without_adapters(how, saved, tmp_path):
    if how == "convert":
        model = int8fx.convert(made("llama")[0])
    else:
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


def test_a_float_model_made_from_the_same_configuration_is_saved_as_one(tmp_path):
    model, inputs = models.llama()
    other = transformers.LlamaForCausalLM(model.config).eval()
    int8fx.convert(model)
    other.save_pretrained(tmp_path / "float")
    assert not hasattr(other.config, "quantization_config")
    assert all(m.config is other.config for m in other.modules() if hasattr(m, "config"))
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "float")
    assert torch.equal(again(**inputs).logits, other(**inputs).logits)
    model.save_pretrained(tmp_path / "int8")
    assert int8fx.is_packed(transformers.LlamaForCausalLM.from_pretrained(tmp_path / "int8"))


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


def test_casts():
    """transformers refuses ``half()`` and ``float()`` for other quantised models."""
    model, inputs = made("llama")
    int8fx.convert(model)
    for dtype, cast in {torch.float16: model.half, torch.float32: model.float}.items():
        assert cast() is model
        assert model.dtype == outputs(model, inputs)[0].dtype == dtype
    assert model.to(torch.bfloat16).dtype == torch.bfloat16
    assert {t.dtype for n, t in model.named_buffers() if n.endswith("_scale")} == {torch.float32}


def test_a_converted_model_is_copied_and_pickled():
    model, inputs = made("llama")
    y = outputs(int8fx.convert(model), inputs)[0]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(outputs(other, inputs)[0], y)
        assert other.half() is other
        assert other.dtype == torch.float16
    assert model.dtype == torch.float32


def test_the_calls_of_lm_evaluation_harness(saved):
    """``HFLM(pretrained=folder)`` and ``HFLM(pretrained=model)``."""
    folder = {"pretrained_model_name_or_path": str(saved), "trust_remote_code": False, "revision": "main"}
    config = transformers.AutoConfig.from_pretrained(**folder)
    quantisation = transformers.quantizers.AutoQuantizationConfig.from_dict(config.quantization_config)
    settings = {"dtype": "auto", "device_map": {"": "cpu"}, "subfolder": "", "gguf_file": None}
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            **folder, **settings, quantization_config=quantisation
        )
    model.eval()
    model.tie_weights()
    assert_same_tensors(model, transformers.AutoModelForCausalLM.from_pretrained(saved))
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, transformers.AutoModelForCausalLM.from_pretrained(saved)(ids).logits)
    assert (model.device.type, model.config.vocab_size) == ("cpu", 96)


@pytest.mark.slow
def test_generate_compiles_with_a_static_cache(saved):
    model = transformers.LlamaForCausalLM.from_pretrained(saved).eval()
    ids = torch.arange(3, 9)[None]
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    compiled = transformers.CompileConfig(fullgraph=True, mode="default")
    model.generation_config.compile_config = compiled
    compiled._compile_all_devices = True  # by default CPUs do not compile
    y = model.generate(ids, cache_implementation="static", **settings)
    assert y.shape == (1, 11)
    assert hasattr(model, "_compiled_call")


def test_memory_that_transformers_plans_for(tmp_path):
    from int8fx.integrations.transformers import Int8FxQuantizer

    quantising = Int8FxQuantizer(int8fx.Int8FxConfig(), pre_quantized=False)
    assert quantising.adjust_max_memory({0: 1000, "cpu": 2000}) == {0: 900, "cpu": 1800}
    assert Int8FxQuantizer(int8fx.Int8FxConfig()).adjust_max_memory({0: 1000}) == {0: 1000}
    sizes = {}
    param_element_size = Int8FxQuantizer.param_element_size

    def watched(self, model, name, param):
        sizes[name] = param_element_size(self, model, name, param)
        return sizes[name]

    model, _ = made("llama")
    model.save_pretrained(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Int8FxQuantizer, "param_element_size", watched)
        type(model).from_pretrained(tmp_path, device_map="auto", quantization_config=int8fx.Int8FxConfig())
    assert sizes["model.layers.0.mlp.up_proj.weight"] == 1
    assert sizes["lm_head.weight"] == 4


def test_parameters_are_counted_without_embeddings():
    model, _ = made("gpt2")
    number = model.num_parameters(exclude_embeddings=True)
    int8fx.convert(model)
    assert model.num_parameters(exclude_embeddings=True) == number
    assert model.num_parameters(only_trainable=True) < model.num_parameters()
