"""The passes inside Inductor: one object in its list ``joint_custom_pre_pass``.

It sees AOTAutograd's normalised graph there, before the passes of Inductor itself.
"""

from __future__ import annotations

import hashlib
import logging
from collections import deque
from functools import cache
from pathlib import Path
from typing import Any

from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass, get_custom_graph_passes
from torch.fx import Graph

from ..graph.count import count_ops
from . import Report, run_passes

log = logging.getLogger("int8fx")


def sources() -> list[Path]:
    """The files that a rewrite depends on: the passes, the reader of graphs, the ops, `ops.rows`, argument types."""
    package = Path(__file__).parents[1]
    return sorted(path for folder in ("schemes", "ops", "graph", "passes") for path in (package / folder).glob("*.py"))


@cache
def _source_hash() -> str:
    digest = hashlib.sha256()
    for path in sources():
        digest.update(path.read_bytes())
    return digest.hexdigest()


class Int8fxPasses(CustomGraphPass):
    """The passes as Inductor takes them. A graph without int8fx ops is not changed."""

    def __init__(self) -> None:
        self.reports: deque[Report] = deque(maxlen=1024)

    def __call__(self, graph: Graph) -> None:
        if not count_ops(graph):
            return
        report = run_passes(graph)
        self.reports.append(report)
        log.info("%s", report)

    def uuid(self) -> str:
        """A hash of `sources`: Inductor's cache stays on, and an edited pass never gets a stale graph."""
        return _source_hash()

    def __reduce__(self) -> str:
        return "PASSES"  # copies of Inductor's configuration hold the same object


PASSES = Int8fxPasses()


def install() -> None:
    """Appends `PASSES` to Inductor's ``joint_custom_pre_pass``, after passes that others installed; again is a no-op.

    `int8fx.convert` arranges that it runs when Inductor is imported, so that plain ``torch.compile(model)`` runs the
    passes. `uninstall` removes it.
    """
    present = installed_passes()
    if PASSES not in present:
        config.joint_custom_pre_pass = [*present, PASSES]


def uninstall() -> None:
    """Removes `PASSES` from Inductor's list; the passes of others stay."""
    if PASSES in installed_passes():
        others = [p for p in installed_passes() if p is not PASSES]
        config.joint_custom_pre_pass = others or None


def installed_passes() -> list[Any]:
    """Inductor's ``joint_custom_pre_pass`` as a list."""
    return list(get_custom_graph_passes(config.joint_custom_pre_pass))


def reports() -> list[Report]:
    """What the passes did to each graph that was compiled in this process, the newest last; at most 1024."""
    return list(PASSES.reports)
