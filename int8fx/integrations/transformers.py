"""transformers: ``from_pretrained(..., quantization_config=Int8FxConfig(...))``, ``save_pretrained`` and back.

`Int8FxConfig` is what a user passes and what ``config.json`` holds. `Int8FxQuantizer` is what transformers calls:

- A float checkpoint is quantised while it is loaded. As soon as the weights that are quantised together have arrived,
  they are packed and freed.
- An int8 checkpoint says which weights are packed, and how: they have ``<name>_codes`` and ``<name>_format``. The model
  is converted on the meta device accordingly, and the tensors are loaded as they are.

Beside each ``<name>_codes`` a saved file has a guard: a tensor ``<name>`` of one byte. Without int8fx, transformers
would find the float weight missing and initialise it at random, with no more than a warning. The guard has a wrong
shape, which is an error.

`TorchAoQuantizer` and `describe_when_saved` are for weights that were packed one by one, without their model: a model
with some of them is saved and loaded as if `convert` had packed them.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.conversion_mapping import PrefixChange, get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming, rename_source_key
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..conversion import convert as conversion
from ..conversion.format import FORMAT, VERSION
from ..conversion.layers import Layer, check_weight, grouped, layer_name, quantised_by
from ..conversion.modules import check_what_is_loaded, leave_fast_paths, pack_layers
from ..conversion.packed import (
    PackedModule,
    is_packed,
    join,
    refuse_unfit,
    take_contents,
    tensors_of,
    tie_equal_columns,
)
from ..schemes import Scheme, llm_int8, of_bits, parse_scheme, stored_text
from ..schemes.weight import CODES
from .checksums import WANTED, adds_checksums
from .stored import (
    METHOD,
    PARTS,
    check_unused,
    convert_as_stored,
    describe_before_saving,
    guard,
    is_guard,
    open_file,
    packed_names,
    read_header,
    read_schemes,
    read_tensor,
    scheme_and_layers,
)


@register_quantization_config(METHOD)
class Int8FxConfig(QuantizationConfigMixin):
    """How `from_pretrained` quantises a model, and in ``config.json``, how it was quantised.

    Args:
        scheme: as `int8fx.convert` takes it, or its text: ``"rotated(columns=0)"``.
        bits: 8 or 4, in place of a scheme: `schemes.of_bits`.
        skip: names and patterns of layers that stay in 16 bits, as in `int8fx.convert`.
        select: names and patterns of the layers to convert; by default as in `int8fx.convert`.
        modules_to_not_convert: the same as ``skip``, under transformers' name.
        version: of the checkpoint's format. Written by int8fx: ``scheme`` is then a text as `stored_text` writes it.
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
        bits: int | None = None,
        modules_to_not_convert: list[str] | None = None,
        version: int | None = None,
        llm_int8_threshold: float | None = None,
        llm_int8_skip_modules: list[str] | None = None,
        llm_int8_enable_fp32_cpu_offload: bool = False,
        llm_int8_has_fp16_weight: bool = False,
        **unknown: Any,
    ) -> None:
        if version is not None and version > VERSION:
            raise ValueError(f"Int8FxConfig: format version {version}; this int8fx reads up to {VERSION}: update it")
        unknown.pop("quant_method", None)
        if unknown:
            raise TypeError(f"Int8FxConfig: unknown arguments {sorted(unknown)}; legal: scheme, bits, skip, select")
        if llm_int8_has_fp16_weight:
            raise ValueError(
                "Int8FxConfig: llm_int8_has_fp16_weight=True trains 16-bit weights; int8fx has none: train adapters "
                "(LoRA) on the int8 model, or leave layers out with skip=[...]"
            )
        if sum(given is not None for given in (scheme, bits, llm_int8_threshold)) > 1:
            raise ValueError("Int8FxConfig: more than one of scheme, bits and llm_int8_threshold; legal: one of them")
        if llm_int8_threshold is not None:
            scheme = llm_int8(llm_int8_threshold or None)
        if bits is not None:
            scheme = of_bits(bits)
        if isinstance(scheme, str):
            scheme = parse_scheme(scheme, stored=version is not None)
        elif not isinstance(scheme, Scheme | None):
            raise TypeError(f"Int8FxConfig: scheme is {scheme!r}; legal: int8fx.llm_int8(...), int8fx.rotated(...)")
        self.quant_method: Any = METHOD
        self.version = VERSION if version is None else version
        self.scheme: Scheme = scheme or llm_int8()
        self.skip = [*_names(skip), *_names(modules_to_not_convert), *_names(llm_int8_skip_modules)]
        self.select = None if select is None else _names(select)

    @property
    def modules_to_not_convert(self) -> list[str]:
        return self.skip

    def to_dict(self) -> dict[str, Any]:
        selection = {"skip": self.skip} | ({} if self.select is None else {"select": self.select})
        return {"quant_method": METHOD, "version": self.version, "scheme": stored_text(self.scheme), **selection}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()

    def get(self, name: str, default: Any = None) -> Any:
        """As of a dict: ``from_pretrained(path, config=model.config)`` takes the configuration of a model for one."""
        return self.to_dict().get(name, default)


