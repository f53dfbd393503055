"""``int8fx convert`` and ``int8fx inspect`` of checkpoints: whole or absent, and said as they are."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support import models
from support.conversion import flip_last_bit

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
