"""``equalize``: moves scales of input channels from weights into what produces the channels, by AWQ or TEQ."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..conversion.layers import Layer, packed_layers
from ..conversion.quantizer import scales_of
from ..graph.producers import Fold, Folds, find_folds
from ..schemes import LLMInt8, Scheme, WeightOnly
from ..schemes.awq import Bounds, ScaledWeight, awq_scales
from ..schemes.calibration import Calibration
from ..schemes.quantize import compute_dtype
from ..schemes.teq import teq_scales
from ..terminal import show_progress
from .calibrate import calibrate, run_batch
from .variants import convertible

ALGORITHMS = ("awq", "teq")
_LEGAL_SCHEMES = "weight_only(...), llm_int8(...) without columns"


def equalize(
    model: nn.Module,
    data: Iterable[Any],
    scheme: Scheme,
    *,
    algorithm: str = "awq",
    calibration: Calibration | None = None,
    progress: bool | None = None,
) -> Calibration:
    """Scales input channels of weights, in place, so that ``convert(model, scheme, calibration=...)`` loses less.

    Input channel k of the weights is multiplied by s[k], and what produces the channel is divided by it: a norm's
    weight and bias, or rows and bias of the linear before. The float model computes the same function but for rounding.
    `graph.producers.find_folds` finds the producers in the graph of the first batch. s is chosen for each producer, in
    the order of the graph, so that ``Q(W s) / s`` is near W on the data: by `awq.awq_scales`, or by `teq.teq_scales`
    from these on. Q rounds to nearest in the scheme's groups, with the scheme's scales.

    Args:
        model: float, in eval mode. ``torch.export.export`` must be able to trace it. It holds for all inputs that take
            the way through the model's code that the first batch takes. Values that a cache holds may be scaled too.
        data: batches, as `calibrate` takes them. The first of them is traced, and compared before and after.
        scheme: `weight_only`, or `llm_int8` without columns. A plan may follow: s fits this scheme best.
        algorithm: ``awq`` or ``teq``, which trains for some minutes where AWQ takes one.
        calibration: what ``calibrate(model, data, moments=True)`` returned, by default that of ``data``. Layers without
            moments keep s = 1, as do those that share a producer with them.
        progress: whether to show a bar on stderr; by default if that is a terminal.

    Returns:
        The calibration of the scaled model, for `convert`: moments become ``H / (s s^T)``, absmax ``absmax / s``.

    A UserWarning says so if there is nothing to scale. If this raises or is interrupted, the Parameters are as they
    were. Until it ends it keeps a copy of those that it changes.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: an unknown algorithm, a scheme with a rotation or unquantised columns, a model that is converted, in
            training mode or that cannot be exported, no batches, no moments, moments that are not finite or not of the
            layer's shape, a scale of a group that its dtype cannot hold, or outputs of the first batch that change by
            more than rounding does.
    """
    _check(model, scheme, algorithm, calibration)
    batches = list(data)
    if not batches:
        raise ValueError("int8fx.equalize: no batches; legal: data that the model runs on")
    if calibration is None:
        calibration = calibrate(model, batches, moments=True, progress=progress)
    parameters = _own_parameters(model)
    found = _find(model, batches[0], parameters)
    layers = _layers_by_parameter(model, parameters)
    folds = []
    for fold in found.folds:
        reason = _unsuitable(fold, layers, calibration)
        if reason is None:
            folds.append(fold)
        else:
            found.reasons.update({place.parameter: reason for place, _ in fold.consumers})
    if not folds:
        warnings.warn(f"int8fx.equalize: {_why_nothing(layers, found.reasons)}", stacklevel=2)
    moments = ScaledMoments(calibration.moments)
    result = Calibration(dict(calibration.absmax), dict(calibration.rows), moments)
    before = _outputs(model, batches[0])
    bar = sys.stderr.isatty() if progress is None else progress
    originals: dict[str, Tensor] = {}
    try:
        for i, fold in enumerate(folds):
            if bar:
                show_progress("equalizing", i, len(folds))
            s = _choose(fold, parameters, layers, result, scheme, algorithm)
            _apply(fold, s, parameters, originals)
            _scale_statistics(fold, s, layers, result, moments)
        if bar:
            show_progress("equalizing", len(folds), len(folds))
        _compare(before, _outputs(model, batches[0]), [parameters[name] for name in originals])
    except BaseException:
        _restore(parameters, originals)
        raise
    return result


def can_equalize(scheme: object) -> bool:
    """Whether `equalize` takes ``scheme``: all input channels are quantised, and none is rotated."""
    return isinstance(scheme, WeightOnly) or (isinstance(scheme, LLMInt8) and not scheme.columns)


def _is_adapter(module: nn.Module) -> bool:
    """Whether PEFT wrapped a layer in ``module``."""
    return any(kind.__name__ == "BaseTunerLayer" for kind in type(module).__mro__)


def _check(model: object, scheme: object, algorithm: object, calibration: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"int8fx.equalize: found {type(model).__name__}; legal: nn.Module")
    if not isinstance(scheme, Scheme):
        raise TypeError(f"int8fx.equalize: scheme is {scheme!r}; legal: {_LEGAL_SCHEMES}")
    if not can_equalize(scheme):
        raise ValueError(
            f"int8fx.equalize: {scheme} rotates channels or leaves some unquantised; legal: {_LEGAL_SCHEMES}"
        )
    if algorithm not in ALGORITHMS:
        raise ValueError(f"int8fx.equalize: algorithm is {algorithm!r}; legal: {', '.join(ALGORITHMS)}")
    if calibration is not None and not isinstance(calibration, Calibration):
        raise TypeError(f"int8fx.equalize: calibration is {calibration!r}; legal: what int8fx.calibrate returns")
    if calibration is not None and not calibration.moments:
        raise ValueError(
            "int8fx.equalize: the calibration has no moments; legal: int8fx.calibrate(model, data, moments=True)"
        )
    packed = next(packed_layers(model), None)
    if packed is not None:
        raise ValueError(f"int8fx.equalize: layer {packed.name!r} is converted already; legal: float weights")
    adapted = next((name for name, m in model.named_modules() if _is_adapter(m)), None)
    if adapted is not None:
        raise ValueError(f"int8fx.equalize: layer {adapted!r} has adapters; legal: merge them, or add them afterwards")
    training = next((name or type(m).__name__ for name, m in model.named_modules() if m.training), None)
    if training is not None:
        raise ValueError(f"int8fx.equalize: module {training!r} is in training mode; legal: model.eval()")


# ---- what can be scaled ---------------------------------------------------------------------------------------------


def _own_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Name -> Parameter, of those that can be scaled: plain float tensors that share their memory with no other."""
    owners: dict[int, set[tuple[int, str]]] = {}
    named: dict[str, Tensor] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if type(tensor) in (nn.Parameter, Tensor) and tensor.layout is torch.strided and not tensor.is_meta:
                    owners.setdefault(tensor.untyped_storage().data_ptr(), set()).add((id(module), name))
                    if tensors is module._parameters and tensor.is_floating_point() and tensor.dtype.itemsize > 1:
                        named[f"{path}.{name}" if path else name] = tensor
    return {name: p for name, p in named.items() if p.numel() and len(owners[p.untyped_storage().data_ptr()]) == 1}


