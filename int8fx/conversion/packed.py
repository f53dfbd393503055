"""Packed weights: int8 codes and their scales as plain tensors of the module that held the float Parameter.

The class of a packed module is a subclass of the class that the module had. So ``isinstance``, hooks, shared modules
and references to the module stay as they were. For a packed weight called ``weight`` the module has a frozen Parameter
and two buffers:

    weight_codes   [..., N, K] int8     the codes, also if the module uses the weight as [..., K, N]
    weight_scale   [..., N]    float32  absmax / 127 per output channel
    weight_format  [L]         uint8    which scheme this is (`format`)

Codes of 4 bits are ``[..., N, ceil(K / 2)]`` uint8, and G groups of columns have scales ``[..., N, G]`` (`formats`).
There are two more buffers if some input columns are not quantised, and others for some formats:

    weight_columns         [C]         int64   which columns they are
    weight_columns_weight  [..., N, C]         their weights, in the dtype of the float weight
    weight_zero_point      like weight_scale, int8 or uint8: of asymmetric codes
    weight_scale_range     [..., N, 2] float32: of scales that are quantised themselves

``state_dict`` holds exactly these. There is no tensor called ``weight``: who expects a float weight finds it missing.
The attribute ``module.weight`` is a view of the packed tensors as a float weight (`view.PackedWeight`); in a graph that
is being captured it is ``int8fx::dequantize`` of them, which the passes turn into int8 matmuls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.nn.utils import stateless

from .. import ops  # noqa: F401  registers torch.ops.int8fx
from ..graph.count import count_ops
from ..schemes import Scheme
from ..schemes.formats import FORMATS
from ..schemes.quantize import pack_weight
from ..schemes.weight import (
    CODES,
    COLUMNS,
    COLUMNS_WEIGHT,
    PER_CHANNEL,
    SCALE,
    SCALE_RANGE,
    SUFFIXES,
    ZERO_POINT,
    Int8Weight,
    PackedTensors,
)
from .accelerate import OFFLOADED, refuse_partial_offload
from .callers import is_called_in_trace
from .contents import READ, UNCHECKED, Checked, Contents, follow, may_read
from .format import FORMAT, format_tensor, read_scheme, same_arithmetic
from .loading import (
    PLAIN_HOOKS,
    PLAIN_LOADERS,
    Place,
    is_checked,
    is_readable,
    loads_as_written,
    running_load,
    set_checked,
    unfit_count,
    unfit_keys,
    unfit_others,
    unfit_weights,
)
from .peft import refuse_targets, refuse_trained_copy
from .reparametrize import Parameters, is_read_by_torch_utils, parametrized_name, refused
from .view import PackedWeight, is_captured, is_differentiated, is_transformed, unwrapped


@dataclass(frozen=True)
class Reading:
    """How a module uses one packed weight.

    layout: ``NK`` if it expects ``[..., N, K]`` (``F.linear``), ``KN`` if it expects ``[..., K, N]`` (``x @ w``).
    dtype: of the float weight that it expects.
    scheme: the scheme that the weight was quantised with.
    kernel_dims: how many dimensions of size 1 follow (2 for a 1x1 ``Conv2d``).
    layer: the name that the layer had when it was converted, for messages.
    K: how many input channels the weight has, if it is known.
    """

    layout: str
    dtype: torch.dtype
    scheme: Scheme
    kernel_dims: int = 0
    layer: str = ""
    K: int | None = None
    # What each call needs: format, group_size and in_features of the `Int8Weight`, and the dtypes that are stored.
    format: tuple[str | None, int | None, int | None] = field(init=False, repr=False, compare=False)
    codes_dtype: torch.dtype = field(init=False, repr=False, compare=False)
    scale_dtype: torch.dtype = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        grouping = self.scheme.grouping
        is_int8, has_fours = grouping.format == "int8", FORMATS[grouping.format].bits == 4
        format = None if is_int8 else grouping.format, grouping.size, self.K if has_fours else None
        for name, value in (
            ("format", format),
            ("codes_dtype", torch.uint8 if has_fours else torch.int8),
            ("scale_dtype", torch.uint8 if grouping.double_quant else grouping.scale_dtype),
        ):
            object.__setattr__(self, name, value)

    def weight(self, tensors: PackedTensors) -> Int8Weight:
        """The packed weight as the ops take it."""
        codes, scale, columns, columns_weight, *of_groups = tensors
        return Int8Weight(
            codes, scale, self.scheme.threshold, self.scheme.rotation, columns, columns_weight, *self.format, *of_groups
        )

    def shape(self, codes: Tensor) -> torch.Size:
        """``[..., N, K]`` of the weight that has these codes."""
        return codes.shape if self.K is None else torch.Size((*codes.shape[:-1], self.K))

    def oriented(self, w: Tensor) -> Tensor:
        """``w [..., N, K]`` as a view in the shape that the module expects."""
        if self.layout == "KN":
            w = w.transpose(-1, -2)
        return w.reshape(*w.shape, *[1] * self.kernel_dims) if self.kernel_dims else w


# ---- the tensors of a module ----------------------------------------------------------------------------------------


def tensors_of(owner: nn.Module, name: str) -> PackedTensors:
    """The packed tensors of the weight called ``name`` in ``owner``.

    Replicas hold their codes as plain attributes. Under FSDP1 codes are buffers.
    """
    codes, buffers = owner._parameters.get(name + CODES), owner._buffers
    scale, *others = (buffers.get(name + suffix) for suffix in SUFFIXES[1:])
    return PackedTensors(getattr(owner, name + CODES) if codes is None else codes, scale, *others)  # type: ignore[arg-type]


def frozen(codes: Tensor) -> nn.Parameter:
    """``codes`` as a Parameter that does not train. Tied weights have one, so this is done once."""
    return codes if isinstance(codes, nn.Parameter) else nn.Parameter(codes, requires_grad=False)


def store(owner: nn.Module, name: str, tensors: PackedTensors, scheme: Scheme) -> None:
    """Gives ``owner`` the packed tensors of the weight called ``name``, in place of its Parameter of that name."""
    codes, *others = tensors.named(name).items()
    owner._parameters.pop(name, None)
    with torch.inference_mode(False):
        owner._parameters[codes[0]] = frozen(codes[1])
        owner._buffers.update(others)
        owner._buffers[name + FORMAT] = format_tensor(scheme, codes[1].device)


# ---- moving, loading and saving packed weights ----------------------------------------------------------------------


class PackedState(nn.Module):
    """Moves, loads and saves the tensors of packed weights; mixed into the classes of modules that hold them."""

    def _packed_places(self) -> list[tuple[str, nn.Module, str, Scheme | None]]:
        """The packed weights that this class moves and loads: path of the owner module, that module, the weight's name,
        and its scheme if that is known."""
        raise NotImplementedError

    def _adopt(self, owner: nn.Module, name: str, form: Tensor) -> None:
        """Called when tensors are loaded whose format tensor is ``form``, of the same arithmetic as the weight's."""
        present = owner._buffers.get(name + FORMAT)
        owner._buffers[name + FORMAT] = form.to(present.device if present is not None else None, copy=True)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        weights = [(owner, name) for _, owner, name, _ in self._packed_places()]
        keys = [(_holder(owner, name + s), name + s) for owner, name in weights for s in (*SUFFIXES, FORMAT)]
        with _moved_separately([(tensors, key) for tensors, key in keys if tensors.get(key) is not None], fn):
            super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        if not is_checked(errors, prefix):
            self._check(state_dict, prefix, local_metadata, errors)
        for path, owner, name, _ in self._packed_places():
            key = prefix + join(path, name)
            if key in state_dict:  # the codes of version 1, or the guard of a file by `save_pretrained`
                state_dict.setdefault(key + CODES, state_dict.pop(key))
            form = state_dict.get(key + FORMAT)
            if form is not None and is_readable(form):
                self._adopt(owner, name, form)
            elif form is None and key + CODES in state_dict:  # version 1
                state_dict[key + FORMAT] = owner._buffers[name + FORMAT]
            _untie_columns(owner._buffers, name, state_dict.get(key + COLUMNS))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    def _check(
        self, state_dict: Mapping[str, Any], prefix: str, metadata: Mapping[str, Any], errors: list[str]
    ) -> None:
        """Checks a load that did not begin at a model with `refuse_unfit`: before the first packed weight, all of them.

        If it began here, nothing at all was loaded yet.
        """
        load, assign = running_load(errors), metadata.get(ASSIGN, False)
        if load is not None and load.model is self:
            refuse_unfit(self, state_dict, prefix, metadata, errors=errors)
        elif load is not None and all(map(loads_as_written, load.model.modules())):
            _raise(load.model, unfit_weights(_places(load.model, ""), load.state_dict, complete=True, assign=assign))
            set_checked(errors, "")
        else:  # of a tied weight, another module may get a part
            _raise(self, unfit_weights(_places(self, prefix), state_dict, complete=False, assign=assign))

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any):
        """The state dict. Columns that weights share are copied in it: checkpoint formats refuse shared memory."""
        state = super().state_dict(*args, prefix=prefix, **kwargs)
        prefix = args[1] if len(args) > 1 and not prefix else prefix
        for path, _, name, _ in self._packed_places():
            key = prefix + join(path, name) + COLUMNS
            if key in state:
                state[key] = state[key].clone()
        return state


