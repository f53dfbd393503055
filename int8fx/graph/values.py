"""Shapes and dtypes of a node's result, as tracing recorded them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.fx import Node


def value(node: object) -> Any:
    """The fake tensor, or the tuple of them, that tracing stored for ``node``; None if it stored none."""
    return node.meta.get("val") if isinstance(node, Node) else None


def sizes(shape: Iterable[object]) -> tuple[str, ...]:
    """Sizes as text, to compare them. Comparing symbols themselves could add a guard, and so a recompile."""
    return tuple(map(str, shape))
