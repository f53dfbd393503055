"""Interleaved timing: in every round each candidate runs once, so that all meet the same state of the machine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from statistics import median

Work = Sequence[Callable[[], object]]  # calls that are taken in turns: the same product with distinct weights

SLICE = 0.01  # seconds that one candidate runs in a round, at least one call
WARM = 0.1  # seconds: below this, a call goes before each slice untimed, to bring back what the others evicted
SLOW, SLOWEST = 2.0, 30.0  # seconds a call: above these, a candidate gets a fifth of the rounds, or one call


@dataclass
class Measured:
    """One candidate in one case.

    values: one per round, in seconds a call (the mean of the round's calls) or in bytes; empty if it did not run.
    note: why it has fewer rounds than others, or none.
    """

    values: list[float] = field(default_factory=list)
    note: str = ""

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
    """What several candidates did, and how the machine was meanwhile.

    suite: a name of `command.SUITES`.
    name: what was measured, such as ``[4096, 4096]`` (N, K) or ``decode, batch 1``.
    subject: the model, if it is one.
    M, N, K: the sizes of a product, else None.
    base: the candidate that the others are compared with.
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
        """What cases that are shown together have in common."""
        return self.name if self.M else self.subject

    def ratio(self, candidate: str) -> float:
        """``best(candidate) / best(base)``: how many times as long (or large) as the base; NaN if either is missing."""
        return self._of(candidate).best / self._of(self.base).best

    def median_ratio(self, candidate: str) -> float:
        """``median(candidate) / median(base)``."""
        return self._of(candidate).median / self._of(self.base).median

    def operations(self) -> float:
        """``2 M N K``: int8 multiplications and additions of the product."""
        return 2.0 * (self.M or 0) * (self.N or 0) * (self.K or 0)

    def share_of_peak(self, candidate: str) -> float:
        """``2 M N K / best(candidate) / peak``; NaN if the peak is unknown."""
        return self.operations() / self._of(candidate).best / self.peak.most

    def share_of_reads(self, candidate: str) -> float:
        """``N K / best(candidate) / reads``: of the read bandwidth, by the bytes of int8 codes; NaN if unknown."""
        return (self.N or 0) * (self.K or 0) / self._of(candidate).best / self.reads.most

    def _of(self, candidate: str) -> Measured:
        return self.measured.get(candidate, Measured())


def interleave(work: Mapping[str, Work], rounds: int) -> dict[str, Measured]:
    """Seconds a call of each candidate of ``work``, in ``rounds`` rounds; each round begins with another candidate.

    Each is called twice before the rounds: once to compile, once to see how long it takes. What raises there is noted
    as failed and takes no part; what is slow there has had its first round.
    """
    found: dict[str, Measured] = {}
    turns: dict[str, _Turns] = {}
    for label, calls in work.items():
        try:
            turns[label] = _Turns(calls, rounds)
        except Exception as error:  # whatever a peer may raise
            reason = str(error).strip().split("\n")[0]
            found[label] = Measured(note=f"failed: {type(error).__name__}: {reason}"[:200])
        else:
            found[label] = Measured(turns[label].before, turns[label].note)
    labels = list(turns)
    for i in range(rounds):
        first = i % max(len(labels), 1)
        for label in labels[first:] + labels[:first]:
            if i < turns[label].rounds:
                found[label].values.append(turns[label].run())
    return found


class _Turns:
    """The calls of one candidate, as many in a round as fill a slice."""

    def __init__(self, calls: Work, rounds: int) -> None:
        self.calls: Iterator[Callable[[], object]] = cycle(calls)
        self.count = 1
        self.warm = False
        self.run()
        seconds = self.run()
        self.count = min(1000, max(1, math.ceil(SLICE / max(seconds, 1e-9))))
        self.warm = seconds < WARM
        self.rounds, self.note = rounds, ""
        self.before: list[float] = []
        if seconds > SLOW:
            few = 1 if seconds > SLOWEST else max(1, rounds // 5)
            self.rounds, self.before = few - 1, [seconds]
            if few < rounds:
                self.note = f"{few} of {rounds} rounds: {seconds:.1f} s a call"

    def run(self) -> float:
        if self.warm:
            next(self.calls)()
        begin = time.perf_counter()
        for call in islice(self.calls, self.count):
            call()
        return (time.perf_counter() - begin) / self.count
