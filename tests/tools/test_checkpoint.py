"""``int8fx convert`` and ``int8fx inspect`` of checkpoints: whole or absent, and said as they are."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support import foreign, models
from support.conversion import assert_same_files, flip_last_bit

import int8fx
from int8fx.tools.checkpoint import CheckpointError, read_contents
from int8fx.tools.cli import main


@pytest.fixture
def source(tmp_path) -> Path:
    model, _ = models.llama()
    model.save_pretrained(tmp_path / "source", max_shard_size="60KB")
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    return tmp_path / "source"


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("scheme", ["llm_int8", "rotated(16, columns=0.05)"])
def test_convert_writes_what_convert_and_save_pretrained_write(scheme, source, tmp_path, capsys):
    assert main(["convert", str(source), str(tmp_path / "int8"), "--scheme", scheme, "--skip", "down_proj"]) == 0
    model = transformers.LlamaForCausalLM.from_pretrained(source)
    int8fx.convert(model, int8fx.Int8FxConfig(scheme).scheme, skip="down_proj")
    model.save_pretrained(tmp_path / "expected")
    written, expected = files(tmp_path / "int8"), files(tmp_path / "expected")
    assert written.pop("tokenizer.json") == b"{}"
    assert written == expected
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    text = capsys.readouterr().out
    assert "int8fx: 12 packed weights, " in text
    assert "model.layers.1.self_attn.q_proj" in text


def test_folders_are_copied_without_weights_or_if_they_are_modules(source, tmp_path):
    layout = {
        "1_Pooling/config.json": True,
        "2_Dense/model.safetensors": True,
        "additional_chat_templates/tool.jinja": True,
        "checkpoint-5/config.json": False,
        "checkpoint-5/model.safetensors": False,
        "onnx/model.onnx": False,
        ".cache/note": False,
    }
    for name in layout:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(name)
    modules = [{"idx": 0, "path": ""}, {"idx": 1, "path": "1_Pooling"}, {"idx": 2, "path": "2_Dense"}]
    (source / "modules.json").write_text(json.dumps(modules))
    assert main(["convert", str(source), str(tmp_path / "int8")]) == 0
    assert {name: (tmp_path / "int8" / name).exists() for name in layout} == layout
    assert (tmp_path / "int8" / "2_Dense" / "model.safetensors").read_text() == "2_Dense/model.safetensors"
    (source / "modules.json").write_text("{}")
    assert main(["convert", str(source), str(tmp_path / "other")]) == 1
    assert not (tmp_path / "other").exists()


def test_inspect_says_what_a_checkpoint_holds(source, tmp_path, capsys):
    assert main(["convert", str(source), str(tmp_path / "int8"), "--scheme", "rotated", "--json"]) == 0
    contents = json.loads(capsys.readouterr().out)
    assert main(["inspect", str(tmp_path / "int8"), "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out) == contents
    assert contents["kind"] == "int8fx"
    state = load_file(tmp_path / "int8" / "model.safetensors")
    for entry in contents["packed"]:
        assert entry["scheme"] == "rotated"
        assert entry["columns"] == state[f"{entry['layer']}.weight_columns"].tolist()
        parts = ("codes", "scale", "columns", "columns_weight")
        assert entry["bytes"] == sum(state[f"{entry['layer']}.weight_{part}"].nbytes for part in parts)
    assert contents["parameters"] == models.llama()[0].num_parameters()
    assert main(["inspect", str(source)]) == 0
    assert capsys.readouterr().out.startswith("float: 0 packed weights")
    assert main(["inspect", str(tmp_path / "int8"), "--json", str(tmp_path / "out.json")]) == 0
    assert json.loads((tmp_path / "out.json").read_text()) == contents


def test_what_is_refused_leaves_the_target(source, tmp_path, capsys):
    target = tmp_path / "int8"
    assert main(["convert", str(source), str(target)]) == 0
    before = files(target)
    assert main(["convert", str(source), str(target)]) == 1
    assert f"{target} exists; legal: another folder, or --overwrite" in capsys.readouterr().err
    assert main(["convert", str(target), str(tmp_path / "twice")]) == 1
    assert "is quantised already, by int8fx" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "missing"), str(tmp_path / "twice")]) == 1
    assert "legal: the folder of a transformers model" in capsys.readouterr().err
    with pytest.raises(SystemExit) as error:
        main(["convert", str(source), str(target), "--scheme", "nonsense"])
    assert error.value.code == 2
    assert main(["convert", str(source), str(target), "--overwrite", "--skip", "no_such_layer"]) == 1
    assert "matches no layer" in capsys.readouterr().err
    assert files(target) == before
    assert not (tmp_path / "twice").exists()
    assert main(["convert", str(source), str(target), "--overwrite", "--scheme", "plain"]) == 0
    assert {entry.scheme for entry in read_contents(target).packed} == {"plain"}


def test_only_models_are_overwritten_and_only_whole_ones_are_converted(source, tmp_path, capsys):
    assert main(["convert", str(source), str(tmp_path), "--overwrite"]) == 1
    assert "is not the folder of a model" in capsys.readouterr().err
    assert (source / "config.json").is_file()
    model, _ = models.llama()
    model.save_pretrained(tmp_path / "part")
    state = load_file(tmp_path / "part" / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, tmp_path / "part" / "model.safetensors", metadata={"format": "pt"})
    assert main(["convert", str(tmp_path / "part"), str(tmp_path / "int8")]) == 1
    assert "lacks tensors: model.layers.1.mlp.up_proj.weight" in capsys.readouterr().err
    assert not (tmp_path / "int8").exists()


def test_damaged_checkpoints_are_refused_by_name(source, tmp_path):
    int8fx.convert(models.llama()[0]).save_pretrained(tmp_path / "int8")
    file = tmp_path / "int8" / "model.safetensors"
    state = load_file(file)
    state["model.layers.0.mlp.up_proj.weight_format"].zero_()
    save_file(state, file)
    with pytest.raises(CheckpointError, match=r"up_proj\.weight_format: found a text that is not int8fx's"):
        read_contents(tmp_path / "int8")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        read_contents(tmp_path / "int8")
    with pytest.raises(CheckpointError, match="has no safetensors files"):
        read_contents(tmp_path / "nothing")


def test_inspect_refuses_a_flipped_bit(source, tmp_path, capsys):
    assert main(["convert", str(source), str(tmp_path / "int8")]) == 0
    file, tensor = tmp_path / "int8" / "model.safetensors", "model.layers.0.mlp.up_proj.weight_codes"
    flip_last_bit(file, tensor)
    for path in (file.parent, file):
        assert main(["inspect", str(path)]) == 1
        assert f"{file}: tensor '{tensor}' has the checksum" in capsys.readouterr().err


@pytest.mark.slow
def test_a_conversion_that_is_killed_leaves_the_old_checkpoint_whole(source, tmp_path):
    target = tmp_path / "int8"
    assert main(["convert", str(source), str(target)]) == 0
    before = files(target)
    script = """
        import sys, time
        from int8fx.tools import checkpoint
        from int8fx.tools.cli import main
        copy = checkpoint.shutil.copy2
        def slow(*args):
            print("copying", flush=True)
            time.sleep(60)
        checkpoint.shutil.copy2 = slow
        main(sys.argv[1:])
    """
    command = [sys.executable, "-c", textwrap.dedent(script), "convert", str(source), str(target), "--overwrite"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "copying\n"  # all but the last file is written
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(0.1)
    assert files(target) == before
    model = transformers.LlamaForCausalLM.from_pretrained(target)
    with torch.no_grad():
        assert model(input_ids=torch.arange(3, 9)[None]).logits.isfinite().all()


# ---- files of other libraries ---------------------------------------------------------------------------------------

CONFIGS = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False},
    "gptq_v2": {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2"},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "GEMM"},
}


def write_quantised(folder: Path, layout: str, *, binary: bool = False, **config) -> transformers.PreTrainedModel:
    """Writes a Llama whose linear layers have random codes in ``layout``. Returns the float model of these weights."""
    model = models.llama(intermediate_size=96, attention_bias=True, **config)[0]
    rng, state = np.random.default_rng(0), dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            layer = foreign.groups(rng, *module.weight.shape, 32, lowest=1 if layout == "gptq" else 0)
            module.weight.data = torch.from_numpy(layer.weight())
            del state[f"{name}.weight"]
            is_awq = layout == "awq"
            prefix = f"{name}."
            state |= foreign.awq(prefix, layer) if is_awq else foreign.gptq(prefix, layer, v2=layout == "gptq_v2")
    folder.mkdir()
    settings = model.config.to_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(settings | {"quantization_config": CONFIGS[layout]}))
    (folder / "quantize_config.json").write_text(json.dumps(CONFIGS[layout]))
    (folder / "tokenizer.json").write_text("{}")
    if binary:
        torch.save(state, folder / "pytorch_model.bin")
    else:
        keys = sorted(state)
        shards = {"model-00001-of-00002.safetensors": keys[::2], "model-00002-of-00002.safetensors": keys[1::2]}
        for file, those in shards.items():
            save_file({key: state[key] for key in those}, folder / file, metadata={"format": "pt"})
        weight_map = {key: file for file, those in shards.items() for key in those}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return model


def assert_equal_models(folder: Path, expected: torch.nn.Module) -> int:
    """The model in ``folder`` has the weights and outputs of ``expected``. Returns how many weights are packed."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    packed = {name: m for name, m in model.named_modules() if getattr(m, "packed_weights", None)}
    floats = {k: t for k, t in model.state_dict().items() if k in expected.state_dict()}
    found = floats | {f"{name}.weight": module.dequantize() for name, module in packed.items()}
    right = expected.state_dict()
    assert found.keys() == right.keys()
    assert [k for k in right if not torch.equal(found[k], right[k])] == []
    with torch.no_grad():
        y, z = (m(**models.llama()[1]).logits for m in (model, expected.eval()))
    assert (y - z).norm() <= 1e-5 * z.norm()
    return len({id(module.weight_codes) for module in packed.values()})


