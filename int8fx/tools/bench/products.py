"""Suites of single products: against the peers, with more and more outliers, overhead of a call, scaling."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

import int8fx
from int8fx.schemes import Scheme

from . import candidates
from .candidates import CANDIDATES, OVERHEAD, Candidate, Layer, converted, inputs, linear
from .machine import Limits, last_level_cache
from .timing import Case, Measured, Work, interleave

SHAPES = ((4096, 4096), (11008, 4096), (4864, 896), (576, 576))  # N, K
ROWS = (1, 4, 16, 128, 512)
QUICK_SHAPES, QUICK_ROWS = SHAPES[2:], (1, 16, 128)
COLD_ROWS = 4  # up to this M, time is reading the weight: each call takes another one
OUTLIERS = 6  # columns
MAX_SIZE = 2048  # of M in the scaling suite
NO_OUTLIERS = "threshold inf"
SCHEMES: dict[str, Scheme] = {
    "llm_int8": int8fx.llm_int8(),
    "llm_int8(inf)": int8fx.llm_int8(math.inf),
    "rotated(budget=0)": int8fx.rotated(budget=0),
    "rotated": int8fx.rotated(),
}


@dataclass(frozen=True)
class Settings:
    """How to measure.

    limits: of the machine, measured between the rounds.
    say: takes a line about what happens now.
    """

    limits: Limits
    rounds: int = 10
    quick: bool = False
    threads: int = 1
    shapes: Sequence[tuple[int, int]] | None = None
    rows: Sequence[int] | None = None
    say: Callable[[str], None] = lambda line: None

    def sizes(self) -> tuple[Sequence[tuple[int, int]], Sequence[int]]:
        """The shapes (N, K) and the numbers of rows M of the suites of products."""
        shapes, rows = (QUICK_SHAPES, QUICK_ROWS) if self.quick else (SHAPES, ROWS)
        return self.shapes or shapes, self.rows or rows


def weights_beyond_cache(N: int, K: int, cache: int) -> int:
    """How many int8 ``[N, K]`` weights hold 1.5 times the ``cache`` bytes of the last-level cache: at least 2."""
    return max(2, math.ceil(1.5 * cache / (N * K)))


def products(settings: Settings) -> Iterator[Case]:
    """Each shape and M: int8fx and every peer, six outlier columns, weights cold for M <= 4."""
    shapes, rows = settings.sizes()
    for N, K in shapes:
        yield from _shape(settings, "products", N, K, rows, CANDIDATES)


def overhead(settings: Settings) -> Iterator[Case]:
    """A 64 x 64 layer, where a call's overhead is its time."""
    for case in _shape(replace(settings, rounds=5 * settings.rounds), "overhead", 64, 64, (1, 16), OVERHEAD, cold=0):
        yield replace(case, base="F.linear")


def outliers(settings: Settings) -> Iterator[Case]:
    """Threshold 6 with 0.15 %, 1 % and all of the columns outliers, against a threshold of infinity."""
    shapes, rows = settings.sizes()
    for N, K in shapes:
        layers = _layers(N, K, rows)
        ours = candidates.build(Candidate("", converted()), layers)
        plain = candidates.build(Candidate("", converted(int8fx.llm_int8(math.inf))), layers)
        for M in rows:
            few, some, every = (inputs(M, K, count) for count in (OUTLIERS, math.ceil(K / 100), K))
            work: dict[str, Work] = {
                NO_OUTLIERS: _calls(plain, few, M),
                f"threshold 6, {OUTLIERS} columns": _calls(ours, few, M),
                "threshold 6, 1 % of the columns": _calls(ours, some, M),
                "threshold 6, every column": _calls(ours, every, M),
                candidates.BFLOAT16: _calls(layers, few, M),
            }
            settings.say(f"outliers: [{N}, {K}], M = {M}")
            yield _case(settings, Case("outliers", f"[{N}, {K}]", NO_OUTLIERS, {}, M, N, K), work)


