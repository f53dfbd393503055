"""What a packed weight says about itself: its format version and its scheme, as a tensor that is saved beside it.

The tensor is called ``weight_format`` for a weight called ``weight``. It holds JSON in UTF-8, one byte per element:
``{"format": "int8fx", "version": 2, "scheme": "rotated(block=256, hadamard='regular')"}``. ``docs/format.md`` describes
the whole format.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from ..schemes import Scheme, parse_scheme, stored_text

FORMAT = "_format"
"""The suffix of its name."""

VERSION = 2
"""1 was int8fx 0.1: codes were called ``weight``, and nothing named the scheme."""

_LONGEST = 1024  # bytes: int8fx writes about 100


def format_tensor(scheme: Scheme, device: torch.device | None = None) -> Tensor:
    """``[L]`` uint8: the format of a weight that was quantised with ``scheme``."""
    text = json.dumps({"format": "int8fx", "version": VERSION, "scheme": stored_text(scheme)})
    return torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)


def read_scheme(tensor: Tensor) -> Scheme:
    """The scheme that a format tensor names.

    Raises:
        ValueError: it is no format tensor, or of a version that this int8fx does not know.
    """
    if tensor.dtype != torch.uint8 or tensor.dim() != 1 or tensor.numel() > _LONGEST:
        raise ValueError(f"found {tensor.dtype} {tuple(tensor.shape)}; legal: JSON text as uint8 [L], L <= {_LONGEST}")
    try:
        content: Any = json.loads(bytes(tensor.tolist()).decode())
        kind, version, scheme = content["format"], content["version"], content["scheme"]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise ValueError(f"found a text that is not int8fx's ({type(error).__name__}: {error})") from None
    if kind != "int8fx" or type(version) is not int or version < VERSION or not isinstance(scheme, str):
        raise ValueError(f"found format {kind!r}, version {version!r}, scheme {scheme!r}; legal: 'int8fx', {VERSION}")
    if version > VERSION:
        raise ValueError(f"found version {version}, of a newer int8fx; this one reads up to {VERSION}: update it")
    return parse_scheme(scheme, stored=True)


def same_arithmetic(one: Scheme, other: Scheme) -> bool:
    """Whether the same packed tensors mean the same under both: equal threshold, rotation and grouping.

    Which columns are unquantised is in the tensors, and how codes were rounded does not matter later.
    """
    return (one.threshold, one.rotation, one.grouping) == (other.threshold, other.rotation, other.grouping)
