"""The check every rewrite ends with."""

from __future__ import annotations

from torch.fx import Node


def verify(old: Node, new: Node) -> None:
    """Raises RuntimeError unless ``new`` has the shape, dtype and device that ``old`` had.

    Nodes without ``meta["val"]`` (graphs of ``torch.fx.symbolic_trace``) have nothing to compare.
    """
    before, after = old.meta.get("val"), new.meta.get("val")
    if before is None or after is None:
        return
    found, expected = ((tuple(map(str, v.shape)), v.dtype, v.device) for v in (after, before))
    if found != expected:
        raise RuntimeError(
            f"int8fx: {new.format_node()} gives {found} in the place of {old.name}, which gave {expected}"
        )
