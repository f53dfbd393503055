"""Tables on the terminal, one CSV file for everything."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from .timing import Case, Measured

TITLES = {
    "products": "Products: ms, and as multiples of int8fx's time; the best of the rounds above the median",
    "outliers": "Outliers: ms, and as multiples of threshold inf's time; the best of the rounds above the median",
    "schemes": "Schemes: ms, and as multiples of llm_int8's time; the best of the rounds above the median",
    "overhead": "Overhead of a call: us, and what is beyond F.linear; the best of the rounds above the median",
    "scaling": "Scaling of int8fx: best / median ms, shares of this machine's limits",
    "models": "Models: ms, and as multiples of int8fx's time; the best of the rounds above the median",
    "profile": "Profiles of compiled forwards: ms by kind of kernel, and as multiples of int8fx's; best above median",
    "memory": "Memory: MB, and as multiples of codes + scales + rest, or of bfloat16's peak",
}
COLUMNS = (
    *("date", "machine", "isa", "threads", "python", "versions"),
    *("suite", "model", "case", "M", "N", "K", "candidate", "unit", "rounds", "best", "median"),
    *("base", "ratio", "median_ratio", "peak_ops", "share_of_peak", "read_bytes_per_s", "share_of_reads", "note"),
)


def rows(cases: Iterable[Case], machine: Mapping[str, str]) -> list[dict[str, object]]:
    """One row for each candidate of each case, by `COLUMNS`; an empty field where nothing was measured.

    best, median: seconds a call or bytes (unit). ratio, median_ratio: as multiples of the base's. peak_ops,
    read_bytes_per_s: the machine's best between the same rounds.
    """
    found: list[dict[str, object]] = []
    for case in cases:
        for label, measured in case.measured.items():
            row: dict[str, object] = {
                **machine,
                "threads": case.threads,
                "suite": case.suite,
                "model": case.subject,
                "case": case.name,
                "M": case.M,
                "N": case.N,
                "K": case.K,
                "candidate": label,
                "unit": case.unit,
                "rounds": len(measured.values),
                "best": measured.best,
                "median": measured.median,
                "base": case.base,
                "ratio": case.ratio(label),
                "median_ratio": case.median_ratio(label),
                "peak_ops": case.peak.most,
                "share_of_peak": case.share_of_peak(label) if case.M else None,
                "read_bytes_per_s": case.reads.most,
                "share_of_reads": case.share_of_reads(label) if case.M else None,
                "note": measured.note,
            }
            found.append({name: _field(row[name]) for name in COLUMNS})
    return found


def _field(value: object) -> object:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return "" if value is None else value


def write_csv(path: Path, cases: Iterable[Case], machine: Mapping[str, str]) -> None:
    """Writes `rows` to ``path``."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows(cases, machine))


def show(console: Console, cases: Sequence[Case]) -> None:
    """Prints the tables of ``cases``, suite by suite."""
    for suite in dict.fromkeys(case.suite for case in cases):
        of_suite = [case for case in cases if case.suite == suite]
        console.print(f"\n{TITLES[suite]}", style="bold")
        if suite == "scaling":
            console.print(_scaling(of_suite))
        elif suite == "memory":
            console.print(_memory(of_suite))
        else:
            for name in dict.fromkeys(case.group for case in of_suite):
                _comparison(console, name, [case for case in of_suite if case.group == name])


def _comparison(console: Console, name: str, cases: list[Case]) -> None:
    """A row for each candidate, a column for each case; what did not run, and why, below."""
    factor = 1e6 if cases[0].suite == "overhead" else 1e3
    table = Table(title=name or None, box=box.SIMPLE, title_justify="left")
    table.add_column(no_wrap=True)
    for case in cases:
        table.add_column(_column(case), justify="right")
    labels = list(dict.fromkeys(label for case in cases for label in case.measured))
    for label in labels:
        if any(label in case.measured and case.measured[label].values for case in cases):
            table.add_row(label, *(_cell(case, label, factor) for case in cases))
    if any(case.peak.values for case in cases) and cases[0].M and cases[0].suite == "products":
        table.add_section()
        table.add_row("int8 peak here, GOP/s", *(f"{case.peak.most / 1e9:,.0f}" for case in cases))
        table.add_row(f"of it, {cases[0].base}", *(f"{case.share_of_peak(case.base):.0%}" for case in cases))
        table.add_row("reads here, GB/s", *(f"{case.reads.most / 1e9:.1f}" for case in cases))
        table.add_row(f"of it, {cases[0].base}", *(f"{case.share_of_reads(case.base):.0%}" for case in cases))
    console.print(table)
    _notes(console, cases)


def _column(case: Case) -> str:
    return f"M = {case.M}" if case.M else case.name


def _cell(case: Case, label: str, factor: float) -> str:
    measured, base = case.measured.get(label, Measured()), case.measured[case.base]
    if not measured.values:
        return "-"
    if case.suite == "overhead":
        beyond = [f"{(a - b) * factor:+.1f}" for a, b in ((measured.best, base.best), (measured.median, base.median))]
    else:
        beyond = [f"{ratio:.2f}x" for ratio in (case.ratio(label), case.median_ratio(label))]
    star = "*" if measured.note else " "
    best, median = measured.best * factor, measured.median * factor
    return f"{best:.4g} {beyond[0]:>6}{star}\n{median:.4g} {beyond[1]:>6} "


def _notes(console: Console, cases: Sequence[Case]) -> None:
    notes: dict[str, list[str]] = {}
    for case in cases:
        where = _column(case)
        for label, measured in case.measured.items():
            if measured.note:
                notes.setdefault(f"{label}: {measured.note}", []).append(where)
        for limit in (case.peak, case.reads):
            if limit.note and not limit.values:
                notes.setdefault(f"the machine's limits were not measured: {limit.note}", []).append(where)
    for note, places in notes.items():
        everywhere = len(set(places)) == len(cases)
        console.print(f"  * {note}" + ("" if everywhere else f" ({', '.join(dict.fromkeys(places))})"), soft_wrap=True)


def _scaling(cases: list[Case]) -> Table:
    table = Table(box=box.SIMPLE)
    for title in ("", "M", "N", "K", "threads", "ms", "GOP/s", "of the int8 peak", "GB/s", "of the reads"):
        table.add_column(title, justify="right" if title else "left")
    for case in cases:
        ours = case.measured[case.base]
        table.add_row(
            case.name,
            *(str(size) for size in (case.M, case.N, case.K, case.threads)),
            f"{ours.best * 1e3:.4g} / {ours.median * 1e3:.4g}",
            f"{case.operations() / ours.best / 1e9:,.0f}",
            f"{case.share_of_peak(case.base):.0%}" if case.peak.values else "-",
            f"{(case.N or 0) * (case.K or 0) / ours.best / 1e9:.1f}",
            f"{case.share_of_reads(case.base):.0%}" if case.reads.values else "-",
        )
    return table


def _memory(cases: list[Case]) -> Table:
    table = Table(box=box.SIMPLE)
    labels = list(dict.fromkeys(label for case in cases for label in case.measured))
    for title in ("", "", *labels):
        table.add_column(title, justify="right" if title else "left")
    for case in cases:
        cells = []
        for label in labels:
            measured = case.measured.get(label, Measured())
            text = f"{measured.best / 1e6:,.1f}  {case.ratio(label):.3f}x" if measured.values else measured.note or "-"
            cells.append(text)
        table.add_row(case.subject, case.name, *cells)
    return table
