"""What ``load_state_dict`` of a converted model refuses, before it changes anything.

The functions here read a state dict and name its problems. `packed.refuse_unfit` calls them. ``docs/format.md`` lists
what is checked.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy
from torch.overrides import is_tensor_like

from ..schemes import Scheme
from ..schemes.formats import FORMATS, Grouping
from ..schemes.quantize import INT8_MAX
from ..schemes.weight import CODES, COLUMNS, COLUMNS_WEIGHT, SCALE, SCALE_RANGE, ZERO_POINT, PackedTensors
from .format import FORMAT, read_scheme, same_arithmetic

OPTIONAL = {
    COLUMNS: "all columns of this layer are quantised",
    COLUMNS_WEIGHT: "all columns of this layer are quantised",
    ZERO_POINT: "the codes of this layer are symmetric",
    SCALE_RANGE: "the scales of this layer are not quantised",
}
"""Tensors that only some packed weights have: suffix -> what is said of a weight that has none."""
_COLUMNS_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def is_readable(tensor: Tensor) -> bool:
    """Whether the values of ``tensor`` are there."""
    return not tensor.is_meta and not isinstance(tensor, FakeTensor)


# ---- the call of load_state_dict -------------------------------------------------------------------------------------


class Load(NamedTuple):
    """A call ``model.load_state_dict(state_dict, strict=strict)``."""

    model: nn.Module
    state_dict: Mapping[str, Any]
    strict: bool


def running_load(errors: list[str]) -> Load | None:
    """The running call of ``nn.Module.load_state_dict`` that collects its errors in ``errors``; None if there is none.

    torch does not tell hooks whether a load is strict, nor what else it loads.
    """
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is nn.Module.load_state_dict.__code__:
            its = frame.f_locals
            if its.get("error_msgs") is errors:
                return Load(its["self"], its["state_dict"], its["strict"])
        frame = frame.f_back  # type: ignore[assignment]
    return None


class _Checked(threading.local):
    """The last load that was checked: its list of errors, which no other load has, and the prefix that was checked."""

    errors: list[str] | None = None
    prefix = ""


_checked = _Checked()


def is_checked(errors: list[str], prefix: str) -> bool:
    """Whether `set_checked` was called in this load for a part of the model that ``prefix`` is in."""
    return _checked.errors is errors and prefix.startswith(_checked.prefix)


def set_checked(errors: list[str], prefix: str) -> None:
    _checked.errors, _checked.prefix = errors, prefix


# ---- packed weights --------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """A packed weight that is loaded.

    key: its name in the state dict.
    tensors: name in the state dict -> the tensor that the model has: codes, scale, columns, and the format.
    scheme: if it is known.
    """

    key: str
    tensors: Mapping[str, Tensor]
    scheme: Scheme | None

    def given(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """The values that ``state_dict`` has for ``tensors``; the codes of version 1 under their new name."""
        given = {k: state_dict[k] for k in self.tensors if k in state_dict}
        if self.key in state_dict:
            given.setdefault(self.key + CODES, state_dict[self.key])
        return given


def unfit_weights(
    places: list[Place], state_dict: Mapping[str, Any], *, complete: bool, assign: bool = False
) -> Iterator[str]:
    """Problems of the tensors that ``state_dict`` has for packed weights.

    Args:
        complete: whether a part of a weight is a problem, unless the rest is there under another name of a tied weight.
        assign: whether the tensors will be assigned, or else copied.
    """
    loaded = {id(place.tensors[k]) for place in places for k in place.given(state_dict)} if complete else None
    fit = True
    for place in places:
        for problem in _unfit(place, state_dict, loaded, assign):
            fit = False
            yield problem
    if fit:
        yield from _contradictions(places, state_dict)


def _unfit(place: Place, state_dict: Mapping[str, Any], loaded: set[int] | None, assign: bool) -> Iterator[str]:
    key, present, given = place.key, place.tensors, place.given(state_dict)
    for k, tensor in given.items():
        if (found := _no_dense_tensor(tensor)) is not None:
            yield f'"{k}" is {found}; legal: a dense tensor'
            return
    tensors = PackedTensors.of(given, key)
    codes, columns, columns_weight = tensors.codes, tensors.columns, tensors.columns_weight
    if codes is not None and codes.dtype != (legal := present[key + CODES].dtype):
        kind = str(legal).removeprefix("torch.")
        yield f'"{key}" is packed and takes {kind} codes, found {codes.dtype}; load float weights before int8fx.convert'
        return
    if key in state_dict and key + CODES in state_dict and not _is_guard(state_dict[key]):
        yield f'"{key}" and "{key + CODES}" are both there; legal: one of them'
        return
    if codes is not None and (marker := key[: key.rfind(".") + 1] + "comfy_quant") in state_dict:
        yield f'"{marker}" is there, so that "{key}" is as ComfyUI stores it; legal: tensors that int8fx wrote'
        return
    optional = {key + FORMAT} if key + CODES not in state_dict else set()  # version 1 has none
    absent = sorted(k for k in present.keys() - given.keys() - optional if loaded and id(present[k]) not in loaded)
    if given and absent:
        yield f'"{key}" is packed, and a part of it is missing: {", ".join(absent)}'
        return
    if extra := next((suffix for suffix in OPTIONAL if key + suffix in state_dict.keys() - present.keys()), None):
        yield f'"{key + extra}" is there, and {OPTIONAL[extra]}; convert the model by its scheme first'
        return
    for k, tensor in given.items():
        if k != key + FORMAT and tensor.shape != present[k].shape:
            yield f'"{k}" has shape {tuple(tensor.shape)}; legal: {tuple(present[k].shape)}'
            return
        if not is_readable(tensor) and (any(map(is_readable, given.values())) if assign else is_readable(present[k])):
            yield f'"{k}" has no data ({tensor.device}); legal: a tensor with data'
            return
    if (form := given.get(key + FORMAT)) is not None and is_readable(form):
        try:
            its = read_scheme(form)
        except ValueError as error:
            yield f'"{key + FORMAT}": {error}'
            return
        if place.scheme is not None and not same_arithmetic(its, place.scheme):
            yield (
                f'"{key}" was quantised by {its}, and this layer by {place.scheme}; convert the model by {its} first'
            )
        K, count = present[key + CODES].shape[-1], 0 if columns is None else columns.numel()
        if (columns is not None or key + COLUMNS not in present) and count != its.static_columns(K):
            yield unfit_count(f'"{key}"', its, K, count)
    elif codes is not None and key + CODES not in state_dict and place.scheme is not None and place.scheme.rotation < 0:
        yield (
            f'"{key}" is of format version 1, which has no regular Hadamard matrices, and this layer has: it is '
            f"{place.scheme}; legal: rotated(block, hadamard='sylvester')"
        )
    is_symmetric = key + ZERO_POINT not in present
    if codes is not None and codes.dtype == torch.int8 and is_symmetric and _extreme(codes, min) < -INT8_MAX:
        yield f'"{key + CODES}" has a code of {int(codes.min())}; legal: {-INT8_MAX} to {INT8_MAX}'
    for suffix in (SCALE, ZERO_POINT, SCALE_RANGE):
        tensor = given.get(key + suffix)
        if tensor is not None and tensor.dtype != (legal := present[key + suffix].dtype):
            yield f'"{key + suffix}" has dtype {tensor.dtype}; legal: {legal}'
            return
    yield from _unfit_scales(key, given, place.scheme)
    if columns is not None:
        yield from _unfit_columns(key, columns, present[key + CODES].shape[-1])
    if columns_weight is not None:
        if columns_weight.dtype not in _COLUMNS_DTYPES:
            yield f'"{key + COLUMNS_WEIGHT}" has dtype {columns_weight.dtype}; legal: a float dtype of 16 bits or more'
        elif is_readable(columns_weight) and not bool(columns_weight.isfinite().all()):
            yield f'"{key + COLUMNS_WEIGHT}" has NaN or inf; legal: finite weights'


def _unfit_scales(key: str, given: Mapping[str, Tensor], scheme: Scheme | None) -> Iterator[str]:
    """Problems of scales, zero points and the ranges of scales."""
    grouping = Grouping() if scheme is None else scheme.grouping
    scale, zero_point, scale_range = (given.get(key + suffix) for suffix in (SCALE, ZERO_POINT, SCALE_RANGE))
    if scale is not None and scale.is_floating_point() and is_readable(scale):
        largest = torch.finfo(torch.float32).max / FORMATS[grouping.format].largest_step(grouping.asymmetric)
        signed = grouping.format == "int4_fullrange"
        size = scale.float().abs() if signed else scale.float()
        if not bool(((size > 0) & (size <= largest)).all()):
            found, legal = ("zero", "other than 0") if signed else ("zero or negative", "above 0")
            yield (
                f'"{key + SCALE}" has a scale that is NaN, inf, {found}, or above {largest:.4g}; legal: finite and '
                f"{legal}"
            )
    if zero_point is not None and zero_point.dtype == torch.uint8 and _extreme(zero_point, max) > 15:
        yield f'"{key + ZERO_POINT}" has a zero point of {int(zero_point.max())}; legal: 0 to 15'
    if scale_range is not None and is_readable(scale_range):
        is_legal = scale_range.isfinite().all() & (scale_range[..., 1] >= 0).all()
        if not bool(is_legal):
            yield f'"{key + SCALE_RANGE}" has a range that is not finite, or a negative step; legal: lowest, step >= 0'


def _extreme(integers: Tensor, of: Callable[[Any], Any]) -> int:
    """The smallest (``min``) or largest (``max``) of integers; 0 if there are none to be read."""
    if not is_readable(integers) or not integers.numel():
        return 0
    return int(integers.min() if of is min else integers.max())


def unfit_count(label: str, scheme: Scheme, K: int, found: int) -> str:
    """The message for a weight of ``scheme`` that has ``found`` unquantised columns, and should have others."""
    legal = scheme.static_columns(K)
    return f"{label} has {found} unquantised columns; legal: {legal}, as its format is {scheme} and K is {K}"


def _no_dense_tensor(value: Any) -> str | None:
    """What ``value`` is if it is no ordinary dense tensor."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    if value.is_nested:
        return "a nested tensor"
    if value.is_quantized:
        return f"a tensor of {value.dtype}"
    return None if value.layout is torch.strided else str(value.layout)


