"""transformers: ``from_pretrained(..., quantization_config=Int8FxConfig(...))``, ``save_pretrained`` and back.

`Int8FxConfig` is what a user passes and what ``config.json`` holds. `Int8FxQuantizer` is what transformers calls:

- A float checkpoint is quantised while it is loaded. As soon as the weights that are quantised together have arrived,
  they are packed and freed.
- An int8 checkpoint says which weights are packed, and how: they have ``<name>_codes`` and ``<name>_format``. The model
  is converted on the meta device accordingly, and the tensors are loaded as they are.

Beside each ``<name>_codes`` a saved file has a guard: a tensor ``<name>`` of one byte. Without int8fx, transformers
would find the float weight missing and initialise it at random, with no more than a warning. The guard has a wrong
shape, which is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.conversion_mapping import PrefixChange, get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming, rename_source_key
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..conversion import convert as conversion
from ..conversion.format import FORMAT, VERSION, read_scheme
from ..conversion.layers import Layer, check_weight, grouped, layer_name, packed_layers
from ..conversion.modules import check_what_is_loaded, leave_fast_paths, pack_layers
from ..conversion.packed import PackedModule, is_packed, join, refuse_unfit, tie_equal_columns
from ..schemes import LLMInt8, Rotated, Scheme, llm_int8, parse_scheme
from ..schemes.calibration import Calibration
from ..schemes.weight import CODES, COLUMNS, COLUMNS_WEIGHT, SCALE

METHOD = "int8fx"
_PARTS = (CODES, SCALE, FORMAT, COLUMNS, COLUMNS_WEIGHT)


@register_quantization_config(METHOD)
class Int8FxConfig(QuantizationConfigMixin):
    """How `from_pretrained` quantises a model, and in ``config.json``, how it was quantised.

    Args:
        scheme: as `int8fx.convert` takes it, or its text: ``"rotated(columns=0)"``.
        skip: names and patterns of layers that stay in 16 bits, as in `int8fx.convert`.
        select: names and patterns of the layers to convert; by default as in `int8fx.convert`.
        modules_to_not_convert: the same as ``skip``, under transformers' name.
        version: of the checkpoint's format. Written by int8fx.
        llm_int8_threshold: bitsandbytes' name for ``scheme=llm_int8(threshold=...)``. 0.0 means plain int8, as there.
        llm_int8_skip_modules: bitsandbytes' name for ``skip``.
        llm_int8_enable_fp32_cpu_offload: accepted. int8 weights run on any device, so nothing is kept in float32.
        llm_int8_has_fp16_weight: only False is legal: packed weights are not trained.

    Raises:
        ValueError, TypeError: an argument is illegal.
    """

    def __init__(
        self,
        scheme: Scheme | str | None = None,
        skip: list[str] | str | None = None,
        select: list[str] | str | None = None,
        *,
        modules_to_not_convert: list[str] | None = None,
        version: int = VERSION,
        llm_int8_threshold: float | None = None,
        llm_int8_skip_modules: list[str] | None = None,
        llm_int8_enable_fp32_cpu_offload: bool = False,
        llm_int8_has_fp16_weight: bool = False,
        **unknown: Any,
    ) -> None:
        unknown.pop("quant_method", None)
        if unknown:
            raise TypeError(f"Int8FxConfig: unknown arguments {sorted(unknown)}; legal: scheme, skip, select")
        if llm_int8_has_fp16_weight:
            raise ValueError(
                "Int8FxConfig: llm_int8_has_fp16_weight=True trains 16-bit weights; int8fx has none: train adapters "
                "(LoRA) on the int8 model, or leave layers out with skip=[...]"
            )
        if llm_int8_threshold is not None:
            if scheme is not None:
                raise ValueError("Int8FxConfig: scheme and llm_int8_threshold; legal: one of them")
            scheme = llm_int8(llm_int8_threshold or None)
        if version > VERSION:
            raise ValueError(f"Int8FxConfig: format version {version}; this int8fx reads up to {VERSION}: update it")
        if isinstance(scheme, str):
            scheme = parse_scheme(scheme)
        elif not isinstance(scheme, (LLMInt8, Rotated, type(None))):
            raise TypeError(f"Int8FxConfig: scheme is {scheme!r}; legal: int8fx.llm_int8(...), int8fx.rotated(...)")
        self.quant_method: Any = METHOD
        self.version = version
        self.scheme: Scheme = scheme or llm_int8()
        self.skip = [*_names(skip), *_names(modules_to_not_convert), *_names(llm_int8_skip_modules)]
        self.select = None if select is None else _names(select)

    @property
    def modules_to_not_convert(self) -> list[str]:
        return self.skip

    def to_dict(self) -> dict[str, Any]:
        selection = {"skip": self.skip} | ({} if self.select is None else {"select": self.select})
        return {"quant_method": METHOD, "version": self.version, "scheme": str(self.scheme), **selection}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


def _names(names: list[str] | str | None) -> list[str]:
    return [] if names is None else [names] if isinstance(names, str) else list(names)


@dataclass(frozen=True)
class _Schemes:
    """The scheme of each layer, as ``convert`` takes a plan."""

    schemes: Mapping[str, Scheme]
    calibration: Calibration | None = None


class _Pack(ConversionOps):
    """Takes a float weight from transformers, and packs its layer when all that belongs together has arrived."""

    def __init__(self, quantizer: Int8FxQuantizer) -> None:
        self.quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], *_: Any, model=None, missing_keys=None, **__: Any) -> dict:
        for name, value in input_dict.items():
            self.quantizer.take(model, name, value[0] if isinstance(value, list) else value, missing_keys)
        return {}


@register_quantizer(METHOD)
class Int8FxQuantizer(HfQuantizer):
    """What transformers calls to quantise, load and save models."""

    requires_calibration = False
    is_trainable = True  # adapters on top are
    is_compileable = True
    quantized_element_size = 1

    def __init__(self, quantization_config: Int8FxConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.quantization_config: Any = quantization_config
        self.prepared: conversion.Prepared | None = None
        self.groups: dict[str, list[Layer]] = {}  # name of a float weight -> the layers that are packed with it
        self.arrived: set[str] = set()

    def is_serializable(self) -> bool:
        return True

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        devices = device_map.values() if isinstance(device_map, dict) else ()
        if not self.pre_quantized and "disk" in devices:
            raise ValueError(
                "int8fx: quantising while loading does not offload to disk; legal: save the int8 model first (int8fx "
                "convert, or from_pretrained on the CPU and save_pretrained), then load that with this device_map"
            )

    # ---- before loading ----------------------------------------------------------------------------------------------

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **_: Any) -> Any:
        _tie_on_meta(model, _names_in(model, self, checkpoint_files))
        if self.pre_quantized:
            schemes = self._schemes_in(model, checkpoint_files)
            conversion.convert(model, _Schemes(schemes)) if schemes else None
            _expect_packed_names(model)
            return model
        config = self.quantization_config
        self.prepared = conversion.prepare(model, config.scheme, select=config.select, skip=config.skip)
        chosen = self.prepared.chosen
        leave_fast_paths(model, {id(layer.module) for layer in chosen})
        tied: dict[int, list[str]] = {}
        for name, p in model.named_parameters(remove_duplicate=False):
            tied.setdefault(id(p), []).append(name)
        for together in _packed_together(chosen, config.scheme.needs_columns):
            for layer in together:
                for name in tied[id(layer.weight)]:
                    self.groups[name] = together
        return model

    def _schemes_in(self, model: Any, checkpoint_files: Any) -> dict[str, Scheme]:
        """Layer name -> scheme, for the packed weights of a checkpoint that ``model`` has.

        Raises:
            ValueError: a packed weight lacks a part, or its format cannot be read.
        """
        state = model.state_dict()
        layers: dict[int, list[str]] = {}
        for name, p in model.named_parameters(remove_duplicate=False):
            layers.setdefault(id(p), []).append(name)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        renamings = _renamings(model, self)
        schemes: dict[str, Scheme] = {}
        alone: dict[str, str] = {}  # layer name -> weight that is stored without codes: its tied twin has them
        for weight, parts in _packed_in(checkpoint_files).items():
            name, _ = rename_source_key(weight, renamings, [], model.base_model_prefix, state)
            if name not in parameters:
                continue  # of a head that this class does not have
            if CODES not in parts:
                alone[layer_name(name)] = weight
                continue
            scheme = _checked_scheme(weight, parts)
            for tied in layers[id(parameters[name])]:
                schemes[layer_name(tied)] = scheme
        for layer in alone.keys() - schemes.keys():
            raise ValueError(f"int8fx: the checkpoint lacks {alone[layer] + CODES!r}; it is incomplete")
        return schemes

    # ---- while loading a float checkpoint ----------------------------------------------------------------------------

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        return param_name in self.groups

    def get_quantize_ops(self) -> _Pack:
        return _Pack(self)

    def take(self, model: nn.Module, name: str, value: Tensor, missing_keys: set[str] | None) -> None:
        """Puts a float weight into its module, and packs the layers of its group if it is the last one."""
        group = self.groups[name]
        path, _, parameter = name.rpartition(".")
        meta = model.get_submodule(path)._parameters[parameter]
        weight = nn.Parameter(value, requires_grad=False)
        for tied, p in list(model.named_parameters(remove_duplicate=False)):
            if p is meta:
                owner, _, leaf = tied.rpartition(".")
                model.get_submodule(owner)._parameters[leaf] = weight
                if missing_keys is not None:
                    missing_keys.discard(tied)
        for layer in group:
            if layer.weight is weight:
                check_weight(layer.name, weight, layer.oriented().shape[-1])
        if all(not layer.weight.is_meta for layer in group):
            self._pack(group)

    def _pack(self, group: list[Layer]) -> None:
        assert self.prepared is not None
        pack_layers(group, self.prepared.quantizer)
        for name in [name for name, layers in self.groups.items() if layers is group]:
            del self.groups[name]

    # ---- after loading -----------------------------------------------------------------------------------------------

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        if self.prepared is not None:
            for group in {id(group): group for group in self.groups.values()}.values():
                self._pack(group)  # the checkpoint did not have all of it, and transformers initialised the rest
            check_what_is_loaded(model)
            conversion.finish(model, self.prepared)
            self.prepared = None
        else:
            _tie_packed(model)
            refuse_unfit(model, model.state_dict(), "")
            tie_equal_columns(model)
        describe(model, self)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        from ..conversion.packed import unpack

        for module in list(model.modules()):
            if isinstance(module, PackedModule):
                unpack(module, dtype)
        return model

    # ---- saving ------------------------------------------------------------------------------------------------------

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The state dict with a guard for each packed weight, see above.

        Of tied weights, only the codes are stored once: transformers ties Parameters when it loads, and not buffers.
        """
        state: dict[str, Tensor] = dict(model.state_dict())
        first: dict[int, str] = {}
        for key in [key for key in state if key.endswith(CODES) and key.removesuffix(CODES) + FORMAT in state]:
            weight, codes = key.removesuffix(CODES), state[key]
            if codes.is_meta or first.setdefault(codes.data_ptr(), weight) == weight:
                state[weight] = torch.zeros(1, dtype=torch.uint8)
            else:
                state |= {weight + part: state[weight + part].clone() for part in _PARTS[1:] if weight + part in state}
        return state, {}


