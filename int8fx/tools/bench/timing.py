"""Interleaved timing: each candidate runs once in every round, so that all run on the machine in the same state.

A candidate cannot change the number of torch's threads for the others, and one that runs on another number of CPUs than
it is said to run on is noted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle, islice
from statistics import median

import torch

Work = Sequence[Callable[[], object]]  # calls that take turns: the same layer with distinct weights

SLICE = 0.01  # seconds that one candidate runs in a round, at least one call
WARM = 0.1  # seconds: shorter calls are made untimed for PAUSE before a turn
# Seconds before a turn, of untimed calls or, if they are longer than WARM, of sleep. Caches are filled, an idle CPU
# gets its clock rates back, and threads of other candidates that wait by spinning (ONNX Runtime has such) stop.
PAUSE = 0.02
SLOW, SLOWEST = 2.0, 30.0  # seconds a call: above these, a candidate gets a fifth of the rounds, or one call
PARALLEL = 1e-3  # seconds: it is legal for shorter calls to run on one thread


@dataclass
class Measured:
    """One candidate in one case.

    values: one per round, in seconds a call (the mean of the round's calls) or in bytes; empty if it did not run.
    note: why it has fewer rounds than others, or none; or that it ran on another number of CPUs than asked.
    cpus: one per timed round, how many CPUs the process used: CPU seconds per second.
    cosine: of its outputs to those of float32, in the mean over rows; NaN if they were not compared.
    """

    values: list[float] = field(default_factory=list)
    note: str = ""
    cpus: list[float] = field(default_factory=list, compare=False)
    cosine: float = field(default=math.nan, compare=False)

    @property
    def best(self) -> float:
        """The least value; NaN if there is none."""
        return min(self.values, default=math.nan)

    @property
    def most(self) -> float:
        """The greatest value, the best of a rate; NaN if there is none."""
        return max(self.values, default=math.nan)

    @property
    def median(self) -> float:
        """The median value; NaN if there is none."""
        return median(self.values) if self.values else math.nan


@dataclass
class Case:
    """The measurements of several candidates, and of the machine between them.

    suite: a name of `suites.SUITES`.
    name: what was measured, such as ``[4096, 4096]`` (N, K) or ``decode, batch 1``.
    base: the candidate that the others are compared with.
    measured: by the candidate's name.
    M, N, K: the sizes of a linear layer, else None.
    subject: the model, if it is one.
    unit: of the values, ``s`` or ``B``.
    peak, reads: the machine's limits between the same rounds, in operations and bytes per second; empty if unknown.
    """

    suite: str
    name: str
    base: str
    measured: dict[str, Measured]
    M: int | None = None
    N: int | None = None
    K: int | None = None
    subject: str = ""
    threads: int = 1
    unit: str = "s"
    peak: Measured = field(default_factory=Measured)
    reads: Measured = field(default_factory=Measured)

    @property
    def group(self) -> str:
        """A key: cases of equal group are shown in one table."""
        return self.name if self.M else self.subject

    def ratio(self, candidate: str) -> float:
        """``best(candidate) / best(base)``: how many times as long (or large) as the base; NaN if either is missing."""
        return self._of(candidate).best / self._of(self.base).best

    def median_ratio(self, candidate: str) -> float:
        """``median(candidate) / median(base)``; NaN if either is missing."""
        return self._of(candidate).median / self._of(self.base).median

    def operations(self) -> float:
        """``2 M N K``: int8 multiplications and additions of the layer."""
        return 2.0 * (self.M or 0) * (self.N or 0) * (self.K or 0)

    def weight_bytes(self) -> float:
        """``N K``: bytes of the layer's int8 weight."""
        return float((self.N or 0) * (self.K or 0))

    def floor(self) -> float:
        """``max(N K / reads, 2 M N K / peak)``: the least seconds of a layer with int8 weights; NaN if unknown."""
        return max(self.weight_bytes() / self.reads.most, self.operations() / self.peak.most)

    def share_of_peak(self, candidate: str) -> float:
        """``2 M N K / best(candidate) / peak``; NaN if the peak is unknown."""
        return self.operations() / self._of(candidate).best / self.peak.most

    def share_of_reads(self, candidate: str) -> float:
        """``N K / best(candidate) / reads``: share of the read bandwidth, counting int8 weights; NaN if unknown."""
        return self.weight_bytes() / self._of(candidate).best / self.reads.most

    def _of(self, candidate: str) -> Measured:
        return self.measured.get(candidate, Measured())


def failure(error: Exception) -> str:
    """The note of a candidate that raised ``error``: its type and the first line of its text."""
    reason = str(error).strip().split("\n")[0]
    return f"failed: {type(error).__name__}: {reason}"[:200]


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    """Runs torch on ``count`` threads, and restores their number after, whatever was called in between."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def interleave(
    work: Mapping[str, Work],
    rounds: int,
    threads: int | None = None,
    first: Callable[[str, object], None] = lambda label, result: None,
) -> dict[str, Measured]:
    """Seconds a call of each candidate of ``work``, in ``rounds`` rounds; each round begins with another candidate.

    Before the rounds each call is made once, to compile, and one of them again, to see how long it takes. A candidate
    that raises there is noted as failed and takes no part. The latter call of a slow candidate counts as its first
    round.

    Args:
        threads: that the calls are to run on. Each turn begins with torch set to it, and a candidate that did not keep
            to it is noted (`threads_note`). None: as many as torch has, and CPUs are not checked.
        first: is given each candidate's name and the result of its first call.
    """
    measured: dict[str, Measured] = {}
    turns: dict[str, _Turns] = {}
    count = threads or torch.get_num_threads()
    for label, calls in work.items():
        candidate = _Turns(calls, count)
        try:
            result, seconds = candidate.warm_up()
        except Exception as error:  # whatever a peer may raise
            measured[label] = Measured(note=failure(error))
            continue
        first(label, result)
        allowed, note = rounds_for(seconds, rounds)
        values = [seconds] if seconds > SLOW else []
        candidate.rounds = allowed - len(values)
        turns[label], measured[label] = candidate, Measured(values, note)
    labels = list(turns)
    for i in range(rounds):
        begin = i % max(len(labels), 1)
        for label in labels[begin:] + labels[:begin]:
            if i < turns[label].rounds:
                seconds, cpus = turns[label].run()
                measured[label].values.append(seconds)
                measured[label].cpus.append(cpus)
    for label, candidate in turns.items():
        notes = [measured[label].note, candidate.note]
        if threads is not None:
            notes.append(threads_note(measured[label], threads))
        measured[label].note = "; ".join(note for note in notes if note)
    return measured


def rounds_for(seconds: float, rounds: int) -> tuple[int, str]:
    """How many of ``rounds`` a candidate gets whose call takes ``seconds``, and the note that says so if fewer."""
    if seconds <= SLOW:
        return rounds, ""
    count = 1 if seconds > SLOWEST else max(1, rounds // 5)
    return count, f"{count} of {rounds} rounds: {seconds:.1f} s a call" if count < rounds else ""


def threads_note(measured: Measured, threads: int) -> str:
    """The note of a candidate that used far fewer or more CPUs than ``threads`` in some rounds; empty if it did not.

    Such a time is of another number of threads, of a call that is serial for long, or of a busy machine. Legal is from
    ``(1 + threads) / 2`` to ``1.1 * threads``; calls shorter than `PARALLEL` may use fewer.
    """
    least = (1 + threads) / 2 if threads > 1 and measured.best >= PARALLEL else 0
    odd = [cpus for cpus in measured.cpus if not least <= cpus <= 1.1 * threads]
    if not odd:
        return ""
    used = f"{min(odd):.1f}" if f"{min(odd):.1f}" == f"{max(odd):.1f}" else f"{min(odd):.1f} to {max(odd):.1f}"
    return f"used {used} CPUs instead of {threads} in {len(odd)} of {len(measured.cpus)} rounds"


class _Turns:
    """The calls of one candidate, as many in a round as fill a slice, with torch set to ``threads``."""

    def __init__(self, calls: Work, threads: int) -> None:
        self.calls, self.threads = calls, threads
        self.turns: Iterator[Callable[[], object]] = cycle(calls)
        self.count = 1
        self.warms = False
        self.rounds = 0
        self.note = ""

    def warm_up(self) -> tuple[object, float]:
        """Each call once, and one again, which decides how a round goes. Returns the first result and its seconds."""
        with self._threads():
            result = self.calls[0]()
            for call in self.calls[1:]:
                call()
        seconds, _ = self.run()
        self.count = min(1000, max(1, math.ceil(SLICE / max(seconds, 1e-9))))
        self.warms = seconds < WARM
        return result, seconds

    def run(self) -> tuple[float, float]:
        """One round: seconds a call, and CPU seconds per second."""
        with self._threads():
            if self.warms:
                self._run_for(PAUSE)
            else:
                time.sleep(PAUSE)
            begin, begin_cpu = time.perf_counter(), time.process_time()
            for call in islice(self.turns, self.count):
                call()
            seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - begin_cpu
        return seconds / self.count, cpu_seconds / max(seconds, 1e-9)

    def _run_for(self, seconds: float) -> None:
        call = next(self.turns)  # the same one, so that the other weights are not fetched
        until = time.perf_counter() + seconds
        call()
        while time.perf_counter() < until:
            call()

    @contextmanager
    def _threads(self) -> Iterator[None]:
        """`on_threads`; notes if what was called changed the number."""
        with on_threads(self.threads):
            yield
            if (left := torch.get_num_threads()) != self.threads:
                self.note = f"set torch to {left} threads instead of {self.threads}"
