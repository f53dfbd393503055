"""diffusers: ``save_pretrained``, ``from_pretrained`` and back, ``from_pretrained(..., quantization_config=...)``.

diffusers knows quantizers by two tables. Without an entry there, and without ``quantization_config`` in a saved
``config.json``, it would take the float weights of an int8 checkpoint for missing ones: their memory stays
uninitialised, with no more than a warning. This file enters `Int8FxQuantizer`. It makes ``save_pretrained`` write the
configuration, and the guards that files of transformers have. It does not import transformers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import safetensors.torch
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from ..conversion import convert as conversion
from ..conversion.format import FORMAT, VERSION
from ..conversion.layers import layer_name
from ..conversion.packed import PackedModule, frozen, refuse_unfit, take_contents, tie_equal_columns, unpack
from ..schemes import Scheme, parse_scheme, stored_text
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


class _Method(str):
    """The name of a method, in the form of diffusers' enum of them."""

    value = METHOD


class StoredConfig:
    """``quantization_config`` as ``config.json`` holds it. The tensors of a checkpoint say how each weight is packed.

    Raises:
        ValueError: it is of a newer int8fx.
    """

    quant_method = _Method(METHOD)

    def __init__(self, content: Mapping[str, Any]) -> None:
        if "version" not in content:  # what a user wrote
            content = {**content, "scheme": stored_text(parse_scheme(content["scheme"]))}
        self.content = {"quant_method": METHOD, "version": VERSION, **content}
        if self.content["version"] > VERSION:
            version = self.content["version"]
            raise ValueError(f"int8fx: format version {version}; this int8fx reads up to {VERSION}: update it")

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], **_: Any) -> StoredConfig:
        return cls(content)

    def to_dict(self) -> dict[str, Any]:
        return self.content


