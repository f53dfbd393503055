"""Random models of a few thousand weights, saved as transformers saves real ones, with a tokenizer of bytes."""

from __future__ import annotations

import json
import wave
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5Model,
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

SIZES: dict[str, Any] = {"vocab_size": 258, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}


def save(directory: Path, model: Any) -> Path:
    """``model`` and a tokenizer of bytes, as ``save_pretrained`` lays them out."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    model.save_pretrained(directory)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>").save_pretrained(directory)
    return directory


def lm_config(tie_word_embeddings: bool = True) -> LlamaConfig:
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaConfig(**SIZES, **heads, max_position_embeddings=96, tie_word_embeddings=tie_word_embeddings)


def save_lm(directory: Path) -> Path:
    torch.manual_seed(0)
    return save(directory, LlamaForCausalLM(lm_config()))


def save_encoder(directory: Path) -> Path:
    torch.manual_seed(0)
    return save(directory, BertModel(BertConfig(**SIZES, num_attention_heads=4, max_position_embeddings=256)))


def save_encoder_decoder(directory: Path) -> Path:
    return save(directory, T5Model(T5Config(vocab_size=258, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)))


def whisper() -> WhisperForConditionalGeneration:
    """It hears a second, and writes six tokens of 256 at most."""
    torch.manual_seed(0)
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 48))}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    tokens = dict.fromkeys(("eos_token_id", "bos_token_id", "pad_token_id"), 256) | {"decoder_start_token_id": 257}
    ends = {"max_source_positions": 50, "max_target_positions": 24, "suppress_tokens": None}
    config = WhisperConfig(vocab_size=259, d_model=32, **sizes, **heads, **tokens, **ends, begin_suppress_tokens=None)
    model = WhisperForConditionalGeneration(config).eval()
    model.generation_config.max_length = 7
    return model


def save_whisper(directory: Path) -> Path:
    WhisperFeatureExtractor(chunk_length=1).save_pretrained(save(directory, whisper()))
    return directory


def save_wav2vec2(directory: Path) -> Path:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 30, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    convolutions: dict[str, Any] = {"conv_dim": (16, 16), "conv_kernel": (10, 10), "conv_stride": (10, 10)}
    positions = {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "num_attention_heads": 2}
    model = Wav2Vec2ForCTC(Wav2Vec2Config(**sizes, **convolutions, **positions, num_feat_extract_layers=2))
    model.save_pretrained(directory)
    alphabet = ["<pad>", "<s>", "</s>", "|", *map(chr, range(97, 123))]
    (directory / "vocab.json").write_text(json.dumps({c: i for i, c in enumerate(alphabet)}))
    Wav2Vec2CTCTokenizer(str(directory / "vocab.json")).save_pretrained(directory)
    Wav2Vec2FeatureExtractor().save_pretrained(directory)
    return directory


def save_audio(path: Path, seconds: float = 1.0, rate: int = 16000, seed: int = 0) -> Path:
    noise = torch.randn(int(seconds * rate), generator=torch.Generator().manual_seed(seed))
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((3000 * noise).clamp(-32768, 32767).to(torch.int16).numpy().tobytes())
    return path
