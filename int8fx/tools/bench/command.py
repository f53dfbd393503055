"""``int8fx bench``: runs the chosen suites, prints their tables, writes CSV and plots."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import replace

import torch
from rich.console import Console

from ..machine import describe, describe_gpu
from . import candidates, check, plots, report
from .limits import load_limits
from .settings import Settings
from .suites import BenchError, chosen
from .timing import Case, on_threads

WIDTH = 130  # of tables in a file


def run(settings: Settings, console: Console | None = None) -> int:
    """Measures, prints the tables, writes ``bench.csv`` and the plots, or ``bench-cuda.csv`` of a GPU.

    If the run is interrupted, what was measured until then is printed and written. On a GPU nothing is timed unless its
    kernels agree with the reference.

    Returns:
        1 if int8fx failed somewhere, if a kernel is wrong, or if the device cannot run the suites; else 0.
    """
    console = console or Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    settings.output.mkdir(parents=True, exist_ok=True)
    cases: list[Case] = []
    with ExitStack() as stack:
        stack.enter_context(on_threads(settings.num_threads))
        stack.enter_context(candidates.quiet())
        stack.enter_context(torch._dynamo.config.patch(recompile_limit=64))  # layers and models share code
        try:
            suites = chosen(settings.suites, settings.device)
            machine, settings = _begin(console, replace(settings, threads=settings.num_threads))
        except BenchError as error:
            console.print(f"int8fx bench --device {settings.device}: {error}", soft_wrap=True)
            return 1
        try:
            for measure in suites.values():
                for case in measure(settings):
                    cases.append(case)
        finally:
            if cases:
                _conclude(console, cases, machine, settings)
    return int(any(case.measured[case.base].note.startswith("failed") for case in cases))


def _begin(console: Console, settings: Settings) -> tuple[dict[str, str], Settings]:
    """Prints a description of the machine; on a GPU, checks the kernels.

    Raises:
        BenchError: nothing can be timed.
    """
    settings = replace(settings, say=lambda line: console.print(f"  {line}", style="dim", soft_wrap=True))
    if settings.device != "cpu":
        if not torch.cuda.is_available():
            raise BenchError("torch sees no CUDA or ROCm device")
        machine = describe_gpu(settings.device)
        console.print(f"{machine['machine']}, {machine['isa']}\n{machine['versions']}", soft_wrap=True)
        if not check.show(console, settings.device):
            raise BenchError("nothing is timed: kernels are wrong")
        return machine, settings
    machine, limits = describe(settings.num_threads), load_limits()
    console.print(", ".join(f"{key} {value}" for key, value in machine.items() if key != "versions"), soft_wrap=True)
    console.print(machine["versions"], soft_wrap=True)
    if limits.reason:
        console.print(f"the machine's limits cannot be measured: {limits.reason}", soft_wrap=True)
    else:
        console.print(f"int8 peak by {limits.instruction}; up to {settings.max_rounds} interleaved rounds a case")
    if settings.num_threads > 1 and os.environ.get("OMP_PROC_BIND", "").lower() in ("", "false"):
        console.print("OMP_PROC_BIND is not set: threads may share a CPU, and times jump. Set OMP_PROC_BIND=true.")
    return machine, replace(settings, limits=limits)


def _conclude(console: Console, cases: list[Case], machine: dict[str, str], settings: Settings) -> None:
    on_cpu = settings.device == "cpu"
    report.show(console, cases)
    if not on_cpu and any(case.M for case in cases):
        console.print(report.floors([case for case in cases if case.M]))
    written = [settings.output / ("bench.csv" if on_cpu else f"bench-{settings.device}.csv")]
    report.write_csv(written[0], cases, machine)
    if on_cpu:
        title = f"{machine['machine']}, {machine['isa']}, {machine['threads']} threads, {machine['date'][:10]}"
        written += plots.draw(cases, settings.output, title)
    console.print("\nwritten: " + ", ".join(str(path) for path in written), soft_wrap=True)
