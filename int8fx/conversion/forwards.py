"""The forwards of packed modules, which multiply by int8 weights: one for each `recipes.Kind` except OTHER."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..schemes.quantize import dequantize
from .recipes import Kind
from .view import is_differentiated


def linear_forward(self, x: Tensor) -> Tensor:
    """``x @ weight.T + bias``."""
    return self.packed_linear(x, "weight", self.bias)


def convolution_forward(self, x: Tensor) -> Tensor:
    """A 1x1 convolution: a linear layer over the channels."""
    n = self.packed_weights["weight"].kernel_dims
    if any(s != 1 for s in self.stride):
        strided: Any = (..., *(slice(None, None, s) for s in self.stride))
        x = x[strided]
    y = self.packed_linear(x.movedim(-n - 1, -1), "weight", self.bias)
    return y.movedim(-1, -n - 1).contiguous()  # like the convolution's result: later code may view it


def embedding_forward(self, ids: Tensor) -> Tensor:
    """Rows of the table. Not an ``int8fx::dequantize``: they are activations, not the weight of a matmul."""
    table = self.packed("weight")
    rows = table.of_channels(lambda tensor: tensor[ids])
    return dequantize(rows, self.packed_weights["weight"].dtype)


def attention_forward(
    self,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``nn.MultiheadAttention`` without its fused inference path, which takes float weights only."""
    if query.is_nested:
        raise ValueError("int8fx: query is a nested tensor; legal: convert the nn.TransformerEncoder with its layers")
    batch_first = self.batch_first and query.dim() == 3
    if batch_first:  # equal tensors must stay the same object: self-attention is one matmul for q, k and v
        q = query.transpose(0, 1)
        k = q if key is query else key.transpose(0, 1)
        value = q if value is query else k if value is key else value.transpose(0, 1)
        query, key = q, k
    separate: dict = {"use_separate_proj_weight": not self._qkv_same_embed_dim}
    if not self._qkv_same_embed_dim:
        separate |= {f"{c}_proj_weight": getattr(self, f"{c}_proj_weight") for c in "qkv"}
    y, weights = F.multi_head_attention_forward(
        query, key, value, self.embed_dim, self.num_heads, self.in_proj_weight, self.in_proj_bias, self.bias_k,
        self.bias_v, self.add_zero_attn, self.dropout, self.out_proj.weight, self.out_proj.bias,
        training=self.training, key_padding_mask=key_padding_mask, need_weights=need_weights, attn_mask=attn_mask,
        average_attn_weights=average_attn_weights, is_causal=is_causal, **separate,
    )  # fmt: skip
    return y.transpose(0, 1) if batch_first else y, weights


def experts_forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """``sum_e w_e * down_e(act(gate_up_e(x)))``: one ``int8fx::grouped_linear`` per projection, rows sorted by expert.

    Ids of ``num_experts`` and above (experts of another rank) come after the last group and add nothing.
    """
    if is_differentiated():
        raise NotImplementedError(
            "int8fx: packed experts have no forward-mode or torch.func derivative; legal: backward"
        )
    experts, top_k = self.num_experts, top_k_index.shape[-1]
    ids, order = top_k_index.reshape(-1).sort(stable=True)
    offsets = torch.searchsorted(ids, torch.arange(experts, device=ids.device, dtype=ids.dtype), right=True)
    x = hidden_states[order // top_k]

    def project(x: Tensor, name: str) -> Tensor:
        bias = getattr(self, f"{name}_bias") if self.has_bias else None
        return torch.ops.int8fx.grouped_linear.default(x, offsets, *self.packed(name), bias)

    y = self._apply_gate(project(x, "gate_up_proj")) if self.has_gate else self.act_fn(project(x, "up_proj"))
    y = project(y, "down_proj")
    if self.has_post_expert_norm:
        y = self.post_expert_norm(y)
    y = y * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    y = y.masked_fill((ids >= experts).unsqueeze(-1), 0)
    by_token = torch.empty_like(y).index_copy(0, order, y)
    return by_token.view(-1, top_k, y.shape[-1]).sum(1).to(hidden_states.dtype)


FORWARDS: dict[Kind, Callable] = {
    Kind.LINEAR: linear_forward,
    Kind.CONVOLUTION: convolution_forward,
    Kind.EMBEDDING: embedding_forward,
    Kind.ATTENTION: attention_forward,
    Kind.EXPERTS: experts_forward,
}
