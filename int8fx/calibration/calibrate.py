"""``calibrate``: statistics of each layer's inputs on data. Conversion chooses unquantised columns from them."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..schemes.calibration import Calibration
from ..terminal import show_progress
from .observe import observe


def calibrate(
    model: nn.Module, data: Iterable[Any], *, moments: bool = False, progress: bool | None = None
) -> Calibration:
    """Runs ``model`` on ``data`` and records ``absmax[k] = max_m(abs(x[m, k]))`` of the input of every matmul.

    A few batches of typical data are enough: outlier columns are the same for any text (Dettmers et al. 2022,
    arXiv 2208.07339, section 4). `convert(..., calibration=...)` chooses the unquantised columns from the result.

    Args:
        model: not converted yet; any ``nn.Module``. It runs without gradients, in its current mode (train or eval).
        data: batches: a tensor (the first argument), a tuple or list (arguments) or a mapping (keyword arguments).
        moments: whether to record ``x.T @ x`` too, for ``rotated(rounding="gptq")``: 4 K * K bytes for each layer.
            Some thousand rows are enough; with fewer rows than K, some directions have no data.
        progress: whether to show a bar on stderr; by default if that is a terminal.

    Raises:
        ValueError: there are no batches, no batch reached a matmul with a weight of the model, an input has NaN or inf,
            or its moments overflow.
    """
    calibration, batches = Calibration(), list(data)
    bar = sys.stderr.isatty() if progress is None else progress
    with torch.no_grad(), observe(model, lambda name, x: calibration.see(name, x, moments)):
        for i, batch in enumerate(batches):
            if bar:
                show_progress("calibrating", i, len(batches))
            run_batch(model, batch)
    if bar:
        show_progress("calibrating", len(batches), len(batches))
    if not calibration.absmax:
        reason = "no matmul with a weight of the model in these batches" if batches else "no batches"
        raise ValueError(f"int8fx.calibrate: {reason}; legal: data that the model runs on, before int8fx.convert")
    for name, absmax in calibration.absmax.items():
        if not absmax.isfinite().all():
            raise ValueError(
                f"int8fx.calibrate: layer {name!r} gets NaN or inf from these batches; legal: finite inputs"
            )
        if moments and not calibration.moments[name].isfinite().all():
            raise ValueError(
                f"int8fx.calibrate: moments of layer {name!r} overflow float32, its inputs reach {absmax.max():.3g}; "
                "legal: inputs whose squares add up in float32"
            )
    return calibration


def run_batch(model: Any, batch: Any) -> Any:
    """``model(batch)``, with a tuple or list as its arguments and a mapping as its keyword arguments."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)
