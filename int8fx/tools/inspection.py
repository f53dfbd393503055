"""``inspect``: where a model's outliers are, what is kept in 16 bits, and what each layer loses under each scheme."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.calibrate import Calibration, run_batch, show_progress
from ..calibration.observe import observe
from ..conversion.convert import Pack
from ..conversion.layers import Layer, plan
from ..conversion.packed import COLUMNS, COLUMNS_WEIGHT
from ..ops import linear
from ..schemes import Scheme
from ..terminal import table


@dataclass(frozen=True)
class Outlier:
    """An input column with values beyond the threshold: in what share of rows, and the largest of them."""

    column: int
    share: float
    absmax: float


@dataclass
class LayerReport:
    """One layer.

    shape: ``(..., N, K)`` of its weight.
    rows: how many rows of input were seen.
    outliers: the columns with an ``abs(x) >= threshold``, the most frequent first.
    absmax: ``[K]``, the largest absolute value of each input column.
    kept: scheme -> the columns that it keeps with exact weights, chosen at conversion.
    where: the buffers that hold them in the converted model: their indices and their weights.
    error: scheme -> ``|y_scheme - y| / |y|`` over all rows, y the product in float; none for experts.
    bytes: scheme -> of its buffers; ``float``: of the weight as it is.
    """

    name: str
    shape: tuple[int, ...]
    rows: int
    outliers: list[Outlier]
    absmax: list[float]
    where: tuple[str, str]
    kept: dict[str, list[int]] = field(default_factory=dict)
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
        head = ["layer", "weight", f"outliers (>= {self.threshold:g})", "largest", "most often", "kept"]
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
                    "/".join(str(len(layer.kept.get(s, ()))) for s in schemes),
                    *(f"{layer.error[s]:.2%}" if s in layer.error else "" for s in schemes),
                    *(f"{n / 1e3:,.0f}" for n in layer.bytes.values()),
                ]
            )
        return table(rows)

    def to_json(self) -> str:
        return json.dumps(self, default=vars)


def inspect(
    model: nn.Module,
    data: Iterable[Any],
    schemes: dict[str, Scheme],
    *,
    calibration: Calibration | None = None,
    threshold: float = 6.0,
    progress: bool = False,
) -> Inspection:
    """Runs ``model`` on ``data`` and reports, for each layer that `convert` would convert, its inputs and its losses.

    A layer's own error is that of its product alone, with the inputs that the float model has:
    ``sqrt(sum((y_scheme - y) ** 2) / sum(y ** 2))``.

    Args:
        model: float, not converted; it stays as it is.
        data: batches, as `calibrate` takes them; schemes that choose columns per call see one batch at a time.
        schemes: label -> scheme.
        calibration: what static columns are chosen by; None for their choice without data.
        threshold: from which size on a value is an outlier (LLM.int8(), arXiv 2208.07339, section 3.2: 6).
        progress: whether to show a bar on stderr.

    Raises:
        ValueError: there are no batches, or no layer of the model took part in them.
    """
    layers = {layer.name: layer for layer in plan(model) if layer.reason is None}
    packs = {label: Pack(scheme, calibration, layers.values()) for label, scheme in schemes.items()}
    seen: dict[str, _Seen] = {}

    def see(name: str, x: Tensor) -> None:
        if name in layers and x.shape[0]:
            if name not in seen:
                seen[name] = _Seen(layers[name], packs, threshold)
            seen[name].add(x)

    batches = list(data)
    with torch.no_grad(), observe(model, see):
        for i, batch in enumerate(batches):
            if progress:
                show_progress("inspecting", i, len(batches))
            run_batch(model, batch)
    if progress:
        show_progress("inspecting", len(batches), len(batches))
    if not seen:
        found = "no layer of the model in these batches" if batches else "no batches"
        raise ValueError(f"int8fx.inspect: {found}; legal: a float model and data that it runs on")
    return Inspection(threshold, [seen[name].report() for name in layers if name in seen])


class _Seen:
    """What one layer's inputs add up to."""

    def __init__(self, layer: Layer, packs: dict[str, Pack], threshold: float) -> None:
        self.layer, self.threshold = layer, threshold
        weight = layer.oriented()
        self.shape, K = tuple(weight.shape), weight.shape[-1]
        self.rows = 0
        self.count, self.absmax = torch.zeros(K, dtype=torch.int64), torch.zeros(K)
        self.square, self.error = 0.0, dict.fromkeys(packs, 0.0)
        self.packed = {label: (pack([layer]), pack.describe(layer)) for label, pack in packs.items()}
        sizes = {label: sum(t.nbytes for t in buffers) for label, (buffers, _) in self.packed.items()}
        self.bytes = {"float": weight.nbytes, **sizes}
        self.kept = {label: b[2].tolist() for label, (b, _) in self.packed.items() if len(b) > 2}

    def add(self, x: Tensor) -> None:
        size = x.abs().float()
        self.rows += x.shape[0]
        self.count += (size >= self.threshold).sum(0).cpu()
        self.absmax = torch.maximum(self.absmax, size.amax(0).cpu())
        weight = self.layer.oriented()
        if weight.dim() != 2:  # experts: their rows come one expert at a time
            return
        exact = x.double() @ weight.double().T
        self.square += float(exact.square().sum())
        for label, ((codes, scale, *kept), described) in self.packed.items():
            rotation = (described.block, *(kept or (None, None)), described.top)
            y = linear(x, codes, scale, None, described.threshold, "none", None, "none", *rotation)
            self.error[label] += float((y.double() - exact).square().sum())

    def report(self) -> LayerReport:
        columns = self.count.nonzero().squeeze(-1).tolist()
        outliers = [Outlier(c, self.count[c].item() / self.rows, self.absmax[c].item()) for c in columns]
        outliers.sort(key=lambda o: (-o.share, -o.absmax))
        error = {k: (v / self.square) ** 0.5 for k, v in self.error.items()} if self.square else {}
        name, parameter = self.layer.name, self.layer.parameter
        prefix = f"{name}.{parameter}" if parameter == "weight" and name != parameter else name
        where = (prefix + COLUMNS, prefix + COLUMNS_WEIGHT)
        absmax = self.absmax.tolist()
        return LayerReport(name, self.shape, self.rows, outliers, absmax, where, self.kept, error, self.bytes)
