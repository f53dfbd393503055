"""Whisper models of CTranslate2: what is written as CTranslate2 does comes back as the model that it was made of."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from support.tiny_models import save_audio, whisper
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor

from int8fx.tools.data.audio import clips
from int8fx.tools.data.ctranslate2 import convert_whisper, read_variables
from int8fx.tools.data.models import load

NORMS = {
    "ffn": "final_layer_norm",
    "self_attention": "self_attn_layer_norm",
    "attention": "encoder_attn_layer_norm",
}


def variables(model: torch.nn.Module) -> dict[str, Tensor]:
    """A Whisper of one layer on either side, under CTranslate2's names."""
    state, found = model.state_dict(), {}

    def take(target: str, *sources: str, names: tuple[str, str] = ("weight", "bias")) -> None:
        for kind, name in zip(("weight", "bias"), names, strict=True):
            known = {source: state.get(f"{source}.{kind}") for source in sources}
            shape = next(t for t in known.values() if t is not None).shape
            found[f"{target}/{name}"] = torch.cat([torch.zeros(shape) if t is None else t for t in known.values()])

    norm = ("gamma", "beta")
    for side, attentions in (("encoder", ("self_attention",)), ("decoder", ("self_attention", "attention"))):
        ours, theirs = f"{side}/layer_0", f"{side}.layers.0"
        for attention in attentions:
            parts = [f"{theirs}.{attention.replace('self_attention', 'self_attn')}.{p}_proj" for p in "qkv"]
            if attention == "attention":
                parts = [p.replace(".attention.", ".encoder_attn.") for p in parts]
                take(f"{ours}/attention/linear_0", parts[0])
                take(f"{ours}/attention/linear_1", *parts[1:])
                take(f"{ours}/attention/linear_2", parts[0].replace("q_proj", "out_proj"))
            else:
                take(f"{ours}/self_attention/linear_0", *parts)
                take(f"{ours}/self_attention/linear_1", parts[0].replace("q_proj", "out_proj"))
        for name in (*attentions, "ffn"):
            take(f"{ours}/{name}/layer_norm", f"{theirs}.{NORMS[name]}", names=norm)
        for i in range(2):
            take(f"{ours}/ffn/linear_{i}", f"{theirs}.fc{i + 1}")
        take(f"{side}/layer_norm", f"{side}.layer_norm", names=norm)
        found[f"{side}/position_encodings/encodings"] = state[f"{side}.embed_positions.weight"]
        found[f"{side}/num_heads"] = torch.tensor(2, dtype=torch.int16)
    for i in (1, 2):
        take(f"encoder/conv{i}", f"encoder.conv{i}")
    return found | {"decoder/embeddings/weight": state["decoder.embed_tokens.weight"]}


def write(folder: Path, tensors: dict[str, Tensor], version: int = 6) -> Path:
    codes = {torch.float32: 0, torch.int16: 2}

    def string(text: str) -> bytes:
        return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"

    data = struct.pack("<I", version) + string("WhisperSpec") + struct.pack("<II", 3, len(tensors))
    for name, tensor in tensors.items():
        head = struct.pack(f"<B{tensor.dim()}IBI", tensor.dim(), *tensor.shape, codes[tensor.dtype], tensor.nbytes)
        data += string(name) + head + tensor.contiguous().numpy().tobytes()
    folder.mkdir()
    (folder / "model.bin").write_bytes(data + struct.pack("<I", 0))
    (folder / "config.json").write_text(json.dumps({"suppress_ids": [1], "suppress_ids_begin": [2]}))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.add_special_tokens(["<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_a_whisper_comes_back_as_it_was(tmp_path):
    model = whisper()
    convert_whisper(write(tmp_path / "source", variables(model.model)), tmp_path / "target")
    twin, (features, tokenizer), kind = load(str(tmp_path / "target"))
    assert kind == "speech"
    state = model.state_dict()
    assert set(twin.state_dict()) == set(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in twin.state_dict().items())
    assert (twin.config.encoder_attention_heads, twin.config.decoder_ffn_dim) == (2, 48)
    measured, _ = clips(twin, features, [str(save_audio(tmp_path / f"{i}.wav", 0.5)) for i in range(2)], 0)
    assert tokenizer.decode(measured[0]["labels"][0], skip_special_tokens=True) is not None
    assert not set(measured[0]["labels"][0].tolist()) & {1}  # suppressed


def test_other_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"is of version 5 of CTranslate2's format; legal: 6"):
        read_variables(write(tmp_path / "old", {}, 5) / "model.bin")
    biased = variables(whisper().model)
    biased["encoder/layer_0/self_attention/linear_0/bias"] = torch.ones(96)
    with pytest.raises(ValueError, match=r"encoder/layers/0/self_attn/k_proj/bias is a bias of a key projection"):
        convert_whisper(write(tmp_path / "biased", biased), tmp_path / "target")
