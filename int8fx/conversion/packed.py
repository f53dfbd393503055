"""Packed weights: int8 codes and their scales as plain buffers of the module that owned the float Parameter.

A packed module's class is a subclass of its own class, so ``isinstance``, hooks, sharing and references to it
stay as they were. For a packed weight called ``weight`` it holds two buffers:

    weight        [..., N, K] int8      its codes, whichever way round the module uses the weight
    weight_scale  [..., N]    float32   absmax / 127 per output channel

and two more if some of its columns are kept in 16 bits:

    weight_columns         [C]         int64   which they are
    weight_columns_weight  [..., N, C]         their weights, in the dtype that the weight had

``state_dict`` sees just these. Reading ``module.weight`` gives ``int8fx::dequantize`` of them in the shape and
dtype that the module expects, so code that knows nothing of int8fx stays right.
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops  # noqa: F401  registers the library
from ..schemes.weight import COLUMNS, SUFFIXES, Int8Weight, PackedTensors


@dataclass(frozen=True)
class PackedWeight:
    """How a module reads one packed weight.

    layout: ``NK`` if it reads ``[..., N, K]`` (``F.linear``), ``KN`` if ``[..., K, N]`` (``x @ w``).
    dtype: of the float weight it reads.
    threshold: of the LLM.int8() products it takes part in.
    kernel_dims: how many dimensions of size 1 follow (2 for a 1x1 ``Conv2d``).
    block: of the rotation that its codes are in; 1 for none.
    """

    layout: str
    dtype: torch.dtype
    threshold: float | None
    kernel_dims: int = 0
    block: int = 1


class PackedModule(nn.Module):
    """Mixed into the class of a module that holds packed weights; `packed_weights` describes them by name."""

    packed_weights: dict[str, PackedWeight]

    def dequantize(self, name: str = "weight") -> Tensor:
        """The packed weight ``name`` as the float tensor that the module would have had.

        Raises:
            KeyError: the module has no packed weight of that name.
        """
        packed = self.packed_weights[name]
        w = torch.ops.int8fx.dequantize.default(*self.packed(name), dtype=packed.dtype)
        if packed.layout == "KN":
            w = w.transpose(-1, -2)
        return w.reshape(*w.shape, *[1] * packed.kernel_dims) if packed.kernel_dims else w

    def packed(self, name: str = "weight") -> Int8Weight:
        """The packed weight ``name`` as the ops take it."""
        packed, tensors = self.packed_weights[name], PackedTensors.of(self._buffers, name)
        columns, columns_weight = tensors.columns, tensors.columns_weight
        return Int8Weight(tensors.codes, tensors.scale, packed.threshold, packed.block, columns, columns_weight)

    def packed_linear(self, x: Tensor, name: str = "weight", bias: Tensor | None = None) -> Tensor:
        return torch.ops.int8fx.linear.default(x, *self.packed(name), bias)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("packed_weights", ()):
            expected = self._buffers[name]
            if not isinstance(value, Tensor) or value.dtype != torch.int8 or value.shape != expected.shape:
                found = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                legal = f"int8 codes {tuple(expected.shape)}"
                raise TypeError(
                    f"{type(self).__name__}.{name} is packed: it takes {legal}, found {found}; assign, tie or "
                    "resize weights before int8fx.convert"
                )
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        keys = [n + suffix for n in self.packed_weights for suffix in SUFFIXES if n + suffix in self._buffers]
        with applied_to_packed([(self._buffers, key) for key in keys], fn):
            super()._apply(fn, recurse)
        self.packed_weights = {
            name: replace(packed, dtype=fn(torch.empty(0, dtype=packed.dtype, device=self._buffers[name].device)).dtype)
            for name, packed in self.packed_weights.items()
        }
        return self

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        for name in self.packed_weights:
            found = state_dict.get(prefix + name)
            if found is not None and found.dtype != torch.int8:
                errors.append(not_codes(prefix + name, found))
                return
            untie_columns(self._buffers, name, state_dict.get(prefix + name + COLUMNS))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.packed_weights:  # tied for the passes' sake; checkpoints refuse what shares memory
            if name + COLUMNS in self._buffers:
                destination[prefix + name + COLUMNS] = self._buffers[name + COLUMNS].clone()

    def __reduce_ex__(self, protocol):
        reduced = super().__reduce_ex__(max(protocol, 2))  # 0 and 1 would name this class, which no module holds
        if reduced[0] is not copyreg.__newobj__ or reduced[1] != (type(self),):
            return reduced
        base = type(self).__mro__[2]
        return (_new_packed, (base, tuple(self.packed_weights), type(self).__dict__.get("forward")), *reduced[2:])

    def extra_repr(self) -> str:
        packed = ", ".join(f"{name}: int8 {tuple(self._buffers[name].shape)}" for name in self.packed_weights)
        return ", ".join(part for part in (super().extra_repr(), packed) if part)


def clash(module: nn.Module, parameter: str) -> str | None:
    """A name that ``module`` would need to be packed and uses for something else."""
    for suffix in SUFFIXES[1:]:
        if any(parameter + suffix in names for names in (module._parameters, module._buffers, module._modules)):
            return parameter + suffix
    return next((n for n in ("packed_weights", "packed", "packed_linear", "dequantize") if hasattr(module, n)), None)


def untie_columns(buffers: dict[str, Tensor | None], name: str, found: Tensor | None) -> None:
    """Gives a weight columns of its own before others than those it shares with other weights are loaded into them."""
    columns = buffers.get(name + COLUMNS)
    if columns is not None and found is not None and not columns.is_meta:
        same = found.shape == columns.shape and torch.equal(found.to(columns.device), columns)
        buffers[name + COLUMNS] = columns if same else columns.clone()


@contextmanager
def applied_to_packed(places: list[tuple[dict[str, Any], str]], fn: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Keeps the codes and scales at ``places`` from an ``nn.Module._apply(fn)`` in this context, then moves them.

    What ``fn`` does to a tensor's device reaches them, what it does to its dtype does not. Tied tensors stay tied, as
    ``nn.Module`` has it for Parameters.
    """
    held = [buffers[key] for buffers, key in places]
    for buffers, key in places:
        buffers[key] = None
    try:
        yield
    finally:
        for (buffers, key), tensor in zip(places, held, strict=True):
            buffers[key] = tensor
    for (buffers, key), tensor in zip(places, held, strict=True):
        moved = fn(tensor)
        if moved.dtype != tensor.dtype:
            moved = tensor.to(moved.device)
        if torch._has_compatible_shallow_copy_type(tensor, moved):
            tensor.data = moved
        else:
            buffers[key] = moved


