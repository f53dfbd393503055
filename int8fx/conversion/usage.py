"""How weights are used: in which layout the matmuls of a graph, or of a module's ``forward``, use them."""

from __future__ import annotations

import copy
import dis
import inspect
import operator
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.fx.proxy import GraphAppendingTracer, Proxy

from ..graph.products import read_product
from ..graph.weights import follow

MIXED = "its matmuls use it in different layouts"


def read_layouts(graph: Graph, weight_of: Callable[[Node], Tensor | None]) -> dict[int, str | None]:
    """In which layout the matmuls of ``graph`` use its weights.

    The same rule holds for modules and graphs: a weight is converted if all matmuls use it in the same layout.

    Args:
        weight_of: the weight that a node stands for, None for any other node. A weight may have several nodes.

    Returns:
        id of a weight -> ``NK`` (all matmuls use it as ``[..., N, K]``, like ``F.linear``), ``KN`` (like ``x @ w``) or
        None (they use it in different layouts). A weight in no matmul with an activation has no entry.
    """

    def shape_of(node: Node) -> torch.Size | None:
        weight = weight_of(node)
        return None if weight is None else weight.shape

    layouts: dict[int, set[str | None]] = {}
    for node in graph.nodes:
        product = read_product(node, shape_of)
        if product is not None:
            layouts.setdefault(id(weight_of(product.w.source)), set()).add(product.layout)
    return {key: used.pop() if len(used) == 1 else None for key, used in layouts.items() if used != {None}}


class Usage(NamedTuple):
    """How a forward uses the Parameters that its module itself holds.

    layouts: Parameter name -> its entry in `read_layouts`.
    unread: the names of Parameters that the forward does not read at all.
    """

    layouts: dict[str, str | None]
    unread: set[str]


def read_usage(module: nn.Module) -> Usage:
    """How ``module.forward`` uses the Parameters that the module itself holds. The module is not changed.

    The forward runs on symbols instead of tensors. Where its control flow depends on them, the rule is that a weight is
    used alike in each round of a loop and for each entry of an index:

    - a condition is taken both ways, in runs of their own, up to `RUNS` runs and `CONDITIONS` conditions in a run;
    - a loop over a symbol runs its body once, and ``int`` or ``float`` of a symbol is 1;
    - ``w[symbol]`` is one entry of ``w``, such as the weight of one expert.

    A run may end with an error that the forward itself raises.

    Raises:
        ValueError: the forward cannot be run on symbols.
    """
    parameters = {name: p for name, p in module._parameters.items() if p is not None}
    layouts: dict[int, set[str | None]] = {}
    changed: set[int] = set()
    read: set[int] = set()
    for run in _runs(module):
        weights = {node: parameters[name] for node, name in run.names.items()}
        for key, layout in read_layouts(run.graph, weights.get).items():
            layouts.setdefault(key, set()).add(layout)
        shapes = {node: weight.shape for node, weight in weights.items()}
        changed |= {id(weight) for node, weight in weights.items() if follow(node, shapes.get) is None}
        read |= {id(weight) for node, weight in weights.items() if node.users}
    agreed = {key: used.pop() if len(used) == 1 else None for key, used in layouts.items() if key not in changed}
    return Usage(
        {name: agreed[id(p)] for name, p in parameters.items() if id(p) in agreed},
        {name for name, p in parameters.items() if id(p) not in read},
    )


# ---- running a forward on symbols -----------------------------------------------------------------------------------

RUNS = 32
CONDITIONS = 12


class _Enough(Exception):
    """A run has met `CONDITIONS` conditions."""


class _Run(NamedTuple):
    """One run of a forward: its graph, and which node stands for which Parameter."""

    graph: Graph
    names: dict[Node, str]


