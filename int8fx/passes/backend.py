"""``torch.compile(model, backend="int8fx")``: Inductor with the passes, also if they are not installed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch._inductor import list_mode_options
from torch._inductor.compile_fx import compile_fx
from torch.fx import GraphModule

from ..graph.count import count_ops
from .inductor import PASSES, installed_passes


def int8fx(
    gm: GraphModule, example_inputs: list, *, mode: str | None = None, options: dict[str, Any] | None = None
) -> Callable:
    """Compiles ``gm`` by Inductor. `inductor.PASSES` run after other joint-graph passes, for this graph only.

    Args:
        gm, example_inputs: as Dynamo gives them to a backend.
        mode, options: as ``torch.compile`` takes them.

    Warns if the graph has no packed weight: most likely its model was not converted.
    """
    if not count_ops(gm.graph):
        warnings.warn("int8fx: no packed weight in this graph; call int8fx.convert(model) first", stacklevel=2)
    passes = installed_passes()
    patches: dict[str, Any] = {**list_mode_options(mode or "default"), **(options or {})}
    patches["joint_custom_pre_pass"] = passes if PASSES in passes else [*passes, PASSES]
    compiled = compile_fx(gm, example_inputs, config_patches=patches)
    assert callable(compiled)  # only AOTInductor returns files
    return compiled
