"""``int8fx bench --device cuda``: the Triton kernels checked, then timed against peers and the GPU's own limits.

Products are recorded as CUDA graphs, and models compiled with them: what is timed is the GPU, not the launches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

import int8fx

from . import candidates, models, report
from .candidates import BFLOAT16, INT8FX, Candidate, inputs, linear
from .check import checks
from .machine import describe
from .models import Form
from .products import OUTLIERS, weights_beyond_cache
from .timing import Case, Measured, Work, interleave

if TYPE_CHECKING:
    from .command import Options

SUITES = ("products", "models")
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192))  # N, K
ROWS = (1, 16, 128, 2048)
QUICK_SHAPES, QUICK_ROWS = SHAPES[:1], (1, 2048)
ROTATED = f"{INT8FX} rotated"
GRAPH_SECONDS = 2e-3  # that a recorded graph runs: a hundred times what it takes to launch and await it
READ_BYTES, PEAK_SIDE = 1 << 30, 8192
PEAK, READS = "int8 peak", "reads"


def unavailable(suites: Sequence[str] = ()) -> str:
    """Why ``suites`` cannot be timed here; empty if they can."""
    if others := [suite for suite in suites if suite not in SUITES]:
        return f"no suite {', '.join(others)} for this device; legal: {', '.join(SUITES)}"
    return "" if torch.cuda.is_available() else "torch sees no CUDA or ROCm device"


# ---- what is timed ---------------------------------------------------------------------------------------------------


FORMS = (
    Form(INT8FX, int8fx.convert),
    Form(ROTATED, lambda model: int8fx.convert(model, int8fx.rotated())),
    Form(BFLOAT16, lambda model: model, converts_head=False),
    *models.PEERS,
)


def _candidate(form: Form) -> Candidate:
    def build(layer: nn.Linear) -> Any:
        converted = form.convert(layer)
        return torch.compile(converted, dynamic=False) if form.name.startswith("torchao") else converted

    return Candidate(form.name, build, needs=form.needs)


@dataclass(frozen=True)
class Recorded:
    """Calls as one CUDA graph: ``run`` replays and awaits it. note: why they are called one by one instead, if so."""

    run: Callable[[], object]
    calls: int
    note: str = ""


def record(calls: Work) -> Recorded:
    """``calls`` in turns, as often as fills `GRAPH_SECONDS`, as a graph; one by one if they cannot be captured.

    A call that awaits the GPU, as bitsandbytes' does for its outliers, cannot be.
    """
    for call in calls:
        call()  # compiles, and chooses tiles
    torch.cuda.synchronize()
    count = max(len(calls), min(2000, math.ceil(GRAPH_SECONDS / _seconds(calls[0]))))
    turns = list(islice(cycle(calls), count))

    def one_by_one() -> None:
        for call in turns:
            call()
        torch.cuda.synchronize()

    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for call in turns:
                call()
    except RuntimeError as error:
        return Recorded(one_by_one, count, f"no CUDA graph: {str(error).strip().splitlines()[0]}"[:120])

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return Recorded(replay, count)


def _seconds(call: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(5):
        call()
    end.record()
    torch.cuda.synchronize()
    return max(begin.elapsed_time(end) / 5e3, 1e-7)


# ---- suites ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """How to measure."""

    rounds: int
    quick: bool
    device: str
    say: Callable[[str], None] = lambda line: None


def limits(device: str) -> dict[str, tuple[Callable[[], object], float]]:
    """The two limits of the GPU: what to call, and how many bytes or operations that is."""
    buffer = torch.ones(READ_BYTES // 4, dtype=torch.int32, device=device)
    side = PEAK_SIDE
    a, b = (torch.ones(side, side, dtype=torch.int8, device=device) for _ in range(2))
    return {
        READS: (lambda: buffer.sum(dtype=torch.int32), float(buffer.nbytes)),
        PEAK: (lambda: torch._int_mm(a, b.t()), 2.0 * side**3),
    }


def products(settings: Settings) -> Iterator[Case]:
    """Each shape and M: every form of a linear layer, six outlier columns, weights that no cache holds."""
    cache = torch.cuda.get_device_properties(settings.device).L2_cache_size
    bounds = limits(settings.device)
    for N, K in QUICK_SHAPES if settings.quick else SHAPES:
        with torch.device(settings.device):
            layers = [linear(N, K) for _ in range(weights_beyond_cache(N, K, cache))]
        built: dict[str, list[Any]] = {}
        absent: dict[str, Measured] = {}
        for candidate in map(_candidate, FORMS):
            try:
                if reason := candidate.missing():
                    absent[candidate.name] = Measured(note=reason)
                else:
                    built[candidate.name] = candidates.build(candidate, layers)
            except Exception as error:  # whatever a peer may raise
                absent[candidate.name] = _failed(error)
        for M in QUICK_ROWS if settings.quick else ROWS:
            torch._dynamo.reset()
            settings.say(f"products: [{N}, {K}], M = {M}")
            x = inputs(M, K, OUTLIERS).to(settings.device)
            work = {name: [lambda layer=layer, x=x: layer(x) for layer in those] for name, those in built.items()}
            found = _measure(work | {name: [call] for name, (call, _) in bounds.items()}, settings.rounds)
            rates = {name: [bounds[name][1] / s for s in found.pop(name).values] for name in bounds}
            order = {form.name: (found | absent)[form.name] for form in FORMS}
            peak, reads = (Measured(rates[name]) for name in (PEAK, READS))
            yield Case("products", f"[{N}, {K}]", INT8FX, order, M, N, K, peak=peak, reads=reads)


def _measure(work: dict[str, Work], rounds: int) -> dict[str, Measured]:
    """`timing.interleave` over the recorded graphs of ``work``, in seconds a call."""
    recorded: dict[str, Recorded] = {}
    found: dict[str, Measured] = {}
    with torch.no_grad():
        for name, calls in work.items():
            try:
                recorded[name] = record(calls)
            except Exception as error:  # whatever a peer may raise
                found[name] = _failed(error)
        for name, measured in interleave({name: [r.run] for name, r in recorded.items()}, rounds).items():
            per_call = [s / recorded[name].calls for s in measured.values]
            found[name] = Measured(per_call, measured.note or recorded[name].note)
    return found


def _failed(error: Exception) -> Measured:
    return Measured(note=f"failed: {type(error).__name__}: {error}"[:200])


def whole_models(settings: Settings) -> Iterator[Case]:
    """A language model made from its configuration: a forward of 512 tokens, decode steps; Inductor's CUDA graphs."""
    layers = models.QUICK_LAYERS if settings.quick else None
    title = models.LARGE + (f", {layers} layers" if layers else "")
    with torch.device(settings.device), torch._inductor.config.patch({"triton.cudagraphs": True}):
        model = models.load(models.LARGE, layers).to(settings.device)
        contenders: dict[str, models.Contender] = {}
        absent: dict[str, Measured] = {}
        for form in FORMS:
            settings.say(f"models: {title}: {form.name}")
            if reason := models.missing(*form.needs):
                absent[form.name] = Measured(note=reason)
                continue
            try:
                contenders[form.name] = models.contend(model, form)
            except Exception as error:  # whatever a peer may raise
                absent[form.name] = _failed(error)
        batches = models.BATCHES[:1] if settings.quick else models.BATCHES
        groups = [
            models.forwards(contenders, models.TOKENS, contenders),
            *(models.decodes(contenders, b) for b in batches),
        ]
        for group in groups:
            torch._dynamo.reset()
            for name, work in group:
                settings.say(f"models: {title}: {name}")
                with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=64):
                    found = interleave({label: _awaited(calls) for label, calls in work.items()}, settings.rounds)
                order = {form.name: (found | absent)[form.name] for form in FORMS}
                yield Case("models", name, INT8FX, order, subject=title)


