"""diffusers: converted models come back bit by bit, and no int8 file loads as something else."""

import copy
import json
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.conversion import flip_last_bit

import int8fx
from int8fx.schemes import stored_text

diffusers = pytest.importorskip("diffusers")

SCHEMES = {"llm_int8": int8fx.llm_int8(), "rotated": int8fx.rotated(16, columns=0.05)}
FILE = "diffusion_pytorch_model.safetensors"


def unet():
    sizes = {"sample_size": 8, "layers_per_block": 1, "block_out_channels": (32, 64), "cross_attention_dim": 32}
    blocks = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    model = diffusers.UNet2DConditionModel(attention_head_dim=8, **sizes, **blocks)
    text = torch.randn(1, 7, 32)
    return model, {"sample": torch.randn(1, 4, 8, 8), "timestep": torch.tensor(3), "encoder_hidden_states": text}


def dit():
    sizes = {"num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 4, "out_channels": 8, "num_layers": 2}
    model = diffusers.DiTTransformer2DModel(sample_size=8, norm_num_groups=4, num_embeds_ada_norm=1000, **sizes)
    x = torch.randn(1, 4, 8, 8)
    return model, {"hidden_states": x, "timestep": torch.tensor([3]), "class_labels": torch.tensor([1])}


def flux():
    sizes = {"in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16}
    widths = {"num_attention_heads": 4, "joint_attention_dim": 32, "pooled_projection_dim": 32}
    model = diffusers.FluxTransformer2DModel(axes_dims_rope=(4, 4, 8), **sizes, **widths)
    texts = {"encoder_hidden_states": torch.randn(1, 5, 32), "pooled_projections": torch.randn(1, 32)}
    ids = {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(5, 3)}
    return model, {"hidden_states": torch.randn(1, 16, 16), "timestep": torch.tensor([0.5]), **texts, **ids}


MODELS = {"unet": unet, "dit": dit, "flux": flux}


def made(name: str):
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    return model.eval(), inputs


def run(model, inputs):
    """The output of a copy: tensors of a file may start anywhere, which changes the order of torch's float sums."""
    with torch.no_grad():
        return copy.deepcopy(model)(**inputs).sample


def equal(model, other) -> bool:
    state, expected = model.state_dict(), other.state_dict()
    same = [torch.equal(state[key], expected[key]) and state[key].dtype == expected[key].dtype for key in state]
    return state.keys() == expected.keys() and all(same)


@pytest.fixture
def saved(tmp_path) -> Path:
    """The folder of a converted DiT."""
    int8fx.convert(made("dit")[0], SCHEMES["rotated"]).save_pretrained(tmp_path / "int8")
    return tmp_path / "int8"


def change(folder: Path, edit) -> None:
    """Applies ``edit`` to the tensors of ``folder``."""
    state = load_file(folder / FILE)
    edit(state)
    save_file(state, folder / FILE, metadata={"format": "pt"})


@pytest.mark.filterwarnings("ignore:int8fx.convert. .*stay as they are")  # a UNet's convolutions
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "60KB"}, {"safe_serialization": False}], ids=str)
def test_a_converted_model_comes_back_bit_by_bit(name, scheme, options, tmp_path):
    model, inputs = made(name)
    y = run(int8fx.convert(model, SCHEMES[scheme]), inputs)
    model.save_pretrained(tmp_path / "1", **options)
    again = type(model).from_pretrained(tmp_path / "1")
    assert equal(again, model)
    assert torch.equal(run(again, inputs), y)
    again.save_pretrained(tmp_path / "2", **options)
    for path in (tmp_path / "1").glob("*diffusion*"):
        assert path.read_bytes() == (tmp_path / "2" / path.name).read_bytes()
    assert json.loads((tmp_path / "2" / "config.json").read_text())["quantization_config"]["scheme"] == stored_text(
        SCHEMES[scheme]
    )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_float_model_is_converted_while_it_loads(scheme, tmp_path):
    model, inputs = made("dit")
    model.save_pretrained(tmp_path / "float")
    config = int8fx.Int8FxConfig(SCHEMES[scheme], skip=["proj_out_1"])
    loaded = type(model).from_pretrained(tmp_path / "float", quantization_config=config)
    expected = int8fx.convert(model, SCHEMES[scheme], skip="proj_out_1")
    assert equal(loaded, expected)
    loaded.save_pretrained(tmp_path / "int8")
    again = type(model).from_pretrained(tmp_path / "int8")
    assert equal(again, expected)
    assert torch.equal(run(again, inputs), run(expected, inputs))


