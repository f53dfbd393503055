"""``convert``: packs the weights of a model to int8 and has the rewriting passes run at compile time."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode

from ..schemes import LLMInt8, Rotated, Scheme, llm_int8
from ..schemes.calibration import Calibration
from ..schemes.gptq import round_weight
from ..schemes.quantize import quantize_weight
from .layers import Layer, check_modules, choose, grouped, plan
from .packed import PackedWeight, Packing, pack_modules
from .recipes import Recipe, attention_forward
from .selection import Selection

LEFT = "int8fx_left"  # attribute of a converted model: layer name -> why it was left


def convert(
    model: Any,
    scheme: Scheme | None = None,
    *,
    select: Selection | None = None,
    skip: Selection = (),
    calibration: Calibration | None = None,
) -> Any:
    """Packs ``model``'s weights to int8, in place, and returns ``model``.

    Weights of linear layers, attention, fused experts and bare Parameters used in products become int8 codes and a
    float32 scale per output channel. ``torch.compile(model)`` then rewrites what is left of dequantised products: the
    passes are appended to Inductor's list (`int8fx.uninstall` takes them out).

    Args:
        model: an ``nn.Module``, a ``torch.fx.GraphModule`` or a ``torch.export.ExportedProgram``.
        scheme: `llm_int8()` by default, or `rotated()`.
        select: the layers to convert: names or patterns as in ``model.layers.*.q_proj`` or ``lm_head``, or a function
            (name, module) -> bool. By default all but output embeddings and 1x1 convolutions; both can be selected.
        skip: the layers to leave, in the same form.
        calibration: what `calibrate` found of this model: schemes with static columns choose them by it. Layers that it
            knows nothing of keep the columns of largest weight, the same in all weights beside each other.

    Raises:
        TypeError: ``model`` or an argument is of the wrong kind.
        ValueError: a layer cannot be converted (already quantised, on meta, integer, complex or non-finite weights, K >
            133,144), a pattern matches nothing, or the scheme needs more of the calibration. The message names it; the
            model is as it was.

    If it is interrupted, or memory runs out, some layers are converted and the others are not, each of them whole: the
    model still works. ``convert(model, select=...)`` of the rest goes on.
    """
    scheme = llm_int8() if scheme is None else scheme
    if not isinstance(scheme, (LLMInt8, Rotated)):
        raise TypeError(
            f"int8fx.convert: scheme is {scheme!r}; legal: int8fx.llm_int8(threshold=...), int8fx.rotated(...)"
        )
    if calibration is not None and not isinstance(calibration, Calibration):
        raise TypeError(f"int8fx.convert: calibration is {calibration!r}; legal: what int8fx.calibrate returns")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("int8fx.convert: the model is a ScriptModule; legal: the eager model it was made from")
    if isinstance(model, (torch.fx.GraphModule, torch.export.ExportedProgram)):
        from .graph_module import convert_graph

        converted = convert_graph(model, scheme, calibration, select, skip)
    elif isinstance(model, nn.Module):
        converted = _convert_module(model, scheme, calibration, select, skip)
    else:
        raise TypeError(
            f"int8fx.convert: found {type(model).__name__}; legal: nn.Module, torch.fx.GraphModule, "
            "torch.export.ExportedProgram"
        )
    if not converted:
        warnings.warn("int8fx.convert: no layer was converted; int8fx.summary(model) says why", stacklevel=2)
    from ..passes.inductor import install

    install()
    return model


def _convert_module(
    model: nn.Module, scheme: Scheme, calibration: Calibration | None, select: Selection | None, skip: Selection
) -> int:
    check_modules(model)
    layers = plan(model, select, skip)
    chosen = choose(layers)
    pack = Pack(scheme, calibration, chosen)
    leave_reasons(model, layers)
    _leave_fast_paths(model, {id(layer.module) for layer in chosen})
    pack_layers(chosen, pack)
    return len(chosen)


def leave_reasons(model: nn.Module, layers: list[Layer]) -> None:
    """Notes on the model, for `summary`, why layers were left."""
    setattr(model, LEFT, {layer.name: layer.reason for layer in layers if layer.reason is not None})


def pack_layers(chosen: list[Layer], pack: Pack) -> None:
    """Packs the weights of ``chosen``, module by module; float weights are freed as it goes.

    Modules that share a weight are packed together: an interruption does not come between them.
    """
    for group in _together(chosen):
        packed: dict[int, tuple[Tensor, ...]] = {}
        for tied in grouped(group, lambda layer: id(layer.weight)):
            packed[id(tied[0].weight)] = pack(tied)
        ready = []
        for own in grouped(group, lambda layer: id(layer.module)):
            weights = {}
            for layer in own:
                assert layer.layout is not None
                weights[layer.parameter] = (*packed[id(layer.weight)], pack.describe(layer))
            recipe = own[0].recipe
            forward = recipe.forward if set(recipe.layouts) == set(weights) else _own_forward(recipe)
            ready.append(Packing(own[0].module, weights, forward))
        pack_modules(ready)


class Pack:
    """Packs ``layers`` for a scheme: ``pack([layer, ...])`` the one weight that these of them share.

    Equal columns of several weights are one tensor: products that read the same x then can share its quantisation.

    Raises:
        ValueError: the scheme needs moments, and the calibration has none of a layer.
    """

    def __init__(self, scheme: Scheme, calibration: Calibration | None, layers: Iterable[Layer]) -> None:
        self.scheme, self.calibration = scheme, calibration or Calibration()
        self._columns: dict[tuple, Tensor] = {}
        self._sizes: dict[tuple[str, int], Tensor] = {}  # of columns without data
        for layer in layers:
            if scheme.rounding == "gptq" and layer.name not in self.calibration.moments:
                raise ValueError(
                    f"int8fx.convert: rounding='gptq' knows nothing of the inputs of layer {layer.name!r}; legal: "
                    "calibration=int8fx.calibrate(model, data, moments=True), with data that reaches it, or skip it"
                )
            if scheme.static_columns(layer.oriented().shape[-1]) and layer.name not in self.calibration.absmax:
                size = layer.oriented().float().square().flatten(0, -2).sum(0)
                self._sizes[_beside(layer)] = self._sizes.get(_beside(layer), 0) + size

    def __call__(self, tied: list[Layer]) -> tuple[Tensor, ...]:
        """Buffers by `packing.SUFFIXES`: ordinary tensors in any grad mode, fake ones of a fake weight."""
        weight, block = tied[0].oriented(), self.scheme.block
        with torch.inference_mode(False), torch.no_grad(), detect_fake_mode(weight) or nullcontext() as fake:
            columns, kept = None, None
            if count := self.scheme.static_columns(weight.shape[-1]):
                columns = self._choose_columns(tied, count)
                if fake is None:
                    columns = self._columns.setdefault((columns.device, *columns.tolist()), columns)
                kept = weight.index_select(-1, columns).clone()
            if self.scheme.rounding == "gptq" and fake is None:
                codes, scale, _, kept = round_weight(weight, self.calibration.moments[tied[0].name], block, columns)
            else:
                codes, scale = quantize_weight(weight, block, columns)
            return (codes, scale) if columns is None or kept is None else (codes, scale, columns, kept)

    def _choose_columns(self, tied: list[Layer], count: int) -> Tensor:
        """The columns to keep, ascending: those with the largest absmax in the calibration data of these layers.

        Without data, those that are largest in Euclidean norm, whose rounding would cost most for inputs that are all
        alike: norms over the weights of all layers beside each other, which often read the same x.
        """
        found = [self.calibration.absmax[t.name] for t in tied if t.name in self.calibration.absmax]
        size = torch.stack(found).amax(0) if found else self._sizes[_beside(tied[0])]
        return size.to(tied[0].weight.device).topk(count).indices.sort().values

    def describe(self, layer: Layer) -> PackedWeight:
        assert layer.layout is not None
        scheme = self.scheme
        return PackedWeight(layer.layout, layer.weight.dtype, scheme.threshold, layer.recipe.kernel_dims, scheme.block)


def _beside(layer: Layer) -> tuple[str, int]:
    """What layers have in common that are in one module and have inputs of one width."""
    return layer.name.rpartition(".")[0], layer.oriented().shape[-1]


def _own_forward(recipe: Recipe):
    """Attention leaves its fused path even if only some of its weights are packed; others run their own forward."""
    return attention_forward if recipe.forward is attention_forward else None


def _together(chosen: list[Layer]) -> list[list[Layer]]:
    """``chosen`` in groups: layers of one module, and of modules that share a weight, are in one."""
    group_of: dict[int, list[Layer]] = {}  # by the id of a module or a weight
    for layer in chosen:
        found = [group_of.get(key, []) for key in (id(layer.module), id(layer.weight))]
        merged = [*found[0], *(found[1] if found[1] is not found[0] else []), layer]
        for member in merged:
            group_of[id(member.module)] = group_of[id(member.weight)] = merged
    return list({id(group): group for group in group_of.values()}.values())


def _leave_fast_paths(model: nn.Module, converted: set[int]) -> None:
    """Turns off the fused inference paths of ``nn.TransformerEncoder(Layer)``, which know float weights only."""
    for module in model.modules():
        if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerEncoder)) and any(
            id(m) in converted for m in module.modules()
        ):
            if isinstance(module, nn.TransformerEncoderLayer):
                module.activation_relu_or_gelu = 0
            else:
                module.use_nested_tensor = False
