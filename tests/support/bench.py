"""Cases of the bench with invented times."""

from int8fx.tools.bench.candidates import BITSANDBYTES, INT8FX
from int8fx.tools.bench.timing import Case, Measured


def case(suite: str, M: int | None = 4, **changed) -> Case:
    """A product of M rows by a ``[96, 64]`` weight, a model if M is None: int8fx, a missing candidate, a slow one."""
    measured = {
        INT8FX.name: Measured([0.5, 0.7], cpus=[1.0, 2.0], cosine=0.99),
        BITSANDBYTES.name: Measured(note="not installed: bitsandbytes"),
        "slow": Measured([2.5], "1 of 2 rounds: 2.5 s a call"),
    }
    sizes = {"N": 96, "K": 64} if M else {}
    limits = {"peak": Measured([1e6, 2e6]), "reads": Measured([1e5, 2e5])}
    return Case(suite, "[96, 64]", INT8FX.name, measured, M, **sizes, **limits | changed)
