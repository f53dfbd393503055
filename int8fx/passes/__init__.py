"""The passes that rewrite an FX graph of int8fx ops, and the report of what they did.

`lower`, `share` and `fold` rewrite a graph in place and return a count. They create no tensor and read no weight.
`inductor` runs them in ``torch.compile``.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Graph

from ..graph.count import count_ops
from .fold import fold
from .lower import lower
from .share import share


@dataclass(frozen=True)
class Report:
    """What the passes did to one graph.

    lowered: matmuls with dequantised weights that became int8 matmuls.
    shared: quantisations of an activation that were saved.
    folded: operations that became part of a matmul's epilogue.
    linears: int8 matmuls in the rewritten graph.
    dequantized: packed weights that the rewritten graph still reads as floats.
    """

    lowered: int
    shared: int
    folded: int
    linears: int
    dequantized: int


_LINEARS = ("linear", "linear_quantized", "grouped_linear")


def run_passes(graph: Graph) -> Report:
    """`lower`, `share` and `fold`, then a lint of the graph."""
    lowered, shared, folded = lower(graph), share(graph), fold(graph)
    graph.lint()
    counts = count_ops(graph)
    return Report(lowered, shared, folded, sum(counts.get(op, 0) for op in _LINEARS), counts.get("dequantize", 0))