def _is_guard(value: Any) -> bool:
    """Whether ``value`` is the guard that files of `save_pretrained` have in place of a float weight."""
    return isinstance(value, Tensor) and value.dtype == torch.uint8 and value.numel() <= 1


def _unfit_columns(key: str, columns: Tensor, K: int) -> Iterator[str]:
    if columns.dtype != torch.int64:
        yield f'"{key + COLUMNS}" takes the numbers of columns as torch.int64, found {columns.dtype}'
    elif is_readable(columns):
        seen: set[int] = set()
        wrong = [c for c in columns.tolist() if not 0 <= c < K or c in seen or seen.add(c)]  # type: ignore[func-returns-value]
        if wrong:
            what = "is there twice" if 0 <= wrong[0] < K else "is out of range"
            yield f'"{key + COLUMNS}": column {wrong[0]} {what}; legal: different columns, from 0 to {K - 1}'


def _contradictions(places: list[Place], state_dict: Mapping[str, Any]) -> Iterator[str]:
    """Parts of a tied weight that differ under its names: the weight would become a mixture."""
    first: dict[tuple[int, str], tuple[str, Any]] = {}
    for place in places:
        codes = id(place.tensors[place.key + CODES])
        for k, value in place.given(state_dict).items():
            suffix = k.removeprefix(place.key)
            if suffix != FORMAT:
                other, its = first.setdefault((codes, suffix), (k, value))
                if not _equal(value, its):
                    yield f'"{other}" and "{k}" differ; legal: equal tensors, as the weights are tied in this model'


