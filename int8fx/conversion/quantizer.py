"""Quantises float weights: `Quantizer` makes packed tensors, `Columns` chooses which columns stay in 16 bits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor
from torch._guards import detect_fake_mode

from ..schemes import Scheme
from ..schemes.calibration import Calibration
from ..schemes.formats import ChooseScales, absmax_scales
from ..schemes.gptq import round_weight
from ..schemes.hqq import hqq_scales
from ..schemes.quantize import pack_weight
from ..schemes.search import searched_scales
from ..schemes.weight import PackedTensors
from .layers import Layer
from .packed import Reading, frozen


class Columns:
    """Chooses which columns of weights are not quantised, for all schemes of one conversion.

    If the calibration has data of a layer, these are the columns whose inputs have the largest absmax. Otherwise, they
    are the columns of largest Euclidean norm, whose rounding would cost most if all inputs had the same size. The norm
    of a column is over the weights of all ``layers`` in one module that have the same K: these often have the same x.

    Equal columns of several weights are one tensor, so that linears of the same x can share its quantisation.

    Args:
        calibration: what `calibrate` returns, or None.
        layers: those that the conversion packs. Norms of a module are computed when its first layer needs them, while
            all its layers are still float.
    """

    def __init__(self, calibration: Calibration | None = None, layers: Iterable[Layer] = ()) -> None:
        self.calibration = calibration or Calibration()
        self._siblings: dict[tuple[str, int], list[Layer]] = {}
        for layer in layers:
            if layer.name not in self.calibration.absmax:
                self._siblings.setdefault(_module_and_width(layer), []).append(layer)
        self._norms: dict[tuple[str, int], Tensor] = {}
        self._tied: dict[tuple, Tensor] = {}

    def choose(self, tied: list[Layer], count: int) -> Tensor:
        """``[count]`` int64, ascending: the unquantised columns of the one weight that the layers ``tied`` share."""
        absmax = [self.calibration.absmax[t.name] for t in tied if t.name in self.calibration.absmax]
        for of_layer in absmax:
            _check_shape("absmax", of_layer, tied[0].oriented().shape[-1:], tied[0])
        norms = [self._norms_of(layer) for layer in tied if layer.name not in self.calibration.absmax]
        size = torch.stack(absmax).amax(0) if absmax else norms[0]
        weight = tied[0].weight
        columns = size.to(weight.device).topk(count).indices.sort().values
        if weight.is_meta or detect_fake_mode(weight) is not None:
            return columns
        return self._tied.setdefault((columns.device, *columns.tolist()), columns)

    def _norms_of(self, layer: Layer) -> Tensor:
        key = _module_and_width(layer)
        if key not in self._norms:
            siblings = self._siblings.pop(key, [layer])
            self._norms[key] = sum((_squares(s) for s in siblings), torch.zeros((), device=layer.weight.device))
        return self._norms[key]


def _check_shape(name: str, statistic: Tensor, shape: tuple[int, ...], layer: Layer) -> None:
    if statistic.shape != shape:
        raise ValueError(
            f"int8fx.convert: the calibration's {name} of layer {layer.name!r}: shape {tuple(statistic.shape)}; legal: "
            f"{tuple(shape)}, as this model has them"
        )


def _module_and_width(layer: Layer) -> tuple[str, int]:
    return layer.name.rpartition(".")[0], layer.oriented().shape[-1]


def _squares(layer: Layer) -> Tensor:
    """``sum_n(weight[n, k] ** 2)``, float32."""
    return layer.oriented().float().square().flatten(0, -2).sum(0)


def scales_of(scheme: Scheme, moments: Tensor | None) -> ChooseScales:
    """How groups get their scales and zero points. ``search`` needs the moments."""
    if scheme.scales == "hqq":
        return hqq_scales
    if scheme.scales == "search":
        assert moments is not None
        return partial(searched_scales, moments=moments)
    return absmax_scales


def _pack(weight: Tensor, scheme: Scheme, columns: Tensor | None, moments: Tensor | None) -> PackedTensors:
    """The packed tensors of ``weight``; moments as `Quantizer._moments_of` returns them."""
    choose = scales_of(scheme, moments)
    if scheme.rounding == "gptq":
        assert moments is not None
        return round_weight(weight, scheme.grouping, moments, scheme.rotation, columns, choose)
    return pack_weight(weight, scheme.grouping, scheme.rotation, columns, choose)


class Quantizer:
    """Quantises weights for a scheme: ``quantizer([layer, ...])`` the one weight that these layers share.

    Args:
        scheme: for all layers, or layer name -> scheme.
        calibration: what `calibrate` returns, or None.
        columns: chooses unquantised columns. One `Columns` serves several quantizers.
        progress: called after each weight with how many are done.
    """

    def __init__(
        self,
        scheme: Scheme | Mapping[str, Scheme],
        calibration: Calibration | None = None,
        columns: Columns | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self.scheme, self.calibration = scheme, calibration or Calibration()
        self.columns = columns or Columns(self.calibration)
        self.progress, self._done = progress, 0

    def scheme_of(self, layer: Layer) -> Scheme:
        return self.scheme[layer.name] if isinstance(self.scheme, Mapping) else self.scheme

    def check(self, layers: Iterable[Layer]) -> None:
        """Raises ValueError if a scheme needs moments of a layer for which the calibration has none.

        Layers on meta have no values to quantise. They get those of a checkpoint.
        """
        for layer in layers:
            if not layer.weight.is_meta:
                self._moments_of(layer)

    def _moments_of(self, layer: Layer) -> Tensor | None:
        """The moments that the scheme of ``layer`` needs; None if it needs none."""
        scheme = self.scheme_of(layer)
        if not scheme.needs_moments:
            return None
        if layer.name not in self.calibration.moments:
            raise ValueError(
                f"int8fx.convert: {scheme} needs moments of the inputs of layer {layer.name!r}; legal: "
                "calibration=int8fx.calibrate(model, data, moments=True), with data that reaches it, or skip it"
            )
        moments, K = self.calibration.moments[layer.name], layer.oriented().shape[-1]
        _check_shape("moments", moments, (K, K), layer)
        return moments

    def __call__(self, tied: list[Layer]) -> PackedTensors:
        """The packed tensors: ordinary ones in any grad mode; fake ones for a fake weight."""
        weight, scheme = tied[0].oriented(), self.scheme_of(tied[0])
        with torch.inference_mode(False), torch.no_grad(), detect_fake_mode(weight) or nullcontext() as fake:
            count = scheme.static_columns(weight.shape[-1])
            columns = self.columns.choose(tied, count) if count else None
            has_values = fake is None and not weight.is_meta
            moments = self._moments_of(tied[0]) if has_values else None
            try:
                if not has_values:  # only the form of the tensors counts
                    tensors = pack_weight(weight, scheme.grouping, scheme.rotation, columns)
                else:
                    tensors = _pack(weight, scheme, columns, moments)
            except ValueError as error:
                raise ValueError(f"int8fx.convert: layer {tied[0].name!r}: {error}") from None
            tensors = tensors._replace(codes=frozen(tensors.codes))
        self._done += 1
        if self.progress is not None:
            self.progress(self._done)
        return tensors

    def reading(self, layer: Layer) -> Reading:
        """How the module of ``layer`` uses its packed weight."""
        assert layer.layout is not None
        K = layer.oriented().shape[-1]
        return Reading(layer.layout, layer.weight.dtype, self.scheme_of(layer), layer.recipe.kernel_dims, layer.name, K)