def _holder(owner: nn.Module, key: str) -> dict[str, Any]:
    return owner._parameters if key in owner._parameters else owner._buffers


ASSIGN = "assign_to_params_buffers"
"""torch's key for ``load_state_dict(assign=True)`` in the metadata that hooks get."""


def refuse_unfit(
    model: nn.Module,
    state_dict: Mapping[str, Any],
    prefix: str = "",
    metadata: Mapping[str, Any] | None = None,
    strict: bool = True,
    missing: list[str] | None = None,
    unexpected: list[str] | None = None,
    errors: list[str] | None = None,
) -> None:
    """Raises RuntimeError, before anything is loaded, if ``state_dict`` has what ``model`` cannot take.

    `convert` registers it as a pre-hook of the model's ``load_state_dict``, which gives the arguments after ``prefix``.
    """
    if errors is not None and is_checked(errors, prefix):
        return
    _raise(model, (f"a key is {key!r}; legal: text" for key in state_dict if not isinstance(key, str)))
    places, assign = _places(model, prefix), bool(metadata and metadata.get(ASSIGN, False))
    _raise(model, unfit_weights(places, state_dict, complete=True, assign=assign))
    packed = {key for place in places for key in place.tensors}
    load = running_load(errors) if errors is not None else None
    keys = unfit_keys(model, state_dict, prefix, places) if load is not None and load.strict else ()
    _raise(model, [*keys, *unfit_others(model, state_dict, prefix, packed, assign=assign)])
    if errors is not None and all(map(loads_as_written, model.modules())):
        set_checked(errors, prefix)


