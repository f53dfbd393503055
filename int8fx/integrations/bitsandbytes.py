"""bitsandbytes: int8 state dicts of its ``Linear8bitLt`` layers, read and written without rounding again.

bitsandbytes stores ``X.weight`` (int8 ``[N, K]``), ``X.SCB`` (float32 ``[N]``, the absmax of each row, so ``scale =
SCB / 127``) and ``X.weight_format`` (uint8, 0 for row-major). Live layers need no conversion: `int8fx.convert` takes
them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..conversion.foreign import takes_int8_codes
from ..conversion.format import FORMAT, format_tensor, read_scheme
from ..schemes import Scheme, llm_int8
from ..schemes.quantize import INT8_MAX
from ..schemes.weight import CODES, COLUMNS, SCALE, SCALE_RANGE, ZERO_POINT

_SCB, _ROW_MAJOR = ".SCB", 0


def from_bitsandbytes(state_dict: Mapping[str, Tensor], scheme: Scheme | None = None) -> dict[str, Tensor]:
    """A state dict of bitsandbytes' int8 layers as int8fx has it; other tensors stay as they are.

    Args:
        scheme: what the codes are multiplied by; ``llm_int8()`` by default. bitsandbytes does not store its threshold.

    Raises:
        ValueError: a layer lacks a part, has another format than row-major, or ``scheme`` has columns.
    """
    scheme = llm_int8() if scheme is None else scheme
    if not takes_int8_codes(scheme):
        raise ValueError(
            f"int8fx: codes of bitsandbytes cannot become {scheme}; legal: llm_int8(threshold=...), plain()"
        )
    result = dict(state_dict)
    for key in [key for key in state_dict if key.endswith(_SCB)]:
        layer = key.removesuffix(_SCB)
        weight, form = f"{layer}.weight", result.pop(f"{layer}.weight_format", None)
        if weight not in result or result[weight].dtype != torch.int8:
            raise ValueError(f"int8fx: {key!r} is there, and {weight!r} is not int8; legal: bitsandbytes' int8 weights")
        if form is not None and (form.numel() != 1 or int(form) != _ROW_MAJOR):
            raise ValueError(f"int8fx: {layer}.weight_format is {form.tolist()}; legal: {_ROW_MAJOR}, row-major")
        codes, scb = result.pop(weight), result.pop(key)
        result[weight + CODES], result[weight + SCALE] = codes, scb.float() / INT8_MAX
        result[weight + FORMAT] = format_tensor(scheme, codes.device)
    return result


def to_bitsandbytes(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of int8fx as bitsandbytes has it; float tensors stay as they are.

    Raises:
        ValueError: a weight is rotated, has unquantised columns, is not symmetric int8 with one scale per output
            channel, or is not the ``weight`` of a linear layer.
    """
    result = dict(state_dict)
    for key in [key for key in state_dict if key.endswith(FORMAT) and key.removesuffix(FORMAT) + CODES in state_dict]:
        weight = key.removesuffix(FORMAT)
        layer, _, name = weight.rpartition(".")
        scheme = read_scheme(result.pop(key))
        codes, scale = result[weight + CODES], result[weight + SCALE]
        has_others = any(weight + suffix in result for suffix in (COLUMNS, ZERO_POINT, SCALE_RANGE))
        if scheme.rotation != 1 or has_others or codes.dtype != torch.int8 or scale.dim() != codes.dim() - 1:
            raise ValueError(
                f"int8fx: {weight!r} is {scheme}, which bitsandbytes does not have; legal: llm_int8(), plain()"
            )
        del result[weight + CODES], result[weight + SCALE]
        if name != "weight" or codes.dim() != 2:
            raise ValueError(f"int8fx: {weight!r} is not the weight of a linear layer, which bitsandbytes needs")
        prefix = f"{layer}." if layer else ""
        result[f"{prefix}weight"], result[f"{prefix}SCB"] = codes, scale * INT8_MAX
        result[f"{prefix}weight_format"] = torch.tensor(_ROW_MAJOR, dtype=torch.uint8, device=codes.device)
    return result
