"""Tiny models with random weights: every function returns ``(model, inputs)``, to be called as ``model(**inputs)``.

Models are in eval mode and float32; equal seeds give equal models. Weights have the size that a trained model's have
(a unit input gives a unit output), biases are not zero, and the norms of language models stretch a few channels, so that
layers see outlier columns.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Inputs = dict[str, Any]
HIDDEN = 64
VOCAB = 96


def _finish(model: nn.Module, seed: int, outliers: int = 0) -> nn.Module:
    """Random weights; ``outliers`` channels of every norm over `HIDDEN` channels are stretched twelvefold."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            for name, p in module.named_parameters(recurse=False):
                if p.dim() >= 2:
                    fan_in = p.shape[-1] if isinstance(module, nn.Embedding) else math.sqrt(p.shape[-1] * p.shape[-2])
                    p.copy_(torch.randn(p.shape, generator=g) / math.sqrt(fan_in))
                elif name == "bias" or name.endswith("_bias"):
                    p.copy_(torch.randn(p.shape, generator=g) / 8)
                elif "norm" in type(module).__name__.lower() and p.shape == (HIDDEN,):
                    p.copy_(1 + torch.randn(p.shape, generator=g) / 8)
                    p[torch.randperm(HIDDEN, generator=g)[:outliers]] *= 12
    return model.eval()


def _ids(batch: int, length: int, seed: int, high: int = VOCAB) -> Tensor:
    return torch.randint(3, high, (batch, length), generator=torch.Generator().manual_seed(seed))


def _randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- transformers ---------------------------------------------------------------------------------------------------