def _places(model: nn.Module, prefix: str) -> list[Place]:
    """The packed weights of ``model``, under the names that they have in a state dict with ``prefix``."""
    places = []
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, PackedState):
            for inner, owner, name, scheme in module._packed_places():
                key = prefix + join(path, join(inner, name))
                form = owner._buffers.get(name + FORMAT)
                tensors = tensors_of(owner, name).named(key) | ({} if form is None else {key + FORMAT: form})
                places.append(Place(key, tensors, scheme))
    return places


def _raise(model: nn.Module, problems: Iterable[str]) -> None:
    """Raises RuntimeError if there are problems, in the form that torch gives them."""
    problems = list(problems)
    if problems:
        raise RuntimeError("\n\t".join([f"Error(s) in loading state_dict for {type(model).__name__}:", *problems]))


def _untie_columns(buffers: dict[str, Tensor | None], name: str, loaded: Tensor | None) -> None:
    """Gives a weight a copy of columns that it shares with other weights, if different ones will be loaded."""
    columns = buffers.get(name + COLUMNS)
    if columns is not None and loaded is not None and is_readable(columns):
        same = is_readable(loaded) and loaded.shape == columns.shape and torch.equal(loaded.to(columns.device), columns)
        buffers[name + COLUMNS] = columns if same else columns.clone()


def tie_equal_columns(model: nn.Module, *_: Any) -> None:
    """Makes equal unquantised columns of several weights one tensor: linears of the same x share its quantisation then.

    `convert` registers it as a post-hook of the model's ``load_state_dict``.
    """
    tied: dict[tuple, Tensor] = {}
    for module in model.modules():
        if isinstance(module, PackedState):
            for place in module._packed_places():
                owner, name = place[1:3]
                columns = owner._buffers.get(name + COLUMNS)
                if columns is not None and is_readable(columns):
                    owner._buffers[name + COLUMNS] = tied.setdefault((columns.device, *columns.tolist()), columns)


def take_contents(model: nn.Module) -> None:
    """Codes and scales of ``model``, which were set one by one, belong together."""
    for module in model.modules():
        if isinstance(module, PackedModule):
            for name in module.packed_weights:
                module.take(name)