def _equal(one: Tensor, other: Tensor) -> bool:
    comparable = all(type(t) in (Tensor, nn.Parameter) and is_readable(t) for t in (one, other))
    return one is other or not comparable or torch.equal(one.to(other.device), other)


# ---- other tensors ---------------------------------------------------------------------------------------------------

PLAIN_LOADERS: set[Any] = {nn.Module._load_from_state_dict, _NormBase._load_from_state_dict}
"""Implementations that load what is in the state dict, as it is there. `packed` adds its own."""

PLAIN_HOOKS: set[Any] = set()
"""Hooks of int8fx."""


def loads_as_written(module: nn.Module) -> bool:
    """Whether nothing changes the state dict before ``module`` loads it: neither its class nor a hook."""
    loaders = {c.__dict__["_load_from_state_dict"] for c in type(module).__mro__ if "_load_from_state_dict" in vars(c)}
    hooks = {getattr(h, "hook", h) for h in module._load_state_dict_pre_hooks.values()}
    return loaders <= PLAIN_LOADERS and hooks <= PLAIN_HOOKS


def own_state(module: nn.Module) -> dict[str, Tensor]:
    """The tensors that ``module`` itself saves and loads."""
    return {
        name: t
        for tensors, transient in ((module._parameters, set()), (module._buffers, module._non_persistent_buffers_set))
        for name, t in tensors.items()
        if t is not None and name not in transient
    }


