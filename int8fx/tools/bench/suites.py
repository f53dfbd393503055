"""The suites of ``int8fx bench``, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from . import cuda, memory, models, products, profile
from .settings import Settings
from .timing import Case

Measure = Callable[[Settings], Iterator[Case]]
_TIMES = "first line: best round; second: median"
_SHARE = "share of the int8 peak"


class Suite(NamedTuple):
    """A suite.

    help: help text of its option.
    title: title of its tables.
    on_cpu, on_gpu: function that measures it, case by case; None: it does not run on a GPU.
    """

    help: str
    title: str
    on_cpu: Measure
    on_gpu: Measure | None = None


SUITES = {
    "products": Suite(
        "single linear layers: int8fx, every other library that is installed, and the machine's limits",
        f"Linear layers: ms, and as multiples of int8fx's time; {_TIMES}; third: {_SHARE}",
        products.products,
        cuda.products,
    ),
    "outliers": Suite(
        "what outlier columns cost: six, and 1 to 100 % of the columns",
        f"Outliers: ms, and as multiples of the time without outliers; {_TIMES}; third: {_SHARE}",
        products.outliers,
    ),
    "schemes": Suite(
        "what rotation and unquantised columns cost",
        f"Schemes: ms, and as multiples of llm_int8's time; {_TIMES}",
        products.schemes,
    ),
    "weights": Suite(
        "weights of 8 and 4 bits in groups, and other libraries' int4",
        f"Weight-only: ms, and as multiples of int8's time; {_TIMES}",
        products.weights,
        cuda.weights,
    ),
    "decoding": Suite(
        "decode steps of a language model with weights of 8 and 4 bits; llama.cpp",
        f"Decoding: ms, and as multiples of int8's time; {_TIMES}; third: cosine of the outputs to float32's",
        models.decoding,
    ),
    "overhead": Suite(
        "time of a call in addition to that of F.linear",
        f"Overhead of a call: us, and difference to F.linear; {_TIMES}",
        products.overhead,
    ),
    "fallback": Suite(
        "what a process without compiled kernels runs, compared with float32; needs CXX=none",
        f"Without compiled kernels: ms, and as multiples of float32's time; {_TIMES}",
        products.fallback,
    ),
    "scaling": Suite(
        "time against M, N, K and threads",
        "Scaling of int8fx: best / median ms, shares of this machine's limits",
        products.scaling,
    ),
    "models": Suite(
        "language models: forwards, decoding, generate(); a text encoder: forwards; fidelity to float32",
        f"Models: ms, and as multiples of int8fx's time; {_TIMES}; third: cosine of the outputs to float32's",
        models.models,
        cuda.language_models,
    ),
    "profile": Suite(
        "forwards of the language models, by kind of kernel",
        f"Profiles of compiled forwards: ms by kind of kernel, and as multiples of int8fx's; {_TIMES}",
        profile.profile,
    ),
    "memory": Suite(
        "bytes of a converted model, peak of a forward",
        "Memory: MB, and as multiples of the ideal size, or of bfloat16's peak",
        memory.memory,
    ),
}


class BenchError(Exception):
    """The bench cannot run; the message says why."""


def chosen(names: Sequence[str], device: str) -> dict[str, Measure]:
    """Suite name -> function that measures it on ``device``: for ``names``, or for all suites if ``names`` is empty.

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
