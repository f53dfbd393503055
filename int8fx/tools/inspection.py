"""``inspect``: the outliers, the unquantised columns and the error of each layer, under each scheme."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.calibrate import run_batch
from ..calibration.observe import observe
from ..calibration.variants import Variants, convertible
from ..conversion.layers import Layer
from ..ops import linear
from ..schemes import Scheme
from ..schemes.calibration import Calibration
from ..schemes.quantize import DEFAULT_THRESHOLD
from ..schemes.weight import COLUMNS, COLUMNS_WEIGHT, Int8Weight
from ..terminal import show_progress, table


@dataclass(frozen=True)
class Outlier:
    """An input column with values of at least the threshold: the share of rows that have one, and the largest."""

    column: int
    share: float
    absmax: float


@dataclass
class LayerReport:
    """The measurements of one layer.

    shape: ``(..., N, K)`` of its weight.
    rows: how many rows of input the batches gave.
    outliers: the columns with an ``abs(x) >= threshold``, the most frequent first.
    absmax: ``[K]``, the largest absolute value of each input column.
    buffers: the names of the two buffers with the unquantised columns in the converted model: indices and weights.
    columns: scheme -> the unquantised columns, which conversion chooses.
    error: scheme -> ``|y_scheme - y| / |y|`` over all rows, where y is the float matmul; none for experts.
    bytes: scheme -> bytes of the layer's buffers; ``float``: bytes of the float weight.
    """

    name: str
    shape: tuple[int, ...]
    rows: int
    outliers: list[Outlier]
    absmax: list[float]
    buffers: tuple[str, str]
    columns: dict[str, list[int]] = field(default_factory=dict)
    error: dict[str, float] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)


@dataclass
class Inspection:
    """The reports of `inspect`; prints as a table."""

    threshold: float
    layers: list[LayerReport]
    about: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        schemes = list(self.layers[0].bytes)[1:]
        head = ["layer", "weight", f"outliers (>= {self.threshold:g})", "largest", "most often", "unquantised"]
        rows = [[*head, *(f"error {s}" for s in schemes), "KB", *(f"KB {s}" for s in schemes)]]
        for layer in self.layers:
            largest = max(layer.outliers, key=lambda o: o.absmax, default=None)
            often = layer.outliers[0] if layer.outliers else None
            rows.append(
                [
                    layer.name,
                    "x".join(map(str, layer.shape)),
                    f"{len(layer.outliers)} of {layer.shape[-1]}",
                    f"{largest.absmax:.4g} in {largest.column}" if largest else "",
                    f"{often.share:.0%} of rows in {often.column}" if often else "",
                    "/".join(str(len(layer.columns.get(s, ()))) for s in schemes),
                    *(f"{layer.error[s]:.2%}" if s in layer.error else "" for s in schemes),
                    *(f"{n / 1e3:,.0f}" for n in layer.bytes.values()),
                ]
            )
        return table(rows)


def inspect(
    model: nn.Module,
    data: Iterable[Any],
    schemes: Mapping[str, Scheme],
    *,
    calibration: Calibration | None = None,
    threshold: float = DEFAULT_THRESHOLD,
    progress: bool = False,
) -> Inspection:
    """Runs ``model`` on ``data`` and reports the inputs and the errors of each layer that `convert` would convert.

    The error of a layer is the error of its matmul alone, with the inputs that the float model has:
    ``sqrt(sum((y_scheme - y) ** 2) / sum(y ** 2))``.

    Args:
        model: float, not converted; it is not changed.
        data: batches, as `calibrate` takes them. Outliers of a call are found in one batch at a time.
        schemes: label -> scheme.
        calibration: statistics from which unquantised columns are chosen; None: from the weights.
        threshold: values of at least this size are outliers (LLM.int8(), arXiv 2208.07339, section 3.2: 6).
        progress: whether to show a bar on stderr.

    Raises:
        ValueError: there are no batches, or they reached no layer of the model.
    """
    layers = convertible(model)
    variants = Variants(schemes.values(), calibration, layers.values())
    inputs: dict[str, _Inputs] = {}

    def see(name: str, x: Tensor) -> None:
        if name in layers and x.shape[0]:
            if name not in inputs:
                weights = dict(zip(schemes, variants.of(layers[name]), strict=True))
                inputs[name] = _Inputs(layers[name], weights, threshold)
            inputs[name].add(x)

    batches = list(data)
    with torch.no_grad(), observe(model, see):
        for i, batch in enumerate(batches):
            if progress:
                show_progress("inspecting", i, len(batches))
            run_batch(model, batch)
    if progress:
        show_progress("inspecting", len(batches), len(batches))
    if not inputs:
        reason = "no layer of the model in these batches" if batches else "no batches"
        raise ValueError(f"int8fx.inspect: {reason}; legal: a float model and data that it runs on")
    return Inspection(threshold, [inputs[name].report() for name in layers if name in inputs])


class _Inputs:
    """The sums over the inputs of one layer."""

    def __init__(self, layer: Layer, int8_weights: dict[str, Int8Weight], threshold: float) -> None:
        self.layer, self.int8_weights, self.threshold = layer, int8_weights, threshold
        self.weight = layer.oriented()
        K = self.weight.shape[-1]
        self.rows = 0
        self.count, self.absmax = torch.zeros(K, dtype=torch.int64), torch.zeros(K)
        self.square, self.error = 0.0, dict.fromkeys(int8_weights, 0.0)

    def add(self, x: Tensor) -> None:
        size = x.abs().float()
        self.rows += x.shape[0]
        self.count += (size >= self.threshold).sum(0).cpu()
        self.absmax = torch.maximum(self.absmax, size.amax(0).cpu())
        if self.weight.dim() != 2:  # the observer sees experts one at a time and does not say which
            return
        exact = x.double() @ self.weight.double().T
        self.square += float(exact.square().sum())
        for label, weight in self.int8_weights.items():
            self.error[label] += float((linear(x, *weight).double() - exact).square().sum())

    def report(self) -> LayerReport:
        columns = self.count.nonzero().squeeze(-1).tolist()
        outliers = [Outlier(c, self.count[c].item() / self.rows, self.absmax[c].item()) for c in columns]
        outliers.sort(key=lambda o: (-o.share, -o.absmax))
        full_name = self.layer.full_name
        return LayerReport(
            name=self.layer.name,
            shape=tuple(self.weight.shape),
            rows=self.rows,
            outliers=outliers,
            absmax=self.absmax.tolist(),
            buffers=(full_name + COLUMNS, full_name + COLUMNS_WEIGHT),
            columns={label: w.columns.tolist() for label, w in self.int8_weights.items() if w.columns is not None},
            error={label: (error / self.square) ** 0.5 for label, error in self.error.items()} if self.square else {},
            bytes={"float": self.weight.nbytes, **{label: _bytes(w) for label, w in self.int8_weights.items()}},
        )


def _bytes(weight: Int8Weight) -> int:
    return sum(t.nbytes for t in weight if isinstance(t, Tensor))