def _awaited(calls: Work) -> Work:
    def run(call: Callable[[], object]) -> None:
        call()
        torch.cuda.synchronize()

    return [lambda call=call: run(call) for call in calls]  # type: ignore[misc]


# ---- the command -----------------------------------------------------------------------------------------------------


def machine_of(device: str) -> dict[str, str]:
    """The GPU and versions, as the CSV's columns have them."""
    from ...triton_kernels.configs import target_of

    known = describe(torch.get_num_threads())
    name, target = torch.cuda.get_device_name(device), target_of(torch.device(device))
    runtime = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    versions = f"{known['versions']}; triton {version('triton')}; {runtime}"
    return known | {"machine": name, "isa": target, "versions": versions}


def check(console: Console, device: str) -> bool:
    """Prints what the kernels computed that the reference does not; whether that is nothing."""
    made = list(checks(device))
    wrong = [found for found in made if not found.right]
    for found in wrong:
        console.print(f"wrong: {found.name}: {found.worst:.3g} times the error that is legal", soft_wrap=True)
    console.print(f"{len(made) - len(wrong)} of {len(made)} checks of the kernels agree with the reference")
    return not wrong


def floor_table(cases: list[Case]) -> Table:
    """What part of the product's floor each form reaches: the bytes of int8 weights, or the operations, at the limits.

    The limits are this GPU's own, measured between the same rounds; 16-bit weights cannot reach more than half.
    """
    table = Table(box=box.SIMPLE, title="Share of the floor", title_justify="left")
    for title in ("", "floor us", *(form.name for form in FORMS)):
        table.add_column(title, justify="right" if title else "left")
    for case in cases:
        seconds = max((case.N or 0) * (case.K or 0) / case.reads.most, case.operations() / case.peak.most)
        shares = [seconds / case.measured[form.name].best for form in FORMS]
        cells = ["-" if math.isnan(share) else f"{share:.0%}" for share in shares]
        table.add_row(f"{case.name}, M = {case.M}", "-" if math.isnan(seconds) else f"{seconds * 1e6:.3g}", *cells)
    return table


def run(options: Options, console: Console, device: str = "cuda") -> int:
    """Checks, then measures and prints, and writes ``bench-cuda.csv``; 1 if a kernel is wrong or int8fx failed.

    Args:
        device: another one where tests stand in for it.
    """
    if reason := unavailable(options.suites):
        console.print(f"int8fx bench --device cuda: {reason}", soft_wrap=True)
        return 1
    settings = Settings(
        options.rounds or (3 if options.quick else 10),
        options.quick,
        device,
        say=lambda line: console.print(f"  {line}", style="dim", soft_wrap=True),
    )
    machine = machine_of(settings.device)
    console.print(f"{machine['machine']}, {machine['isa']}\n{machine['versions']}", soft_wrap=True)
    if not check(console, settings.device):
        console.print("nothing is timed")
        return 1
    suites = {"products": products, "models": whole_models}
    cases: list[Case] = []
    try:
        with candidates.quiet():
            for name in options.suites or SUITES:
                for case in suites[name](settings):
                    cases.append(replace(case, threads=torch.get_num_threads()))
    finally:
        if cases:
            report.show(console, cases)
            timed = [case for case in cases if case.M]
            if timed:
                console.print(floor_table(timed))
            report.write_csv(options.output / "bench-cuda.csv", cases, machine)
            console.print(f"\nwritten: {options.output / 'bench-cuda.csv'}", soft_wrap=True)
    return int(any(case.measured[case.base].note.startswith("failed") for case in cases))