def schemes(settings: Settings) -> Iterator[Case]:
    """Each of `SCHEMES`, on inputs with six outlier columns."""
    shapes, rows = settings.sizes()
    for N, K in shapes:
        layers = _layers(N, K, rows)
        built = {name: candidates.build(Candidate(name, converted(scheme)), layers) for name, scheme in SCHEMES.items()}
        for M in rows:
            x = inputs(M, K, OUTLIERS)
            settings.say(f"schemes: [{N}, {K}], M = {M}")
            work = {name: _calls(of_scheme, x, M) for name, of_scheme in built.items()}
            yield _case(settings, Case("schemes", f"[{N}, {K}]", "llm_int8", {}, M, N, K), work)


def scaling(settings: Settings) -> Iterator[Case]:
    """int8fx alone: M at a fixed weight, N and K at few and many rows, threads."""
    side, most = (1024, 256) if settings.quick else (4096, MAX_SIZE)
    sizes = [2**i for i in range(6, most.bit_length() + 2, 2 if settings.quick else 1)]
    many = most // 4
    yield from _sweep(settings, "against M", [(2**i, side, side) for i in range(most.bit_length())])
    for M in (1, many):
        yield from _sweep(settings, f"against N, M = {M}", [(M, N, side) for N in sizes])
        yield from _sweep(settings, f"against K, M = {M}", [(M, side, K) for K in sizes])
    before = torch.get_num_threads()
    try:
        for threads in range(1, settings.threads + 1):
            torch.set_num_threads(threads)
            for M in (1, many):
                yield from _sweep(replace(settings, threads=threads), f"against threads, M = {M}", [(M, side, side)])
    finally:
        torch.set_num_threads(before)


def _sweep(settings: Settings, name: str, sizes: list[tuple[int, int, int]]) -> Iterator[Case]:
    ours = Candidate(candidates.INT8FX, converted())
    for M, N, K in sizes:
        layers = candidates.build(ours, _layers(N, K, (M,)))
        settings.say(f"scaling {name}: [{N}, {K}], M = {M}, {settings.threads} threads")
        case = Case("scaling", name, ours.name, {}, M, N, K)
        yield _case(settings, case, {ours.name: _calls(layers, inputs(M, K, OUTLIERS), M)})


def _shape(
    settings: Settings,
    suite: str,
    N: int,
    K: int,
    rows: Sequence[int],
    contenders: Sequence[Candidate],
    cold: int = COLD_ROWS,
) -> Iterator[Case]:
    """One shape, each M of ``rows``; the layers of a candidate are built once."""
    layers = _layers(N, K, rows, cold)
    built: dict[str, list[Layer]] = {}
    absent: dict[str, Measured] = {}
    for candidate in contenders:
        if reason := candidate.missing():
            absent[candidate.name] = Measured(note=reason)
            continue
        try:
            built[candidate.name] = candidates.build(candidate, layers)
        except Exception as error:  # whatever a peer may raise
            absent[candidate.name] = Measured(note=f"failed: {type(error).__name__}: {error}"[:200])
    for M in rows:
        torch._dynamo.reset()  # a graph for each M: they would pass the limit of recompilations
        settings.say(f"{suite}: [{N}, {K}], M = {M}")
        x = inputs(M, K, OUTLIERS)
        work: dict[str, Work] = {
            c.name: _calls(built[c.name], c.prepare(x), M, cold) for c in contenders if c.name in built
        }
        case = _case(settings, Case(suite, f"[{N}, {K}]", contenders[0].name, {}, M, N, K), work)
        yield replace(case, measured={c.name: (case.measured | absent)[c.name] for c in contenders})


def _layers(N: int, K: int, rows: Sequence[int], cold: int = COLD_ROWS) -> list[nn.Linear]:
    count = weights_beyond_cache(N, K, last_level_cache()) if min(rows) <= cold else 1
    return [linear(N, K) for _ in range(count)]


def _calls(layers: Sequence[Layer], x: object, M: int, cold: int = COLD_ROWS) -> Work:
    return [lambda layer=layer: layer(x) for layer in (layers if cold >= M else layers[:1])]  # type: ignore[misc]


def _case(settings: Settings, case: Case, work: dict[str, Work]) -> Case:
    """``case`` with ``work`` measured, the machine's limits between its rounds."""
    with torch.no_grad():
        found = interleave(work | settings.limits.work(settings.threads), settings.rounds)
    peak, reads = settings.limits.rates(found, settings.threads)
    return replace(case, measured=found, threads=settings.threads, peak=peak, reads=reads)