def _names(names: list[str] | str | None) -> list[str]:
    if callable(names):
        raise TypeError(
            "Int8FxConfig: select and skip take names and patterns, which JSON can hold; for a function use convert"
        )
    return [] if names is None else [names] if isinstance(names, str) else list(names)


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
        self.parts: set[str] = set()  # names of the tensors of packed weights that are loaded

    def is_serializable(self) -> bool:
        return True

    def adjust_max_memory(self, max_memory: dict) -> dict:
        """While a model is quantised, a tenth of the memory is for the float weights that have arrived."""
        if self.pre_quantized:
            return max_memory
        return {device: int(0.9 * size) for device, size in max_memory.items()}

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        devices = device_map.values() if isinstance(device_map, dict) else ()
        if not self.pre_quantized and "disk" in devices:
            raise ValueError(
                "int8fx: quantising while loading does not offload to disk; legal: save the int8 model first (int8fx "
                "convert, or from_pretrained on the CPU and save_pretrained), then load that with this device_map"
            )

    # ---- before loading ----------------------------------------------------------------------------------------------

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **_: Any) -> Any:
        stored = _Stored(checkpoint_files, model, _renamings(model, self))
        _tie_on_meta(model, stored)
        if self.pre_quantized:
            self._convert_as_stored(model, stored)
            return model
        config = self.quantization_config
        if config.scheme.needs_moments:
            raise ValueError(
                f"int8fx: {config.scheme} needs data, which from_pretrained does not have; legal: load the float "
                "model, then int8fx.calibrate(model, data, moments=True) and int8fx.convert"
            )
        self.prepared = conversion.prepare(model, config.scheme, select=config.select, skip=config.skip)
        chosen = self.prepared.chosen
        leave_fast_paths(model, {id(layer.module) for layer in chosen})
        tied = _names_of(model)
        for together in _packed_together(chosen, config.scheme.needs_columns):
            for layer in together:
                for name in tied[id(layer.weight)]:
                    self.groups[name] = together
        return model

    def _convert_as_stored(self, model: Any, stored: _Stored) -> None:
        """Converts ``model``, which is on meta, so that it can take the packed weights of a checkpoint.

        Raises:
            ValueError, RuntimeError: a packed weight lacks a part, or has one too many or of another dtype or shape, or
                its format cannot be read. The message names it.
        """
        if not stored.keys:
            raise ValueError(
                "int8fx: found no file of an int8 checkpoint to read the formats of its weights from; legal: a folder "
                "as save_pretrained writes it. For a state_dict: int8fx.convert the model, then model.load_state_dict"
            )
        schemes = {name: stored.scheme(names) for names in _names_of(model).values() if (name := stored.packed(names))}
        self._check_claims(model, set(schemes))
        if schemes:
            names = _names_of(model)
            ids = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
            convert_as_stored(model, {n: scheme for name, scheme in schemes.items() for n in names[ids[name]]})
        _expect_packed_names(model)
        self.parts = {name + part for name in packed_names(model) for part in PARTS}
        given = stored.headers(packed_names(model))
        check_unused(model, set(given))
        refuse_unfit(model, given, "")

    def _check_claims(self, model: Any, packed: set[str]) -> None:
        """Raises ValueError if a layer of ``model`` that ``config.json`` lists as packed is not so in the files."""
        prefix = f"{model.base_model_prefix}."
        claimed = self.quantization_config.select or []
        claimed = {n for name in claimed for n in (name, prefix + name, name.removeprefix(prefix))}
        found = {layer_name(name) for names in _names_of(model).values() if packed & set(names) for name in names}
        here = {layer_name(name) for names in _names_of(model).values() for name in names}
        if lost := sorted((claimed & here) - found):
            raise ValueError(
                f"int8fx: config.json says that {lost[0]!r} is packed, and the checkpoint lacks its tensors; it is "
                "incomplete"
            )

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Tensors of packed weights keep the dtype that they are stored in."""
        if not self.parts.isdisjoint(converter.target_patterns):
            return None
        return super().get_new_dtype(converter, param, dtype)

    # ---- while loading a float checkpoint ----------------------------------------------------------------------------

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        return param_name in self.groups

    def get_quantize_ops(self) -> _Pack:
        return _Pack(self)

    def take(self, model: nn.Module, name: str, value: Tensor, missing_keys: set[str] | None) -> None:
        """Puts a float weight into its module, and packs the layers of its group if it is the last one."""
        assert self.prepared is not None
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
                check_weight(layer, self.prepared.quantizer.scheme_of(layer))
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
            _check_loaded(model)
            _tie_packed(model)
            refuse_unfit(model, model.state_dict(), "")
            tie_equal_columns(model)
            take_contents(model)
            conversion.load_kernels(model)
        describe(model, self)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        from ..conversion.packed import unpack

        # A saved configuration names it.
        float_dtype = getattr(torch, dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
        for module in list(model.modules()):
            if isinstance(module, PackedModule):
                unpack(module, float_dtype)
        return model

    # ---- saving ------------------------------------------------------------------------------------------------------

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The state dict with a guard for each packed weight, see above, and metadata that ask for checksums.

        Of tied weights, only the codes are stored once: transformers ties Parameters when it loads, and not buffers.

        Raises:
            ValueError: torchao has quantised other weights. The message names one.
        """
        for path, module in model.named_modules():
            if quantised_by(module) == "torchao":
                raise ValueError(
                    f"int8fx: layer {path!r} is quantised by torchao, and others by int8fx; no format of transformers "
                    "holds both. Legal: one of them, as int8fx.Int8FxConfig does"
                )
        state: dict[str, Tensor] = dict(model.state_dict())
        first: dict[int, str] = {}
        for key in [key for key in state if key.endswith(CODES) and key.removesuffix(CODES) + FORMAT in state]:
            weight, codes = key.removesuffix(CODES), state[key]
            if codes.is_meta or first.setdefault(codes.data_ptr(), weight) == weight:
                state[weight] = guard()
            else:
                state |= {weight + part: state[weight + part].clone() for part in PARTS[1:] if weight + part in state}
        return state, dict(WANTED)


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
    scheme, select = scheme_and_layers(model)
    config = Int8FxConfig(scheme, select=select)
    if quantizer is None:
        quantizer = Int8FxQuantizer(config, pre_quantized=True)
    quantizer.quantization_config = config
    model.hf_quantizer, model.config.quantization_config = quantizer, config
    model.is_quantized, model.quantization_method, model.is_loaded_in_8bit = True, METHOD, True
    # transformers refuses these of quantised models. A bound method would be pickled by name, as the one that refuses.
    model.half, model.float = partial(nn.Module.half, model), partial(nn.Module.float, model)
    for module in model.modules():
        if hasattr(module, "get_input_embeddings"):  # models inside the model
            module.config._is_quantized = True
    _expect_packed_names(model)