def test_another_dtype_leaves_scales_in_float32(saved):
    model = diffusers.DiTTransformer2DModel.from_pretrained(saved, torch_dtype=torch.bfloat16)
    first = diffusers.DiTTransformer2DModel.from_pretrained(saved)
    state, expected = model.state_dict(), first.state_dict()
    parts = [key for key in state if "weight_" in key]
    assert parts
    assert all(torch.equal(state[key], expected[key]) for key in parts)
    assert model.proj_out_1.bias.dtype == torch.bfloat16


def test_part_of_a_model_converted_on_its_own_is_saved_as_int8(tmp_path):
    model, inputs = made("dit")
    int8fx.convert(model.transformer_blocks)
    int8fx.convert(model.proj_out_1, int8fx.rotated())
    y = run(model, inputs)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(run(again, inputs), y)
    assert len(int8fx.summary(again).converted) == len(int8fx.summary(model).converted)


def test_a_state_dict_goes_onto_a_converted_model_only(saved):
    model, inputs = made("dit")
    y = run(int8fx.convert(model, SCHEMES["rotated"]), inputs)
    torch.manual_seed(1)
    other = int8fx.convert(MODELS["dit"]()[0].eval(), SCHEMES["rotated"])
    other.load_state_dict(load_file(saved / FILE))
    assert torch.equal(run(other, inputs), y)
    with pytest.raises(RuntimeError, match="size mismatch"):
        made("dit")[0].load_state_dict(load_file(saved / FILE), strict=False)


def test_dequantize_makes_it_a_float_model_that_is_saved_as_one(saved, tmp_path):
    model = diffusers.DiTTransformer2DModel.from_pretrained(saved)
    weight = model.proj_out_1.weight.clone()
    model.dequantize()
    model.save_pretrained(tmp_path / "float")
    again = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "float")
    assert not int8fx.is_packed(again)
    assert torch.equal(again.proj_out_1.weight, weight)


def test_casts_keep_the_packed_weights(saved):
    model = diffusers.DiTTransformer2DModel.from_pretrained(saved)
    scale = model.proj_out_1.weight_scale.clone()
    model.to(torch.bfloat16)
    assert model.proj_out_1.bias.dtype == torch.bfloat16
    assert torch.equal(model.proj_out_1.weight_scale, scale)


def test_a_pipeline(tmp_path):
    model, _ = made("dit")
    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    vae = diffusers.AutoencoderKL(block_out_channels=(32,), latent_channels=4, **blocks)
    pipe = diffusers.DiTPipeline(model, vae, diffusers.DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path / "float")

    def sample(pipe):
        pipe.transformer, pipe.vae = copy.deepcopy(pipe.transformer), copy.deepcopy(pipe.vae)
        generator = torch.Generator().manual_seed(0)
        return pipe([1], num_inference_steps=2, generator=generator, output_type="np").images

    int8fx.convert(pipe.transformer, SCHEMES["rotated"])
    images = sample(pipe)
    pipe.save_pretrained(tmp_path / "int8")
    again = diffusers.DiTPipeline.from_pretrained(tmp_path / "int8")
    again.set_progress_bar_config(disable=True)
    assert (sample(again) == images).all()
    config = diffusers.PipelineQuantizationConfig(
        quant_mapping={"transformer": int8fx.Int8FxConfig(SCHEMES["rotated"])}
    )
    mapped = diffusers.DiTPipeline.from_pretrained(tmp_path / "float", quantization_config=config)
    assert equal(mapped.transformer, model)


# ---- what raises ----------------------------------------------------------------------------------------------------


def loading(folder: Path, **options):
    return diffusers.DiTTransformer2DModel.from_pretrained(folder, **options)


