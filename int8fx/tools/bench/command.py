"""What ``int8fx bench`` runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from . import candidates, cuda, memory, models, plots, products, profile, report
from .machine import describe, limits
from .products import Settings
from .timing import Case

SUITES: dict[str, Callable[[Settings], Iterator[Case]]] = {
    "products": products.products,
    "outliers": products.outliers,
    "schemes": products.schemes,
    "overhead": products.overhead,
    "scaling": products.scaling,
    "models": models.models,
    "profile": profile.profile,
    "memory": memory.memory,
}

WIDTH = 130  # of tables in a file


@dataclass(frozen=True)
class Options:
    """The command's options.

    suites: names of `SUITES`; all of them if empty.
    rounds: of each case, at most; None: 10, or 3 if ``quick``.
    threads: None leaves torch's number of threads.
    device: cpu or cuda.
    """

    suites: tuple[str, ...] = ()
    quick: bool = False
    rounds: int | None = None
    threads: int | None = None
    output: Path = Path("int8fx-bench")
    device: str = "cpu"


def run(options: Options, console: Console | None = None) -> int:
    """Measures, prints the tables, writes ``bench.csv`` and the plots; 1 if int8fx itself failed somewhere, else 0.

    What was measured so far is printed and written also if the run is interrupted.
    """
    console = console or Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    options.output.mkdir(parents=True, exist_ok=True)
    if options.device == "cuda":
        return cuda.run(options, console)
    before = torch.get_num_threads()
    cases: list[Case] = []
    with ExitStack() as stack:
        if options.threads is not None:
            torch.set_num_threads(options.threads)
            stack.callback(torch.set_num_threads, before)
        stack.enter_context(candidates.quiet())
        threads = torch.get_num_threads()
        machine = describe(threads)
        settings = Settings(
            limits(threads),
            options.rounds or (3 if options.quick else 10),
            options.quick,
            threads,
            say=lambda line: console.print(f"  {line}", style="dim", soft_wrap=True),
        )
        _introduce(console, machine, settings)
        try:
            for name in options.suites or SUITES:
                for case in SUITES[name](settings):
                    cases.append(case)
        finally:
            if cases:
                _conclude(console, cases, machine, options.output)
    return int(any(case.measured[case.base].note.startswith("failed") for case in cases))


def _introduce(console: Console, machine: dict[str, str], settings: Settings) -> None:
    console.print(", ".join(f"{key} {value}" for key, value in machine.items() if key != "versions"), soft_wrap=True)
    console.print(machine["versions"], soft_wrap=True)
    if settings.limits.reason:
        console.print(f"the machine's limits cannot be measured: {settings.limits.reason}", soft_wrap=True)
    else:
        console.print(f"int8 peak by {settings.limits.instruction}; up to {settings.rounds} interleaved rounds a case")
    if settings.threads > 1 and os.environ.get("OMP_PROC_BIND", "").lower() in ("", "false"):
        console.print("OMP_PROC_BIND is not set: threads may share a CPU, and times jump. Set OMP_PROC_BIND=true.")


def _conclude(console: Console, cases: list[Case], machine: dict[str, str], output: Path) -> None:
    report.show(console, cases)
    report.write_csv(output / "bench.csv", cases, machine)
    title = f"{machine['machine']}, {machine['isa']}, {machine['threads']} threads, {machine['date'][:10]}"
    drawn = plots.draw(cases, output, title)
    console.print("\nwritten: " + ", ".join(str(path) for path in [output / "bench.csv", *drawn]), soft_wrap=True)
