"""The passes, and the one object that runs them inside Inductor.

`lower`, `share` and `fold` rewrite an FX graph in place and return a count. They create no tensor and read no weight.
`PASSES` runs them in this order at ``joint_custom_pre_pass``: on AOTAutograd's normalised graph, before Inductor's own
passes. Every compilation adds a `Report` to ``PASSES.reports``.
"""

from __future__ import annotations

import hashlib
import logging
from collections import deque
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph

from .fold import fold
from .lower import lower
from .share import share

log = logging.getLogger("int8fx")


@dataclass(frozen=True)
class Report:
    """What the passes did to one graph.

    lowered: products with dequantised weights that became int8 products.
    shared: quantisations saved.
    folded: operations that went into a product's epilogue.
    linears: int8 products in the rewritten graph.
    dequantized: packed weights that are still read as floats in it.
    """

    lowered: int
    shared: int
    folded: int
    linears: int
    dequantized: int


_PRODUCTS = ("linear", "linear_quantized", "grouped_linear")


def count_ops(graph: Graph) -> dict[str, int]:
    """How often each int8fx op stands in ``graph``, by its name without the namespace."""
    counts: dict[str, int] = {}
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "int8fx":
            name = node.target._schema.name.split("::")[1]
            counts[name] = counts.get(name, 0) + 1
    return counts


def run_passes(graph: Graph) -> Report:
    """`lower`, `share` and `fold`, then a lint of the graph."""
    lowered, shared, folded = lower(graph), share(graph), fold(graph)
    graph.lint()
    counts = count_ops(graph)
    return Report(lowered, shared, folded, sum(counts.get(op, 0) for op in _PRODUCTS), counts.get("dequantize", 0))


@cache
def _source_hash() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


class Int8fxPasses(CustomGraphPass):
    """The passes as Inductor takes them. A graph without int8fx ops is left alone."""

    def __init__(self) -> None:
        self.reports: deque[Report] = deque(maxlen=1024)

    def __call__(self, graph: Graph) -> None:
        if not count_ops(graph):
            return
        report = run_passes(graph)
        self.reports.append(report)
        log.info("%s", report)

    def uuid(self) -> str:
        """A hash of the passes' sources: Inductor's cache stays on, and an edited pass never gets a stale graph."""
        return _source_hash()

    def __reduce__(self) -> str:
        return "PASSES"  # copies of Inductor's configuration hold the same object


PASSES = Int8fxPasses()


def install() -> None:
    """Appends `PASSES` to Inductor's ``joint_custom_pre_pass``, behind passes that others installed; again is a no-op.

    `int8fx.convert` calls this, so that plain ``torch.compile(model)`` runs the passes. `uninstall` takes it back.
    """
    import torch._inductor.config as config

    present = installed_passes()
    if PASSES not in present:
        config.joint_custom_pre_pass = [*present, PASSES]


def uninstall() -> None:
    """Takes `PASSES` out of Inductor's list; the passes of others stay."""
    import torch._inductor.config as config

    if PASSES in installed_passes():
        rest = [p for p in installed_passes() if p is not PASSES]
        config.joint_custom_pre_pass = rest or None


def installed_passes() -> list:
    """Inductor's ``joint_custom_pre_pass`` as a list."""
    import torch._inductor.config as config
    from torch._inductor.custom_graph_pass import get_custom_graph_passes

    return list(get_custom_graph_passes(config.joint_custom_pre_pass))