def llama(batch: int = 2, length: int = 7, *, seed: int = 0, **config: Any) -> tuple[nn.Module, Inputs]:
    """Grouped-query attention, gated MLP, RMSNorm; ``tie_word_embeddings=True`` for a tied head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 136, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**settings | config))
    return _finish(model, seed, outliers=2), {"input_ids": _ids(batch, length, seed), "use_cache": False}


def gpt2(batch: int = 2, length: int = 7, *, seed: int = 0, **config: Any) -> tuple[nn.Module, Inputs]:
    """transformers' ``Conv1D`` layers, whose weights are ``[K, N]``; LayerNorm, GELU, a tied head."""
    from transformers import GPT2Config, GPT2LMHeadModel

    settings = {
        "vocab_size": VOCAB, "n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "n_positions": 64, "resid_pdrop": 0.0,
        "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    model = GPT2LMHeadModel(GPT2Config(**settings | config))
    return _finish(model, seed, outliers=2), {"input_ids": _ids(batch, length, seed), "use_cache": False}


def mixtral(batch: int = 2, length: int = 7, *, seed: int = 0, **config: Any) -> tuple[nn.Module, Inputs]:
    """Fused experts with ``[E, N, K]`` weights and a router that is a bare Parameter."""
    from transformers import MixtralConfig, MixtralForCausalLM

    settings = {
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 72, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2,
        "max_position_embeddings": 64, "sliding_window": None, "tie_word_embeddings": False, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    model = MixtralForCausalLM(MixtralConfig(**settings | config))
    return _finish(model, seed, outliers=2), {"input_ids": _ids(batch, length, seed), "use_cache": False}


def gpt_oss(batch: int = 2, length: int = 7, *, seed: int = 0, **config: Any) -> tuple[nn.Module, Inputs]:
    """Fused experts with transposed ``[E, K, N]`` weights and biases, interleaved gate and up, attention sinks."""
    from transformers import GptOssConfig, GptOssForCausalLM

    settings = {
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 72, "num_hidden_layers": 2, "head_dim": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2,
        "max_position_embeddings": 64, "sliding_window": 16, "tie_word_embeddings": False, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 0, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }  # fmt: skip
    model = GptOssForCausalLM(GptOssConfig(**settings | config))
    return _finish(model, seed, outliers=2), {"input_ids": _ids(batch, length, seed), "use_cache": False}


def t5(batch: int = 2, length: int = 7, *, seed: int = 0, **config: Any) -> tuple[nn.Module, Inputs]:
    """Encoder and decoder with cross-attention; one embedding table for both and, by default, for the head."""
    from transformers import T5Config, T5ForConditionalGeneration

    settings = {
        "vocab_size": VOCAB, "d_model": HIDDEN, "d_kv": 16, "d_ff": 136, "num_layers": 2, "num_decoder_layers": 2,
        "num_heads": 4, "dropout_rate": 0.0, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2,
        "feed_forward_proj": "gated-gelu",
    }  # fmt: skip
    model = T5ForConditionalGeneration(T5Config(**settings | config))
    inputs = {"input_ids": _ids(batch, length, seed), "decoder_input_ids": _ids(batch, 5, seed + 1), "use_cache": False}
    return _finish(model, seed, outliers=2), inputs


def bert(batch: int = 2, length: int = 7, *, seed: int = 0, **config: Any) -> tuple[nn.Module, Inputs]:
    """A text encoder; the second sequence of the batch ends in padding."""
    from transformers import BertConfig, BertModel

    settings = {
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 136, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 64, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    model = BertModel(BertConfig(**settings | config))
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[-1, length - length // 3 :] = 0
    return _finish(model, seed, outliers=2), {"input_ids": _ids(batch, length, seed), "attention_mask": mask}


def vit(batch: int = 2, *, seed: int = 0, **config: Any) -> tuple[nn.Module, Inputs]:
    """An image encoder: patches by a strided convolution (not 1x1), then a transformer."""
    from transformers import ViTConfig, ViTModel

    settings = {
        "hidden_size": HIDDEN, "intermediate_size": 136, "num_hidden_layers": 2, "num_attention_heads": 4,
        "image_size": 16, "patch_size": 4, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    model = ViTModel(ViTConfig(**settings | config))
    return _finish(model, seed, outliers=2), {"pixel_values": _randn(batch, 3, 16, 16, seed=seed)}


# ---- torch ----------------------------------------------------------------------------------------------------------


def transformer(
    batch: int = 2, length: int = 7, *, seed: int = 0, batch_first: bool = True, norm_first: bool = False
) -> tuple[nn.Module, Inputs]:
    """``nn.Transformer``, encoder and decoder."""
    model = nn.Transformer(
        HIDDEN, nhead=4, num_encoder_layers=2, num_decoder_layers=2, dim_feedforward=136, batch_first=batch_first,
        norm_first=norm_first,
    )  # fmt: skip
    src, tgt = _randn(batch, length, HIDDEN, seed=seed), _randn(batch, 5, HIDDEN, seed=seed + 1)
    if not batch_first:
        src, tgt = src.transpose(0, 1), tgt.transpose(0, 1)
    return _finish(model, seed), {"src": src, "tgt": tgt}


class BareProducts(nn.Module):
    """Bare Parameters in every kind of product, each both ways round; `OPERANDS` says how each is used.

    ``bmm`` and ``einsum`` with three dimensions take one weight per row of the batch, which therefore is `BATCH`.
    """

    BATCH = 3
    OPERANDS = {
        "linear": "NK", "at": "KN", "at_t": "NK", "matmul": "KN", "matmul_t": "NK", "mm": "KN", "mm_t": "NK",
        "addmm": "KN", "addmm_t": "NK", "bmm": "KN", "bmm_t": "NK", "baddbmm": "KN", "einsum": "KN", "einsum_t": "NK",
        "einsum_experts": "KN", "einsum_experts_t": "NK",
    }  # fmt: skip
    BATCHED = ("bmm", "bmm_t", "baddbmm", "einsum_experts", "einsum_experts_t")

    def __init__(self, k: int = HIDDEN, n: int = 24) -> None:
        super().__init__()
        for name, layout in self.OPERANDS.items():
            shape = (n, k) if layout == "NK" else (k, n)
            setattr(self, name, nn.Parameter(torch.empty(self.BATCH, *shape) if name in self.BATCHED else torch.empty(shape)))
        self.addmm_bias = nn.Parameter(torch.empty(n))
        self.baddbmm_bias = nn.Parameter(torch.empty(n))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """x ``[BATCH, M, K]`` -> the result of each product, ``[BATCH, M, N]``."""
        n = self.addmm_bias.shape[0]
        x2d = x.reshape(-1, x.shape[-1])
        flat = {
            "mm": torch.mm(x2d, self.mm),
            "mm_t": torch.mm(x2d, self.mm_t.t()),
            "addmm": torch.addmm(self.addmm_bias, x2d, self.addmm),
            "addmm_t": torch.addmm(self.addmm_bias, x2d, self.addmm_t.T),
        }
        return {
            "linear": F.linear(x, self.linear),
            "at": x @ self.at,
            "at_t": x @ self.at_t.transpose(0, 1),
            "matmul": torch.matmul(x, self.matmul),
            "matmul_t": torch.matmul(x, self.matmul_t.mT),
            **{name: y.view(self.BATCH, -1, n) for name, y in flat.items()},
            "bmm": torch.bmm(x, self.bmm),
            "bmm_t": torch.bmm(x, self.bmm_t.transpose(1, 2)),
            "baddbmm": torch.baddbmm(self.baddbmm_bias, x, self.baddbmm),
            "einsum": torch.einsum("bmk,kn->bmn", x, self.einsum),
            "einsum_t": torch.einsum("bmk,nk->bmn", x, self.einsum_t),
            "einsum_experts": torch.einsum("emk,ekn->emn", x, self.einsum_experts),
            "einsum_experts_t": torch.einsum("emk,enk->emn", x, self.einsum_experts_t),
        }


def bare_products(length: int = 7, *, seed: int = 0) -> tuple[nn.Module, Inputs]:
    """`BareProducts`, with an outlier column in its input."""
    model = BareProducts()
    x = _randn(BareProducts.BATCH, length, HIDDEN, seed=seed)
    x[..., 5] *= 12
    return _finish(model, seed), {"x": x}


class TiedLM(nn.Module):
    """A language model whose head shares the embedding's weight and whose two projections share one."""

    def __init__(self, padding_idx: int | None = 0) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN, padding_idx=padding_idx)
        self.up = nn.Linear(HIDDEN, 136)
        self.up_again = nn.Linear(HIDDEN, 136)
        self.down = nn.Linear(136, HIDDEN)
        self.lm_head = nn.Linear(HIDDEN, VOCAB, bias=False)
        self.up_again.weight = self.up.weight
        self.lm_head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids)
        return self.lm_head(h + self.down(torch.relu(self.up(h)) + torch.tanh(self.up_again(h))))


def tied_lm(batch: int = 2, length: int = 7, *, seed: int = 0, padding_idx: int | None = 0) -> tuple[nn.Module, Inputs]:
    """`TiedLM`; some ids are ``padding_idx``."""
    model = _finish(TiedLM(padding_idx), seed)
    ids = _ids(batch, length, seed)
    if padding_idx is not None:
        ids[-1, -2:] = padding_idx
        with torch.no_grad():
            model.embed.weight[padding_idx] = 0
    return model, {"ids": ids}


LANGUAGE_MODELS = {"llama": llama, "gpt2": gpt2, "mixtral": mixtral, "gpt_oss": gpt_oss}
ALL = {
    **LANGUAGE_MODELS, "t5": t5, "bert": bert, "vit": vit, "transformer": transformer, "bare_products": bare_products,
    "tied_lm": tied_lm,
}  # fmt: skip