def describe(model: Any, quantizer: Int8FxQuantizer | None = None) -> None:
    """Makes converted transformers models say so: in their configuration, and to the libraries that ask.

    `int8fx.convert` calls it for every model. Those inside others, such as PEFT's or sentence-transformers', are found;
    models that are not transformers' are left alone.
    """
    for inner in _outermost(model):
        if is_packed(inner):
            _describe(inner, quantizer)


def _outermost(model: Any) -> Iterator[Any]:
    """The transformers models in ``model`` that are not inside another one."""
    from transformers import PreTrainedModel  # when this file is loaded, transformers may be loading it

    if isinstance(model, PreTrainedModel):
        yield model
    elif isinstance(model, nn.Module):
        for child in model.children():
            yield from _outermost(child)


def _describe(model: Any, quantizer: Int8FxQuantizer | None) -> None:
    rows = list(packed_layers(model))
    schemes = [reading.scheme for *_, reading in rows if reading is not None]
    config = Int8FxConfig(max(set(schemes), key=schemes.count), select=sorted(row.name for row in rows))
    if quantizer is None:
        quantizer = Int8FxQuantizer(config, pre_quantized=True)
    quantizer.quantization_config = config
    model.hf_quantizer, model.config.quantization_config = quantizer, config
    model.is_quantized, model.quantization_method, model.is_loaded_in_8bit = True, METHOD, True
    model.half, model.float = (
        MethodType(cast, model) for cast in (nn.Module.half, nn.Module.float)
    )  # not refused here
    for module in model.modules():
        if hasattr(module, "get_input_embeddings"):  # models inside the model
            module.config._is_quantized = True
    _expect_packed_names(model)


