"""How a module uses its bare Parameters, read from a symbolic run of its ``forward``."""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict, defaultdict, deque
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.fx.proxy import GraphAppendingTracer

from ..graph.products import read_product


class _Recorder(GraphAppendingTracer):
    """Records what is done with proxies. Unlike ``torch.fx.Tracer`` it patches nothing that other threads use."""

    def __init__(self) -> None:
        super().__init__(Graph())

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor):  # a buffer, or a Parameter of a child: some value that is not looked at
            return self.graph.get_attr("tensor")
        try:
            return super().create_arg(a)
        except NotImplementedError:  # an object that only the call itself understands
            return None


_HOOKS = [name for name in vars(nn.Module()) if name.endswith("_hooks")]


class _CopiedOnRead(dict):
    """The buffers or Parameters of a module, each of which is copied when it is read."""

    def __init__(self, tensors: dict[str, Tensor | None]) -> None:
        super().__init__(tensors)
        self.own: set[str] = set()

    def __getitem__(self, name: str) -> Tensor | None:
        tensor = super().__getitem__(name)
        if name not in self.own and tensor is not None:
            self[name] = tensor = tensor.detach().clone()
        return tensor

    def __setitem__(self, name: str, tensor: Tensor | None) -> None:
        self.own.add(name)
        super().__setitem__(name, tensor)


class _Twins:
    """Copies of what a forward may write to: modules, containers, tensors, plain objects; the rest is shared.

    The copy of a module records calls of it, instead of running its forward and hooks.
    """

    def __init__(self, recorder: _Recorder) -> None:
        self.recorder = recorder
        self.made: dict[int, Any] = {}

    def of(self, value: Any, inside_object: bool = False) -> Any:
        """``inside_object``: of an object that is no module; objects within it are shared."""
        if id(value) in self.made:
            return self.made[id(value)]
        kind = type(value)
        if isinstance(value, MethodType):
            return MethodType(value.__func__, self.of(value.__self__, inside_object))
        if kind is tuple:
            return tuple(self.of(v, inside_object) for v in value)
        if isinstance(value, torch.jit.ScriptModule):
            twin = self.made[id(value)] = nn.Module()
            vars(twin)["forward"] = self._record
        elif isinstance(value, nn.Module):
            twin = self.made[id(value)] = nn.Module.__new__(kind)
            tensors = {name: _CopiedOnRead(vars(value)[name]) for name in ("_parameters", "_buffers")}
            fresh = vars(nn.Module())
            vars(twin).update(tensors, **{name: fresh[name] for name in _HOOKS}, forward=self._record)
            vars(twin).update((k, self.of(v)) for k, v in vars(value).items() if k not in vars(twin))
        elif kind in (dict, OrderedDict, defaultdict):
            twin = self.made[id(value)] = copy.copy(value)
            twin.update((k, self.of(v, inside_object)) for k, v in value.items())
        elif kind in (list, deque):
            twin = self.made[id(value)] = copy.copy(value)
            twin.clear()
            twin.extend(self.of(v, inside_object) for v in value)
        elif kind in (set, bytearray):
            twin = self.made[id(value)] = copy.copy(value)
        elif kind is Tensor:
            twin = self.made[id(value)] = value.detach().clone()
        elif _is_plain(value) and not inside_object:
            twin = self.made[id(value)] = object.__new__(kind)
            vars(twin).update((k, self.of(v, True)) for k, v in vars(value).items())
        else:
            return value
        return twin

    def _record(self, *args: Any, **kwargs: Any) -> Any:
        return self.recorder.create_proxy("call_module", "child", args, kwargs)


def _is_plain(value: Any) -> bool:
    """Whether all that ``value`` is stands in its ``__dict__``."""
    kind = type(value)
    own = all(c.__module__ != "builtins" and "__slots__" not in vars(c) for c in kind.__mro__[:-1])
    return own and kind.__new__ is object.__new__ and hasattr(value, "__dict__")


def _twin(module: nn.Module, recorder: _Recorder) -> tuple[nn.Module, dict[Node, str]]:
    """``module`` with proxies for Parameters, recorders for children and copies of what its forward may write to."""
    twin = _Twins(recorder).of(module)
    del vars(twin)["forward"]
    present = {name for name, p in module._parameters.items() if p is not None}
    vars(twin)["_parameters"] = dict.fromkeys(module._parameters.keys() - present)
    proxies = {name: recorder.create_proxy("get_attr", name, (), {}) for name in present}
    vars(twin).update(proxies)
    return twin, {proxy.node: name for name, proxy in proxies.items()}


def read_usage(module: nn.Module) -> dict[str, str]:
    """How ``module.forward`` multiplies by the module's own Parameters. The module stays as it is.

    Returns:
        Parameter name -> ``NK`` (used as ``[..., N, K]``, like ``F.linear``) or ``KN`` (like ``x @ w``). A Parameter
        without an entry is in no product with an activation, or in products of both kinds.

    Raises:
        ValueError: the forward cannot be run on symbols (control flow that depends on tensors or their shapes).
    """
    recorder = _Recorder()
    try:
        twin, sources = _twin(module, recorder)
        signature = inspect.signature(type(module).forward)
        parameters = list(signature.parameters.values())[1:]
        args = {
            p.name: recorder.create_proxy("placeholder", p.name, (), {})
            for p in parameters
            if p.default is inspect.Parameter.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        }
        if parameters and parameters[0].kind is inspect.Parameter.VAR_POSITIONAL:  # forward(self, *inputs): one input
            bound = signature.bind(twin, recorder.create_proxy("placeholder", parameters[0].name, (), {}), **args)
        else:
            bound = signature.bind(twin, **args)
        with torch.random.fork_rng(devices=[]):
            type(module).forward(*bound.args, **bound.kwargs)
    except Exception as error:
        raise ValueError(f"forward cannot be traced ({type(error).__name__}: {error})") from error

    def shape_of(node: Node) -> torch.Size | None:
        parameter = module._parameters.get(sources[node]) if node in sources else None
        return None if parameter is None else parameter.shape

    layouts: dict[int, set[str | None]] = {}  # by Parameter: it may have several names
    for node in recorder.graph.nodes:
        product = read_product(node, shape_of)
        if product is not None:
            layouts.setdefault(id(module._parameters[sources[product.w.source]]), set()).add(product.layout)
    found = {name: layouts.get(id(p), set()) for name, p in module._parameters.items()}
    return {name: layout for name, used in found.items() if len(used) == 1 and (layout := next(iter(used))) is not None}