@pytest.mark.parametrize(("layout", "binary"), [*((layout, False) for layout in CONFIGS), ("awq", True)])
def test_gptq_and_awq_folders_are_taken_over(layout, binary, tmp_path, capsys):
    """Parts of a layer are in several files."""
    expected = write_quantised(tmp_path / "source", layout, binary=binary)
    assert main(["convert", str(tmp_path / "source"), str(tmp_path / "int8")]) == 0
    assert "int8fx: 14 packed weights" in capsys.readouterr().out
    assert assert_equal_models(tmp_path / "int8", expected) == 14
    assert (tmp_path / "int8" / "tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "int8" / "quantize_config.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["int8", "source"]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "int8")
    model.save_pretrained(tmp_path / "again")
    (tmp_path / "int8" / "tokenizer.json").unlink()
    assert_same_files(tmp_path / "int8", tmp_path / "again")


def test_options_of_what_is_taken_over(tmp_path):
    model = write_quantised(tmp_path / "source", "gptq")
    command = ["convert", str(tmp_path / "source"), str(tmp_path / "int8"), "--compute", "int8", "--dtype", "bfloat16"]
    assert main(command) == 0
    scheme = "weight_only(dtype='int4_clip', group_size=32, asymmetric=True, scale_dtype='float16', compute='int8')"
    contents = read_contents(tmp_path / "int8")
    assert {entry.scheme for entry in contents.packed} == {scheme}
    assert {entry.layer: entry.shape for entry in contents.packed} == {
        name: tuple(m.weight.shape)
        for name, m in model.named_modules()
        if hasattr(m, "in_features") and "head" not in name
    }
    assert contents.parameters == model.num_parameters()
    assert load_file(tmp_path / "int8" / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("tied", [True, False])
def test_gguf_files_are_taken_over(tied, tmp_path, capsys):
    (tmp_path / "source").mkdir()
    file = tmp_path / "source" / "model.gguf"
    model = models.llama(intermediate_size=96, tie_word_embeddings=tied)[0]
    kinds = {"ffn_down": "Q5_0", "blk.": "Q4_0", "token_embd": "Q8_0", "output": "F16"}
    foreign.write_gguf(file, model, kinds)
    assert main(["convert", str(file), str(tmp_path / "int8")]) == 0
    out, err = capsys.readouterr()
    assert f"int8fx: {13 if tied else 12} packed weights" in out
    assert "2 tensors of type Q5_0 become torch.float32: blk.0.ffn_down.weight, blk.1.ffn_down.weight" in err
    assert ("token_embd" in err) == (not tied)
    assert "no tokenizer that transformers can read" in err
    expected = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    assert assert_equal_models(tmp_path / "int8", expected) == (13 if tied else 12)


def quantised(**settings):
    """Changes the quantization_config of a folder."""

    def apply(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] |= settings
        (folder / "config.json").write_text(json.dumps(config))

    return apply


def resize(folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text()) | {"intermediate_size": 128}
    (folder / "config.json").write_text(json.dumps(settings))


def shards(change):
    """Changes the tensors of each file of a folder."""

    def apply(folder: Path) -> None:
        for file in folder.glob("*.safetensors"):
            state = load_file(file)
            change(state)
            save_file(state, file, metadata={"format": "pt"})

    return apply


def rename(old: str, new: str):
    """Changes the names of tensors."""

    def in_state(state: dict) -> None:
        for key in [key for key in state if old in key]:
            state[key.replace(old, new)] = state.pop(key)

    def apply(folder: Path) -> None:
        shards(in_state)(folder)
        index = folder / "model.safetensors.index.json"
        index.write_text(index.read_text().replace(old, new))

    return apply


def truncate(folder: Path) -> None:
    file = min(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])


