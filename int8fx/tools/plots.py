"""Pictures of measurements; they need matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .evaluate import Evaluation
    from .inspection import Inspection


def figure(width: float, height: float) -> Any:
    """An empty figure for a file: it opens no window and leaves pyplot's state alone."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


_BINS = 192  # columns of the outlier picture: layers differ in K


def draw_evaluation(evaluation: Evaluation, path: str | Path) -> None:
    """Writes a picture of the first metric of each scheme with its interval."""
    labels = list(evaluation.results)
    metric = next(iter(evaluation.results[labels[0]].metrics))
    estimates = [evaluation.results[label].metrics[metric] for label in labels]
    picture = figure(7, 1.2 + 0.4 * len(labels))
    axes = picture.add_subplot()
    values = [e.value for e in estimates]
    errors = [[e.value - e.low for e in estimates], [e.high - e.value for e in estimates]]
    axes.barh(labels, values, xerr=errors, color="#4c72b0", ecolor="#222222", capsize=3)
    for i, e in enumerate(estimates):
        axes.annotate(f" {e.value:.3g}", (e.high, i), va="center", fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(left=0, right=1.15 * max(e.high for e in estimates) or 1)
    axes.set_xlabel(f"{metric} to float with 95 % intervals, less is better")
    axes.set_title(f"{evaluation.model}: {evaluation.data}", fontsize=10)
    picture.savefig(path, dpi=150)


def draw_inspection(inspection: Inspection, path: str | Path) -> None:
    """Writes a picture of all layers: the size of outliers over their columns, and each scheme's error."""
    import numpy as np
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    layers = inspection.layers
    image = np.full((len(layers), _BINS), np.nan)
    for i, layer in enumerate(layers):
        K = layer.shape[-1]
        for outlier in layer.outliers:
            start = outlier.column * _BINS // K
            end = max(start + 1, (outlier.column + 1) * _BINS // K)
            image[i, start:end] = np.fmax(image[i, start:end], outlier.absmax)
    picture = figure(11, max(3.0, 1.5 + 0.09 * len(layers)))
    left, right = picture.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    sizes = [o.absmax for layer in layers for o in layer.outliers if o.absmax > 0]
    smallest = inspection.threshold if 0 < inspection.threshold < np.inf else min(sizes, default=1.0)
    norm = LogNorm(smallest, max([1.01 * smallest, *sizes]))
    shading = left.imshow(
        image,
        aspect="auto",
        norm=norm,
        cmap="inferno_r",
        interpolation="nearest",
        extent=(0, 1, len(layers) - 0.5, -0.5),
    )
    picture.colorbar(shading, ax=left, label="largest absolute value", location="bottom", shrink=0.6)
    left.set_xlabel("input column / K")
    left.set_title(f"outliers: columns with a value of {inspection.threshold:g} or more", fontsize=10)
    step = max(1, len(layers) // 60)
    left.set_yticks(range(0, len(layers), step), [layer.name for layer in layers[::step]], fontsize=5)
    for label in list(layers[0].bytes)[1:]:
        points = [(layer.error[label], i) for i, layer in enumerate(layers) if layer.error.get(label)]
        right.plot([e for e, _ in points], [i for _, i in points], marker=".", markersize=3, linewidth=0.7, label=label)
    right.set_xscale("log")
    right.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    right.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.2g}%"))
    right.xaxis.set_minor_formatter(NullFormatter())
    right.set_xlabel("error of the layer's output, relative")
    right.set_title("error by layer", fontsize=10)
    right.grid(axis="x", alpha=0.3)
    if right.lines:
        right.legend(fontsize=7)
    picture.savefig(path, dpi=100)