def _runs(module: nn.Module) -> list[_Run]:
    """Runs of the forward on symbols, one for each way through its conditions.

    Ways that differ in an early condition come first.
    """
    ways: deque[tuple[bool, ...]] = deque([()])
    runs: list[_Run] = []
    while ways and len(runs) < RUNS:
        way = ways.popleft()
        recorder = _Recorder(way)
        names: dict[Node, str] = {}
        try:
            _run_on_symbols(module, recorder, names)
        except Exception as error:
            if not (isinstance(error, _Enough) or _is_raised_by_forward(error)):
                raise ValueError(f"forward cannot be traced ({type(error).__name__}: {error})") from error
        taken = recorder.conditions
        ways.extend((*taken[:i], not taken[i]) for i in range(len(way), len(taken)))
        runs.append(_Run(recorder.graph, names))
    return runs


def _is_raised_by_forward(error: Exception) -> bool:
    """Whether a ``raise`` or ``assert`` of the forward, or of what it calls outside of torch, raised ``error``."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None:
        return False
    code, module = traceback.tb_frame.f_code, traceback.tb_frame.f_globals.get("__name__", "")
    is_raise = dis.opname[code.co_code[traceback.tb_lasti]] == "RAISE_VARARGS"
    return is_raise and module.partition(".")[0] != "torch"


class _Symbol(Proxy):
    """Stands for a value of any type."""

    tracer: _Recorder

    def __int__(self) -> int:
        return 1

    __index__ = __int__

    def __getitem__(self, index: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.getitem, (self, _entry(index)), {})


def _entry(index: Any) -> Any:
    """``index``, with a number in place of each symbol but in slices."""
    if isinstance(index, tuple):
        return tuple(map(_entry, index))
    return 0 if isinstance(index, Proxy) else index


class _Recorder(GraphAppendingTracer):
    """Records what is done with proxies. Unlike ``torch.fx.Tracer`` it patches nothing that other threads use.

    Args:
        way: what its first conditions are; all others are False.
    """

    def __init__(self, way: tuple[bool, ...]) -> None:
        super().__init__(Graph())
        self.way = way
        self.conditions: tuple[bool, ...] = ()

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor):  # a buffer, or a Parameter of a child; its name is not needed
            return self.graph.get_attr("tensor")
        try:
            return super().create_arg(a)
        except NotImplementedError:  # an object of a type that only the called function handles
            return None

    def proxy(self, node: Node) -> Proxy:
        return _Symbol(node, self)

    def to_bool(self, obj: Proxy) -> bool:
        count = len(self.conditions)
        if count == CONDITIONS:
            raise _Enough
        self.conditions += (count < len(self.way) and self.way[count],)
        return self.conditions[-1]

    def iter(self, obj: Proxy) -> Iterator:
        return iter([self.create_proxy("call_function", operator.getitem, (obj, 0), {})])


def _run_on_symbols(module: nn.Module, recorder: _Recorder, names: dict[Node, str]) -> None:
    """Runs a copy of ``module`` whose Parameters are proxies; notes in ``names`` which Parameter a node stands for."""
    twin = _Twins(recorder).of(module)
    del vars(twin)["forward"]
    present = {name for name, p in module._parameters.items() if p is not None}
    vars(twin)["_parameters"] = dict.fromkeys(module._parameters.keys() - present)
    proxies = {name: recorder.create_proxy("get_attr", name, (), {}) for name in present}
    names.update((proxy.node, name) for name, proxy in proxies.items())
    vars(twin).update(proxies)
    forward = type(module).forward
    signature = inspect.signature(forward)
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
        forward(*bound.args, **bound.kwargs)


_HOOKS = [name for name in vars(nn.Module()) if name.endswith("_hooks")]


class _CopiedOnRead(dict):
    """The buffers or Parameters of a module, each of which is copied when it is read."""

    def __init__(self, tensors: dict[str, Tensor | None]) -> None:
        super().__init__(tensors)
        self.copied: set[str] = set()

    def __getitem__(self, name: str) -> Tensor | None:
        tensor = super().__getitem__(name)
        if name not in self.copied and tensor is not None:
            self[name] = tensor = tensor.detach().clone()
        return tensor

    def __setitem__(self, name: str, tensor: Tensor | None) -> None:
        self.copied.add(name)
        super().__setitem__(name, tensor)


class _Twins:
    """Copies of what a forward may write to: modules, containers, tensors, plain objects. Other objects are shared.

    A copied child module records its calls, and runs neither its forward nor its hooks.
    """

    def __init__(self, recorder: _Recorder) -> None:
        self.recorder = recorder
        self.twins: dict[int, Any] = {}

    def of(self, value: Any, inside_object: bool = False) -> Any:
        """The copy of ``value``. ``inside_object``: it is in an object that is no module; then objects are shared."""
        if id(value) in self.twins:
            return self.twins[id(value)]
        if type(value) is tuple:
            return tuple(self.of(v, inside_object) for v in value)
        if type(value) is MethodType:
            return MethodType(value.__func__, self.of(value.__self__, inside_object))
        for applies, empty, fill in _COPIERS:
            if applies(value) and not (inside_object and fill is _Twins.fill_object):
                twin = self.twins[id(value)] = empty(value)  # before it is filled: it may hold itself
                fill(self, twin, value, inside_object)
                return twin
        return value

    def fill_module(self, twin: nn.Module, value: nn.Module, _: bool) -> None:
        fresh = vars(nn.Module())
        vars(twin).update({name: _CopiedOnRead(vars(value)[name]) for name in ("_parameters", "_buffers")})
        vars(twin).update({name: fresh[name] for name in _HOOKS}, forward=self._record)
        vars(twin).update((k, self.of(v)) for k, v in vars(value).items() if k not in vars(twin))

    def fill_script(self, twin: nn.Module, value: nn.Module, _: bool) -> None:
        vars(twin)["forward"] = self._record

    def fill_dict(self, twin: dict, value: dict, inside_object: bool) -> None:
        twin.update((k, self.of(v, inside_object)) for k, v in value.items())

    def fill_list(self, twin: list, value: list, inside_object: bool) -> None:
        twin.clear()
        twin.extend(self.of(v, inside_object) for v in value)

    def fill_object(self, twin: object, value: object, _: bool) -> None:
        vars(twin).update((k, self.of(v, True)) for k, v in vars(value).items())

    def fill_nothing(self, twin: object, value: object, _: bool) -> None:
        pass

    def _record(self, *args: Any, **kwargs: Any) -> Any:
        return self.recorder.create_proxy("call_module", "child", args, kwargs)


def _is(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: type(value) in kinds


def _is_plain(value: Any) -> bool:
    """Whether the ``__dict__`` of ``value`` has all of its state."""
    kind = type(value)
    in_dict = all(c.__module__ != "builtins" and "__slots__" not in vars(c) for c in kind.__mro__[:-1])
    return in_dict and kind.__new__ is object.__new__ and hasattr(value, "__dict__")


_COPIERS: tuple[tuple[Callable[[Any], bool], Callable[[Any], Any], Callable[..., None]], ...] = (
    (lambda value: isinstance(value, torch.jit.ScriptModule), lambda value: nn.Module(), _Twins.fill_script),
    (lambda value: isinstance(value, nn.Module), lambda value: nn.Module.__new__(type(value)), _Twins.fill_module),
    (_is(dict, OrderedDict, defaultdict), copy.copy, _Twins.fill_dict),
    (_is(list, deque), copy.copy, _Twins.fill_list),
    (_is(set, bytearray), copy.copy, _Twins.fill_nothing),
    (_is(Tensor), lambda value: value.detach().clone(), _Twins.fill_nothing),
    (_is_plain, lambda value: object.__new__(type(value)), _Twins.fill_object),
)
"""Whether an entry applies to a value, a function for an empty copy, one that fills it. The first match is used."""
