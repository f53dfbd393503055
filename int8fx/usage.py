"""How a module uses its bare Parameters, read from a symbolic trace of its ``forward``."""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node, Tracer

from .passes.products import read_product


class _OneModule(Tracer):
    """Traces the forward of one module; its children stay calls. Buffers are copied when the forward reads them.

    While it runs, torch.fx replaces methods of ``nn.Module`` for the whole process: what other threads do passes through.
    """

    lock = threading.Lock()

    def __init__(self) -> None:
        super().__init__()
        self.copies: dict[int, tuple[Tensor, Tensor]] = {}
        self.thread = threading.get_ident()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def call_module(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict) -> Any:
        if threading.get_ident() != self.thread:
            return attr_val
        if isinstance(attr_val, Tensor) and not isinstance(attr_val, nn.Parameter):
            return self.copies.setdefault(id(attr_val), (attr_val, attr_val.detach().clone()))[1]
        return super().getattr(attr, attr_val, parameter_proxy_cache)


def _twin(value: Any, made: dict[int, Any], inside_object: bool = False) -> Any:
    """A copy of what a forward may write to: modules, containers, tensors, plain objects; Parameters are shared.

    ``made`` holds the copies by ``id``. Objects inside objects that are no modules are shared.
    """
    if id(value) in made:
        return made[id(value)]
    kind = type(value)
    if isinstance(value, MethodType):
        return MethodType(value.__func__, _twin(value.__self__, made, inside_object))
    if kind is tuple:
        return tuple(_twin(v, made, inside_object) for v in value)
    if isinstance(value, nn.Module) and not isinstance(value, torch.jit.ScriptModule):
        twin = made[id(value)] = nn.Module.__new__(kind)
        vars(twin).update((k, v if k == "_buffers" else _twin(v, made)) for k, v in vars(value).items())
        vars(twin)["_buffers"] = dict(value._buffers)
    elif kind in (dict, OrderedDict, defaultdict):
        twin = made[id(value)] = copy.copy(value)
        twin.update((k, _twin(v, made, inside_object)) for k, v in value.items())
    elif kind in (list, deque):
        twin = made[id(value)] = copy.copy(value)
        twin.clear()
        twin.extend(_twin(v, made, inside_object) for v in value)
    elif kind in (set, bytearray):
        twin = made[id(value)] = copy.copy(value)
    elif kind is Tensor:
        twin = made[id(value)] = value.detach().clone()
    elif _is_plain(value) and not inside_object:
        twin = made[id(value)] = object.__new__(kind)
        vars(twin).update((k, _twin(v, made, True)) for k, v in vars(value).items())
    else:
        return value
    return twin


def _is_plain(value: Any) -> bool:
    """Whether all that ``value`` is stands in its ``__dict__``."""
    kind = type(value)
    own = all(c.__module__ != "builtins" and "__slots__" not in vars(c) for c in kind.__mro__[:-1])
    return own and kind.__new__ is object.__new__ and hasattr(value, "__dict__")


def read_usage(module: nn.Module) -> dict[str, str]:
    """How ``module.forward`` multiplies by the module's own Parameters.

    Returns:
        Parameter name -> ``NK`` (used as ``[..., N, K]``, like ``F.linear``) or ``KN`` (like ``x @ w``). A Parameter
        without an entry is in no product with an activation, or in products of both kinds.

    Raises:
        ValueError: the forward cannot be traced (control flow that depends on tensors or their shapes).
    """
    try:
        with _OneModule.lock, torch.random.fork_rng(devices=[]):
            graph = _OneModule().trace(_twin(module, {}))  # the trace runs code that may write to the module
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
