"""What ``int8fx bench`` measures, and how."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .limits import NO_LIMITS, Limits

Sizes = tuple[Sequence[tuple[int, int]], Sequence[int]]  # shapes (N, K) of weights, and numbers of rows M


@dataclass(frozen=True)
class Settings:
    """The command's options, and other settings of the suites.

    suites: names of `suites.SUITES`; empty: all that run on the device.
    quick: fewer sizes and rounds, models of two layers.
    rounds: the largest number of rounds of a case; None: 10, or 3 if ``quick``.
    threads: of all candidates; None: as many as torch has.
    output: folder for the CSV file and the plots.
    device: ``cpu`` or ``cuda`` (which is also ROCm's name).
    shapes, rows: sizes of the linear layers; None: those of the suite.
    limits: of this CPU, measured between the rounds.
    say: prints a line of progress.
    """

    suites: tuple[str, ...] = ()
    quick: bool = False
    rounds: int | None = None
    threads: int | None = None
    output: Path = Path("int8fx-bench")
    device: str = "cpu"
    shapes: Sequence[tuple[int, int]] | None = None
    rows: Sequence[int] | None = None
    limits: Limits = NO_LIMITS
    say: Callable[[str], None] = lambda line: None

    @property
    def max_rounds(self) -> int:
        """The most rounds that a case takes."""
        return self.rounds or (3 if self.quick else 10)

    @property
    def num_threads(self) -> int:
        """The number of threads that torch and its peers run on."""
        return self.threads or torch.get_num_threads()

    def sizes(self, full: Sizes, quick: Sizes) -> Sizes:
        """``quick`` or ``full``, as `quick` says; `shapes` and `rows` replace them."""
        shapes, rows = quick if self.quick else full
        return self.shapes or shapes, self.rows or rows
