"""sentence-transformers: modules that it saves on their own, such as ``Dense``, come back packed.

The transformers model in a ``SentenceTransformer`` is saved and loaded by `integrations.transformers`. Other modules
are made from their configuration, as float ones, and their tensors are loaded into them. `convert_before_loading`
converts such a module first if the tensors are packed. Without int8fx, loading is an error: keys are missing.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from torch import nn

from .stored import convert_as_stored, read_schemes


def convert_before_loading() -> None:
    """Makes ``Module.load_torch_weights`` take packed tensors. Called once, when sentence-transformers has the class.

    It raises ValueError or RuntimeError, naming the tensor, if they do not fit.
    """
    from sentence_transformers.base.modules.module import Module

    load = Module.load_torch_weights.__func__  # type: ignore[attr-defined]  # a classmethod

    @wraps(load)
    def load_torch_weights(cls: Any, *args: Any, model: nn.Module | None = None, **kwargs: Any) -> Any:
        state = load(cls, *args, **kwargs)
        if model is None:
            return state
        schemes = read_schemes(state)
        if not schemes:
            return load(cls, *args, model=model, **kwargs)
        convert_as_stored(model, schemes)
        model.load_state_dict(state)
        return model

    Module.load_torch_weights = classmethod(load_torch_weights)  # type: ignore[method-assign,assignment]
