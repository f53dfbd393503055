"""What int8fx knows of module types: which of their Parameters are product weights, and how packed modules run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..schemes.quantize import dequantize

EMBEDDING = "an embedding: a table of rows, not a product"
CONVOLUTION = "a 1x1 convolution: converted if selected"


@dataclass(frozen=True)
class Recipe:
    """How to convert a module.

    layouts: Parameter name -> ``NK`` or ``KN``, as `packing.PackedWeight` has it.
    forward: what the packed module runs when all of these weights are packed; None for its own forward, which then
        reads them dequantised.
    on_request: why it is left unless the selection names it.
    refused: Parameter name -> why it stays as it is.
    """

    layouts: dict[str, str] = field(default_factory=dict)
    forward: Callable | None = None
    kernel_dims: int = 0
    on_request: str | None = None
    refused: dict[str, str] = field(default_factory=dict)


def matrices(module: nn.Module) -> list[str]:
    """The names of ``module``'s own Parameters of two or more dimensions."""
    own = module._parameters.items()
    return [name for name, p in own if p is not None and not uninitialized(p) and p.dim() >= 2]


def uninitialized(p: object) -> bool:
    """Whether ``p`` is a Parameter of a lazy module that has not run."""
    return isinstance(p, (nn.UninitializedParameter, nn.UninitializedBuffer))


def recipe_for(module: nn.Module) -> Recipe:
    """The recipe for ``module``'s own `matrices`."""
    forward, names = type(module).forward, matrices(module)
    if forward is nn.Linear.forward and "weight" in names:
        return Recipe({"weight": "NK"}, linear_forward)
    if _is_conv1d(forward) and "weight" in names:
        return Recipe({"weight": "KN"}, linear_forward)
    if forward is nn.MultiheadAttention.forward:
        used = [n for n in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight") if n in names]
        return Recipe(dict.fromkeys(used, "NK"), attention_forward)
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return _convolution(module)
    if _is_fused_experts(module):
        first = "gate_up_proj" if module.has_gate else "up_proj"
        layout = "KN" if module.is_transposed else "NK"
        return Recipe(dict.fromkeys((first, "down_proj"), layout), experts_forward)
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        plain = forward is nn.Embedding.forward and module.max_norm is None
        return Recipe(forward=embedding_forward if plain else None, refused=dict.fromkeys(names, EMBEDDING))
    if not names:
        return Recipe()
    return _by_usage(module, names)


def _is_conv1d(forward: Callable) -> bool:
    return forward.__qualname__ == "Conv1D.forward" and forward.__module__ == "transformers.pytorch_utils"


def _convolution(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> Recipe:
    plain = type(module).forward in (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
    padded = not isinstance(module.padding, str) and any(module.padding)
    if not plain or any(k != 1 for k in module.kernel_size) or module.groups != 1 or padded:
        return Recipe(refused={"weight": "a convolution; only 1x1 convolutions without groups or padding are products"})
    return Recipe({"weight": "NK"}, convolution_forward, kernel_dims=len(module.kernel_size), on_request=CONVOLUTION)


def _is_fused_experts(module: nn.Module) -> bool:
    """transformers 5's experts: 3-D Parameters, and what its ``use_experts_implementation`` sets on the module."""
    described = all(hasattr(module, name) for name in ("is_transposed", "has_gate", "has_bias", "num_experts"))
    down = module._parameters.get("down_proj")
    return described and down is not None and down.dim() == 3


def _by_usage(module: nn.Module, names: list[str]) -> Recipe:
    from .usage import read_usage

    try:
        usage = read_usage(module)
    except ValueError as error:
        return Recipe(refused=dict.fromkeys(names, f"its use is not known: {error}"))
    layouts = {name: usage[name] for name in names if name in usage}
    return Recipe(layouts, refused={name: "not the weight of a product" for name in names if name not in layouts})


# ---- forwards of packed modules -------------------------------------------------------------------------------------


def linear_forward(self, x: Tensor) -> Tensor:
    return self.packed_linear(x, "weight", self.bias)


def convolution_forward(self, x: Tensor) -> Tensor:
    n = self.packed_weights["weight"].kernel_dims
    if any(s != 1 for s in self.stride):
        strided: Any = (..., *(slice(None, None, s) for s in self.stride))
        x = x[strided]
    y = self.packed_linear(x.movedim(-n - 1, -1), "weight", self.bias)
    return y.movedim(-1, -n - 1).contiguous()  # what follows may view it, as it could the convolution's result


def embedding_forward(self, ids: Tensor) -> Tensor:
    """Rows of the table, not by ``int8fx::dequantize``: they are activations, and no product's weight."""
    weight = self.packed("weight")
    columns_weight = None if weight.columns_weight is None else weight.columns_weight[ids]
    rows = weight._replace(codes=weight.codes[ids], scale=weight.scale[ids], columns_weight=columns_weight)
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
    """``nn.MultiheadAttention`` without its fused inference path, which knows float weights only."""
    if query.is_nested:
        raise ValueError("int8fx: attention found a nested tensor; convert the nn.TransformerEncoder with its layers")
    batch_first = self.batch_first and query.dim() == 3
    if batch_first:  # the same tensor must stay the same: self-attention is one product with q, k and v together
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
    """Rows sorted by expert, one int8 product per expert and projection: ``sum_e w_e * down_e(act(gate_up_e(x)))``.

    Ids of ``num_experts`` and above (experts of another rank) sort behind the last group and add nothing.
    """
    experts, top_k = self.num_experts, top_k_index.shape[-1]
    ids, order = top_k_index.reshape(-1).sort(stable=True)
    offsets = torch.searchsorted(ids, torch.arange(experts, device=ids.device, dtype=ids.dtype), right=True)
    x = hidden_states[order // top_k]

    def product(x: Tensor, name: str) -> Tensor:
        bias = getattr(self, f"{name}_bias") if self.has_bias else None
        return torch.ops.int8fx.grouped_linear.default(x, offsets, *self.packed(name), bias)

    y = self._apply_gate(product(x, "gate_up_proj")) if self.has_gate else self.act_fn(product(x, "up_proj"))
    y = product(y, "down_proj")
    if self.has_post_expert_norm:
        y = self.post_expert_norm(y)
    y = y * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    y = y.masked_fill((ids >= experts).unsqueeze(-1), 0)
    by_token = torch.empty_like(y).index_copy(0, order, y)
    return by_token.view(-1, top_k, y.shape[-1]).sum(1).to(hidden_states.dtype)
