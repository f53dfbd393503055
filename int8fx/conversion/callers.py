"""Who is calling: for libraries that have no hook, and do with packed modules what must be refused."""

from __future__ import annotations

import sys
from types import FrameType, ModuleType

from torch._guards import TracingContext


def caller(file: str, function: str) -> FrameType | None:
    """The innermost running call of ``function`` in the module ``file``."""
    if file not in sys.modules:
        return None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == function and frame.f_globals.get("__name__") == file:
            return frame
        frame = frame.f_back
    return None


def above(calls: int) -> FrameType | None:
    """The call that is ``calls`` calls above the function that asks; None if there are not so many."""
    frame: FrameType | None = sys._getframe(1)
    for _ in range(calls):
        frame = frame and frame.f_back
    return frame


def is_called_in_trace(file: ModuleType, function: str) -> bool:
    """Whether Dynamo is tracing a call of ``function`` in the module ``file``. It must not trace the one that asks."""
    return any((f.filename, f.name) == (file.__file__, function) for f in TracingContext.extract_stack())
