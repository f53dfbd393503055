"""Suites of single linear layers: other libraries, outliers, schemes, overhead of a call, no compiler, scaling."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

import int8fx
from int8fx.ops import native

from ..machine import last_level_cache, total_memory
from .candidates import (
    BFLOAT16,
    BFLOAT16_FROZEN,
    FOR_FALLBACK,
    FOR_LAYERS,
    FOR_OVERHEAD,
    FOR_WEIGHTS,
    INT8FX,
    Candidate,
    Layer,
    build_each,
    inputs,
    linear,
    of_scheme,
)
from .settings import Settings, Sizes
from .timing import Case, Measured, Work, interleave

SIZES: Sizes = (((4096, 4096), (11008, 4096), (4864, 896), (576, 576)), (1, 4, 16, 128, 512))
FALLBACK_SIZES: Sizes = (((4096, 4096), (2048, 2048), (576, 576)), (1, 4, 5, 16, 128, 512))
QUICK_SIZES: Sizes = (((4864, 896), (576, 576)), (1, 16, 128))
MAX_FROZEN = 4  # weights of a candidate that compiles each by itself, which takes seconds
COLD_ROWS = 4  # up to this M, reading the weight takes the time: each call takes another weight, not in the cache
OUTLIERS = 6  # columns
SHARES = (0.01, 0.05, 0.1, 0.4, 0.9, 1.0)  # of the columns, in the outliers suite; real layers have any of them
MAX_SIZE = 2048  # of M in the scaling suite
PLAIN = of_scheme(int8fx.plain())
SCHEMES = (of_scheme(int8fx.llm_int8()), PLAIN, of_scheme(int8fx.rotated(columns=0)), of_scheme(int8fx.rotated()))


def weights_beyond_cache(N: int, K: int, cache: int, memory: float = math.inf) -> int:
    """How many int8 ``[N, K]`` weights fill 1.5 times the ``cache`` bytes of the last-level cache: at least 2.

    They fill at most 1/64 of ``memory`` bytes, since each candidate holds them, some in float32. Where the cache is
    larger, the other candidates of a round and the buffer of `limits` displace them before their next turn.
    """
    return max(2, math.ceil(min(1.5 * cache, memory / 64) / (N * K)))


def products(settings: Settings) -> Iterator[Case]:
    """Each shape and M: int8fx and every other library, six outlier columns, uncached weights for M <= `COLD_ROWS`."""
    shapes, rows = settings.sizes(SIZES, QUICK_SIZES)
    for N, K in shapes:
        yield from compare(settings, "products", N, K, rows, FOR_LAYERS)


def overhead(settings: Settings) -> Iterator[Case]:
    """A 64 x 64 layer, whose time is almost only the overhead of the call."""
    settings = replace(settings, rounds=5 * settings.max_rounds)
    for case in compare(settings, "overhead", 64, 64, (1, 16), FOR_OVERHEAD, cold_rows=0):
        yield replace(case, base="F.linear")


def fallback(settings: Settings) -> Iterator[Case]:
    """int8fx in a process without compiled kernels, compared with float32's ``nn.Linear``; weights in the cache."""
    if native.load():
        settings.say(
            "fallback: not run, compiled kernels are loaded; legal: CXX=none TORCH_EXTENSIONS_DIR=/tmp/no-kernels"
        )
        return
    shapes, rows = settings.sizes(FALLBACK_SIZES, QUICK_SIZES)
    for N, K in shapes:
        yield from compare(settings, "fallback", N, K, rows, FOR_FALLBACK, cold_rows=0)


def outliers(settings: Settings) -> Iterator[Case]:
    """The default threshold with six outlier columns and each of `SHARES`, compared with int8 without outliers."""
    shapes, rows = settings.sizes(SIZES, QUICK_SIZES)
    for N, K in shapes:
        counts = {f"{OUTLIERS} outlier columns": OUTLIERS}
        counts |= {f"{100 * share:.0f} % of the columns": math.ceil(share * K) for share in SHARES}
        linears = _linears(N, K, rows)
        others = (PLAIN, BFLOAT16, BFLOAT16_FROZEN)
        built, absent = build_each((*others, INT8FX), lambda candidate: candidate.layers(linears))  # noqa: B023
        for M in rows:
            torch._dynamo.reset()
            settings.say(f"outliers: [{N}, {K}], M = {M}")
            work, left = _work(others, built, inputs(M, K, OUTLIERS), M)
            for label, count in counts.items():
                work[f"llm_int8, {label}"] = _calls(built[INT8FX.name], inputs(M, K, count), M)
            case = _measure(settings, Case("outliers", f"[{N}, {K}]", PLAIN.name, {}, M, N, K), work)
            yield replace(case, measured=case.measured | left | absent)


