"""Tiny random models of the architectures of transformers, from their configuration classes by rules on names."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.auto import configuration_auto, modeling_auto

TASKS = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "image": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "audio": modeling_auto.MODEL_FOR_CTC_MAPPING_NAMES,
}
VOCABULARY, LARGEST = 96, 20_000_000  # parameters

RULES: list[tuple[str, int]] = [
    (r"(.*_)?vocab_size(_.*)?", VOCABULARY),
    (r"num_feat_extract_layers", 7),
    (r"(pad|bos|eos|cls|sep|mask|unk|decoder_start|.*)_token_id", 2),
    (r"first_k_dense_replace|num_dense_layers|(.*_)?n_groups?|topk_group|num_nextn_predict_layers", 1),
    (r"(num|n)_sparse_(encoder|decoder)_layers", 1),
    (r".*experts_per_tok(en)?|moe_top_?k|(moe_)?top_?k(_experts)?|num_selected_experts", 2),
    (r"(.*_)?(num|n)_(local_|routed_)?experts|moe_num_experts", 4),
    (r"(n|num)_shared_experts|moe_num_shared_experts|zero_expert_num", 1),
    (r"qk_(rope|nope)_head_dim|rotary_dim", 8),
    (r"v_head_dim|(.*_)?head_dim|d_kv|d_head|kv_channels|(attention_)?head_size|head_width", 16),
    (r"(.*_)?(num_key_value_heads|kv_n_heads|num_kv_heads|multi_query_group_num)", 2),
    (r"(.*_)?(n|num)?_?(attention_)?heads|n_head|(.*_)?attention_heads|(.*_)?num_attention_heads", 4),
    (r"q_lora_rank|kv_lora_rank", 32),
    (r"(.*_)?(intermediate_size|ffn_dim|d_ff|d_inner|n_inner|mlp_dim|ffn_hidden_size|inner_dim)(_.*)?", 96),
    (r"(.*_)?(hidden_size|d_model|n_embd|embed_dim|embedding_size|hidden_dim|emb_dim|dim|d_embed)", 64),
    (r"(.*_)?(layers|n_layer|num_hidden_layers|num_layers|depth)", 2),
    (r"(.*_)?max_position_embeddings|n_positions|max_seq_len|(.*_)?sliding_window", 64),
    (r"image_size", 32),
    (r"patch_size", 8),
]


def shrink(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a configuration with small sizes. Lists with an entry for each layer keep one of each kind."""
    small = {}
    for name, value in values.items():
        if isinstance(value, dict) and name.endswith("_config"):
            small[name] = shrink(value)
        elif isinstance(value, int) and not isinstance(value, bool) and value > 0:
            size = next((size for pattern, size in RULES if re.fullmatch(pattern, name)), value)
            small[name] = min(size, value)
        elif isinstance(value, list) and name.endswith("layer_types") and len(value) > 2:
            kinds = list(dict.fromkeys(value))
            small[name] = (kinds * 2)[:2] if len(kinds) < 2 else [kinds[0], kinds[-1]]
        else:
            small[name] = VOCABULARY if name == "vocab_size" else value
    if {"qk_rope_head_dim", "head_dim"} <= small.keys():
        small["head_dim"] = small["qk_rope_head_dim"]
    return small


def tiny_config(model_type: str) -> PreTrainedConfig:
    kind = configuration_auto.CONFIG_MAPPING[model_type]
    values = {k: v for k, v in kind().to_dict().items() if k not in ("model_type", "transformers_version")}
    return kind(**shrink(values))


def build(task: str, model_type: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A random model in eval mode, and inputs for it. Raises whatever the classes raise if the rules do not fit."""
    import transformers

    name = TASKS[task][model_type]
    kind = getattr(transformers, name if isinstance(name, str) else name[0])
    config = tiny_config(model_type)
    with torch.device("meta"):
        size = sum(p.numel() for p in kind(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters")
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for module in model.modules():
            for p in module.parameters(recurse=False):
                if p.dim() >= 2:
                    is_convolution = isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
                    p.normal_(0, (p[0].numel() if is_convolution else p.shape[-1]) ** -0.5)
    ids = torch.randint(3, VOCABULARY, (2, 9))
    inputs: dict[str, torch.Tensor] = {"input_ids": ids}
    if task == "seq2seq":
        inputs["decoder_input_ids"] = ids[:, :5]
    elif task == "image":
        inputs = {"pixel_values": torch.randn(2, 3, 32, 32)}
    elif task == "audio":
        takes_waves = getattr(model, "main_input_name", "") == "input_values"
        features = getattr(getattr(config, "encoder_config", config), "num_mel_bins", 80)
        inputs = (
            {"input_values": torch.randn(2, 1600)} if takes_waves else {"input_features": torch.randn(2, 64, features)}
        )
    with torch.no_grad():
        model(**inputs)
    return model, inputs


def build_or_skip(task: str, model_type: str, required: bool) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """`build`. Skips the test if the rules do not fit this model type and it is not ``required``."""
    try:
        return build(task, model_type)
    except Exception as error:
        if required:
            raise
        pytest.skip(f"the rules do not fit: {type(error).__name__}: {error}")
