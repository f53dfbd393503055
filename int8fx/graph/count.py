"""Counts the ops of the ``int8fx`` library in a graph."""

from __future__ import annotations

import torch
from torch.fx import Graph


def count_ops(graph: Graph) -> dict[str, int]:
    """Name of an int8fx op, without the namespace -> how many calls of it ``graph`` has."""
    counts: dict[str, int] = {}
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "int8fx":
            name = node.target._schema.name.split("::")[1]
            counts[name] = counts.get(name, 0) + 1
    return counts
