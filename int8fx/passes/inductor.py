"""The passes inside Inductor: one object in its list ``joint_custom_pre_pass``.

It sees AOTAutograd's normalised graph there, before the passes of Inductor itself. This module does not import
Inductor, which takes more than a second: a process that stays eager has no use for it.
"""

from __future__ import annotations

import hashlib
import logging
import sys
from collections import deque
from functools import cache
from pathlib import Path
from typing import Any

from torch.fx import Graph

from ..graph.count import count_ops
from ..imports import cancel, when_imported
from . import Report, run_passes

CONFIG = "torch._inductor.config"

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


class Int8fxPasses:
    """The passes as Inductor takes them: a ``CustomGraphPass``. A graph without int8fx ops is not changed."""

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

    If Inductor is not imported yet, this happens when it is. `int8fx.convert` calls this, so that plain
    ``torch.compile(model)`` runs the passes. `uninstall` takes it back.
    """
    when_imported(CONFIG, _append)


def _append() -> None:
    from torch._inductor import config
    from torch._inductor.custom_graph_pass import CustomGraphPass

    CustomGraphPass.register(Int8fxPasses)  # for isinstance
    present = installed_passes()
    if PASSES not in present:
        config.joint_custom_pre_pass = [*present, PASSES]


def uninstall() -> None:
    """Removes `PASSES` from Inductor's list, also if they are to be there once it is imported; those of others stay."""
    cancel(CONFIG, _append)
    present = installed_passes()
    if PASSES in present:
        sys.modules[CONFIG].joint_custom_pre_pass = [p for p in present if p is not PASSES] or None  # type: ignore[attr-defined]


def installed_passes() -> list[Any]:
    """Inductor's ``joint_custom_pre_pass`` as a list; empty if Inductor is not imported."""
    present = getattr(sys.modules.get(CONFIG), "joint_custom_pre_pass", None)
    return list(present) if isinstance(present, (list, tuple)) else [] if present is None else [present]


def reports() -> list[Report]:
    """What the passes did to each graph that was compiled in this process, the newest last; at most 1024."""
    return list(PASSES.reports)
