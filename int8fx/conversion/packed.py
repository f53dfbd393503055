"""Packed weights: int8 codes and their scales as plain buffers of the module that held the float Parameter.

The class of a packed module is a subclass of the class that the module had. So ``isinstance``, hooks, shared modules
and references to the module stay as they were. For a packed weight called ``weight`` the module has two buffers:

    weight        [..., N, K] int8      the codes, also if the module uses the weight as [..., K, N]
    weight_scale  [..., N]    float32   absmax / 127 per output channel

It has two more if some input columns are not quantised:

    weight_columns         [C]         int64   which columns they are
    weight_columns_weight  [..., N, C]         their weights, in the dtype of the float weight

``state_dict`` holds exactly these. Reading ``module.weight`` gives ``int8fx::dequantize`` of them, in the shape and
dtype that the module expects, so code without support for int8fx still computes the right result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.export import ExportedProgram
from torch.fx import GraphModule

from .. import ops  # noqa: F401  registers torch.ops.int8fx
from ..graph.count import count_ops
from ..schemes import Scheme
from ..schemes.weight import COLUMNS, SCALE, SUFFIXES, Int8Weight, PackedTensors


@dataclass(frozen=True)
class Reading:
    """How a module uses one packed weight.

    layout: ``NK`` if it expects ``[..., N, K]`` (``F.linear``), ``KN`` if it expects ``[..., K, N]`` (``x @ w``).
    dtype: of the float weight that it expects.
    scheme: the scheme that the weight was quantised with.
    kernel_dims: how many dimensions of size 1 follow (2 for a 1x1 ``Conv2d``).
    """

    layout: str
    dtype: torch.dtype
    scheme: Scheme
    kernel_dims: int = 0

    def weight(self, tensors: PackedTensors) -> Int8Weight:
        """The packed weight as the ops take it."""
        codes, scale, *columns = tensors
        return Int8Weight(codes, scale, self.scheme.threshold, self.scheme.block, *columns)


# ---- moving, loading and saving packed weights ----------------------------------------------------------------------


class PackedBuffers(nn.Module):
    """Moves, loads and saves the buffers of packed weights; mixed into the classes of modules that hold them."""

    def _packed_places(self) -> list[tuple[str, nn.Module, str]]:
        """The packed weights that this class moves and loads: path of the owner module, that module, weight name."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        keys = [(owner._buffers, name + suffix) for _, owner, name in self._packed_places() for suffix in SUFFIXES]
        with _moved_separately([(buffers, key) for buffers, key in keys if key in buffers], fn):
            super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        refuse_unfit(self, state_dict, prefix)
        for path, owner, name in self._packed_places():
            _untie_columns(owner._buffers, name, state_dict.get(prefix + join(path, name) + COLUMNS))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any):
        """The state dict. Columns that weights share are copied in it: checkpoint formats refuse shared memory."""
        state = super().state_dict(*args, prefix=prefix, **kwargs)
        prefix = args[1] if len(args) > 1 and not prefix else prefix
        for path, _, name in self._packed_places():
            key = prefix + join(path, name) + COLUMNS
            if key in state:
                state[key] = state[key].clone()
        return state


