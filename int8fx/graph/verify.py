"""The check at the end of every rewrite."""

from __future__ import annotations

from torch.fx import Node

from .values import sizes, value


def verify(old: Node, new: Node) -> None:
    """Raises RuntimeError unless ``new`` has the shape, dtype and device that ``old`` had.

    Nodes without ``meta["val"]`` (graphs of ``torch.fx.symbolic_trace``) are not checked.
    """
    if value(old) is None or value(new) is None:
        return
    before, after = ((sizes(v.shape), v.dtype, v.device) for v in (value(old), value(new)))
    if after != before:
        raise RuntimeError(f"int8fx: {new.format_node()} gives {after} instead of {old.name}, which gave {before}")