def _expect_packed_names(model: Any) -> None:
    """Tells transformers the names of packed weights: what is tied, which keys it ignores, which conversions stay."""
    packed = {
        join(path, name)
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, PackedModule)
        for name in module.packed_weights
    }
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    for target, source in list(tied.items()):
        if target in packed and source in packed:
            del tied[target]
            tied[target + CODES] = source + CODES  # transformers ties Parameters; `_tie_packed` ties the buffers
    model.all_tied_weights_keys = tied
    guards = {f"^(.*\\.)?{re.escape(name)}$" for name in packed}
    model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *guards}
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        conversions = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [entry for entry in conversions if not isinstance(entry, PrefixChange)]
    model._weight_conversions = [entry for entry in conversions if not _makes_one_of(entry, packed)]


def _tie_packed(model: Any) -> None:
    """Makes packed weights that transformers ties share their buffers too, as their codes do."""
    for target, source in (model.all_tied_weights_keys or {}).items():
        if target.endswith(CODES) and source.endswith(CODES):
            path, _, name = target.removesuffix(CODES).rpartition(".")
            owner, _, leaf = source.removesuffix(CODES).rpartition(".")
            setattr(model.get_submodule(path), name, getattr(model.get_submodule(owner), leaf))


def _makes_one_of(entry: Any, names: set[str]) -> bool:
    """Whether a conversion, such as the merge of experts, makes a weight of ``names``. Packed ones stay merged."""
    if not isinstance(entry, WeightConverter):
        return False
    return any(re.search(pattern, name) for pattern in entry.target_patterns for name in names)


