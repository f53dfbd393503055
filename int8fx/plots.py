"""Pictures of measurements; they need matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .evaluate import Evaluation


def figure(width: float, height: float) -> Any:
    """An empty figure, drawn to a file only: no window, no state of pyplot."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def draw_evaluation(evaluation: Evaluation, path: str | Path) -> None:
    """Writes a picture of the first metric of each scheme with its interval."""
    labels = list(evaluation.results)
    metric = next(iter(evaluation.results[labels[0]].metrics))
    estimates = [evaluation.results[label].metrics[metric] for label in labels]
    drawn = figure(7, 1.2 + 0.4 * len(labels))
    axes = drawn.add_subplot()
    values = [e.value for e in estimates]
    errors = [[e.value - e.low for e in estimates], [e.high - e.value for e in estimates]]
    axes.barh(labels, values, xerr=errors, color="#4c72b0", ecolor="#222222", capsize=3)
    for i, e in enumerate(estimates):
        axes.annotate(f" {e.value:.3g}", (e.high, i), va="center", fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(left=0, right=1.15 * max(e.high for e in estimates) or 1)
    axes.set_xlabel(f"{metric} to float, with 95 % intervals: less is better")
    axes.set_title(f"{evaluation.model}: {evaluation.windows} windows of {evaluation.width} tokens", fontsize=10)
    drawn.savefig(path, dpi=150)
