"""The suites of ``int8fx bench``, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from . import cuda, memory, models, products, profile
from .settings import Settings
from .timing import Case

Measure = Callable[[Settings], Iterator[Case]]
_TIMES = "the best of the rounds above the median"


class Suite(NamedTuple):
    """A suite.

    help: of its option.
    title: of its tables.
    on_cpu, on_gpu: what measures it, case by case; None: not on a GPU.
    """

    help: str
    title: str
    on_cpu: Measure
    on_gpu: Measure | None = None


SUITES = {
    "products": Suite(
        "single products, against every peer that is installed and the machine's limits",
        f"Products: ms, and as multiples of int8fx's time; {_TIMES}",
        products.products,
        cuda.products,
    ),
    "outliers": Suite(
        "what outlier columns cost",
        f"Outliers: ms, and as multiples of the time without outliers; {_TIMES}",
        products.outliers,
    ),
    "schemes": Suite(
        "what rotation and unquantised columns cost",
        f"Schemes: ms, and as multiples of llm_int8's time; {_TIMES}",
        products.schemes,
    ),
    "overhead": Suite(
        "what a call costs beyond F.linear",
        f"Overhead of a call: us, and what is beyond F.linear; {_TIMES}",
        products.overhead,
    ),
    "scaling": Suite(
        "time against M, N, K and threads",
        "Scaling of int8fx: best / median ms, shares of this machine's limits",
        products.scaling,
    ),
    "models": Suite(
        "language models: forwards, decoding, generate()",
        f"Models: ms, and as multiples of int8fx's time; {_TIMES}",
        models.models,
        cuda.language_models,
    ),
    "profile": Suite(
        "their forwards by kind of kernel",
        "Profiles of compiled forwards: ms by kind of kernel, and as multiples of int8fx's; best above median",
        profile.profile,
    ),
    "memory": Suite(
        "bytes of a converted model, peak of a forward",
        "Memory: MB, and as multiples of codes + scales + rest, or of bfloat16's peak",
        memory.memory,
    ),
}


class BenchError(Exception):
    """The bench cannot run; says why."""


def chosen(names: Sequence[str], device: str) -> dict[str, Measure]:
    """What measures each suite of ``names`` on ``device``, or each suite that it has if ``names`` is empty.

    Raises:
        BenchError: a suite of ``names`` does not run on this device.
    """
    suites = {
        name: measure
        for name, suite in SUITES.items()
        if (measure := suite.on_cpu if device == "cpu" else suite.on_gpu) is not None
    }
    if absent := [name for name in names if name not in suites]:
        raise BenchError(f"no suite {', '.join(absent)} for this device; legal: {', '.join(suites)}")
    return {name: suites[name] for name in names or suites}
