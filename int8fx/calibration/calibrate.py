"""``calibrate``: statistics of each layer's inputs on data. Conversion chooses unquantised columns from them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from contextlib import closing
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..schemes.calibration import Calibration, Statistics
from ..terminal import show_progress
from .files import CalibrationFolder, fingerprint
from .observe import matmuls, observe, without_fast_path
from .stages import blocks_of, stages


def calibrate(
    model: nn.Module,
    data: Iterable[Any],
    *,
    moments: bool = False,
    folder: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> Calibration:
    """Runs ``model`` on ``data`` and records ``absmax[k] = max_m(abs(x[m, k]))`` of the input of every matmul.

    A few batches of typical data are enough: outlier columns are the same for any text (Dettmers et al. 2022,
    arXiv 2208.07339, section 4). `convert(..., calibration=...)` chooses the unquantised columns from the result.

    Args:
        model: not converted yet; any ``nn.Module``. It runs without gradients, in its current mode (train or eval).
        data: batches: a tensor (the first argument), a tuple or list (arguments) or a mapping (keyword arguments).
        moments: whether to record ``x.T @ x`` too, for ``rounding="gptq"`` and ``scales="search"``: 4 K * K bytes for
            each layer. Some thousand rows are enough; with fewer rows than K, some directions have no data.
        folder: where to write statistics. All batches then pass one block of the model before any enters the next, so
            that memory holds the moments of one block, and what the forwards of all batches hold between two blocks. A
            second call with the same model, data and folder goes on after the last block that was written.
        progress: whether to show a bar on stderr; by default if that is a terminal.

    Raises:
        ValueError: there are no batches, no batch reached a matmul with a weight of the model, an input has NaN or inf,
            its moments overflow, or ``folder`` holds the statistics of another model or of other data.
    """
    batches = list(data)
    bar = sys.stderr.isatty() if progress is None else progress
    with torch.no_grad():
        if folder is None:
            calibration = _in_memory(model, batches, moments, bar)
        else:
            calibration = _in_stages(model, batches, moments, folder, bar)
    if not calibration.absmax:
        reason = "no matmul with a weight of the model in these batches" if batches else "no batches"
        raise ValueError(f"int8fx.calibrate: {reason}; legal: data that the model runs on, before int8fx.convert")
    return calibration


def _in_memory(model: nn.Module, batches: list[Any], moments: bool, bar: bool) -> Calibration:
    statistics = Statistics(moments)
    with observe(model, statistics.add):
        for i, batch in enumerate(batches):
            if bar:
                show_progress("calibrating", i, len(batches))
            run_batch(model, batch)
    if bar:
        show_progress("calibrating", len(batches), len(batches))
    _check(statistics.calibration)
    return statistics.calibration


def _in_stages(model: nn.Module, batches: list[Any], moments: bool, path: Any, bar: bool) -> Calibration:
    folder = CalibrationFolder(path, fingerprint(model, batches, moments))
    statistics, stage, total = Statistics(moments), 0, len(blocks_of(model)) + 1

    def add(name: str, x: Tensor) -> None:
        if stage >= folder.stages:
            statistics.add(name, x)

    def call(batch: Any) -> None:
        with matmuls(model, add):
            run_batch(model, batch)

    running = stages(model, [partial(call, batch) for batch in batches])
    with without_fast_path(), closing(running):
        for done in running:
            if done >= folder.stages:
                _check(statistics.calibration)
                folder.write(done, statistics.calibration)
                statistics = Statistics(moments)
            stage = done + 1  # what runs next
            if bar:
                show_progress("calibrating", min(stage, total), total)
    return Calibration(folder.absmax, folder.rows, folder.moments)


def _check(calibration: Calibration) -> None:
    """Raises ValueError if the inputs of a layer were not finite, or their moments overflow."""
    for name, absmax in calibration.absmax.items():
        if not absmax.isfinite().all():
            raise ValueError(
                f"int8fx.calibrate: layer {name!r} gets NaN or inf from these batches; legal: finite inputs"
            )
        if name in calibration.moments and not calibration.moments[name].isfinite().all():
            raise ValueError(
                f"int8fx.calibrate: moments of layer {name!r} overflow float32, its inputs reach {absmax.max():.3g}; "
                "legal: inputs whose squares add up in float32"
            )


def run_batch(model: Any, batch: Any) -> Any:
    """``model(batch)``, with a tuple or list as its arguments and a mapping as its keyword arguments."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)