def unfit_others(
    model: nn.Module, state_dict: Mapping[str, Any], prefix: str, packed: set[str], *, assign: bool
) -> Iterator[str]:
    """Problems of other tensors than those of packed weights, which are called ``packed``.

    torch finds these while it loads, and leaves the model half loaded. What a module changes before it loads is torch's
    to check.
    """
    mixed = any(isinstance(value, Tensor) and is_readable(value) for value in state_dict.values())
    for path, module in _loaded_as_written(model, prefix):
        for name, tensor in own_state(module).items():
            key = path + name
            if key in state_dict and key not in packed:
                problem = _misfit(state_dict[key], tensor, assign, mixed)
                if problem is not None:
                    yield f"{problem[0]} for {key}: found {problem[1]}; legal: {problem[2]}"
            elif key + CODES in state_dict and key + FORMAT in state_dict:
                yield f'"{key}" is float in this model, found its int8 codes; convert this layer too first'


def _misfit(value: Any, tensor: Tensor, assign: bool, mixed: bool) -> tuple[str, Any, Any] | None:
    """What is wrong with ``value`` for ``tensor`` of the model: what, found, legal.

    Args:
        mixed: whether the state dict has tensors with data.
    """
    if not is_tensor_like(value):
        return "no tensor", type(value).__name__, "a tensor"
    if is_lazy(tensor) or not isinstance(value, Tensor):
        return None
    found = _no_dense_tensor(value)
    if found is not None and _no_dense_tensor(tensor) is None:
        return "no dense tensor", found, "a dense tensor"
    if tensor.is_nested:
        return None
    if value.shape != tensor.shape and (tuple(value.shape), tuple(tensor.shape)) != ((1,), ()):
        return "size mismatch", tuple(value.shape), tuple(tensor.shape)
    if value.is_meta and not tensor.is_meta and (mixed or not assign):
        return "no data", "a tensor on meta", "a tensor with data"
    wrong = value.is_complex() and not tensor.is_complex()
    if isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
        wrong = not value.is_floating_point()  # codes of an int8 layer, or a mislabelled file
    return ("wrong dtype", value.dtype, tensor.dtype) if wrong else None


def unfit_keys(model: nn.Module, state_dict: Mapping[str, Any], prefix: str, places: list[Place]) -> Iterator[str]:
    """Keys that a strict load refuses, in torch's words: those missing and those not expected."""
    if any(
        getattr(h, "hook", h) not in PLAIN_HOOKS
        for m in model.modules()
        for h in m._load_state_dict_post_hooks.values()
    ):
        return  # they may take keys off torch's lists
    aliases = {p.key: p.key + CODES for p in places}
    optional = {p.key + FORMAT for p in places if p.key + CODES not in state_dict}  # version 1 has none
    found = {*state_dict, *(aliases[key] for key in aliases if key in state_dict)}
    known, missing = {key for key in aliases if key in state_dict}, []
    inside = dict(_loaded_as_written(model, prefix))
    for path, module in inside.items():
        names = [path + name for name in own_state(module)]
        if type(module).set_extra_state is not nn.Module.set_extra_state:
            names.append(f"{path}_extra_state")
        known.update(names)
        old = {path + "num_batches_tracked"} if isinstance(module, _NormBase) else set()  # old files have none
        missing += [name for name in names if name not in found and name not in optional and name not in old]
    unexpected = [
        key
        for key in state_dict
        if key.startswith(prefix) and key not in known and _is_inside(model, key, prefix, inside)
    ]
    for what, keys in (("Missing", missing), ("Unexpected", unexpected)):
        if keys:
            yield f"{what} key(s) in state_dict: {', '.join(f'{chr(34)}{key}{chr(34)}' for key in keys)}. "


def _loaded_as_written(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """Prefix and module, for ``module`` and those in it, except those in which the state dict may be changed."""
    if loads_as_written(module):
        yield prefix, module
        for name, child in module._modules.items():
            if child is not None:
                yield from _loaded_as_written(child, f"{prefix}{name}.")


def _is_inside(model: nn.Module, key: str, prefix: str, inside: Mapping[str, nn.Module]) -> bool:
    """Whether the deepest module that ``key`` names is one of ``inside``."""
    module: nn.Module | None = model
    *path, _ = key[len(prefix) :].split(".")
    for name in path:
        if module is None or name not in module._modules:
            break
        module, prefix = module._modules[name], f"{prefix}{name}."
    return prefix in inside
