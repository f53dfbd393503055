"""Tables on the terminal, one CSV file for everything."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median

from rich import box
from rich.console import Console
from rich.table import Table

from .suites import SUITES
from .timing import Case, Measured

COLUMNS = (
    *("date", "machine", "isa", "threads", "python", "versions"),
    *("suite", "model", "case", "M", "N", "K", "candidate", "unit", "rounds", "best", "median", "cpus", "cosine"),
    *("base", "ratio", "median_ratio", "peak_ops", "share_of_peak", "read_bytes_per_s", "share_of_reads", "note"),
)

SUITES_WITH_PEAK = ("products", "outliers")  # whose tables have each candidate's share of the int8 peak


def rows(cases: Iterable[Case], machine: Mapping[str, str]) -> list[dict[str, object]]:
    """One row for each candidate of each case, by `COLUMNS`; a field is empty if nothing was measured.

    best, median: seconds per call or bytes, according to unit. ratio, median_ratio: as multiples of the base's.
    cpus: how many CPUs a timed round used, in the median. cosine: to float32's outputs, in the mean over rows.
    peak_ops, read_bytes_per_s: the machine's best between the same rounds, per second.
    """
    table: list[dict[str, object]] = []
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
                "cpus": median(measured.cpus) if measured.cpus else None,
                "cosine": measured.cosine,
                "base": case.base,
                "ratio": case.ratio(label),
                "median_ratio": case.median_ratio(label),
                "peak_ops": case.peak.most,
                "share_of_peak": case.share_of_peak(label) if case.M else None,
                "read_bytes_per_s": case.reads.most,
                "share_of_reads": case.share_of_reads(label) if case.M else None,
                "note": measured.note,
            }
            table.append({name: _field(row[name]) for name in COLUMNS})
    return table


def _field(value: object) -> object:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return "" if value is None else value


def write_csv(path: Path, cases: Iterable[Case], machine: Mapping[str, str]) -> None:
    """Writes `rows` to ``path``, after a header line with `COLUMNS`."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows(cases, machine))


def show(console: Console, cases: Sequence[Case]) -> None:
    """Prints the tables of ``cases``, suite by suite."""
    for suite in dict.fromkeys(case.suite for case in cases):
        of_suite = [case for case in cases if case.suite == suite]
        console.print(f"\n{SUITES[suite].title}", style="bold")
        if suite == "scaling":
            console.print(_scaling(of_suite))
        elif suite == "memory":
            console.print(_memory(of_suite))
        else:
            for name in dict.fromkeys(case.group for case in of_suite):
                _comparison(console, name, [case for case in of_suite if case.group == name])


def _comparison(console: Console, name: str, cases: list[Case]) -> None:
    """A row for each candidate, a column for each case; then the machine's limits, and notes on candidates."""
    factor = 1e6 if cases[0].suite == "overhead" else 1e3
    table = Table(title=name or None, box=box.SIMPLE, title_justify="left")
    table.add_column(no_wrap=True)
    for case in cases:
        table.add_column(_column(case), justify="right")
    labels = list(dict.fromkeys(label for case in cases for label in case.measured))
    for label in labels:
        if any(label in case.measured and case.measured[label].values for case in cases):
            table.add_row(label, *(_cell(case, label, factor) for case in cases))
    if any(case.peak.values for case in cases) and cases[0].suite in SUITES_WITH_PEAK:
        table.add_section()
        table.add_row("int8 peak here, GOP/s", *(f"{case.peak.most / 1e9:,.0f}" for case in cases))
        table.add_row("read bandwidth here, GB/s", *(f"{case.reads.most / 1e9:.1f}" for case in cases))
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
    lines = [f"{measured.best * factor:.4g} {beyond[0]:>6}{star}", f"{measured.median * factor:.4g} {beyond[1]:>6} "]
    if case.suite in SUITES_WITH_PEAK and case.peak.values:
        lines.append(f"{case.share_of_peak(label):.0%} of peak ")
    if not math.isnan(measured.cosine):
        lines.append(f"cosine {measured.cosine:.5f} ")
    return "\n".join(lines)


def _notes(console: Console, cases: Sequence[Case]) -> None:
    """A line for each candidate or limit that has notes: each note, and in which cases if not in all."""
    notes: dict[str, dict[str, list[str]]] = {}
    for case in cases:
        limits = {"the int8 peak": case.peak, "the read bandwidth": case.reads}
        for label, measured in (case.measured | limits).items():
            if measured.note:
                notes.setdefault(label, {}).setdefault(measured.note, []).append(_column(case))
    for label, of_label in notes.items():
        texts = [
            note + ("" if len(set(places)) == len(cases) else f" ({', '.join(dict.fromkeys(places))})")
            for note, places in of_label.items()
        ]
        console.print(f"  * {label}: {'; '.join(texts)}", soft_wrap=True)


def _scaling(cases: list[Case]) -> Table:
    table = Table(box=box.SIMPLE)
    for title in ("", "M", "N", "K", "threads", "ms", "GOP/s", "of the int8 peak", "GB/s", "of the bandwidth"):
        table.add_column(title, justify="right" if title else "left")
    for case in cases:
        base = case.measured[case.base]
        table.add_row(
            case.name,
            *(str(size) for size in (case.M, case.N, case.K, case.threads)),
            f"{base.best * 1e3:.4g} / {base.median * 1e3:.4g}",
            f"{case.operations() / base.best / 1e9:,.0f}",
            f"{case.share_of_peak(case.base):.0%}" if case.peak.values else "-",
            f"{case.weight_bytes() / base.best / 1e9:.1f}",
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


def floors(cases: Sequence[Case]) -> Table:
    """`Case.floor` of each layer in us, and the floor as a share of each candidate's time.

    Where the floor is the time to read the int8 weights, candidates with 16-bit weights reach at most half.
    """
    labels = list(dict.fromkeys(label for case in cases for label in case.measured))
    table = Table(box=box.SIMPLE, title="Share of the floor", title_justify="left")
    for title in ("", "floor us", *labels):
        table.add_column(title, justify="right" if title else "left")
    for case in cases:
        floor = case.floor()
        shares = [floor / case.measured.get(label, Measured()).best for label in labels]
        cells = ["-" if math.isnan(share) else f"{share:.0%}" for share in shares]
        table.add_row(f"{case.name}, M = {case.M}", "-" if math.isnan(floor) else f"{floor * 1e6:.3g}", *cells)
    return table
