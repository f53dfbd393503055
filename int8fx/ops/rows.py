"""Which form of a linear layer runs for a number of rows on a device, and so whether x is quantised before the matmul.

Kernels, passes, the bench and the tests call `form`. The C++ kernels are compiled with its numbers (`native.command`).
"""

from __future__ import annotations

import enum

WEIGHT_ONLY_ROWS_CPU = 4
"""On a CPU, up to how many rows are multiplied without quantising x. Their time is the time to read the weight.

With AVX2 and no AVX512 the kernels quantise them too, by themselves, if x is quantised for more rows and the weight has
integers in groups of a multiple of 32 (``csrc/groups_few.h``): there it takes less time than floats."""

WEIGHT_ONLY_ROWS_GPU = 32
"""On a GPU, up to how many rows are multiplied without quantising x, from two on. With N = K = 8192 on an H100, 16 rows
take 29 us weight-only, 44 us quantised in one launch, 38 us quantised in several, and 48 us in bfloat16."""

FUSED_ROWS_GPU = 1
"""On a GPU, up to how many rows are quantised in the launch that multiplies. With N = K = 8192 on an H100, one row
takes 26 to 31 us this way, and 31 us weight-only."""


class Form(enum.Enum):
    """How one call of a linear layer runs."""

    WEIGHT_ONLY = "x is not quantised: only the rounding of the weights adds error"
    FUSED = "x is quantised inside the launch that multiplies"
    QUANTIZED = "x is quantised first: several layers can share its codes"


def form(rows: int, device_type: str, threshold: float | None, block: int, has_columns: bool, is_plain: bool) -> Form:
    """The form of a linear layer on ``rows`` rows of x.

    Rotated weights always quantise x first: then a row's result does not depend on the size of its batch. On a GPU
    weights in groups and of other formats than int8 are multiplied by x as it is, for any number of rows: the products
    of a group are scaled one by one, which costs more than int8 products save.

    A weight that is not plain is QUANTIZED only where a plain one is too: so what `quantize_rowwise` computes for plain
    weights is there for all that read it.

    Args:
        rows: M, the product of x's sizes but the last. With a 3-D weight, the rows of one expert. In `grouped_linear`,
            the rows of one expert on a CPU and of all experts on a GPU, which does not read the offsets.
        device_type: ``cpu`` or ``cuda``. Other devices run as CPUs do.
        threshold, block, is_plain: of the `Int8Weight`.
        has_columns: whether the weight has unquantised columns.
    """
    if block != 1:
        return Form.QUANTIZED
    if device_type != "cuda":
        return Form.WEIGHT_ONLY if rows <= WEIGHT_ONLY_ROWS_CPU else Form.QUANTIZED
    if has_columns:  # the Triton kernels of the other forms do not handle unquantised columns
        return Form.QUANTIZED
    if threshold == 0 or not is_plain:
        return Form.WEIGHT_ONLY
    if rows <= FUSED_ROWS_GPU:
        return Form.FUSED
    return Form.WEIGHT_ONLY if rows <= WEIGHT_ONLY_ROWS_GPU else Form.QUANTIZED