class _Tensors(nn.Module):
    """The tensors in what ``model`` returns."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        return list(_named_tensors(self.model(*args, **kwargs)).values())


def _named_tensors(output: Any, path: str = "output") -> dict[str, Tensor]:
    """The float tensors in an output, in mappings and sequences too; not those in objects of other kinds, as caches."""
    if isinstance(output, Tensor):
        return {path: output} if output.is_floating_point() else {}
    found: dict[str, Tensor] = {}
    if isinstance(output, (Mapping, list, tuple)):
        items = output.items() if isinstance(output, Mapping) else enumerate(output)
        for key, part in items:
            found |= _named_tensors(part, f"{path}[{key!r}]")
    return found


def _find(model: nn.Module, batch: Any, parameters: Mapping[str, Tensor]) -> Folds:
    args, kwargs = ((), dict(batch)) if isinstance(batch, Mapping) else (batch, {})
    args = tuple(args) if isinstance(args, (tuple, list)) else (args,)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    wrapped = _Tensors(model).eval()
    try:
        with torch.no_grad():
            program = torch.export.export(wrapped, args, kwargs, strict=False)
    except Exception as error:
        raise ValueError(
            f"int8fx.equalize: torch.export.export cannot trace the model ({type(error).__name__}: {error}); legal: a "
            "model that it can trace with the first batch"
        ) from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    names = {
        placeholder: name.removeprefix("model.")
        for placeholder, name in program.graph_signature.inputs_to_parameters.items()
    }
    return find_folds(program.graph, {node: name for node, name in names.items() if name in parameters})


def _layers_by_parameter(model: nn.Module, parameters: Mapping[str, Tensor]) -> dict[str, Layer]:
    """Name of a Parameter -> its layer, of those that ``convert`` would convert."""
    layers = {id(layer.weight): layer for layer in convertible(model).values()}
    return {name: layers[id(p)] for name, p in parameters.items() if id(p) in layers}


def _unsuitable(fold: Fold, layers: Mapping[str, Layer], calibration: Calibration) -> str | None:
    """Why the fold is left out, or None. Weights that stay float are scaled with others that do not."""
    converted = [layers[place.parameter] for place, _ in fold.consumers if place.parameter in layers]
    if not converted:
        return "it is not converted"
    missing = next((layer.name for layer in converted if layer.name not in calibration.moments), None)
    return None if missing is None else f"the calibration has no moments of layer {missing!r}"


def _why_nothing(layers: Mapping[str, Layer], reasons: Mapping[str, str]) -> str:
    if not layers:
        return "nothing to scale: the model has no layer to convert"
    largest = max(layers, key=lambda name: layers[name].weight.nbytes)
    reason = reasons.get(largest, "the first batch does not multiply by it as a linear does, or it is tied")
    return f"nothing to scale. The largest layer is {layers[largest].name}: {reason}"


# ---- choosing scales ------------------------------------------------------------------------------------------------


def _choose(
    fold: Fold,
    parameters: Mapping[str, Tensor],
    layers: Mapping[str, Layer],
    calibration: Calibration,
    scheme: Scheme,
    algorithm: str,
) -> Tensor:
    """s ``[C]``, float32 or float64."""
    weights, absmax = [], torch.zeros(len(fold.free))
    squares = counts = torch.zeros(len(fold.free), dtype=torch.float64)
    first = next(place.parameter for place, _ in fold.consumers if place.parameter in layers)
    device, dtype = parameters[first].device, compute_dtype(parameters[first].dtype)
    for place, channels in fold.consumers:
        if place.parameter in layers:
            name, weight = layers[place.parameter].name, parameters[place.parameter].detach()
            weight = (weight if place.dim == 1 else weight.T).to(device, dtype)
            moments = _checked(calibration.moments[name], name, weight.shape[1]).to(device, dtype)
            weights.append(ScaledWeight(weight, moments, channels.to(device)))
            mean_squares = moments.diagonal().double().cpu() / max(1, calibration.rows.get(name, 1))
            squares = squares.index_add(0, channels, mean_squares)
            counts = counts.index_add(0, channels, torch.ones_like(mean_squares))
            if name in calibration.absmax:
                absmax = absmax.scatter_reduce(0, channels, calibration.absmax[name].float().cpu(), "amax")
    size = (squares / counts.clamp_min(1)).sqrt().to(device, dtype)
    bounds = Bounds(*(t.to(device, dtype) for t in _bounds(fold, parameters, absmax)))
    choose = partial(scales_of, scheme)
    try:
        with torch.no_grad():
            s = awq_scales(weights, size, scheme.grouping, choose, bounds)
        return teq_scales(weights, s, scheme.grouping, choose, bounds) if algorithm == "teq" else s
    except ValueError as error:
        names = ", ".join(repr(layers[p.parameter].name) for p, _ in fold.consumers if p.parameter in layers)
        raise ValueError(f"int8fx.equalize: layers {names}: {error}") from None


def _checked(moments: Tensor, name: str, K: int) -> Tensor:
    """``moments``. Raises ValueError, naming the layer, unless they can be those of its inputs."""
    if moments.shape != (K, K) or not moments.isfinite().all() or (moments.diagonal() < 0).any():
        raise ValueError(
            f"int8fx.equalize: the moments {list(moments.shape)} of layer {name!r} are of another shape, not finite, "
            f"or negative on the diagonal; legal: x.T @ x of its inputs, [{K}, {K}]"
        )
    return moments


def _bounds(fold: Fold, parameters: Mapping[str, Tensor], absmax: Tensor) -> tuple[Tensor, Tensor]:
    """Scales with which no weight, producer or activation leaves the normal numbers of its dtype; of free channels."""
    low, high = torch.zeros(len(fold.free), dtype=torch.float64), torch.full((len(fold.free),), math.inf).double()
    produced = [parameters[place.parameter] for place in fold.producer]
    largest = torch.stack([_absmax(parameters[p.parameter], p.dim) for p in fold.producer]).amax(0)
    for info in {p.dtype: torch.finfo(p.dtype) for p in produced}.values():
        low = low.maximum(largest.maximum(absmax.double()) / info.max)
        high = high.minimum(torch.where(largest > 0, largest / info.tiny, math.inf))
    for place, channels in fold.consumers:
        weight = parameters[place.parameter]
        info = torch.finfo(weight.dtype)
        of_inputs = _absmax(weight, place.dim)
        low = low.scatter_reduce(0, channels, torch.where(of_inputs > 0, info.tiny / of_inputs, 0), "amax")
        high = high.scatter_reduce(0, channels, torch.where(of_inputs > 0, info.max / of_inputs, math.inf), "amin")
    ends = torch.finfo(torch.float32)
    low, high = low.clamp(ends.tiny, 1), high.clamp(1, ends.max)
    return low.where(fold.free, 1), high.where(fold.free, 1)


def _absmax(p: Tensor, dim: int) -> Tensor:
    """``[C]``: the largest absolute value of each channel, float64."""
    return p.detach().abs().movedim(dim, -1).reshape(-1, p.shape[dim]).amax(0).double().cpu()


# ---- applying them --------------------------------------------------------------------------------------------------


def _apply(fold: Fold, s: Tensor, parameters: Mapping[str, Tensor], originals: dict[str, Tensor]) -> None:
    """Scales the Parameters of a fold, after it has copied those that have no copy in ``originals`` yet."""
    if (s == 1).all():
        return
    changes = [(place, 1 / s.double()) for place in fold.producer]
    changes += [(place, s.double()[channels.to(s.device)]) for place, channels in fold.consumers]
    with torch.no_grad():
        for place, factor in changes:
            p = parameters[place.parameter]
            scaled = p.double() * (factor if place.dim == p.dim() - 1 else factor[:, None]).to(p.device)
            if place.parameter not in originals:
                originals[place.parameter] = p.clone()
            p.copy_(scaled)


def _restore(parameters: Mapping[str, Tensor], originals: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, original in originals.items():
            parameters[name].copy_(original)


class ScaledMoments(Mapping[str, Tensor]):
    """Moments ``H / (s s^T)`` of inputs that were divided by s. They are computed when they are asked for.

    Args:
        moments: layer name -> ``H [K, K]``, in memory or in a folder.
    """

    def __init__(self, moments: Mapping[str, Tensor]) -> None:
        self._moments = moments
        self.scales: dict[str, Tensor] = {}
        """Layer name -> ``s [K]``, float64. Layers without an entry have s = 1."""

    def __getitem__(self, name: str) -> Tensor:
        moments, s = self._moments[name], self.scales.get(name)
        return moments if s is None else (moments.double() / s / s[:, None]).to(moments.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._moments)

    def __len__(self) -> int:
        return len(self._moments)


def _scale_statistics(
    fold: Fold, s: Tensor, layers: Mapping[str, Layer], calibration: Calibration, moments: ScaledMoments
) -> None:
    """The statistics of the consumers' inputs, which are divided by s. Tensors are replaced, not written to."""
    for place, channels in fold.consumers:
        name = layers[place.parameter].name if place.parameter in layers else None
        if name is not None:
            of_inputs = s.double().cpu()[channels]
            moments.scales[name] = moments.scales.get(name, 1) * of_inputs
            if name in calibration.absmax:
                absmax = calibration.absmax[name]
                calibration.absmax[name] = (absmax.double() / of_inputs).to(absmax)


# ---- comparing ------------------------------------------------------------------------------------------------------


def _outputs(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    with torch.no_grad():
        return {name: t.detach().clone() for name, t in _named_tensors(run_batch(model, batch)).items()}


def _compare(before: Mapping[str, Tensor], after: Mapping[str, Tensor], changed: Sequence[Tensor]) -> None:
    """Raises ValueError if an output has changed by more than sqrt(eps), relative, of the coarsest dtype."""
    for name, y in before.items():
        bound = math.sqrt(max(torch.finfo(t.dtype).eps for t in (y, *changed)))
        new, finite = after[name].double(), y.isfinite()
        error = torch.where(finite, new - y.double(), 0).norm() / y.double().where(finite, 0).norm().clamp_min(1e-300)
        if not bool(error <= bound) or not torch.equal(new.isfinite(), finite):
            raise ValueError(
                f"int8fx.equalize: {name} of the first batch changes by {float(error):.3g}, relative; legal: up to "
                f"{bound:.3g}. The model is as it was"
            )
