"""GGUF files: the weights that transformers and ``gguf`` dequantise, bit for bit, and errors for damaged files."""

import struct
import warnings

import gguf
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from support import models
from support.foreign import random_blocks, write_gguf

import int8fx
from int8fx.conversion.format import read_scheme
from int8fx.integrations.gguf import from_gguf, open_gguf
from int8fx.integrations.stored import convert_as_stored, read_schemes

UP = "blk.1.ffn_up.weight"
SCHEMES = {
    "Q4_0": int8fx.weight_only("int4_fullrange", 32, scale_dtype="float16"),
    "Q8_0": int8fx.weight_only("int8", 32, scale_dtype="float16"),
}


def llama(seed: int = 0, **config):
    return models.llama(seed=seed, intermediate_size=96, **config)[0]


def on_meta(folder):
    """A float model of the configuration that transformers reads from ``folder / model.gguf``."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.from_pretrained(folder, gguf_file="model.gguf")
        )
    model.tie_weights()
    return model


def loaded(file, **options):
    """As a user does it; all weights are in the file, so none stays on meta. Buffers are computed anew."""
    state = from_gguf(file, on_meta(file.parent), **options)
    model = llama()
    convert_as_stored(model, read_schemes(state))
    model.load_state_dict(state, assign=True)
    return model


def weights(model) -> dict[str, torch.Tensor]:
    floats = dict(model.named_parameters())
    packed = {path: module for path, module in model.named_modules() if getattr(module, "packed_weights", None)}
    return {k: t for k, t in floats.items() if not k.endswith("_codes")} | {
        f"{path}.{name}": module.dequantize(name) for path, module in packed.items() for name in module.packed_weights
    }


def by_transformers(file):
    return transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)


@pytest.mark.parametrize("kind", SCHEMES)
@settings(max_examples=10)
@given(seed=st.integers(0, 2**32))
def test_any_blocks_keep_their_values(kind, tmp_path_factory, seed):
    """Negative scales, zero ones, and the code -128 too."""
    file = tmp_path_factory.mktemp("gguf") / "model.gguf"
    rows = random_blocks(np.random.default_rng(seed), kind, 96, 64)
    write_gguf(file, llama(), {UP: kind}, raw={UP: rows})
    expected = torch.from_numpy(gguf.dequantize(rows, gguf.GGMLQuantizationType[kind]))
    assert torch.equal(loaded(file).model.layers[1].mlp.up_proj.dequantize(), expected)


@pytest.mark.parametrize(
    "kinds", [{"blk.": "Q4_0", "output": "Q8_0"}, {"attn_": "Q8_0", "ffn_": "Q4_0", "output": "F16"}]
)
def test_models_have_the_weights_and_outputs_that_transformers_gives_them(kinds, tmp_path):
    """Rows of q and k have another order in the file."""
    file = tmp_path / "model.gguf"
    write_gguf(file, llama(), kinds)
    model, expected = loaded(file), by_transformers(file)
    found, right = weights(model), weights(expected)
    assert found.keys() == right.keys()
    assert [k for k in right if not torch.equal(found[k], right[k])] == []
    inputs = models.llama()[1]
    with torch.no_grad():
        y, z = model(**inputs).logits, expected(**inputs).logits
    assert (y - z).norm() <= 1e-5 * z.norm()


def test_schemes_and_what_becomes_float(tmp_path):
    file = tmp_path / "model.gguf"
    write_gguf(file, llama(), {"ffn_down": "Q4_1", "blk.": "Q4_0", "token_embd": "Q8_0", "output": "BF16"})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        state = from_gguf(file, on_meta(tmp_path), dtype=torch.bfloat16, compute="int8")
    texts = [str(w.message) for w in caught if str(w.message).startswith("int8fx")]
    assert [text.partition(": ")[2].partition(": ")[2] for text in texts] == [
        "1 tensors of type Q8_0 become torch.bfloat16: token_embd.weight",
        "2 tensors of type Q4_1 become torch.bfloat16: blk.0.ffn_down.weight, blk.1.ffn_down.weight",
    ]
    assert state["model.layers.0.mlp.down_proj.weight"].dtype == torch.bfloat16
    scheme = read_scheme(state["model.layers.0.mlp.up_proj.weight_format"])
    assert scheme == int8fx.weight_only("int4_fullrange", 32, scale_dtype="float16", compute="int8")
    assert "model.norm.weight" in state


@pytest.mark.parametrize("kind", SCHEMES)
def test_a_tied_embedding_is_packed(kind, tmp_path):
    file = tmp_path / "model.gguf"
    write_gguf(file, llama(tie_word_embeddings=True), {"token_embd": kind})
    state = from_gguf(file, on_meta(tmp_path))
    names = ("model.embed_tokens.weight", "lm_head.weight")
    assert all(
        read_scheme(state[f"{name}_format"]) in (SCHEMES[kind], int8fx.weight_only("int8", 32, True, "float16"))
        for name in names
    )
    assert state[f"{names[0]}_codes"] is state[f"{names[1]}_codes"]


def test_files_without_a_weight_to_pack_are_refused(tmp_path):
    file = tmp_path / "model.gguf"
    write_gguf(file, llama(), {"blk.": "Q4_1", "token_embd": "Q8_0"})
    with pytest.raises(
        ValueError, match=r"no weight to pack among the tensors of the GGUF file: 14 of Q4_1, .*; legal: Q4_0"
    ):
        from_gguf(file, on_meta(tmp_path))


def test_another_model_is_refused_by_the_name_of_the_tensor(tmp_path):
    file = tmp_path / "model.gguf"
    write_gguf(file, llama(), {"blk.": "Q4_0"})
    with torch.device("meta"):
        other = transformers.LlamaForCausalLM(llama(hidden_size=128).config)
    with pytest.raises(
        ValueError, match=r"'blk\.0\.attn_q\.weight' has shape \(64, 64\); legal: \(128, 128\), that of 'model"
    ):
        from_gguf(file, other)


# ---- damaged files --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    file = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf(file, llama(), {"blk.": "Q4_0"})
    return file.read_bytes()


@given(st.data())
def test_truncated_files_are_refused(whole, tmp_path_factory, data):
    end = data.draw(st.one_of(st.integers(0, 4000), st.integers(0, len(whole) - 33)))  # the end may be padding
    file = tmp_path_factory.mktemp("gguf") / "model.gguf"
    file.write_bytes(whole[:end])
    with pytest.raises(ValueError, match=f"{file} is no GGUF file that can be read: "):
        open_gguf(file)


@given(st.data())
def test_changed_bytes_of_the_header_are_refused_or_read(whole, tmp_path_factory, data):
    """In a short time, and by no other error."""
    raw = bytearray(whole)
    for at in data.draw(st.lists(st.integers(0, 3000), min_size=1, max_size=4)):
        raw[at] = data.draw(st.sampled_from((0, 1, 9, 127, 128, 255)))
    file = tmp_path_factory.mktemp("gguf") / "model.gguf"
    file.write_bytes(raw)
    try:
        found = str(open_gguf(file).tensors)
    except ValueError as error:
        found = str(error)
    assert found.startswith(("[ReaderTensor(", "[]", f"int8fx: {file} is no GGUF file that can be read: "))


KEY = struct.pack("<Q", 1) + b"k"
HEADERS = {
    "another magic": (b"GGML" + struct.pack("<IQQ", 3, 0, 0), "it does not begin with GGUF"),
    "version 1": (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "it has version 1; legal: 2 or 3"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "little-endian"),
    "many tensors": (b"GGUF" + struct.pack("<IQQ", 3, 2**62, 0), "it declares 4611686018427387904 tensors"),
    "many entries": (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**62), "it declares 0 tensors"),
    "a long text": (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**63) + bytes(16), "metadata end at byte"),
    "a long array": (
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + KEY + struct.pack("<IIQ", 9, 4, 2**60),
        "metadata end at",
    ),
    "a long array of texts": (
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + KEY + struct.pack("<IIQ", 9, 8, 2**60),
        "unpack",
    ),
    "an array of arrays": (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + KEY + struct.pack("<IIQ", 9, 9, 1), "an array has"),
    "an unknown type": (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + KEY + struct.pack("<I", 13), "a metadata type is 13"),
    "no architecture": (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "it lacks general.architecture"),
    "empty": (b"", "no GGUF file that can be read"),
}


@pytest.mark.parametrize("header", HEADERS)
def test_hostile_headers_are_refused(header, tmp_path):
    raw, message = HEADERS[header]
    (tmp_path / "model.gguf").write_bytes(raw)
    with pytest.raises(ValueError, match=f"{tmp_path / 'model.gguf'} is no GGUF file") as error:
        open_gguf(tmp_path / "model.gguf")
    assert message in str(error.value)


def test_parts_of_a_model_are_refused(tmp_path):
    write_gguf(tmp_path / "model.gguf", llama(), {"blk.": "Q4_0"}, split_count=3)
    with pytest.raises(ValueError, match="one of 3 files of a model; merge them"):
        open_gguf(tmp_path / "model.gguf")