def _forget_others(model: Any) -> None:
    """Gives a float model a configuration of its own if it shares its with a model that was converted."""
    if getattr(model, "hf_quantizer", None) is not None or not _says_int8fx(model):
        return
    copied: dict[int, Any] = {}
    copy.deepcopy(model.config, copied)
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, PreTrainedConfig):
                vars(module)[name] = copied.get(id(value), value)
    del model.config.quantization_config


def _says_int8fx(model: Any) -> bool:
    return isinstance(getattr(model.config, "quantization_config", None), Int8FxConfig)


def _expect_packed_names(model: Any) -> None:
    """Tells transformers the names of packed weights: what is tied, which keys it ignores, which conversions stay."""
    packed = packed_names(model)
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


def _tie_on_meta(model: Any, stored: _Stored) -> None:
    """Ties the weights that ``model`` shares, unless the checkpoint has values for each: then transformers decides."""
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if not (stored.has(target) and stored.has(source)):
            path, _, name = target.rpartition(".")
            setattr(model.get_submodule(path), name, model.get_parameter(source))


def _names_of(model: nn.Module) -> dict[int, list[str]]:
    """Id of a Parameter -> its names, of which tied weights have several."""
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    return names


def _check_loaded(model: nn.Module) -> None:
    """Raises RuntimeError, naming it, if a tensor of a packed weight was not loaded: its memory is uninitialised."""
    for path, module in model.named_modules():
        if not isinstance(module, PackedModule):
            continue
        hooked = any(hasattr(m, "_hf_hook") for m in (module, *module.children()))
        for name in module.packed_weights:
            for key, tensor in tensors_of(module, name).named(name).items():
                if not getattr(tensor, "_is_hf_initialized", tensor.is_meta and hooked):
                    raise RuntimeError(f"int8fx: the checkpoint has no {join(path, key)!r} that fits; it is incomplete")


def _renamings(model: Any, quantizer: Int8FxQuantizer) -> list[WeightRenaming]:
    mapping = get_model_conversion_mapping(model, None, quantizer) or []
    return [entry for entry in mapping if isinstance(entry, WeightRenaming)]


