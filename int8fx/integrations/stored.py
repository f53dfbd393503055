"""Checkpoints of converted models, for the libraries that load and save them: which weights are packed, and how.

Beside each ``<name>_codes`` a saved file has a guard: a tensor ``<name>`` of one byte, which no float model takes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..conversion import convert as conversion
from ..conversion.format import FORMAT, read_scheme
from ..conversion.layers import layer_name, packed_layers
from ..conversion.packed import PackedModule, is_packed, join
from ..schemes import Scheme
from ..schemes.calibration import Calibration
from ..schemes.weight import CODES, SUFFIXES
from .checksums import check_file

METHOD = "int8fx"
"""The ``quant_method`` in ``config.json``."""

PARTS = (CODES, FORMAT, *SUFFIXES[1:])
"""The endings of the tensors of a packed weight."""


# ---- files -----------------------------------------------------------------------------------------------------------


def open_file(file: Any) -> Any:
    """A safetensors file, opened, or the tensors by name that ``torch.save`` wrote. Both have ``keys()``.

    Raises:
        ValueError: a tensor of the file has not the checksum that it was written with.
    """
    if str(file).endswith(".safetensors"):
        check_file(file)
        return safe_open(file, framework="pt")
    loaded = torch.load(file, map_location="cpu", mmap=is_zipfile(file), weights_only=True)
    return {key: tensor for key, tensor in loaded.items() if isinstance(tensor, Tensor)}


def read_tensor(file: Any, key: str) -> Tensor:
    """The tensor ``key`` of an opened file."""
    return file[key] if isinstance(file, dict) else file.get_tensor(key)


def read_header(file: Any, key: str) -> Tensor:
    """A tensor on meta, of the dtype and shape of the tensor ``key`` of an opened file."""
    if isinstance(file, dict):
        return file[key].to("meta")
    part = file.get_slice(key)
    shape = part.get_shape()
    return torch.empty(shape, dtype=(part[:0] if shape else part[...]).dtype, device="meta")


def guard() -> Tensor:
    return torch.zeros(1, dtype=torch.uint8)


def is_guard(tensor: Tensor) -> bool:
    return tensor.dtype == torch.uint8 and tensor.shape == (1,)


# ---- loading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Schemes:
    """The scheme of each layer, as ``convert`` takes a plan."""

    schemes: Mapping[str, Scheme]
    calibration: Calibration | None = None


def read_schemes(tensors: Mapping[str, Tensor]) -> dict[str, Scheme]:
    """Name of a weight -> its scheme, for each packed weight among ``tensors``.

    Raises:
        ValueError: a format cannot be read. The message names it.
    """
    schemes = {}
    for key in tensors:
        if key.endswith(FORMAT):
            try:
                schemes[key.removesuffix(FORMAT)] = read_scheme(tensors[key])
            except ValueError as error:
                raise ValueError(f"int8fx: {key!r} of the checkpoint: {error}") from error
    return schemes


def convert_as_stored(model: nn.Module, schemes: Mapping[str, Scheme]) -> None:
    """Converts the weights of ``model`` that ``schemes`` names.

    Raises:
        ValueError: the model does not have one, or it cannot be packed. The message names it.
    """
    conversion.convert(model, _Schemes({layer_name(name): scheme for name, scheme in schemes.items()}))
    reasons = getattr(model, conversion.LEFT, {})
    if lost := sorted(name for name in schemes if layer_name(name) in reasons):
        reason = reasons[layer_name(lost[0])]
        raise ValueError(f"int8fx: {lost[0]!r} is packed in the checkpoint, and cannot be here: {reason}")


def packed_names(model: nn.Module) -> set[str]:
    """The names of the packed weights of ``model``, each under all its names."""
    modules = [(path, m) for path, m in model.named_modules(remove_duplicate=False) if isinstance(m, PackedModule)]
    return {join(path, name) for path, module in modules for name in module.packed_weights}


def check_unused(model: nn.Module, names: set[str]) -> None:
    """Raises ValueError if one of ``names``, parts of packed weights in a checkpoint, has no place in ``model``."""
    if extra := sorted(names - model.state_dict().keys() - packed_names(model)):
        raise ValueError(f"int8fx: the checkpoint has {extra[0]!r}, which the scheme of this weight does not use")


# ---- saving ----------------------------------------------------------------------------------------------------------


def scheme_and_layers(model: nn.Module) -> tuple[Scheme, list[str]]:
    """The scheme of most packed weights of ``model``, and the names of their layers, for ``config.json``."""
    rows = list(packed_layers(model))
    schemes = Counter(row.reading.scheme for row in rows if row.reading is not None)
    return schemes.most_common(1)[0][0], sorted(row.name for row in rows)


def describe_before_saving(
    cls: Any, describe: Callable[[Any], None], of_floats: Callable[[Any], None] = lambda model: None
) -> None:
    """Makes ``cls.save_pretrained`` first call ``describe(model)``, or ``of_floats(model)`` if no weight is packed."""
    save = cls.save_pretrained

    @wraps(save)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        (describe if is_packed(self) else of_floats)(self)
        return save(self, *args, **kwargs)

    cls.save_pretrained = save_pretrained
