"""Suites on a GPU: the Triton kernels, checked against the reference and timed against peers and the GPU's limits.

Linear layers are recorded as CUDA graphs, and models are compiled with CUDA graphs, so that launches are not timed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle, islice

import torch

from . import models
from .candidates import FOR_GPU_WEIGHTS, FOR_GPUS, Candidate, build_each, inputs, linear
from .limits import PEAK, READS
from .products import OUTLIERS, weights_beyond_cache
from .settings import Settings, Sizes
from .timing import Case, Measured, Work, failure, interleave

SIZES: Sizes = (((4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192)), (1, 16, 128, 2048))
QUICK_SIZES: Sizes = (((4096, 4096),), (1, 2048))
WEIGHT_SIZES: Sizes = (((4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192)), (1, 16, 128))
QUICK_WEIGHT_SIZES: Sizes = (((4096, 4096),), (1, 16))
GRAPH_SECONDS = 2e-3  # duration of a recorded graph: a hundred times as long as its launch and synchronisation
READ_BYTES, PEAK_SIDE = 1 << 30, 8192


@dataclass(frozen=True)
class Recorded:
    """Calls as one CUDA graph.

    run: replays the graph and waits for it.
    calls: how many of them it holds.
    note: why the calls run one by one instead; empty if they are recorded.
    """

    run: Callable[[], object]
    calls: int
    note: str = ""


def record(work: Work) -> Recorded:
    """Records the calls of ``work`` in turns as a CUDA graph that runs for `GRAPH_SECONDS`.

    A call that waits for the GPU, as bitsandbytes' does for its outliers, cannot be recorded: then they are called one
    by one.
    """
    for call in work:
        call()  # compiles, and chooses tiles
    torch.cuda.synchronize()
    count = max(len(work), min(2000, math.ceil(GRAPH_SECONDS / _seconds(work[0]))))
    calls = list(islice(cycle(work), count))

    def one_by_one() -> None:
        for call in calls:
            call()
        torch.cuda.synchronize()

    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for call in calls:
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


def limits(device: str) -> dict[str, tuple[Callable[[], object], float]]:
    """The two limits of the GPU: `PEAK` and `READS` -> a call, and the operations or bytes of it."""
    buffer = torch.ones(READ_BYTES // 4, dtype=torch.int32, device=device)
    side = PEAK_SIDE
    a, b = (torch.ones(side, side, dtype=torch.int8, device=device) for _ in range(2))
    return {
        READS: (lambda: buffer.sum(dtype=torch.int32), float(buffer.nbytes)),
        PEAK: (lambda: torch._int_mm(a, b.t()), 2.0 * side**3),
    }


def products(settings: Settings) -> Iterator[Case]:
    """Each shape and M: every candidate's layer, six outlier columns, weights that are not in the cache."""
    yield from _compare(settings, "products", FOR_GPUS, settings.sizes(SIZES, QUICK_SIZES), 8)


def weights(settings: Settings) -> Iterator[Case]:
    """The same for weights of 8 and 4 bits, in groups, and other libraries' 4 bits."""
    yield from _compare(settings, "weights", FOR_GPU_WEIGHTS, settings.sizes(WEIGHT_SIZES, QUICK_WEIGHT_SIZES), 4)


def _compare(
    settings: Settings, suite: str, candidates: tuple[Candidate, ...], sizes: Sizes, bits: int
) -> Iterator[Case]:
    """A case for each shape and M of ``sizes``; the first of ``candidates`` is the base.

    bits: of the smallest codes: so many weights are made that theirs are not in the cache.
    """
    cache = torch.cuda.get_device_properties(settings.device).L2_cache_size
    bounds = limits(settings.device)
    shapes, rows = sizes
    for N, K in shapes:
        with torch.device(settings.device):
            linears = [linear(N, K) for _ in range(weights_beyond_cache(N, K * bits // 8, cache))]
        built, absent = build_each(candidates, lambda candidate: candidate.layers(linears))  # noqa: B023
        for M in rows:
            torch._dynamo.reset()
            settings.say(f"{suite}: [{N}, {K}], M = {M}")
            x = inputs(M, K, OUTLIERS).to(settings.device)
            work: dict[str, Work] = {
                name: [lambda layer=layer, x=x: layer(x) for layer in layers]  # type: ignore[misc]
                for name, layers in built.items()
            }
            measured = _measure(work | {name: [call] for name, (call, _) in bounds.items()}, settings.max_rounds)
            rates = {
                name: Measured([amount / seconds for seconds in measured.pop(name).values])
                for name, (_, amount) in bounds.items()
            }
            measured = {candidate.name: (measured | absent)[candidate.name] for candidate in candidates}
            base = candidates[0].name
            case = Case(suite, f"[{N}, {K}]", base, measured, M, N, K, threads=settings.num_threads)
            case.peak, case.reads = rates[PEAK], rates[READS]
            yield case


def _measure(work: dict[str, Work], rounds: int) -> dict[str, Measured]:
    """`timing.interleave` over the recorded graphs of ``work``, in seconds a call."""
    recorded: dict[str, Recorded] = {}
    measured: dict[str, Measured] = {}
    with torch.no_grad():
        for name, calls in work.items():
            try:
                recorded[name] = record(calls)
            except Exception as error:  # whatever a peer may raise
                measured[name] = Measured(note=failure(error))
        graphs = interleave({name: [graph.run] for name, graph in recorded.items()}, rounds)
    for name, of_graph in graphs.items():
        per_call = [seconds / recorded[name].calls for seconds in of_graph.values]
        measured[name] = Measured(per_call, of_graph.note or recorded[name].note)
    return measured


def language_models(settings: Settings) -> Iterator[Case]:
    """A language model with random weights: forwards and decode steps, with Inductor's CUDA graphs."""
    with torch.device(settings.device), torch._inductor.config.patch({"triton.cudagraphs": True}):
        subject = models.make(settings, "models", models.LARGE)
        if isinstance(subject, models.Subject):  # its weights are random: it can be made
            yield from models.compare(settings, subject, FOR_GPUS)
