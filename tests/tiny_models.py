"""Random models of a few thousand weights, saved as transformers saves real ones, with a tokenizer of bytes."""

from __future__ import annotations

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
    return save(directory, BertModel(BertConfig(**SIZES, num_attention_heads=4, max_position_embeddings=64)))


def save_encoder_decoder(directory: Path) -> Path:
    return save(directory, T5Model(T5Config(vocab_size=258, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)))