def schemes(settings: Settings) -> Iterator[Case]:
    """Each of `SCHEMES`, on inputs with six outlier columns."""
    shapes, rows = settings.sizes(SIZES, QUICK_SIZES)
    for N, K in shapes:
        yield from compare(settings, "schemes", N, K, rows, SCHEMES)


def weights(settings: Settings) -> Iterator[Case]:
    """Weights of 8 and 4 bits, in groups, compared with int8 and one scale per output channel."""
    shapes, rows = settings.sizes(SIZES, QUICK_SIZES)
    for N, K in shapes:
        yield from compare(settings, "weights", N, K, rows, FOR_WEIGHTS)


def scaling(settings: Settings) -> Iterator[Case]:
    """int8fx alone: M at a fixed weight, N and K at few and many rows, threads."""
    side, max_size = (1024, 256) if settings.quick else (4096, MAX_SIZE)
    sizes = [2**i for i in range(6, max_size.bit_length() + 2, 2 if settings.quick else 1)]
    many = max_size // 4
    yield from _sweep(settings, "against M", [(2**i, side, side) for i in range(max_size.bit_length())])
    for M in (1, many):
        yield from _sweep(settings, f"against N, M = {M}", [(M, N, side) for N in sizes])
        yield from _sweep(settings, f"against K, M = {M}", [(M, side, K) for K in sizes])
    for threads in range(1, settings.num_threads + 1):
        for M in (1, many):
            yield from _sweep(replace(settings, threads=threads), f"against threads, M = {M}", [(M, side, side)])


def _sweep(settings: Settings, name: str, sizes: list[tuple[int, int, int]]) -> Iterator[Case]:
    for M, N, K in sizes:
        layers = INT8FX.layers(_linears(N, K, (M,)))
        settings.say(f"scaling {name}: [{N}, {K}], M = {M}, {settings.num_threads} threads")
        case = Case("scaling", name, base=INT8FX.name, measured={}, M=M, N=N, K=K)
        yield _measure(settings, case, {INT8FX.name: _calls(layers, inputs(M, K, OUTLIERS), M)})


def compare(
    settings: Settings,
    suite: str,
    N: int,
    K: int,
    rows: Sequence[int],
    candidates: Sequence[Candidate],
    cold_rows: int = COLD_ROWS,
) -> Iterator[Case]:
    """A case for each M of ``rows`` with all of ``candidates``, on inputs with six outlier columns.

    Args:
        N, K: of the weight.
        candidates: the first one is the base. The layers of each are built once.
        cold_rows: up to this M, each call takes a weight that is not in the cache.
    """
    linears = _linears(N, K, rows, cold_rows)
    built, absent = build_each(candidates, lambda candidate: candidate.layers(linears))
    for M in rows:
        torch._dynamo.reset()  # one graph for each M would exceed the limit of recompilations
        settings.say(f"{suite}: [{N}, {K}], M = {M}")
        work, left = _work(candidates, built, inputs(M, K, OUTLIERS), M, cold_rows)
        case = _measure(settings, Case(suite, f"[{N}, {K}]", candidates[0].name, {}, M, N, K), work)
        measured = case.measured | left | absent
        yield replace(case, measured={c.name: measured[c.name] for c in candidates})


def _linears(N: int, K: int, rows: Sequence[int], cold_rows: int = COLD_ROWS) -> list[nn.Linear]:
    count = weights_beyond_cache(N, K, last_level_cache(), total_memory()) if min(rows) <= cold_rows else 1
    return [linear(N, K) for _ in range(count)]


def _work(
    candidates: Sequence[Candidate], built: Mapping[str, Sequence[Layer]], x: Tensor, M: int, cold_rows: int = COLD_ROWS
) -> tuple[dict[str, Work], dict[str, Measured]]:
    """The calls of those of ``candidates`` that are ``built``, and a note for each that is not timed at this M."""
    work: dict[str, Work] = {}
    left: dict[str, Measured] = {}
    for candidate in candidates:
        if candidate.name in built:
            calls = _calls(built[candidate.name], candidate.input(x), M, cold_rows)
            if candidate.frozen and len(calls) > MAX_FROZEN:
                left[candidate.name] = Measured(note=f"not run: each of {len(calls)} weights would be compiled")
            else:
                work[candidate.name] = calls
    return work, left


def _calls(layers: Sequence[Layer], x: object, M: int, cold_rows: int = COLD_ROWS) -> Work:
    return [lambda layer=layer: layer(x) for layer in (layers if cold_rows >= M else layers[:1])]  # type: ignore[misc]


def _measure(settings: Settings, case: Case, work: dict[str, Work]) -> Case:
    """``case`` with ``work`` measured, and the machine's limits measured between its rounds."""
    threads = settings.num_threads
    with torch.no_grad():
        measured = interleave(work | settings.limits.work(threads), settings.max_rounds, threads)
    peak, reads = settings.limits.rates(measured, threads)
    return replace(case, measured=measured, threads=threads, peak=peak, reads=reads)