class Int8FxQuantizer(DiffusersQuantizer):
    """What diffusers calls to load and save models.

    A float checkpoint is loaded as it is, then converted. For an int8 checkpoint, the model is converted while it is on
    meta, and the tensors are loaded as they are.

    Args:
        quantization_config: a `StoredConfig`, or what the user passes: an `int8fx.Int8FxConfig`.
    """

    use_keep_in_fp32_modules = True  # as without a quantizer

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(StoredConfig(quantization_config.to_dict()), **kwargs)  # type: ignore[arg-type]
        self.headers: dict[str, Tensor] | None = None  # of all tensors of the files; of a single file: None
        self.stored: set[str] = set()  # names of the tensors of packed weights that the files have
        self.loaded: set[str] = set()

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # adapters

    @property
    def is_compileable(self) -> bool:
        return True

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError(
                "int8fx: diffusers' models are not loaded to disk as int8; legal: a device_map of devices and 'cpu'"
            )

    # ---- loading -----------------------------------------------------------------------------------------------------

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """``loaded_keys`` without guards: diffusers would report them as unexpected."""
        self.headers = dict(_headers(checkpoint_files))
        return [key for key in loaded_keys if not (key + CODES in self.headers and is_guard(self.headers[key]))]

    def preprocess_model(self, model: Any, **kwargs: Any) -> Any:
        return self._process_model_before_weight_loading(model, **kwargs)

    def _process_model_before_weight_loading(
        self, model: Any, state_dict: Mapping[str, Tensor] | None = None, **_: Any
    ) -> Any:
        headers = self.headers if self.headers is not None else state_dict or {}
        schemes = read_schemes(headers)
        if self.pre_quantized and self.headers is not None:
            self._check_claims(schemes)
        if schemes:
            convert_as_stored(model, schemes)
            self._check(model, headers)
        return model

    def _check_claims(self, stored: Mapping[str, Scheme]) -> None:
        """Raises ValueError if ``config.json`` lists a packed layer of which the files have no format."""
        lost = sorted(set(self.quantization_config.to_dict().get("select") or ()) - {layer_name(n) for n in stored})
        if lost or not stored:
            what = f"{lost[0]!r} is packed" if lost else "the model is packed"
            raise ValueError(f"int8fx: config.json says that {what}, and the checkpoint lacks its tensors")

    def _check(self, model: nn.Module, headers: Mapping[str, Tensor]) -> None:
        """Raises ValueError or RuntimeError if tensors of packed weights do not fit ``model``, which is converted."""
        here = packed_names(model)
        names = {name + part for name in here for part in ("", *PARTS)} & headers.keys()
        given = {name: headers[name] for name in names if not is_guard(headers[name])}
        self.stored = {name + part for name in here for part in PARTS} & model.state_dict().keys()
        check_unused(model, set(given))
        refuse_unfit(model, {name: t if name.endswith(FORMAT) else t.to("meta") for name, t in given.items()}, "")

    def check_if_quantized_param(self, model: Any, param_value: Any, param_name: str, *_: Any, **__: Any) -> bool:
        return param_name in self.stored

    def create_quantized_param(  # type: ignore[override]
        self, model: nn.Module, cast: Tensor, name: str, device: Any, stored: Mapping[str, Tensor], *_: Any, **__: Any
    ) -> None:
        """Puts a tensor of a packed weight into ``model``, as it is in ``stored``: ``cast`` has the model's dtype."""
        path, leaf = name.rpartition(".")[::2]
        owner, value = model.get_submodule(path), stored[name].to(device)
        if leaf in owner._parameters:
            owner._parameters[leaf] = frozen(value)
        else:
            owner._buffers[leaf] = value
        self.loaded.add(name)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        if not self.stored:
            content = self.quantization_config.to_dict()
            scheme = parse_scheme(content["scheme"], stored=True)
            return conversion.convert(model, scheme, select=content.get("select"), skip=content.get("skip") or ())
        if lost := sorted(self.stored - self.loaded):
            raise RuntimeError(
                f"int8fx: {lost[0]!r} was not loaded as it is stored; legal: from_pretrained without offload_state_dict"
            )
        refuse_unfit(model, model.state_dict(), "")
        tie_equal_columns(model)
        take_contents(model)
        conversion.load_kernels(model)
        describe(model)
        return model

    # ---- afterwards --------------------------------------------------------------------------------------------------

    def get_state_dict_and_metadata(self, state_dict: Mapping[str, Tensor], **_: Any) -> tuple[dict, dict]:  # type: ignore[override]
        """The state dict with a guard for each packed weight, and metadata, as in `integrations.transformers`."""
        packed = [k.removesuffix(CODES) for k in state_dict if k.endswith(CODES)]
        guards = {name: guard() for name in packed if name + FORMAT in state_dict}
        return {**state_dict, **guards}, dict(WANTED)

    def _dequantize(self, model: Any) -> Any:
        for module in list(model.modules()):
            if isinstance(module, PackedModule):
                unpack(module)
        content = {key: value for key, value in model.config.items() if key != "quantization_config"}
        model._internal_dict = type(model.config)(content)
        return model


def describe(model: Any) -> None:
    """Makes a model of diffusers that has packed weights say so: in its configuration, and by its quantizer.

    Raises:
        ValueError: another quantizer of diffusers has quantised other weights.
    """
    present = getattr(model, "hf_quantizer", None)
    if present is not None and not isinstance(present, Int8FxQuantizer):
        raise ValueError(
            f"int8fx: some layers are quantised by {present.quantization_config.quant_method}, and others by int8fx; "
            "no file of diffusers holds both. Legal: one of them"
        )
    scheme, select = scheme_and_layers(model)
    config = StoredConfig({"version": VERSION, "scheme": stored_text(scheme), "skip": [], "select": select})
    model.hf_quantizer = Int8FxQuantizer(config)
    model.register_to_config(quantization_config=config.to_dict())


def describe_when_saved() -> None:
    """Makes ``save_pretrained`` of diffusers' models describe them first. Called once, when diffusers has them.

    Their files get checksums from then on: diffusers calls ``safetensors.torch.save_file`` by this name.
    """
    from diffusers.models.modeling_utils import ModelMixin

    describe_before_saving(ModelMixin, describe)
    safetensors.torch.save_file = adds_checksums(safetensors.torch.save_file)


def _headers(files: list[str]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of ``files`` by name: formats as they are, of others only dtype and shape, on meta."""
    for file in files:
        opened = open_file(file)
        for key in opened.keys():  # noqa: SIM118  not always a dict
            yield key, (read_tensor if key.endswith(FORMAT) else read_header)(opened, key)


auto.AUTO_QUANTIZER_MAPPING[METHOD] = Int8FxQuantizer
auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = StoredConfig
