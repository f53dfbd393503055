"""Interleaved timing: each candidate runs once in every round, so that all run on the machine in the same state."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from statistics import median

Work = Sequence[Callable[[], object]]  # calls that take turns: the same layer with distinct weights

SLICE = 0.01  # seconds that one candidate runs in a round, at least one call
WARM = 0.1  # seconds: in each round an untimed call precedes shorter ones, to fetch what other candidates evicted
PAUSE = 0.02  # seconds before a turn, in which threads that wait by spinning (ONNX Runtime has such) stop
SLOW, SLOWEST = 2.0, 30.0  # seconds a call: above these, a candidate gets a fifth of the rounds, or one call
PARALLEL = 1e-3  # seconds: it is legal for shorter calls to run on one thread


@dataclass
class Measured:
    """One candidate in one case.

    values: one per round, in seconds a call (the mean of the round's calls) or in bytes; empty if it did not run.
    note: why it has fewer rounds than others, or none.
    cpus: one per timed round, how many CPUs the process used: CPU seconds per second.
    """

    values: list[float] = field(default_factory=list)
    note: str = ""
    cpus: list[float] = field(default_factory=list, compare=False)

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


def interleave(work: Mapping[str, Work], rounds: int) -> dict[str, Measured]:
    """Seconds a call of each candidate of ``work``, in ``rounds`` rounds; each round begins with another candidate.

    Each is called twice before the rounds: once to compile, once to see how long it takes. A candidate that raises
    there is noted as failed and takes no part. The second call of a slow candidate counts as its first round.
    """
    measured: dict[str, Measured] = {}
    turns: dict[str, _Turns] = {}
    for label, calls in work.items():
        candidate = _Turns(calls)
        try:
            seconds = candidate.warm_up()
        except Exception as error:  # whatever a peer may raise
            measured[label] = Measured(note=failure(error))
            continue
        count, note = rounds_for(seconds, rounds)
        first = [seconds] if seconds > SLOW else []
        candidate.rounds = count - len(first)
        turns[label], measured[label] = candidate, Measured(first, note)
    labels = list(turns)
    for i in range(rounds):
        begin = i % max(len(labels), 1)
        for label in labels[begin:] + labels[:begin]:
            if i < turns[label].rounds:
                time.sleep(PAUSE)
                seconds, cpus = turns[label].run()
                measured[label].values.append(seconds)
                measured[label].cpus.append(cpus)
    return measured


def rounds_for(seconds: float, rounds: int) -> tuple[int, str]:
    """How many of ``rounds`` a candidate gets whose call takes ``seconds``, and the note that says so if fewer."""
    if seconds <= SLOW:
        return rounds, ""
    count = 1 if seconds > SLOWEST else max(1, rounds // 5)
    return count, f"{count} of {rounds} rounds: {seconds:.1f} s a call" if count < rounds else ""


def thread_warning(measured: Mapping[str, Measured], threads: int) -> str:
    """A line that names the candidates that used far fewer or more CPUs than ``threads`` in some rounds; empty if none.

    Such a time is of another number of threads, or of a busy machine. Legal is from ``(1 + threads) / 2`` to
    ``1.1 * threads``. Calls shorter than `PARALLEL` are not checked.
    """
    least, most = (1 + threads) / 2 if threads > 1 else 0, 1.1 * threads
    odd_rounds = []
    for label, candidate in measured.items():
        odd = [cpus for cpus in candidate.cpus if not least <= cpus <= most]
        if odd and candidate.best >= PARALLEL:
            odd_rounds.append(f"{label} {min(odd):.1f} to {max(odd):.1f} in {len(odd)} of {len(candidate.cpus)} rounds")
    if not odd_rounds:
        return ""
    return f"warning: CPUs used with {threads} threads (legal: {least:.1f} to {most:.1f}): {'; '.join(odd_rounds)}"


class _Turns:
    """The calls of one candidate, as many in a round as fill a slice."""

    def __init__(self, calls: Work) -> None:
        self.calls: Iterator[Callable[[], object]] = cycle(calls)
        self.count = 1
        self.warms = False
        self.rounds = 0

    def warm_up(self) -> float:
        """Two calls; decides how a round goes by the second one, and returns its seconds."""
        self.run()
        seconds, _ = self.run()
        self.count = min(1000, max(1, math.ceil(SLICE / max(seconds, 1e-9))))
        self.warms = seconds < WARM
        return seconds

    def run(self) -> tuple[float, float]:
        """One round: seconds a call, and CPU seconds per second."""
        if self.warms:
            next(self.calls)()
        begin, begin_cpu = time.perf_counter(), time.process_time()
        for call in islice(self.calls, self.count):
            call()
        seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - begin_cpu
        return seconds / self.count, cpu_seconds / max(seconds, 1e-9)