def outside(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001-of", "../model-00001-of"))


def keep(folder: Path) -> None:
    """Changes nothing."""


def without_numbers(state: dict) -> None:
    for key in [key for key in state if key == f"{Q}.scales"]:
        state[key].fill_(float("nan"))


Q, MLP = "model.layers.1.self_attn.q_proj", "model.layers.1.mlp"
FAULTS = {
    "a scheme": (keep, ["--bits", "4"], "is quantised by gptq, and keeps its codes; legal: no scheme"),
    "skip": (keep, ["--skip", "lm_head"], "is quantised by gptq, and keeps its codes"),
    "another method": (quantised(quant_method="aqlm"), [], "is quantised already, by aqlm"),
    "another layout": (quantised(checkpoint_format="marlin"), [], "the layout 'marlin'; legal: gptq, gptq_v2"),
    "gemv": (quantised(quant_method="awq", version="gemv"), [], "the layout 'gemv'; legal: gemm"),
    "no such file": (lambda folder: min(folder.glob("*.safetensors")).unlink(), [], "No such file"),
    "truncated": (truncate, [], "incomplete metadata"),
    "outside": (outside, [], "has no weight_map of file names"),
    "a part is missing": (rename(f"{Q}.scales", "other"), [], f"layer '{Q}' lacks scales"),
    "another layer": (rename(f"{Q}.", f"{Q}s."), [], f"has '{Q}s.bias', and the model of transformers has no place"),
    "a bias too many": (rename("model.norm.weight", f"{MLP}.up_proj.bias"), [], f"has '{MLP}.up_proj.bias', and"),
    "another size": (resize, [], "mlp.down_proj.weight_codes"),
    "NaN": (shards(without_numbers), [], f"'{Q}.weight' has a scale that is NaN or inf"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_folders_of_other_libraries_leave_the_target(fault, tmp_path, capsys):
    damage, options, message = FAULTS[fault]
    write_quantised(tmp_path / "source", "gptq")
    damage(tmp_path / "source")
    assert main(["convert", str(tmp_path / "source"), str(tmp_path / "int8"), *options]) == 1
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_biases_of_zeros_that_a_model_does_not_have_are_left_out(tmp_path):
    """AutoGPTQ writes them."""
    expected = write_quantised(tmp_path / "source", "gptq")
    file = tmp_path / "source" / "model-00001-of-00002.safetensors"
    state = load_file(file) | {"model.layers.0.mlp.up_proj.bias": torch.zeros(96)}
    save_file(state, file, metadata={"format": "pt"})
    assert main(["convert", str(tmp_path / "source"), str(tmp_path / "int8")]) == 0
    assert assert_equal_models(tmp_path / "int8", expected) == 14


def test_damaged_gguf_files_leave_the_target(source, tmp_path, capsys):
    file = tmp_path / "model.gguf"
    for raw, message in ((b"GGUF", "is no GGUF file that can be read"), (b"", "is no GGUF file that can be read")):
        file.write_bytes(raw)
        assert main(["convert", str(file), str(tmp_path / "int8")]) == 1
        assert message in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "none.gguf"), str(tmp_path / "int8")]) == 1
    assert "No such file" in capsys.readouterr().err
    assert main(["convert", str(source), str(tmp_path / "int8"), "--compute", "int8"]) == 1
    assert "is a float model; legal: compute in the scheme" in capsys.readouterr().err
    assert not (tmp_path / "int8").exists()


def test_experts_of_other_libraries_are_refused(tmp_path, capsys):
    """transformers stacks them into one weight while it loads."""
    models.mixtral(intermediate_size=96)[0].save_pretrained(tmp_path / "source")
    file, rng = tmp_path / "source" / "model.safetensors", np.random.default_rng(0)
    state = load_file(file)
    for key in [key for key in state if ".experts." in key]:
        layer = foreign.groups(rng, *state.pop(key).shape, 32)
        state |= foreign.gptq(key.removesuffix("weight"), layer)
    assert "model.layers.0.block_sparse_moe.experts.0.w1.qweight" in state
    save_file(state, file, metadata={"format": "pt"})
    config = json.loads((tmp_path / "source" / "config.json").read_text()) | {"quantization_config": CONFIGS["gptq"]}
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    assert main(["convert", str(tmp_path / "source"), str(tmp_path / "int8")]) == 1
    assert ".experts.0.w1" in capsys.readouterr().err
    assert not (tmp_path / "int8").exists()
