"""Architectures of transformers: quantised while loading as by `convert`, and saved and loaded bit by bit.

The fast lane has classes whose names change between model and file, or whose ties are unusual.
``HYPOTHESIS_PROFILE=thorough pytest tests/integrations/test_transformers_zoo.py`` sweeps all that `support.zoo` builds.
"""

import os

import pytest
import torch
from support import zoo
from support.conversion import assert_same_files, assert_same_tensors, converted_names

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


@pytest.mark.parametrize("select", [None, ["*"]], ids=["default", "everything"])
@pytest.mark.parametrize(("task", "name"), SWEEP, ids=lambda value: value)
def test_architecture(task, name, select, tmp_path):
    model, _ = zoo.build_or_skip(task, name, required=(task, name) in FAMILIES)
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
    assert_same_tensors(loaded, converted)
    loaded.save_pretrained(tmp_path / "loaded", **SHARDS)
    converted.save_pretrained(tmp_path / "converted", **SHARDS)
    assert_same_files(tmp_path / "loaded", tmp_path / "converted")
    again = cls.from_pretrained(tmp_path / "loaded")
    assert_same_tensors(again, loaded)
    assert not [name for name, t in (*again.named_parameters(), *again.named_buffers()) if t.is_meta]
    again.save_pretrained(tmp_path / "again", **SHARDS)
    assert_same_files(tmp_path / "again", tmp_path / "loaded")


def test_a_model_whose_names_do_not_come_back_is_refused_by_name(tmp_path):
    model, _ = zoo.build(*RENAMED)
    int8fx.convert(model).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks 'model\.layers\.\d\.self_attn\.\w+\.weight_proj\.weight_codes'"):
        type(model).from_pretrained(tmp_path)
