"""PNG plots: time against M, the roofline, and how int8fx scales."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from .timing import Case


def draw(cases: Sequence[Case], directory: Path, machine: str) -> list[Path]:
    """Draws those of the plots that ``cases`` has data for into ``directory``; returns the files.

    ``time_against_m.png``: best time of each candidate, a panel for each shape. ``roofline.png``: operations per second
    against operations per byte, under ``min(peak, reads * operations per byte)``. ``scaling.png``: int8fx's shares of
    the two limits against each size, and its time against threads.
    """
    products = [case for case in cases if case.suite == "products"]
    scaling = [case for case in cases if case.suite == "scaling"]
    drawn = []
    if products:
        drawn.append(_save(_time_against_m(products), directory / "time_against_m.png", machine))
    if any(_limited(case) for case in products):
        drawn.append(_save(_roofline(products), directory / "roofline.png", machine))
    if scaling:
        drawn.append(_save(_scaling(scaling), directory / "scaling.png", machine))
    return drawn


def _figure(panels: int) -> tuple[Any, list[Any]]:
    """A figure and its axes, at most two in a row. It does not use pyplot: no window, no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    across = min(panels, 2)
    down = -(-panels // across)
    figure = Figure(figsize=(6 * across, 4 * down), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(down, across, i + 1) for i in range(panels)]


def _save(figure: Any, path: Path, machine: str) -> Path:
    figure.suptitle(machine, fontsize=8)
    figure.savefig(path, dpi=120)
    return path


def _panels(cases: Sequence[Case]) -> list[tuple[str, list[Case]]]:
    return [(name, list(of_name)) for name, of_name in groupby(cases, lambda case: case.name)]


def _time_against_m(cases: Sequence[Case]) -> Any:
    panels = _panels(cases)
    figure, axes = _figure(len(panels))
    labels = list(dict.fromkeys(label for case in cases for label in case.measured))
    for axis, (name, of_name) in zip(axes, panels, strict=True):
        for i, label in enumerate(labels):
            points = [(case.M, case.measured[label].best * 1e3) for case in of_name if case.measured[label].values]
            if points:
                is_base = label == of_name[0].base
                axis.plot(*zip(*points, strict=True), "o-", label=label, color=f"C{i}", linewidth=2.5 if is_base else 1)
        axis.set(xscale="log", yscale="log", xlabel="M, rows of x", ylabel="best time, ms", title=f"weight {name}")
        axis.grid(alpha=0.3, which="both")
    if axes[0].lines:
        axes[0].legend(fontsize=7)
    return figure


def _limited(case: Case) -> bool:
    return bool(case.peak.values and case.reads.values and case.measured[case.base].values)


def intensity(case: Case) -> float:
    """``2 M N K / (N K + 2 M K + 2 M N)``: operations per byte of int8 weight and 16-bit x and y."""
    M, N, K = case.M or 0, case.N or 0, case.K or 0
    return case.operations() / (case.weight_bytes() + 2 * M * K + 2 * M * N)


def _roofline(cases: Sequence[Case]) -> Any:
    figure, (axis,) = _figure(1)
    cases = [case for case in cases if _limited(case)]
    peak = max(case.peak.most for case in cases)
    reads = max(case.reads.most for case in cases)
    ends = min(map(intensity, cases)) / 2, max(*map(intensity, cases), peak / reads) * 2
    roof = [ends[0], peak / reads, ends[1]]
    axis.plot(roof, [min(peak, reads * x) / 1e9 for x in roof], "k-", label="this machine's best")
    for name, of_name in _panels(cases):
        points = [(intensity(c), c.operations() / c.measured[c.base].best / 1e9) for c in of_name]
        axis.plot(*zip(*points, strict=True), "o-", label=f"{of_name[0].base}, weight {name}")
    axis.set(xscale="log", yscale="log", xlabel="operations per byte of weight, x and y", ylabel="GOP/s")
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=7)
    return figure


def _scaling(cases: Sequence[Case]) -> Any:
    threads = [case for case in cases if case.name.startswith("against threads")]
    panels = _panels([case for case in cases if case not in threads])
    figure, axes = _figure(max(len(panels) + bool(threads), 1))
    for axis, (name, of_name) in zip(axes, panels, strict=False):
        size = name.removeprefix("against ")[0]
        x = [getattr(case, size) for case in of_name]
        axis.plot(x, [case.share_of_peak(case.base) for case in of_name], "o-", label="of the int8 peak")
        axis.plot(x, [case.share_of_reads(case.base) for case in of_name], "s-", label="of the read bandwidth")
        axis.set(xscale="log", xlabel=size, ylabel="share of the machine's limit", title=name, ylim=(0, None))
    if threads:
        for M in sorted({case.M or 0 for case in threads}):
            of_m = [case for case in threads if case.M == M]
            times = [case.measured[case.base].best * 1e3 for case in of_m]
            axes[-1].plot([case.threads for case in of_m], times, "o-", label=f"M = {M}")
        axes[-1].set(yscale="log", xlabel="threads", ylabel="best time, ms", title="against threads")
    for axis in axes:
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=7)
    return figure
