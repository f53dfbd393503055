"""int8fx: 8-bit linear layers for PyTorch, by LLM.int8() and by rotated int8.

>>> model = int8fx.convert(model)
>>> model = torch.compile(model, fullgraph=True)
"""

from typing import TYPE_CHECKING, Any

from . import ops as ops
from .calibration.calibrate import calibrate
from .calibration.equalize import equalize
from .calibration.plan import Plan, plan
from .conversion.convert import convert
from .conversion.packed import is_packed
from .conversion.summary import summary
from .imports import when_imported
from .passes.inductor import reports, uninstall
from .schemes import LLMInt8, Rotated, Scheme, llm_int8, plain, rotated, weight_only
from .schemes.calibration import Calibration

if TYPE_CHECKING:
    from .integrations.torchao import LLMInt8Config as LLMInt8Config
    from .integrations.transformers import Int8FxConfig as Int8FxConfig

__version__ = "0.2.0"
__all__ = [
    "Calibration",
    "LLMInt8",
    "Plan",
    "Rotated",
    "Scheme",
    "calibrate",
    "convert",
    "equalize",
    "is_packed",
    "llm_int8",
    "plain",
    "plan",
    "reports",
    "rotated",
    "summary",
    "uninstall",
    "weight_only",
]


def __getattr__(name: str) -> Any:
    if name == "Int8FxConfig":  # not in __all__, as it needs transformers
        try:
            from .integrations import transformers
        except ModuleNotFoundError as error:
            message = 'int8fx.Int8FxConfig needs transformers: pip install "int8fx[transformers]"'
            raise ImportError(message) from error
        return transformers.Int8FxConfig
    if name == "LLMInt8Config":  # nor this one, as it needs torchao
        try:
            from .integrations import torchao
        except ModuleNotFoundError as error:
            raise ImportError('int8fx.LLMInt8Config needs torchao: pip install "torchao>=0.18"') from error
        return torchao.LLMInt8Config
    raise AttributeError(f"module 'int8fx' has no attribute {name!r}")


def _register_in_transformers() -> None:
    from .integrations import transformers as transformers  # it registers what it defines


def _describe_transformers_when_saved() -> None:
    from .integrations import transformers

    transformers.describe_when_saved()


def _register_in_diffusers() -> None:
    from .integrations import diffusers as diffusers  # it registers what it defines


def _describe_diffusers_when_saved() -> None:
    from .integrations import diffusers

    diffusers.describe_when_saved()


def _load_packed_modules() -> None:
    from .integrations import sentence_transformers

    sentence_transformers.convert_before_loading()


when_imported("transformers.quantizers.auto", _register_in_transformers)
when_imported("transformers.modeling_utils", _describe_transformers_when_saved)
when_imported("diffusers.quantizers.auto", _register_in_diffusers)
when_imported("diffusers.models.modeling_utils", _describe_diffusers_when_saved)
when_imported("sentence_transformers.base.modules.module", _load_packed_modules)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "Int8FxConfig", "LLMInt8Config"})
