"""sentence-transformers: modules that it saves on their own, such as ``Dense``, come back packed.

The transformers model in a ``SentenceTransformer`` is saved and loaded by `integrations.transformers`. Other modules
are made from their configuration, as float ones, and their tensors are loaded into them. `convert_before_loading`
converts such a module first if the tensors are packed. Without int8fx, loading is an error: keys are missing. The files
of packed modules get checksums, and are compared with them.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from torch import nn

from ..conversion.packed import is_packed
from .checksums import check_file, checksums
from .stored import convert_as_stored, read_schemes


def convert_before_loading() -> None:
    """Makes ``Module.load_torch_weights`` take packed tensors. Called once, when sentence-transformers has the class.

    It raises ValueError or RuntimeError, naming the tensor, if they do not fit or have another checksum.
    """
    from sentence_transformers.base.modules import module

    defining: Any = module
    Module = defining.Module
    load = Module.load_torch_weights.__func__  # a classmethod
    load_file, save_model = defining.load_safetensors_file, defining.save_safetensors_model

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

    @wraps(load_file)
    def load_checked(file: Any, *args: Any, **kwargs: Any) -> Any:
        check_file(file)
        return load_file(file, *args, **kwargs)

    @wraps(save_model)
    def save_with_checksums(model: nn.Module, file: Any) -> None:
        save_model(model, file, metadata=checksums(model.state_dict()) if is_packed(model) else None)

    Module.load_torch_weights = classmethod(load_torch_weights)
    defining.load_safetensors_file, defining.save_safetensors_model = load_checked, save_with_checksums