LAYER = "transformer_blocks.1.ff.net.2.weight"
DAMAGE = {
    "no codes": (lambda s: s.pop(LAYER + "_codes"), "a part of it is missing: .*_codes"),
    "no scale": (lambda s: s.pop(LAYER + "_scale"), "a part of it is missing: .*_scale"),
    "nothing": (
        lambda s: [s.pop(k) for k in list(s) if k.startswith(LAYER)],
        "ff.net.2' is packed, and the checkpoint",
    ),
    "a short scale": (lambda s: s.update({LAYER + "_scale": s[LAYER + "_scale"][:-1].clone()}), "has shape"),
    "a bfloat16 scale": (lambda s: s.update({LAYER + "_scale": s[LAYER + "_scale"].bfloat16()}), "has dtype"),
    "NaN": (lambda s: s[LAYER + "_scale"].fill_(float("nan")), "has a scale that is NaN"),
    "a format of zeros": (lambda s: s[LAYER + "_format"].zero_(), "found a text that is not int8fx's"),
    "a float weight too": (lambda s: s.update({LAYER: torch.zeros(64, 256)}), "are both there"),
    "an unknown layer": (
        lambda s: s.update({k.replace("blocks.1", "blocks.7"): t.clone() for k, t in s.items() if LAYER in k}),
        "which this model does not have",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("options", [{}, {"ignore_mismatched_sizes": True, "torch_dtype": torch.bfloat16}], ids=str)
def test_a_damaged_checkpoint_is_refused_by_name(damage, options, saved):
    edit, message = DAMAGE[damage]
    change(saved, edit)
    with pytest.raises((ValueError, RuntimeError), match=message):
        loading(saved, **options)


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "60KB"}], ids=str)
@pytest.mark.parametrize("tensor", [LAYER + "_codes", LAYER + "_scale", LAYER, "pos_embed.proj.bias"])
def test_a_flipped_bit_is_refused(tensor, options, saved, tmp_path):
    loading(saved).save_pretrained(tmp_path / "sub" / "again", **options)
    [file] = [f for f in (tmp_path / "sub" / "again").glob("*.safetensors") if tensor in load_file(f)]
    flip_last_bit(file, tensor)
    with pytest.raises(ValueError, match=f"{file}: tensor '{tensor}' has the checksum"):
        loading(tmp_path / "sub", subfolder="again")


def test_float_tensors_under_an_int8_configuration_are_refused(saved):
    save_file(made("dit")[0].state_dict(), saved / FILE, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"config\.json says that .* is packed, and the checkpoint lacks its tensors"):
        loading(saved)


def test_a_newer_version_is_refused(saved):
    config = json.loads((saved / "config.json").read_text())
    config["quantization_config"]["version"] = 99
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="format version 99; this int8fx reads up to"):
        loading(saved)


def test_without_the_configuration_the_guards_raise(saved):
    config = json.loads((saved / "config.json").read_text())
    del config["quantization_config"]
    (saved / "config.json").write_text(json.dumps(config))
    for options in ({}, {"low_cpu_mem_usage": False}):
        with pytest.raises((ValueError, RuntimeError), match=r"expected shape|size mismatch"):
            loading(saved, **options)


def test_offloading_that_casts_or_cannot_hold_int8_is_refused(saved, tmp_path):
    with pytest.raises(ValueError, match="not loaded to disk as int8"):
        loading(saved, device_map={"": "disk"}, offload_folder=tmp_path / "offload")
    with pytest.raises(RuntimeError, match="was not loaded as it is stored; legal: from_pretrained without offload_st"):
        loading(saved, offload_state_dict=True, torch_dtype=torch.bfloat16)


def test_a_model_that_another_quantizer_has_quantised_is_not_saved(tmp_path):
    model, _ = made("dit")
    int8fx.convert(model)
    model.hf_quantizer = types.SimpleNamespace(quantization_config=types.SimpleNamespace(quant_method="torchao"))
    with pytest.raises(ValueError, match="some layers are quantised by torchao, and others by int8fx"):
        model.save_pretrained(tmp_path)


def test_float_models_are_saved_as_ever(tmp_path):
    model, inputs = made("dit")
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    again = loading(tmp_path)
    assert not int8fx.is_packed(again)
    assert torch.equal(run(again, inputs), run(model, inputs))


def in_new_process(script: str, *args: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True)


LOAD = "import diffusers, sys; diffusers.DiTTransformer2DModel.from_pretrained(sys.argv[1])"


@pytest.mark.slow
def test_without_int8fx_loading_is_an_error_and_with_it_before_or_after_it_works(saved):
    done = in_new_process(LOAD, saved)
    assert done.returncode
    assert "Unknown quantization type, got int8fx" in done.stderr
    for script in (f"import int8fx\n{LOAD}", LOAD.replace("sys;", "sys, int8fx;")):
        done = in_new_process(script, saved)
        assert done.returncode == 0, done.stderr
