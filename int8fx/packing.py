"""Packed weights: int8 codes and their scales as plain buffers of the module that owned the float Parameter.

A packed module's class is a subclass of its own class, so ``isinstance``, hooks, sharing and references to it
stay as they were. For a packed weight called ``weight`` it holds two buffers:

    weight        [..., N, K] int8      its codes, whichever way round the module uses the weight
    weight_scale  [..., N]    float32   absmax / 127 per output channel

``state_dict`` sees just these. Reading ``module.weight`` gives ``int8fx::dequantize`` of them in the shape and
dtype that the module expects, so code that knows nothing of int8fx stays right.
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from . import ops  # noqa: F401  registers the library

SCALE = "_scale"


@dataclass(frozen=True)
class PackedWeight:
    """How a module reads one packed weight.

    layout: ``NK`` if it reads ``[..., N, K]`` (``F.linear``), ``KN`` if ``[..., K, N]`` (``x @ w``).
    dtype: of the float weight it reads.
    threshold: of the LLM.int8() products it takes part in.
    kernel_dims: how many dimensions of size 1 follow (2 for a 1x1 ``Conv2d``).
    """

    layout: str
    dtype: torch.dtype
    threshold: float
    kernel_dims: int = 0


class PackedModule(nn.Module):
    """Mixed into the class of a module that holds packed weights; `packed_weights` describes them by name."""

    packed_weights: dict[str, PackedWeight]

    def dequantize(self, name: str = "weight") -> Tensor:
        """The packed weight ``name`` as the float tensor that the module would have had.

        Raises:
            KeyError: the module has no packed weight of that name.
        """
        packed = self.packed_weights[name]
        w = torch.ops.int8fx.dequantize.default(
            self._buffers[name], self._buffers[name + SCALE], packed.dtype, packed.threshold
        )
        if packed.layout == "KN":
            w = w.transpose(-1, -2)
        return w.reshape(*w.shape, *[1] * packed.kernel_dims) if packed.kernel_dims else w

    def packed_linear(self, x: Tensor, name: str = "weight", bias: Tensor | None = None) -> Tensor:
        codes, scale = self._buffers[name], self._buffers[name + SCALE]
        return torch.ops.int8fx.linear.default(x, codes, scale, bias, self.packed_weights[name].threshold)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("packed_weights", ()):
            expected = self._buffers[name]
            if not isinstance(value, Tensor) or value.dtype != torch.int8 or value.shape != expected.shape:
                found = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(
                    f"{type(self).__name__}.{name} is packed: it takes int8 codes {tuple(expected.shape)}, found {found}"
                )
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        # Device moves reach codes and scales, casts do not; tied tensors stay tied, as nn.Module does for Parameters.
        keys = [key for name in self.packed_weights for key in (name, name + SCALE)]
        held = {key: self._buffers[key] for key in keys}
        for key in keys:
            self._buffers[key] = None
        try:
            super()._apply(fn, recurse)
        finally:
            self._buffers.update(held)
        for key, tensor in held.items():
            moved = fn(tensor)
            if moved.dtype != tensor.dtype:
                moved = tensor.to(moved.device)
            if torch._has_compatible_shallow_copy_type(tensor, moved):
                tensor.data = moved
            else:
                self._buffers[key] = moved
        self.packed_weights = {
            name: replace(packed, dtype=fn(torch.empty(0, dtype=packed.dtype, device=held[name].device)).dtype)
            for name, packed in self.packed_weights.items()
        }
        return self

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        for name in self.packed_weights:
            found = state_dict.get(prefix + name)
            if found is not None and found.dtype != torch.int8:
                errors.append(
                    f'"{prefix}{name}" is packed and takes int8 codes, found {found.dtype}; load float weights '
                    "before int8fx.convert"
                )
                return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    def __reduce_ex__(self, protocol):
        reduced = super().__reduce_ex__(max(protocol, 2))  # 0 and 1 would name this class, which no module holds
        if reduced[0] is not copyreg.__newobj__ or reduced[1] != (type(self),):
            return reduced
        base = type(self).__mro__[2]
        return (_new_packed, (base, tuple(self.packed_weights), type(self).__dict__.get("forward")), *reduced[2:])

    def extra_repr(self) -> str:
        packed = ", ".join(f"{name}: int8 {tuple(self._buffers[name].shape)}" for name in self.packed_weights)
        return ", ".join(part for part in (super().extra_repr(), packed) if part)


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


def pack_module(
    module: nn.Module,
    weights: dict[str, tuple[Tensor, Tensor, PackedWeight]],
    forward: Callable | None = None,
) -> None:
    """Turns ``module`` into a packed one in place: all of ``weights`` or, if anything raises, none.

    Args:
        module: owns a Parameter under each name.
        weights: name -> (codes ``[..., N, K]`` int8, scale ``[..., N]`` float32, how the module reads it).
        forward: replaces the class's forward; a module-level function, so that the module can be pickled.
    """
    base, before = type(module), dict(module.__dict__)
    after = dict(before)
    after["_parameters"] = {k: v for k, v in module._parameters.items() if k not in weights}
    after["_buffers"] = dict(module._buffers)
    after["packed_weights"] = {name: packed for name, (_, _, packed) in weights.items()}
    for name, (codes, scale, _) in weights.items():
        after["_buffers"][name], after["_buffers"][name + SCALE] = codes, scale
    cls = packed_class(base, tuple(weights), forward)
    try:
        module.__dict__.update(after)
        module.__class__ = cls
    except BaseException:
        module.__dict__.update(before)
        module.__dict__.pop("packed_weights", None)
        module.__class__ = base
        raise


def is_packed(module: nn.Module) -> bool:
    """Whether ``module`` itself (not its children) holds weights packed by int8fx."""
    return isinstance(module, PackedModule)
