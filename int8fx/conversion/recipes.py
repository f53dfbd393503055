"""Module types: which of their Parameters are weights of a matmul, and in which layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum

from torch import nn

from .usage import MIXED, read_usage

TABLE = "an embedding: rows are looked up, no matmul"
CONVOLUTION = "a 1x1 convolution: converted if selected"
NO_PRODUCT = "not the weight of a matmul"
UNREAD = "its use cannot be determined: its module was not seen to read it"


class Kind(Enum):
    """What a module computes. All kinds except OTHER have a packed forward (`forwards.FORWARDS`)."""

    LINEAR = "linear"
    CONVOLUTION = "convolution"
    EMBEDDING = "embedding"
    ATTENTION = "attention"
    EXPERTS = "experts"
    OTHER = "other"


@dataclass(frozen=True)
class Recipe:
    """How to convert a module.

    layouts: Parameter name -> ``NK`` or ``KN``, as in `packed.Reading`.
    kind: what the module computes. Modules of kind OTHER run the forward of their class, on dequantised weights.
    kernel_dims: as in `packed.Reading`.
    on_request: why it is converted only if the selection names it; None if it is converted by default.
    refused: Parameter name -> why it is not converted.
    """

    layouts: dict[str, str] = field(default_factory=dict)
    kind: Kind = Kind.OTHER
    kernel_dims: int = 0
    on_request: str | None = None
    refused: dict[str, str] = field(default_factory=dict)


def matrices(module: nn.Module) -> list[str]:
    """The names of the Parameters of two or more dimensions that ``module`` itself holds."""
    parameters = module._parameters.items()
    return [name for name, p in parameters if p is not None and not uninitialized(p) and p.dim() >= 2]


def uninitialized(p: object) -> bool:
    """Whether ``p`` is a Parameter of a lazy module that has not run."""
    return isinstance(p, (nn.UninitializedParameter, nn.UninitializedBuffer))


def recipe_for(module: nn.Module) -> Recipe:
    """The recipe for the `matrices` of ``module``."""
    forward, names = type(module).forward, matrices(module)
    if forward is nn.Linear.forward and "weight" in names:
        return Recipe({"weight": "NK"}, Kind.LINEAR)
    if _is_conv1d(forward) and "weight" in names:
        return Recipe({"weight": "KN"}, Kind.LINEAR)
    if forward is nn.MultiheadAttention.forward:
        used = [n for n in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight") if n in names]
        return Recipe(dict.fromkeys(used, "NK"), Kind.ATTENTION)
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return _convolution(module)
    if _is_fused_experts(module):
        first = "gate_up_proj" if module.has_gate else "up_proj"
        layout = "KN" if module.is_transposed else "NK"
        return Recipe(dict.fromkeys((first, "down_proj"), layout), Kind.EXPERTS)
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        plain = forward is nn.Embedding.forward and module.max_norm is None
        return Recipe(kind=Kind.EMBEDDING if plain else Kind.OTHER, refused=dict.fromkeys(names, TABLE))
    if not names:
        return Recipe()
    try:
        usage = read_usage(module)
    except ValueError as error:
        return Recipe(refused=dict.fromkeys(names, f"its use cannot be determined: {error}"))
    recipe = recipe_of_usage(usage.layouts, names)
    unread = {name: UNREAD for name in recipe.refused if name in usage.unread}
    return replace(recipe, refused=recipe.refused | unread)


def recipe_of_usage(usage: dict[str, str | None], names: list[str]) -> Recipe:
    """The recipe for Parameters ``names`` that a forward or a graph uses as ``usage`` says (`usage.read_layouts`)."""
    layouts = {name: layout for name in names if (layout := usage.get(name)) is not None}
    reasons = {name: MIXED if name in usage else NO_PRODUCT for name in names if name not in layouts}
    return Recipe(layouts, refused=reasons)


def _is_conv1d(forward: Callable) -> bool:
    return forward.__qualname__ == "Conv1D.forward" and forward.__module__ == "transformers.pytorch_utils"


def _convolution(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> Recipe:
    plain = type(module).forward in (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
    padded = not isinstance(module.padding, str) and any(module.padding)
    if not plain or any(k != 1 for k in module.kernel_size) or module.groups != 1 or padded:
        return Recipe(refused={"weight": "a convolution; only 1x1 convolutions without groups or padding are matmuls"})
    dims = len(module.kernel_size)
    return Recipe({"weight": "NK"}, Kind.CONVOLUTION, kernel_dims=dims, on_request=CONVOLUTION)


def _is_fused_experts(module: nn.Module) -> bool:
    """Experts of transformers 5: 3-D Parameters, and the attributes that its ``use_experts_implementation`` sets."""
    described = all(hasattr(module, name) for name in ("is_transposed", "has_gate", "has_bias", "num_experts"))
    down = module._parameters.get("down_proj")
    return described and down is not None and down.dim() == 3
