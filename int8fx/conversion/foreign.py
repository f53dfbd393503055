"""int8 layers of bitsandbytes and torchao: `convert` takes over their codes and scales as they are.

The attributes of their layers are read by name. Neither package is imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..schemes import LLMInt8, Scheme, plain, weight_only
from ..schemes.quantize import INT8_MAX, quantize_weight
from ..schemes.weight import PackedTensors
from .forwards import linear_forward
from .layers import layer_name, quantised_by
from .packed import Reading, frozen, join, pack_modules
from .selection import Choice


@dataclass
class ForeignLayer:
    """A layer that another package has quantised.

    tensors: its weight as int8fx stores it.
    scheme: how the package multiplies by it.
    dtype: of the float weight it had, as far as that can be known.
    """

    name: str
    module: nn.Module
    tensors: PackedTensors
    scheme: Scheme
    dtype: torch.dtype


def foreign_layers(model: nn.Module, choice: Choice) -> list[ForeignLayer]:
    """The layers of ``model`` that bitsandbytes or torchao have quantised, without those that ``choice`` leaves out.

    A ``Linear8bitLt`` that is not quantised yet becomes an ``nn.Linear``.

    Raises:
        ValueError: one has a form that int8fx does not have. The message names it.
    """
    found = []
    for path, module in model.named_modules():
        name, package = path or layer_name(join(path, "weight")), quantised_by(module)
        if package is None or choice.skips([name], module):
            continue
        if not choice.by_default and not choice.selects([name], module):
            continue
        read = _bitsandbytes if package == "bitsandbytes" else _torchao
        try:
            layer = read(name, module)
        except ValueError as error:
            raise ValueError(
                f"int8fx.convert: layer {name!r} is already quantised by {package} ({type(module).__name__}, "
                f"{type(module._parameters.get('weight')).__name__}): {error}; legal: float weights, bitsandbytes' "
                "Linear8bitLt, torchao's symmetric int8 with a scale per row"
            ) from None
        if layer is not None:
            found.append(layer)
    return found


def pack_foreign(layers: list[ForeignLayer], scheme: Scheme | None) -> None:
    """Packs ``layers``. ``scheme``: that the user asked for, or None for that of each layer."""
    for layer in layers:
        reading = Reading("NK", layer.dtype, scheme or layer.scheme, 0, layer.name)
        _as_linear(layer.module)
        pack_modules([(layer.module, {"weight": (layer.tensors, reading)}, linear_forward)])


def check_scheme(layers: list[ForeignLayer], scheme: Scheme | None) -> None:
    """Raises ValueError if the codes of ``layers`` are not those of ``scheme``, which the user asked for."""
    if layers and scheme is not None and not takes_int8_codes(scheme):
        raise ValueError(
            f"int8fx.convert: layer {layers[0].name!r} is quantised already, which {scheme} cannot take over; legal: "
            "llm_int8(threshold=...), weight_only(), plain(), or a float model"
        )


def takes_int8_codes(scheme: Scheme) -> bool:
    """Whether the tensors of ``scheme`` are int8 codes of whole rows and their scales, as other packages have them."""
    return scheme.grouping.is_plain and scheme.rotation == 1 and not scheme.needs_columns


def _as_linear(module: nn.Module) -> None:
    """Makes ``module`` an ``nn.Linear``, without what bitsandbytes adds to it."""
    for attribute in ("state", "index"):
        module.__dict__.pop(attribute, None)
    for hooks in (module._load_state_dict_pre_hooks, module._state_dict_hooks):
        for key, hook in list(hooks.items()):
            if str(getattr(getattr(hook, "hook", hook), "__module__", "")).startswith("bitsandbytes"):
                del hooks[key]
    object.__setattr__(module, "__class__", nn.Linear)


def _bitsandbytes(name: str, module: Any) -> ForeignLayer | None:
    if type(module).__name__ != "Linear8bitLt":
        raise ValueError("int8fx has no such weights")
    weight, state = module.weight, module.state
    dtype = torch.float16 if module.bias is None else module.bias.dtype
    codes = state.CB if getattr(weight, "CB", None) is None else weight.CB
    scale = state.SCB if getattr(weight, "SCB", None) is None else weight.SCB
    if codes is None and weight.dtype == torch.int8:
        codes = weight.data
    if codes is None or weight.is_floating_point():
        floats = weight.data.as_subclass(Tensor)
        _as_linear(module)
        module._parameters["weight"] = nn.Parameter(floats, requires_grad=weight.requires_grad)
        return None
    if scale is None:
        raise ValueError("its SCB is missing")
    scheme = LLMInt8(state.threshold or None)  # 0.0 is bitsandbytes' word for plain int8
    return ForeignLayer(name, module, _tensors(codes.as_subclass(Tensor), scale / INT8_MAX), scheme, dtype)


def _torchao(name: str, module: nn.Module) -> ForeignLayer:
    weight: Any = module._parameters["weight"]
    if type(weight).__name__ != "Int8Tensor" or type(module) is not nn.Linear:
        raise ValueError("int8fx has no such weights")
    N, K = weight.qdata.shape
    zero, smoothing = getattr(weight, "zero_point", None), getattr(weight, "act_pre_scale", None)
    if weight.scale.numel() != N or list(weight.block_size) != [1, K] or smoothing is not None:
        raise ValueError(f"its scales have shape {tuple(weight.scale.shape)}")
    if (zero is not None and bool(zero.any())) or getattr(weight, "act_quant_scale", None) is not None:
        raise ValueError("it is asymmetric or static")
    scheme = weight_only() if weight.act_quant_kwargs is None else plain()
    scale = weight.scale.reshape(N).float()
    codes = weight.qdata
    if codes.numel() and int(codes.min()) < -INT8_MAX:  # int8fx's codes are symmetric: such rows are rounded again
        rows = (codes == -INT8_MAX - 1).any(1)
        codes, scale = codes.clone(), scale.clone()
        codes[rows], scale[rows] = quantize_weight(codes[rows].float() * scale[rows, None])
    return ForeignLayer(name, module, _tensors(codes, scale), scheme, weight.dtype)


def _tensors(codes: Tensor, scale: Tensor) -> PackedTensors:
    with torch.inference_mode(False), torch.no_grad():
        return PackedTensors(frozen(codes.detach().clone(memory_format=torch.contiguous_format)), scale.float().clone())
