"""How a module uses its bare Parameters, read from a symbolic trace of its ``forward``."""

from __future__ import annotations

import torch
from torch import nn
from torch.fx import Node, Tracer

from .passes.products import read_product


class _OneModule(Tracer):
    """Traces the forward of one module; its children stay calls."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def read_usage(module: nn.Module) -> dict[str, str]:
    """How ``module.forward`` multiplies by the module's own Parameters.

    Returns:
        Parameter name -> ``NK`` (used as ``[..., N, K]``, like ``F.linear``) or ``KN`` (like ``x @ w``). A Parameter
        without an entry is in no product with an activation, or in products of both kinds.

    Raises:
        ValueError: the forward cannot be traced (control flow that depends on tensors or their shapes).
    """
    twin = nn.Module.__new__(type(module))  # the trace runs code that may assign to the module: it gets a twin
    twin.__dict__ = {k: dict(v) if k in ("_parameters", "_buffers", "_modules") else v for k, v in module.__dict__.items()}
    try:
        graph = _OneModule().trace(twin)
    except Exception as error:
        raise ValueError(f"forward cannot be traced ({type(error).__name__}: {error})") from error

    def shape_of(node: Node) -> torch.Size | None:
        parameter = module._parameters.get(node.target) if node.op == "get_attr" else None
        return None if parameter is None else parameter.shape

    layouts: dict[str, set[str | None]] = {}
    for node in graph.nodes:
        product = read_product(node, shape_of)
        if product is not None:
            layouts.setdefault(product.w.source.target, set()).add(product.layout)
    return {name: found.pop() for name, found in layouts.items() if len(found) == 1 and None not in found}  # type: ignore[misc]