def _packed_together(chosen: list[Layer], by_siblings: bool) -> Iterator[list[Layer]]:
    """Groups of layers that are packed at once: of one module, of a shared weight, and of columns chosen together."""
    parent: dict[int, int] = {}

    def root(key: int) -> int:
        while parent.setdefault(key, key) != key:
            key = parent[key]
        return key

    siblings: dict[tuple[str, int], int] = {}
    for layer in chosen:
        parent[root(id(layer.module))] = root(id(layer.weight))
        if by_siblings:
            key = (layer.name.rpartition(".")[0], layer.oriented().shape[-1])
            parent[root(siblings.setdefault(key, id(layer.weight)))] = root(id(layer.weight))
    yield from grouped(chosen, lambda layer: root(id(layer.weight)))


def _names_in(model: Any, quantizer: Int8FxQuantizer, files: Any) -> set[str]:
    """The names that the weights of a checkpoint have in ``model``; a packed weight has its float name."""
    renamings, state = _renamings(model, quantizer), model.state_dict()
    keys = {key.removesuffix(CODES) for key in _files_of(files)}
    return {rename_source_key(key, renamings, [], model.base_model_prefix, state)[0] for key in keys}


def _tie_on_meta(model: Any, there: set[str]) -> None:
    """Ties the weights that ``model`` shares, unless the checkpoint has values for each: then transformers decides."""
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if not {target, source} <= there:
            path, _, name = target.rpartition(".")
            setattr(model.get_submodule(path), name, model.get_parameter(source))


def _files_of(files: Any) -> dict[str, str]:
    """Key -> file, for the safetensors files of a checkpoint."""
    keys: dict[str, str] = {}
    for file in [files] if isinstance(files, str) else files or ():
        if str(file).endswith(".safetensors"):
            with safe_open(file, framework="pt") as opened:
                keys |= dict.fromkeys(opened.keys(), str(file))
    return keys


def _renamings(model: Any, quantizer: Int8FxQuantizer) -> list[WeightRenaming]:
    mapping = get_model_conversion_mapping(model, None, quantizer) or []
    return [entry for entry in mapping if isinstance(entry, WeightRenaming)]


def _packed_in(files: Any) -> dict[str, dict[str, Any]]:
    """Weight name -> part -> (file, key), for the packed weights in safetensors files. A part may be missing."""
    keys = _files_of(files)
    weights = {key.removesuffix(part) for part in (CODES, FORMAT) for key in keys if key.endswith(part)}
    return {
        weight: {part: (keys[weight + part], weight + part) for part in _PARTS if weight + part in keys}
        for weight in sorted(weights)
        if sum(weight + part in keys for part in (CODES, SCALE, FORMAT)) >= 2  # names of others may end like these
    }


def _checked_scheme(weight: str, parts: dict[str, Any]) -> Scheme:
    """The scheme of a packed weight of a checkpoint, all of whose parts are there."""
    if FORMAT not in parts:
        raise ValueError(
            f"int8fx: the checkpoint has {weight + CODES!r} and lacks {weight + FORMAT!r}; it is incomplete"
        )
    file, key = parts[FORMAT]
    with safe_open(file, framework="pt") as opened:
        try:
            scheme = read_scheme(opened.get_tensor(key))
        except ValueError as error:
            raise ValueError(f"int8fx: {key!r} of the checkpoint: {error}") from error
        K = _last_size(*parts[CODES])
    needed = {CODES, SCALE, FORMAT} | ({COLUMNS, COLUMNS_WEIGHT} if scheme.static_columns(K) else set())
    if parts.keys() != needed:
        wrong = sorted(weight + part for part in parts.keys() ^ needed)
        raise ValueError(f"int8fx: {weight!r} of the checkpoint is {scheme}; missing or too many: {', '.join(wrong)}")
    return scheme


def _last_size(file: str, key: str) -> int:
    with safe_open(file, framework="pt") as opened:
        return opened.get_slice(key).get_shape()[-1]


conversion.AFTER_CONVERSION.append(describe)