def refuse_unfit(model: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Raises RuntimeError, before anything is loaded, if ``state_dict`` has tensors that packed weights cannot take.

    `convert` registers it as a pre-hook of the model's ``load_state_dict``.
    """
    problems = [
        problem
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, PackedBuffers)
        for inner, owner, name in module._packed_places()
        for problem in _unfit(owner._buffers, name, state_dict, prefix + join(path, join(inner, name)))
    ]
    if problems:
        raise RuntimeError("\n\t".join([f"Error(s) in loading state_dict for {type(model).__name__}:", *problems]))


def _unfit(buffers: Mapping[str, Tensor | None], name: str, state_dict: Mapping[str, Any], key: str) -> Iterator[str]:
    """Problems of the tensors that ``state_dict`` has for a packed weight, which is called ``key`` there."""
    codes, columns = state_dict.get(key), state_dict.get(key + COLUMNS)
    if codes is not None and codes.dtype != torch.int8:
        yield f'"{key}" is packed and takes int8 codes, found {codes.dtype}; load float weights before int8fx.convert'
    expected, present = buffers[name], buffers.get(name + COLUMNS)
    if columns is None or present is None or expected is None or columns.shape != present.shape:
        return  # torch names missing, unexpected and misshapen tensors
    if columns.dtype != torch.int64:
        yield f'"{key + COLUMNS}" takes the numbers of columns as torch.int64, found {columns.dtype}'
    elif not columns.is_meta and not isinstance(columns, FakeTensor):
        K, numbers = expected.shape[-1], columns.tolist()
        seen: set[int] = set()
        wrong = [c for c in numbers if not 0 <= c < K or c in seen or seen.add(c)]  # type: ignore[func-returns-value]
        if wrong:
            what = "is there twice" if 0 <= wrong[0] < K else "is out of range"
            yield f'"{key + COLUMNS}": column {wrong[0]} {what}; legal: different columns, from 0 to {K - 1}'


def _untie_columns(buffers: dict[str, Tensor | None], name: str, loaded: Tensor | None) -> None:
    """Gives a weight a copy of columns that it shares with other weights, if different ones will be loaded."""
    columns = buffers.get(name + COLUMNS)
    if columns is not None and loaded is not None and not columns.is_meta:
        readable = not loaded.is_meta and not isinstance(loaded, FakeTensor)
        same = readable and loaded.shape == columns.shape and torch.equal(loaded.to(columns.device), columns)
        buffers[name + COLUMNS] = columns if same else columns.clone()


@contextmanager
def _moved_separately(places: list[tuple[dict[str, Any], str]], fn: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Hides the tensors at ``places`` from an ``nn.Module._apply(fn)`` in this context, and then moves them.

    ``fn`` may change their device but not their dtype. Tied tensors stay tied, as Parameters do in ``nn.Module``.
    """
    hidden = [buffers[key] for buffers, key in places]
    for buffers, key in places:
        buffers[key] = None
    try:
        yield
    finally:
        for (buffers, key), tensor in zip(places, hidden, strict=True):
            buffers[key] = tensor
    for (buffers, key), tensor in zip(places, hidden, strict=True):
        moved = fn(tensor)
        if moved.dtype != tensor.dtype:
            moved = tensor.to(moved.device)
        if torch._has_compatible_shallow_copy_type(tensor, moved):
            tensor.data = moved
        else:
            buffers[key] = moved


def join(path: str, leaf: str) -> str:
    return f"{path}.{leaf}" if path else leaf


# ---- packed modules -------------------------------------------------------------------------------------------------


_NEWOBJ = object.__reduce_ex__(object(), 2)[0]  # copyreg.__newobj__: how pickle makes an object of a class


class PackedModule(PackedBuffers):
    """Mixed into the class of a module with packed weights. `packed_weights`: weight name -> how the module uses it."""

    packed_weights: dict[str, Reading]

    def dequantize(self, name: str = "weight") -> Tensor:
        """The packed weight ``name`` as the float tensor that the module would have had.

        Raises:
            KeyError: the module has no packed weight of that name.
        """
        reading = self.packed_weights[name]
        w = torch.ops.int8fx.dequantize.default(*self.packed(name), dtype=reading.dtype)
        if reading.layout == "KN":
            w = w.transpose(-1, -2)
        return w.reshape(*w.shape, *[1] * reading.kernel_dims) if reading.kernel_dims else w

    def packed(self, name: str = "weight") -> Int8Weight:
        """The packed weight ``name`` as the ops take it."""
        return self.packed_weights[name].weight(PackedTensors.of(self._buffers, name))

    def packed_linear(self, x: Tensor, name: str = "weight", bias: Tensor | None = None) -> Tensor:
        """``int8fx::linear`` of x ``[..., K]`` with the packed weight ``name``: ``[..., N]``."""
        return torch.ops.int8fx.linear.default(x, *self.packed(name), bias)

    def _packed_places(self) -> list[tuple[str, nn.Module, str]]:
        return [("", self, name) for name in self.packed_weights]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("packed_weights", ()):
            codes = self._buffers[name]
            assert codes is not None
            if not isinstance(value, Tensor) or value.dtype != torch.int8 or value.shape != codes.shape:
                given = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                legal = f"int8 codes {tuple(codes.shape)}"
                raise TypeError(
                    f"{type(self).__name__}.{name} is packed: it takes {legal}, found {given}; assign, tie or "
                    "resize weights before int8fx.convert"
                )
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        super()._apply(fn, recurse)
        self.packed_weights = {
            name: replace(reading, dtype=fn(torch.empty(0, dtype=reading.dtype, device=codes.device)).dtype)
            for name, reading in self.packed_weights.items()
            if (codes := self._buffers[name]) is not None
        }
        return self

    def __reduce_ex__(self, protocol):
        reduced = super().__reduce_ex__(max(protocol, 2))  # 0 and 1 would name this class, which no module holds
        if reduced[0] is not _NEWOBJ or reduced[1] != (type(self),):
            return reduced
        names, forward = tuple(self.packed_weights), type(self).__dict__.get("forward")
        return (_new_packed, (float_class(self), names, forward), *reduced[2:])

    def extra_repr(self) -> str:
        shapes = {name: tuple(self.packed(name).codes.shape) for name in self.packed_weights}
        packed = ", ".join(f"{name}: int8 {shape}" for name, shape in shapes.items())
        return ", ".join(part for part in (super().extra_repr(), packed) if part)


def float_class(module: PackedModule) -> type[nn.Module]:
    """The class that a packed module had before."""
    return type(module).__bases__[1]


@cache
def packed_class(base: type[nn.Module], names: tuple[str, ...], forward: Callable | None) -> type[nn.Module]:
    """The subclass of ``base`` whose weights ``names`` are packed; ``forward`` replaces that of ``base`` if given."""

    def dequantized(name: str) -> property:
        return property(lambda self: self.dequantize(name))

    body: dict[str, Any] = {name: dequantized(name) for name in names}
    body["__module__"], body["__doc__"] = base.__module__, base.__doc__
    if forward is not None:
        body["forward"] = forward
    return type(f"Int8{base.__name__}", (PackedModule, base), body)


def _new_packed(base: type[nn.Module], names: tuple[str, ...], forward: Callable | None) -> nn.Module:
    cls = packed_class(base, names, forward)  # type: ignore[arg-type]  # classes are hashable
    return cls.__new__(cls)


Weights = dict[str, tuple[PackedTensors, Reading]]


def clash(module: nn.Module, parameter: str) -> str | None:
    """A name that packing would need, and that ``module`` already uses for something else; None if there is none."""
    for suffix in SUFFIXES[1:]:
        if any(parameter + suffix in names for names in (module._parameters, module._buffers, module._modules)):
            return parameter + suffix
    return next((n for n in ("packed_weights", "packed", "packed_linear", "dequantize") if hasattr(module, n)), None)


def pack_modules(modules: Sequence[tuple[nn.Module, Weights, Callable | None]]) -> None:
    """Packs modules in place: all of them, with all of their weights, or, if anything raises, none.

    Args:
        modules: for each, the module; Parameter name -> its packed tensors and how the module uses them; the forward
            that replaces the one of its class, or None. It must be a module-level function, so that it can be pickled.
    """
    before = [(module, type(module), dict(module.__dict__)) for module, _, _ in modules]
    try:
        for module, weights, forward in modules:
            _pack(module, weights, forward)
    except BaseException:
        for module, cls, attributes in before:
            object.__setattr__(module, "__class__", cls)
            module.__dict__.clear()
            module.__dict__.update(attributes)
        raise


def _pack(module: nn.Module, weights: Weights, forward: Callable | None) -> None:
    cls = packed_class(type(module), tuple(weights), forward)  # type: ignore[arg-type]  # classes are hashable
    buffers = dict(module._buffers)
    for name, (tensors, _) in weights.items():
        buffers |= tensors.buffers(name)
    module.__dict__.update(
        _parameters={k: v for k, v in module._parameters.items() if k not in weights},
        _buffers=buffers,
        packed_weights={name: reading for name, (_, reading) in weights.items()},
    )
    object.__setattr__(module, "__class__", cls)


# ---- queries --------------------------------------------------------------------------------------------------------


def codes_in(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """Packed weights that a graph reads from plain buffers: path of the module that holds it, that module, its name.

    Weights of packed modules, which a graph may call, are not among them.
    """
    return [
        (path, owner, name)
        for path, owner in model.named_modules()
        if not isinstance(owner, PackedModule)
        for name, codes in owner._buffers.items()
        if codes is not None and codes.dtype == torch.int8 and name + SCALE in owner._buffers
    ]


def is_packed(model: nn.Module | ExportedProgram) -> bool:
    """Whether ``model`` holds weights packed by int8fx, in itself or in anything inside it."""
    if isinstance(model, ExportedProgram):
        return bool(count_ops(model.graph))
    return any(
        isinstance(module, PackedBuffers) or (isinstance(module, GraphModule) and bool(count_ops(module.graph)))
        for module in model.modules()
    )
