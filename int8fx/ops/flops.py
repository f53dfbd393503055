"""How many operations the ops count as in ``torch.utils.flop_counter``: those of the float matmul."""

from __future__ import annotations

import math
from typing import Any

import torch


def register() -> None:
    """Registers a formula for each matmul: ``2 * M * N * K``."""
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    int8fx = torch.ops.int8fx

    def linear(x_shape: Any, weight_shape: Any, *_: Any, **__: Any) -> int:
        return 2 * math.prod(x_shape) * weight_shape[-2]

    def linear_quantized(
        x_shape: Any, codes: Any, x_scale: Any, mask: Any, weight_shape: Any, *_: Any, **__: Any
    ) -> int:
        return 2 * math.prod(x_shape) * weight_shape[-2]

    def grouped_linear(x_shape: Any, offsets: Any, weight_shape: Any, *_: Any, **__: Any) -> int:
        return 2 * math.prod(x_shape) * weight_shape[-2]

    for op, formula in (
        (int8fx.linear, linear),
        (int8fx.linear_quantized, linear_quantized),
        (int8fx.grouped_linear, grouped_linear),
    ):
        if op not in flop_registry:
            register_flop_formula(op)(formula)