@contextmanager
def _moved_separately(places: list[tuple[dict[str, Any], str]], fn: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Hides the tensors at ``places`` from an ``nn.Module._apply(fn)`` in this context, and then moves them.

    ``fn`` may change their device but not their dtype. Tied tensors stay tied, as Parameters do in ``nn.Module``.
    """
    hidden = [tensors[key] for tensors, key in places]
    for tensors, key in places:
        tensors[key] = None
    try:
        yield
    finally:
        for (tensors, key), tensor in zip(places, hidden, strict=True):
            tensors[key] = tensor
    for (tensors, key), tensor in zip(places, hidden, strict=True):
        with torch.no_grad():
            moved = fn(tensor)
        if moved.dtype != tensor.dtype:
            moved = tensor.to(moved.device)
        if torch._has_compatible_shallow_copy_type(tensor, moved):
            tensor.data = moved
        else:
            tensors[key] = frozen(moved) if isinstance(tensor, nn.Parameter) else moved


def join(path: str, leaf: str) -> str:
    return f"{path}.{leaf}" if path else leaf


# ---- packed modules -------------------------------------------------------------------------------------------------


_TAKEN_BY_FSDP = "_is_fsdp_managed_module"  # FSDP1 and FSDP2 set this attribute of every module that they take
_NEWOBJ = object.__reduce_ex__(object(), 2)[0]  # copyreg.__newobj__: how pickle makes an object of a class


class PackedModule(PackedState):
    """Mixed into the class of a module with packed weights. `packed_weights`: weight name -> how the module uses it."""

    packed_weights: dict[str, Reading]
    _contents: Mapping[str, Contents] = {}
    _checked: Checked
    _before_cast: dict[str, Tensor]  # under FSDP1: name -> the float tensor that it may cast

    def dequantize(self, name: str = "weight") -> Tensor:
        """The packed weight ``name`` as the float tensor that the module would have had.

        Raises:
            KeyError: the module has no packed weight of that name.
        """
        return self.packed_weights[name].oriented(self.dequantize_codes(name))

    def dequantize_codes(self, name: str) -> Tensor:
        """The packed weight ``name`` as floats, ``[..., N, K]``."""
        dtype = self.packed_weights[name].dtype
        return torch.ops.int8fx.dequantize.default(*self.packed(name), dtype=dtype)

    def packed(self, name: str = "weight") -> Int8Weight:
        """The packed weight ``name`` as the ops take it."""
        buffers, codes = self._buffers, self._parameters.get(name + CODES)  # few calls: every forward comes here
        if torch.compiler.is_compiling():
            expected = self._check_tensors(name)
            if expected is not None:
                self._assert_format(name, expected)
        else:
            form, read, written, address = self._checked.get(name, UNCHECKED)
            replaced = buffers.get(name + FORMAT) is not form or (
                codes is not None
                and (
                    getattr(codes, READ, None) is not read
                    or codes.data_ptr() != address
                    or (written is not None and codes._version != written)
                )
            )
            if replaced and not self._is_gathered(name, codes):
                self._check_tensors(name)
        reading, scale = self.packed_weights[name], buffers.get(name + SCALE)
        codes = getattr(self, name + CODES) if codes is None else codes
        if scale is None or scale.dtype is not reading.scale_dtype or codes.dtype is not reading.codes_dtype:
            scale = self._uncast_scale(name)
        return Int8Weight(
            codes,
            scale,
            reading.scheme.threshold,
            reading.scheme.rotation,
            buffers.get(name + COLUMNS),
            buffers.get(name + COLUMNS_WEIGHT),
            *reading.format,
            buffers.get(name + ZERO_POINT),
            buffers.get(name + SCALE_RANGE),
        )

    def _uncast_scale(self, name: str) -> Tensor:
        """The scale of the weight ``name`` from before FSDP1 cast it.

        Raises:
            TypeError: it or the codes have another dtype than theirs, and nothing to undo.
            RuntimeError: it is not there.
        """
        self._undo_cast()
        codes, scale, *_ = tensors_of(self, name)
        if scale is None:
            raise self._lost(name, SCALE)
        reading = self.packed_weights[name]
        for suffix, tensor, dtype in ((CODES, codes, reading.codes_dtype), (SCALE, scale, reading.scale_dtype)):
            if tensor.dtype is not dtype:
                raise TypeError(
                    f"int8fx: {name + suffix} of layer {self.label(name)} is {tensor.dtype} now; legal: {dtype}. Code "
                    "that replaces Parameters (vector_to_parameters) may get those that require grad"
                )
        return scale

    def _lost(self, name: str, suffix: str) -> RuntimeError:
        return RuntimeError(
            f"int8fx: layer {self.label(name)} has lost its buffer {name + suffix!r}; legal: the buffers that "
            "int8fx.convert gave it"
        )

    def packed_linear(self, x: Tensor, name: str = "weight", bias: Tensor | None = None) -> Tensor:
        """``int8fx::linear`` of x ``[..., K]`` with the packed weight ``name``: ``[..., N]``."""
        if is_differentiated():
            return F.linear(x, self.dequantize_codes(name), bias)
        return torch.ops.int8fx.linear.default(x, *self.packed(name), bias)

    def packed_weight(self, name: str) -> Tensor:
        """The value of the attribute ``name``: a `PackedWeight`, or its float tensor if a graph is being captured."""
        if is_captured(tensors_of(self, name).codes):
            return self.dequantize(name)
        if is_read_by_torch_utils(2):  # above the property
            raise refused(self.label(name))
        return PackedWeight(self, name)

    @property
    def parametrizations(self) -> Any:
        """As in ``nn.Module``. ``register_parametrization`` looks here first."""
        given = None if torch.compiler.is_compiling() else parametrized_name(2)  # above ``is_parametrized``
        for name in self.packed_weights:
            if given in (name, *(name + suffix for suffix in (*SUFFIXES, FORMAT))):
                raise refused(self.label(name))
        return self.__getattr__("parametrizations")

    @torch.no_grad()
    def requantize(self, name: str, weight: Tensor, rows: slice = slice(None)) -> None:
        """Stores ``weight``, rounded to nearest by the scheme of the packed weight ``name``, in place of its ``rows``.

        Args:
            weight: ``[R, K]``, any float dtype.
            rows: which of the rows they are, counted through all experts; by default all.

        Raises:
            ValueError: it is not finite, or its rotation overflows float32. Nothing is changed.
        """
        reading, tensors = self.packed_weights[name], tensors_of(self, name)
        if tensors.codes.is_meta:
            return
        refused = ValueError(
            f"int8fx: a write of NaN, inf or values that overflow float32 into the packed {self.label(name)}; legal: "
            "finite values"
        )
        if not bool(weight.isfinite().all()):
            raise refused
        self.packed(name)  # they belong together
        try:
            packed = pack_weight(weight, reading.scheme.grouping, reading.scheme.rotation, tensors.columns)
        except ValueError as error:
            raise ValueError(f"int8fx: a write into the packed weight {self.label(name)}: {error}") from None
        if not bool(packed.scale.isfinite().all()):
            raise refused
        lead, channels = tensors.codes.dim() - 1, tensors.codes.shape[:-1].numel()
        with self._contents[name].writing(tensors.codes, tensors.scale, range(channels)[rows]):
            for part in PER_CHANNEL:
                tensor, value = getattr(tensors, part), getattr(packed, part)
                if tensor is None:
                    continue
                flat = tensor.reshape(-1, *tensor.shape[lead:])
                flat[rows] = value.to(tensor.dtype)
                if not tensor.is_contiguous():  # then ``flat`` is a copy
                    tensor.copy_(flat.view(tensor.shape))
                if not tensor.is_inference():  # `PackedWeight` writes below autograd: a backward of before must notice
                    torch.autograd.graph.increment_version(tensor)

    def label(self, name: str) -> str:
        """The name of the packed weight ``name`` in messages."""
        return repr(self.packed_weights[name].layer or f"{type(self).__name__}.{name}")

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any):
        self._undo_cast()
        return super().state_dict(*args, prefix=prefix, **kwargs)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._undo_cast()
        super()._load_from_state_dict(*args)
        state_dict, prefix = args[:2]
        for name in self.packed_weights:
            if prefix + name + CODES in state_dict:
                self.take(name)
        self._keep_uncast()  # ``assign=True`` replaces tensors

    def named_parameters(self, *args: Any, **kwargs: Any):
        """As in ``nn.Module``. PEFT looks here for the Parameters that it adapts."""
        if not torch.compiler.is_compiling():
            for name in self.packed_weights:
                refuse_targets((name, name + CODES), self.label(name))
        return super().named_parameters(*args, **kwargs)

    def _packed_places(self) -> list[tuple[str, nn.Module, str, Scheme | None]]:
        return [("", self, name, reading.scheme) for name, reading in self.packed_weights.items()]

    def _adopt(self, owner: nn.Module, name: str, form: Tensor) -> None:
        super()._adopt(owner, name, form)
        scheme = read_scheme(form)
        if scheme != self.packed_weights[name].scheme:  # graphs guard on the object
            self.packed_weights[name] = replace(self.packed_weights[name], scheme=scheme)

    def __setattr__(self, name: str, value: Any) -> None:
        packed = self.__dict__.get("packed_weights", ())
        if name in packed:
            self._tie(name, value)
        else:
            if name.endswith(FORMAT) and (weight := name.removesuffix(FORMAT)) in packed:
                self._check_format(weight, value)
            if name == "out_proj" and "in_proj_weight" in packed and type(value).__module__.startswith("peft."):
                raise TypeError(
                    f"int8fx: layer {self.label('in_proj_weight')} is a packed nn.MultiheadAttention, and PEFT's "
                    "adapters replace its weights; legal: convert(model, skip=[...]), or adapters elsewhere"
                )
            if name == OFFLOADED:
                for weight in self.packed_weights:
                    refuse_partial_offload(self.label(weight), tensors_of(self, weight).codes)
            super().__setattr__(name, value)
            if name == _TAKEN_BY_FSDP:
                self._leave_flat_parameter()

    def _tie(self, name: str, value: Any) -> None:
        """Makes the packed weight ``name`` the same tensors as another one."""
        if not isinstance(value, PackedWeight) or not value.is_whole or value.shape != getattr(self, name).shape:
            given = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(
                f"int8fx: {self.label(name)} is packed, and {type(self).__name__}.{name} takes no new tensor, found "
                f"{given}; legal: a write into it (module.{name}.data = w rounds w to int8), or the packed weight of "
                "another module, to tie them; assign or resize weights before int8fx.convert"
            )
        other, reading = value.module, value.module.packed_weights[value.weight_name]
        if reading.layout != self.packed_weights[name].layout:
            raise TypeError(
                f"int8fx: {self.label(name)} and {other.label(value.weight_name)} use their weights transposed"
            )
        mine, its = tensors_of(self, name).named(name), tensors_of(other, value.weight_name).named(name)
        for key in mine.keys() - its.keys():
            del self._buffers[key]
        _holder(self, name + CODES)[name + CODES] = its.pop(name + CODES)
        self._buffers.update(its)
        self._buffers[name + FORMAT] = other._buffers[value.weight_name + FORMAT]
        self._contents = {**self._contents, name: other._contents[value.weight_name]}
        self.packed_weights[name] = replace(self.packed_weights[name], scheme=reading.scheme, dtype=reading.dtype)

    def _check_format(self, name: str, value: Any) -> None:
        """Raises ValueError if the format tensor ``value`` is of a scheme that the weight ``name`` does not have."""
        if isinstance(value, Tensor) and is_readable(value):
            try:
                scheme, mine = read_scheme(value), self.packed_weights[name].scheme
            except ValueError as error:
                raise ValueError(f"int8fx: the format of {self.label(name)}: {error}") from None
            if not same_arithmetic(scheme, mine):
                raise ValueError(
                    f"int8fx: {self.label(name)} is quantised by {mine}, found a format of {scheme}; legal: tensors of "
                    f"{mine}, or a model converted by {scheme}"
                )
            if scheme != mine:
                self.packed_weights[name] = replace(self.packed_weights[name], scheme=scheme)

    def _check_tensors(self, name: str) -> str | None:
        """Raises ValueError if the format of the weight ``name`` says that this module reads its tensors wrongly, or if
        its codes and its scale do not belong together.

        Tools that set tensors one by one, such as accelerate and ``torch.func.functional_call``, set formats too.

        Returns:
            The text of the format if Dynamo is tracing a ``functional_call``, which may give another one when it runs.
        """
        for suffix in (SCALE, FORMAT):
            if name + suffix not in self._buffers:
                raise self._lost(name, suffix)
        form, (codes, scale, columns, *_) = self._buffers[name + FORMAT], tensors_of(self, name)
        values = None if form is None else unwrapped(form)
        if type(values) is not Tensor or not is_readable(values) or values.dim() != 1 or not may_read(codes):
            return None
        self._check_format(name, values)
        scheme, found = self.packed_weights[name].scheme, 0 if columns is None else columns.numel()
        if found != scheme.static_columns(codes.shape[-1]):  # a scheme with codes of 4 bits has none for any K
            raise ValueError(f"int8fx: {unfit_count(self.label(name), scheme, codes.shape[-1], found)}")
        if not self._contents[name].accepts(codes, scale):
            raise ValueError(
                f"int8fx: the codes and the scale of {self.label(name)} do not belong together: one was written or "
                "replaced; legal: load_state_dict, a copy of buffers() and parameters(), or a write into "
                f"module.{name}"
            )
        if values is form:
            self._checked.accept(name, form, codes)
        seen = is_transformed() or not is_called_in_trace(stateless, "_functional_call")  # an assertion has no vmap
        return None if seen else bytes(values.tolist()).decode()

    def _is_gathered(self, name: str, codes: Tensor | None) -> bool:
        """Whether FSDP2 has gathered the codes of the weight ``name`` into other memory, which it does for each call,
        and nothing else has changed. A digest would make each call wait for the GPU."""
        form, read = self._checked.get(name, UNCHECKED)[:2]
        if _TAKEN_BY_FSDP not in self.__dict__ or codes is None or self._buffers.get(name + FORMAT) is not form:
            return False
        if not follow(codes, read):
            return False
        self._checked.accept(name, form, codes)
        return True

    def _assert_format(self, name: str, expected: str) -> None:
        """Makes the graph that is being captured raise RuntimeError if it is given another format than ``expected``."""
        form = self._buffers[name + FORMAT]
        own = torch.tensor(list(expected.encode()), dtype=torch.uint8, device=form.device)  # type: ignore[union-attr]
        same = (form == own).all() if form.shape == own.shape else own.new_zeros((), dtype=torch.bool)  # type: ignore[union-attr]
        message = f"int8fx: {self.label(name)} was given tensors of another format; legal: {expected}"
        torch._assert_async(same, message.replace('"', "'"))  # Inductor writes it into C++ as it is

    def take(self, name: str) -> None:
        """The codes and the scale of the weight ``name`` belong together."""
        tensors = tensors_of(self, name)
        self._contents[name].take(tensors.codes, tensors.scale)
        self._checked.pop(name, None)

    # What `torch.compiler.assume_constant_result` sets, which would import the compiler here. A graph that is captured
    # does not hold the format then.
    _check_tensors._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def _leave_flat_parameter(self) -> None:
        """Makes codes buffers if FSDP1 is about to flatten Parameters: its flat parameter takes no integers.

        It broadcasts buffers (``sync_module_states``) as it does Parameters. FSDP2 shards codes, and has replaced them
        by DTensors before it comes here. FSDP1 casts float buffers by ``MixedPrecision(buffer_dtype)``: the tensors
        before that are kept, and `_undo_cast` puts them back.
        """
        for name in self.packed_weights:
            if type(self._parameters.get(name + CODES)) is nn.Parameter:
                self._buffers[name + CODES] = self._parameters.pop(name + CODES)  # one object still: ties stay
                self._before_cast = {}
        self._keep_uncast()

    def _keep_uncast(self) -> None:
        if "_before_cast" in self.__dict__:
            named = [t for name in self.packed_weights for t in tensors_of(self, name).named(name).items()]
            self._before_cast = {key: tensor.detach() for key, tensor in named if tensor.is_floating_point()}

    def _undo_cast(self) -> None:
        for key, tensor in self.__dict__.get("_before_cast", {}).items():
            buffer = self._buffers[key]
            if buffer is not None and (buffer.dtype != tensor.dtype or buffer.data_ptr() != tensor.data_ptr()):
                buffer.data = tensor

    def requires_grad_(self, requires_grad: bool = True):
        if requires_grad:
            raise TypeError(
                f"int8fx: layer {self.label(next(iter(self.packed_weights)))} is int8 and is not trained; train "
                "adapters (LoRA) on top, or leave the layer out: convert(model, skip=[...])"
            )
        return super().requires_grad_(False)

    def __prepare_scriptable__(self):
        """``torch.jit.script`` calls this."""
        raise TypeError(
            f"int8fx: torch.jit.script does not take packed layers, found {type(self).__name__}; legal: "
            "torch.jit.trace, torch.export or torch.compile"
        )

    def __delattr__(self, name: str) -> None:
        for weight in self.__dict__.get("packed_weights", ()):
            held = name in self._parameters or name in self._buffers
            if name == weight or (held and name.removeprefix(weight) in (*SUFFIXES, FORMAT)):
                raise TypeError(f"int8fx: {self.label(weight)} is packed and cannot be deleted; replace the module")
        super().__delattr__(name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        self._undo_cast()
        super()._apply(fn, recurse)
        self.packed_weights = {
            name: replace(reading, dtype=fn(torch.empty(0, dtype=reading.dtype, device=codes.device)).dtype)
            for name, reading in self.packed_weights.items()
            if (codes := tensors_of(self, name).codes) is not None
        }
        self._keep_uncast()
        return self

    def __reduce_ex__(self, protocol):
        refuse_trained_copy(self.label(next(iter(self.packed_weights))))
        reduced = super().__reduce_ex__(max(protocol, 2))  # 0 and 1 would name this class, which no module holds
        if reduced[0] is not _NEWOBJ or reduced[1] != (type(self),):
            return reduced
        names, forward = tuple(self.packed_weights), type(self).__dict__.get("forward")
        return (_new_packed, (float_class(self), names, forward), *reduced[2:])

    def extra_repr(self) -> str:
        weights = {name: (reading, tensors_of(self, name).codes) for name, reading in self.packed_weights.items()}
        packed = ", ".join(
            f"{name}: {reading.scheme.grouping.format} {tuple(reading.shape(codes))}"
            for name, (reading, codes) in weights.items()
        )
        return ", ".join(part for part in (super().extra_repr(), packed) if part)


PLAIN_LOADERS.update((PackedState._load_from_state_dict, PackedModule._load_from_state_dict))
PLAIN_HOOKS.update((refuse_unfit, tie_equal_columns))


def float_class(module: PackedModule) -> type[nn.Module]:
    """The class that a packed module had before."""
    return type(module).__bases__[1]


@cache
def packed_class(base: type[nn.Module], names: tuple[str, ...], forward: Callable | None) -> type[nn.Module]:
    """The subclass of ``base`` whose weights ``names`` are packed; ``forward`` replaces that of ``base`` if given."""

    def attribute(name: str) -> property:
        return property(lambda self: self.packed_weight(name))

    body: dict[str, Any] = {name: attribute(name) for name in names}
    body["__module__"], body["__doc__"] = base.__module__, base.__doc__
    if forward is not None:
        body["forward"] = forward
    return type(f"Int8{base.__name__}", (PackedModule, base), body)


def _new_packed(base: type[nn.Module], names: tuple[str, ...], forward: Callable | None) -> nn.Module:
    cls = packed_class(base, names, forward)  # type: ignore[arg-type]  # classes are hashable
    return cls.__new__(cls)


Weights = dict[str, tuple[PackedTensors, Reading]]


_METHODS = ("packed_weights", "packed_weight", "packed", "packed_linear", "dequantize", "dequantize_codes",
            "requantize", "label")  # fmt: skip


def clash(module: nn.Module, parameter: str) -> str | None:
    """A name that packing would need, and that ``module`` already uses for something else; None if there is none."""
    for suffix in (*SUFFIXES, FORMAT):
        if any(parameter + suffix in names for names in (module._parameters, module._buffers, module._modules)):
            return parameter + suffix
    return next((n for n in _METHODS if hasattr(module, n)), None)


def pack_modules(modules: Sequence[tuple[nn.Module, Weights, Callable | None]]) -> None:
    """Packs modules in place: all of them, with all of their weights, or, if anything raises, none.

    Args:
        modules: for each, the module; Parameter name -> its packed tensors and how the module uses them; the forward
            that replaces the one of its class, or None. It must be a module-level function, so that it can be pickled.
    """
    before = [(module, type(module), dict(module.__dict__)) for module, _, _ in modules]
    contents: dict[int, Contents] = {}
    try:
        for module, weights, forward in modules:
            _pack(module, weights, forward, contents)
    except BaseException:
        for module, cls, attributes in before:
            object.__setattr__(module, "__class__", cls)
            module.__dict__.clear()
            module.__dict__.update(attributes)
        raise


def _pack(module: nn.Module, weights: Weights, forward: Callable | None, contents: dict[int, Contents]) -> None:
    """``contents``: those of the weights that were packed before, by the id of their codes."""
    cls = packed_class(type(module), tuple(weights), forward)  # type: ignore[arg-type]  # classes are hashable
    module.__dict__.update(
        _parameters=dict(module._parameters),
        _buffers=dict(module._buffers),
        packed_weights={name: reading for name, (_, reading) in weights.items()},
    )
    for name, (tensors, reading) in weights.items():
        store(module, name, tensors, reading.scheme)
    object.__setattr__(module, "__class__", cls)
    labels = {name: module.label(name) for name in weights}  # type: ignore[operator]  # a PackedModule now
    module.__dict__["_parameters"] = Parameters(module._parameters, labels)
    module.__dict__["_checked"] = Checked()
    module.__dict__["_contents"] = {
        name: contents.setdefault(id(tensors.codes), Contents()) for name, (tensors, _) in weights.items()
    }
    for name in weights:
        module.take(name)  # type: ignore[operator]


def unpack(module: PackedModule, dtype: torch.dtype | None = None) -> None:
    """Makes ``module`` what it was before: its class, and float Parameters that hold the dequantised weights."""
    floats = {name: module.dequantize(name) for name in module.packed_weights}
    floats = {name: weight.to(dtype or weight.dtype) for name, weight in floats.items()}
    base = float_class(module)
    module.__dict__["_parameters"] = dict(module._parameters)
    for name, weight in floats.items():
        for suffix in (*SUFFIXES, FORMAT):
            _holder(module, name + suffix).pop(name + suffix, None)
        module._parameters[name] = nn.Parameter(weight, requires_grad=False)
    del module.__dict__["packed_weights"]
    for name in ("_before_cast", "_checked", "_contents"):
        module.__dict__.pop(name, None)
    object.__setattr__(module, "__class__", base)


def is_codes(name: str, tensor: Tensor | None) -> bool:
    """Whether a Parameter is the codes of a packed weight."""
    return name.endswith(CODES) and tensor is not None and tensor.dtype in (torch.int8, torch.uint8)


# ---- queries --------------------------------------------------------------------------------------------------------


def codes_in(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """Packed weights that a graph reads: path of the module that holds them, that module, name of the weight.

    Weights of packed modules, which a graph may call, are not among them.
    """
    return [
        (path, owner, name.removesuffix(CODES))
        for path, owner in model.named_modules()
        if not isinstance(owner, PackedModule)
        for name, codes in owner._parameters.items()
        if is_codes(name, codes)
        if name.removesuffix(CODES) + SCALE in owner._buffers
    ]


def is_packed(model: nn.Module | ExportedProgram) -> bool:
    """Whether ``model`` holds weights packed by int8fx, in itself or in anything inside it."""
    if isinstance(model, ExportedProgram):
        return bool(count_ops(model.graph))
    return any(
        isinstance(module, PackedState) or (isinstance(module, GraphModule) and bool(count_ops(module.graph)))
        for module in model.modules()
    )
