"""The schemas of the ``int8fx`` library. `native.command` passes them on to the C++ kernels.

So a library of compiled kernels can serve a process without Python's int8fx, such as one that runs a package of
AOTInductor. Whichever of the two is loaded first defines the ops.
"""

from __future__ import annotations

import torch

NAMESPACE = "int8fx"
_WEIGHT = (
    "Tensor weight, Tensor weight_scale, float? threshold=None, int block=1, Tensor? columns=None, "
    "Tensor? columns_weight=None, str? format=None, int? group_size=None, int? in_features=None, "
    "Tensor? zero_point=None, Tensor? scale_range=None"
)
_EPILOGUE = "Tensor? bias=None, str activation='none', Tensor? other=None, str binary='none'"
SCHEMAS = (
    f"linear(Tensor x, {_WEIGHT}, {_EPILOGUE}) -> Tensor",
    f"linear_quantized(Tensor x, Tensor codes, Tensor x_scale, Tensor outlier_mask, {_WEIGHT}, {_EPILOGUE}) -> Tensor",
    "quantize_rowwise(Tensor x, float? threshold=None, int block=1, Tensor? columns=None, *, bool for_linear=False) "
    "-> (Tensor, Tensor, Tensor)",
    f"grouped_linear(Tensor x, Tensor offsets, {_WEIGHT}, Tensor? bias=None) -> Tensor",
    f"dequantize({_WEIGHT}, *, ScalarType dtype) -> Tensor",
)
NAMES = tuple(schema.partition("(")[0] for schema in SCHEMAS)


def define(library: torch.library.Library) -> None:
    """Defines in ``library`` those of `SCHEMAS` that a library of kernels has not defined.

    Raises:
        RuntimeError: one is defined differently: the kernels that were loaded are those of another version.
    """
    for schema in SCHEMAS:
        present = torch._C._jit_get_schemas_for_operator(f"{NAMESPACE}::{schema.partition('(')[0]}")
        if not present:
            library.define(schema)
        elif [str(found) for found in present] != [legal := str(torch._C.parse_schema(f"{NAMESPACE}::{schema}"))]:
            raise RuntimeError(
                f"int8fx: the kernels that are loaded define {present[0]}; legal: {legal}. They are those of another "
                "version: load what `int8fx build` prints, or import int8fx only"
            )
