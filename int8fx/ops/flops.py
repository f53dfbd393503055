"""How many operations the ops count as in ``torch.utils.flop_counter``: those of the float matmul."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch


def register() -> None:
    """Registers a formula for each matmul: ``2 * M * N * K``."""
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    int8fx = torch.ops.int8fx

    def formula(weight_at: int) -> Callable[..., int]:
        """``weight_at``: which argument of the op the weight is; x is the first."""
        return lambda *shapes, **_: 2 * math.prod(shapes[0]) * shapes[weight_at][-2]

    for op, weight_at in ((int8fx.linear, 1), (int8fx.linear_quantized, 4), (int8fx.grouped_linear, 2)):
        if op not in flop_registry:
            register_flop_formula(op)(formula(weight_at))