class _Stored:
    """The files of a checkpoint: safetensors, or what ``torch.save`` wrote. Their keys by the names in ``model``.

    keys: name -> key. A part of a packed weight has the name that the model has for the weight, and the part's suffix.
    """

    def __init__(self, files: Any, model: Any, renamings: list[WeightRenaming]) -> None:
        self.files: dict[str, Any] = {}  # key -> an open file, or a dict of tensors
        for file in [files] if isinstance(files, str) else files or ():
            opened = open_file(file)
            self.files |= dict.fromkeys(opened.keys(), opened)
        self.keys: dict[str, str] = {}
        state, prefix = model.state_dict(), model.base_model_prefix
        for key in sorted(self.files):
            for part in ("", *PARTS):
                if not key.endswith(part):
                    continue
                weight = key.removesuffix(part)
                name, _ = rename_source_key(weight, renamings, [], prefix, state)
                if name not in state and weight in state:  # as transformers does when it loads
                    name, _ = rename_source_key(weight, [], [], prefix, state)
                if not part or name in state:
                    self.keys[name + part] = key

    def header(self, name: str) -> Tensor:
        """A tensor of the dtype and shape that the tensor ``name`` has, on meta."""
        return read_header(self.files[self.keys[name]], self.keys[name])

    def headers(self, weights: Iterable[str]) -> dict[str, Tensor]:
        """The headers of all parts of the packed ``weights``, and their formats as they are."""
        names = {weight + part for weight in weights for part in ("", *PARTS)} & self.keys.keys()
        headers = {name: self.read(name) if name.endswith(FORMAT) else self.header(name) for name in names}
        return {name: tensor for name, tensor in headers.items() if not is_guard(tensor)}

    def read(self, name: str) -> Tensor:
        return read_tensor(self.files[self.keys[name]], self.keys[name])

    def has(self, weight: str) -> bool:
        """Whether the files have values for the weight called ``weight``, packed or not."""
        return weight + CODES in self.keys or (weight in self.keys and not is_guard(self.header(weight)))

    def packed(self, names: list[str]) -> str | None:
        """One of the tied ``names`` if the files have this weight packed, or remains of it."""
        for name in names:
            if name + FORMAT in self.keys:
                return name
        for name in names:
            if (name + CODES in self.keys and self.header(name + CODES).dtype == torch.int8) or (
                name in self.keys and is_guard(self.header(name))
            ):
                return name
        return None

    def scheme(self, names: list[str]) -> Scheme:
        """The scheme of the packed weight ``names``. Raises ValueError if the files lack its codes or its format."""
        for part in (CODES, FORMAT):
            there = [name + part for name in names if name + part in self.keys]
            if not there:
                raise ValueError(f"int8fx: the checkpoint lacks {names[0] + part!r}; it is incomplete")
        [scheme] = read_schemes({self.keys[there[0]]: self.read(there[0])}).values()
        return scheme


# ---- weights that were packed one by one -----------------------------------------------------------------------------


class TorchAoQuantizer(TorchAoHfQuantizer):
    """transformers' own, for ``TorchAoConfig``. It makes what `int8fx.LLMInt8Config` packed a model of int8fx."""

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        super().validate_environment(*args, **kwargs)
        if self.pre_quantized and self._is_int8fx:
            raise ValueError(
                "int8fx: config.json names torchao's method with int8fx.LLMInt8Config, which has no checkpoints of its "
                "own; legal: int8fx.Int8FxConfig, as save_pretrained writes it"
            )

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        super()._process_model_after_weight_loading(model, **kwargs)
        if is_packed(model):
            check_what_is_loaded(model)
            describe(model)
        elif self._is_int8fx:
            warnings.warn(
                "int8fx.LLMInt8Config: no layer of this model was quantised: torchao's are nn.Linear and no heads; "
                "int8fx.Int8FxConfig quantises Conv1D and fused experts too",
                stacklevel=2,
            )
            self.remove_quantization_config(model)
        return model

    @property
    def _is_int8fx(self) -> bool:
        return type(self.quantization_config.quant_type).__name__ == "LLMInt8Config"


def describe_when_saved() -> None:
    """Makes ``save_pretrained`` describe a model first if none of its packed weights was packed together with it.

    Called once, when transformers has defined its models. Files of int8 models get checksums from then on.

    Without guards and configuration, transformers would load random weights in their place, with only a warning.
    """
    from transformers import modeling_utils

    describe_before_saving(modeling_utils.PreTrainedModel, _describe_if_unknown, _forget_others)
    modeling_utils.safe_save_file = adds_checksums(modeling_utils.safe_save_file)


def _describe_if_unknown(model: Any) -> None:
    if not _says_int8fx(model):
        describe(model)


conversion.AFTER_CONVERSION.append(describe)
AUTO_QUANTIZER_MAPPING["torchao"] = TorchAoQuantizer
