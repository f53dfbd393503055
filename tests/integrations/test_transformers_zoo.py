"""Architectures of transformers: quantised while loading as by `convert`, and saved and loaded bit by bit.

The fast lane has classes whose names change between model and file, or whose ties are unusual.
``HYPOTHESIS_PROFILE=thorough pytest tests/integrations/test_transformers_zoo.py`` sweeps all that `support.zoo` builds.
"""

import filecmp
import os

import pytest
import torch
from support import zoo
from support.conversion import converted_names
from torch import nn

import int8fx

FAMILIES = [
    ("causal", "camembert"), ("causal", "deepseek_v3"), ("causal", "falcon"), ("causal", "mamba"), ("causal", "phi3"),
    ("masked", "roberta"), ("seq2seq", "bart"), ("audio", "wav2vec2"),
]  # fmt: skip
RENAMED = ("causal", "inkling2_text")
"""Its file calls ``weight_proj.weight`` ``weight_proj``. transformers does not rename ``weight_proj.weight_codes``."""
EVERYTHING = [(task, name) for task, names in zoo.TASKS.items() for name in names if (task, name) != RENAMED]
SWEEP = EVERYTHING if os.environ.get("HYPOTHESIS_PROFILE") == "thorough" else FAMILIES
SHARDS = {"max_shard_size": "200KB"}


def assert_same(model: nn.Module, other: nn.Module) -> None:
    state, expected = model.state_dict(), other.state_dict()
    assert state.keys() == expected.keys()
    assert [k for k, t in state.items() if t.dtype != expected[k].dtype or not torch.equal(t, expected[k])] == []


def assert_same_files(folder, other) -> None:
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    assert filecmp.cmpfiles(folder, other, names, shallow=False)[1:] == ([], [])


@pytest.mark.parametrize("select", [None, ["*"]], ids=["default", "everything"])
@pytest.mark.parametrize(("task", "name"), SWEEP, ids=lambda value: value)
def test_architecture(task, name, select, tmp_path):
    try:
        model, _ = zoo.build(task, name)
    except Exception as error:
        if (task, name) in FAMILIES:
            raise
        pytest.skip(f"the rules do not fit: {type(error).__name__}: {error}")
    cls, scheme = type(model), int8fx.rotated(16, columns=0.05)
    model.save_pretrained(tmp_path / "float")
    converted = cls.from_pretrained(tmp_path / "float")
    if any(not torch.equal(t, converted.state_dict()[k]) for k, t in model.state_dict().items()):
        pytest.skip("transformers does not load the float model as it was saved")
    int8fx.convert(converted, scheme, select=select)
    if not converted_names(converted):
        pytest.skip("nothing is converted")
    config = int8fx.Int8FxConfig(scheme, select=select)
    loaded = cls.from_pretrained(tmp_path / "float", quantization_config=config)
    assert_same(loaded, converted)
    loaded.save_pretrained(tmp_path / "loaded", **SHARDS)
    converted.save_pretrained(tmp_path / "converted", **SHARDS)
    assert_same_files(tmp_path / "loaded", tmp_path / "converted")
    again = cls.from_pretrained(tmp_path / "loaded")
    assert_same(again, loaded)
    assert not [name for name, t in (*again.named_parameters(), *again.named_buffers()) if t.is_meta]
    again.save_pretrained(tmp_path / "again", **SHARDS)
    assert_same_files(tmp_path / "again", tmp_path / "loaded")


def test_a_model_whose_names_do_not_come_back_is_refused_by_name(tmp_path):
    model, _ = zoo.build(*RENAMED)
    int8fx.convert(model).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks 'model\.layers\.\d\.self_attn\.\w+\.weight_proj\.weight_codes'"):
        type(model).from_pretrained(tmp_path)