@cache
def packed_class(base: type[nn.Module], names: tuple[str, ...], forward: Callable | None) -> type[nn.Module]:
    """The subclass of ``base`` whose weights ``names`` are packed; ``forward`` replaces the base's if given."""

    def reader(name: str) -> property:
        return property(lambda self: self.dequantize(name))

    body: dict[str, Any] = {name: reader(name) for name in names}
    body["__module__"], body["__doc__"] = base.__module__, base.__doc__
    if forward is not None:
        body["forward"] = forward
    return type(f"Int8{base.__name__}", (PackedModule, base), body)


def _new_packed(base: type[nn.Module], names: tuple[str, ...], forward: Callable | None) -> nn.Module:
    cls = packed_class(base, names, forward)
    return cls.__new__(cls)


@dataclass(frozen=True)
class Packing:
    """What turns ``module`` into a packed one.

    module: owns a Parameter under each name.
    weights: name -> (codes ``[..., N, K]`` int8, scale ``[..., N]`` float32, and columns with their weights if some are
        kept, how the module reads it).
    forward: replaces the class's forward; a module-level function, so that the module can be pickled.
    """

    module: nn.Module
    weights: dict[str, tuple[Any, ...]]
    forward: Callable | None = None


def pack_modules(packings: Sequence[Packing]) -> None:
    """Packs modules in place: all of them, with all of their weights, or, if anything raises, none."""
    before = [(type(p.module), dict(p.module.__dict__)) for p in packings]
    try:
        for packing in packings:
            _pack(packing)
    except BaseException:
        for packing, (cls, attributes) in zip(packings, before, strict=True):
            object.__setattr__(packing.module, "__class__", cls)
            packing.module.__dict__.clear()
            packing.module.__dict__.update(attributes)
        raise


def _pack(packing: Packing) -> None:
    module, weights = packing.module, packing.weights
    cls = packed_class(type(module), tuple(weights), packing.forward)
    buffers = {name + s: t for name, (*tensors, _) in weights.items() for s, t in zip(SUFFIXES, tensors, strict=False)}
    module.__dict__.update(
        _parameters={k: v for k, v in module._parameters.items() if k not in weights},
        _buffers={**module._buffers, **buffers},
        packed_weights={name: packed for name, (*_, packed) in weights.items()},
    )
    object.__setattr__(module, "__class__", cls)


def not_codes(name: str, found: Tensor) -> str:
    """What a packed weight answers to a state dict with a float tensor under its name."""
    return f'"{name}" is packed and takes int8 codes, found {found.dtype}; load float weights before int8fx.convert'


def is_packed(module: nn.Module) -> bool:
    """Whether ``module`` itself (not its children) holds weights packed by int8fx."""
    return isinstance(module, PackedModule)
