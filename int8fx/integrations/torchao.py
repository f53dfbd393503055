"""torchao: ``quantize_(model, LLMInt8Config())``, also through transformers' ``TorchAoConfig``.

torchao walks through the model and hands over one module at a time, without its name and without the model. What
`int8fx.convert` decides for a whole model is therefore decided for each module alone, or by torchao's ``filter_fn``.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from torch import nn
from torch.fx import GraphModule
from torchao.core.config import ALLOWED_AO_MODULES, AOBaseConfig
from torchao.quantization import register_quantize_module_handler

from ..conversion import convert as conversion
from ..conversion.foreign import pack_foreign
from ..conversion.layers import packed_layers
from ..conversion.modules import leave_fast_paths, pack_layers
from ..conversion.packed import PackedModule
from ..schemes import LLMInt8, Rotated, Scheme, WeightOnly, llm_int8, parse_scheme  # noqa: F401  found by name

ALLOWED_AO_MODULES.add(__name__)  # where `config_from_dict` finds the classes below, and those of schemes


@dataclass
class LLMInt8Config(AOBaseConfig):
    """How ``torchao.quantize_`` quantises the modules that its ``filter_fn`` chooses, by default all ``nn.Linear``.

    Each becomes what ``int8fx.convert(module, scheme, select="*")`` makes of it, bit by bit. Compared with
    ``int8fx.convert(model)``:

    - ``filter_fn`` alone chooses: ``lm_head`` is quantised too, ``Conv1D`` of GPT-2 and fused experts are not.
    - Unquantised columns are chosen for each module alone, so q, k and v no longer share the quantisation of their x.
    - Modules that share a weight do not share it afterwards.
    - ``nn.TransformerEncoderLayer`` keeps its fused path in eval mode, which dequantises its weights.

    Args:
        scheme: as `int8fx.convert` takes it, or its text: ``"rotated(columns=0)"``.

    Raises:
        TypeError: ``scheme`` is neither.
        ValueError: its text is none, or it needs data (``rounding="gptq"``).
    """

    scheme: Scheme | str = llm_int8()  # noqa: RUF009  frozen

    def __post_init__(self) -> None:
        if isinstance(self.scheme, str):
            self.scheme = parse_scheme(self.scheme)
        if not isinstance(self.scheme, Scheme):
            raise TypeError(
                f"LLMInt8Config: scheme is {self.scheme!r}; legal: int8fx.llm_int8(...), int8fx.rotated(...)"
            )
        if self.scheme.needs_moments:
            raise ValueError(
                f"LLMInt8Config: {self.scheme} needs data, which torchao does not pass on; legal: rounding='nearest', "
                "or int8fx.convert(model, scheme, calibration=...)"
            )


@register_quantize_module_handler(LLMInt8Config)
def _quantize(module: nn.Module, config: LLMInt8Config) -> nn.Module:
    """Packs the weights of ``module`` and of modules in it, in place. What cannot be packed is left, with a warning.

    A module that is packed by the same scheme stays as it is: torchao comes twice to a module with two names.

    Raises:
        ValueError: a weight is unsuitable as `int8fx.convert` defines it, or packed by another scheme.
    """
    scheme = config.scheme
    assert isinstance(scheme, Scheme)
    if isinstance(module, GraphModule):
        raise ValueError("LLMInt8Config: filter_fn chose a GraphModule; legal: int8fx.convert of it")
    packed = list(packed_layers(module))
    for layer in packed:
        if layer.reading is not None and layer.reading.scheme != scheme:
            raise ValueError(
                f"LLMInt8Config: {module} is already converted by int8fx, to {layer.reading.scheme}; legal: float "
                f"weights, or the same scheme again, found {scheme}"
            )
    try:
        prepared = conversion.prepare(module, scheme, select=_any, skip=_is_packed_module, progress=False)
    except ValueError as error:
        raise ValueError(f"LLMInt8Config: in {module}, whose name torchao does not tell: {error}") from error
    if prepared.chosen or prepared.foreign:
        leave_fast_paths(module, {id(layer.module) for layer in prepared.chosen})
        pack_layers(prepared.chosen, prepared.quantizer)
        pack_foreign(prepared.foreign, scheme)
        conversion.finish(module, prepared)
    elif not packed:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in prepared.reasons.items())
        warnings.warn(f"LLMInt8Config: {module} stays as it is: {reasons or 'it has no matrix'}", stacklevel=2)
    return module


def _any(name: str, module: nn.Module) -> bool:
    return True


def _is_packed_module(name: str, module: nn.Module) -> bool:
    return isinstance(module, PackedModule)
