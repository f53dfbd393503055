"""`PackedWeight`: what ``module.weight`` of a packed module is in eager mode.

It stands for the float weight and holds no copy of it. It knows the weight's shape, dtype and device. Matmuls with it
run on the int8 codes, other reads dequantise the rows that they need, and writes round to int8 again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, lru_cache
from typing import Any, ClassVar, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor
from torch._C import _functorch, _get_dispatch_mode, _TorchDispatchModeKey
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves, tree_map_only

from ..schemes.weight import CODES, Int8Weight

aten = torch.ops.aten
int8fx = torch.ops.int8fx


def is_captured(tensor: Tensor) -> bool:
    """Whether operations on ``tensor`` are being recorded into a graph or transformed, by ``torch.func`` or the like.

    Then the float weight is ``int8fx::dequantize``, an op that every transformation knows.
    """
    return (
        torch.compiler.is_compiling()
        or isinstance(tensor, FakeTensor)
        or is_traced()
        or is_transformed()
        or forward_ad._current_level >= 0
    )


def is_traced() -> bool:
    """Whether a graph is being recorded, so that reading values would be recorded too."""
    return _get_dispatch_mode(_TorchDispatchModeKey.PROXY) is not None or torch._C._get_tracing_state() is not None


def is_transformed() -> bool:
    """Whether ``torch.func`` is transforming (vmap, grad, jvp ...)."""
    return _functorch.peek_interpreter_stack() is not None


def unwrapped(tensor: Tensor) -> Tensor:
    """The tensor that ``torch.func`` has wrapped, or ``tensor`` itself."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def is_differentiated() -> bool:
    """Whether ``torch.func`` differentiates (grad, vjp, jvp ...), or forward-mode derivatives are being taken.

    The ops have no derivative of these kinds. Layers then multiply by dequantised weights.
    """
    if torch.compiler.is_compiling():
        return False
    if forward_ad._current_level >= 0:
        return True
    if _functorch.peek_interpreter_stack() is None:
        return False
    transforms = (_functorch.TransformType.Grad, _functorch.TransformType.Jvp)
    return any(level.key() in transforms for level in _functorch.get_interpreter_stack())


class PackedWeight(Tensor):
    """The packed weight ``name`` of ``module`` as a float tensor of its shape, dtype and device, or a view of it.

    - A view (``T``, ``w[i]``, ``split``, ``detach``, ``data`` ...) is again a PackedWeight of the same packed tensors.
    - A matmul of an activation with it that sums over the input channels runs ``int8fx::linear``, or
      ``int8fx::grouped_linear`` for a stack of experts. It has the gradient of the matmul with the dequantised weight.
    - ``to`` another dtype is a PackedWeight of this dtype. It is a copy: a write to it does not change the module.
    - Any other operation that reads it gets the float values (``int8fx::dequantize``).
    - A write into it (``copy_``, ``w[0] = 0``, ``w.data += delta``, ``w.data = t``) changes the module: the rows that
      it reaches are computed in float32, or in float64, and rounded to int8 again (`PackedModule.requantize`). NaN and
      inf are refused.

    Each read of ``module.weight`` makes a new one. It holds references only: there are no float values in memory.
    ``data_ptr`` says where its codes are, so that tied weights have equal ones. ``numpy`` gives a read-only copy.
    """

    module: Any  # a `packed.PackedModule`
    weight_name: str
    copied: _Copy | None

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # everything is in dispatch

    @staticmethod
    def __new__(
        cls,
        module: Any,
        name: str,
        view: Tensor | None = None,
        dtype: torch.dtype | None = None,
        copied: _Copy | None = None,
    ) -> PackedWeight:
        """``view``: a meta tensor, a view of a contiguous ``[..., N, K]`` weight; None: the whole weight as used.
        ``copied``: the values of a copy."""
        reading, codes = module.packed_weights[name], getattr(module, name + CODES)
        if view is None:
            shape, stride, offset = *_whole_geometry(reading, reading.shape(codes)), 0
        else:
            shape, stride, offset = view.shape, view.stride(), int(view.storage_offset())
        self = Tensor._make_wrapper_subclass(
            cls, shape, stride, offset, dtype=dtype or reading.dtype, device=codes.device
        )
        torch._C._set_throw_on_mutable_data_ptr(self)  # C++ code that wants the values' address gets an error
        self.module, self.weight_name, self.copied = module, name, copied
        self._is_param = view is None  # then isinstance(self, nn.Parameter)
        return self

    _is_hf_initialized = True  # transformers' init_weights leaves it alone

    @property
    def geometry(self) -> Tensor:
        """A meta tensor: a view of a contiguous ``[..., N, K]`` weight that has the values of this one."""
        size = math.prod(self.module.packed_weights[self.weight_name].shape(self._codes))
        return torch.empty(size, device="meta").as_strided(self.shape, self.stride(), self.storage_offset())

    @property
    def is_whole(self) -> bool:
        """Whether this is the weight as the module uses it, not a part or a copy of it."""
        reading = self.module.packed_weights[self.weight_name]
        shape, stride = _whole_geometry(reading, reading.shape(self._codes))
        return self.copied is None and _places(self) == (shape, stride, 0)

    @property
    def _codes(self) -> Tensor:
        return getattr(self.module, self.weight_name + CODES)

    @property
    def packed(self) -> Int8Weight:
        return self.module.packed(self.weight_name) if self.copied is None else self.copied.packed

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]  # the stubs lack func
        kwargs = kwargs or {}
        multiply = _MATMULS.get(func)
        if multiply is not None:
            y = multiply(*args, **kwargs)
            if y is not None:
                return y
        kind = _kind(func)
        if kind == "view":
            return _view(func, args, kwargs)
        if kind == "write":
            return _write(func, args, kwargs)
        args, kwargs = tree_map_only(PackedWeight, dense, (args, kwargs))
        return func(*args, **kwargs)

    # ---- attributes of a Parameter -----------------------------------------------------------------------------------

    @property
    def data(self) -> Tensor:
        return self

    @data.setter
    def data(self, value: Tensor) -> None:
        if isinstance(value, PackedWeight) and _owner(value) == _owner(self) and _places(value) == _places(self):
            return  # what an in-place operation on ``data`` has written
        if value.shape != self.shape or value.device != self.device or not value.is_floating_point():
            raise ValueError(
                f"int8fx: the packed weight {self.label} takes as its data a float tensor {tuple(self.shape)} on "
                f"{self.device}, found {value.dtype} {tuple(value.shape)} on {value.device}; module.to moves it"
            )
        with torch.no_grad():
            self.copy_(value)
        if self.is_whole and value.dtype != self.dtype:
            readings = self.module.packed_weights
            readings[self.weight_name] = replace(readings[self.weight_name], dtype=value.dtype)

    @property
    def requires_grad(self) -> bool:
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    def requires_grad_(self, requires_grad: bool = True) -> PackedWeight:
        if requires_grad:
            raise self._no_gradient()
        return self

    @property
    def grad(self) -> None:
        return None

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        if value is not None:
            raise self._no_gradient()

    def _no_gradient(self) -> TypeError:
        return TypeError(
            f"int8fx: the packed weight {self.label} is int8 and takes no gradient; train adapters (LoRA) on top, or "
            "leave the layer out: convert(model, skip=[...])"
        )

    @property
    def label(self) -> str:
        """The name of the weight in messages."""
        return self.module.label(self.weight_name)

    # ---- as values, and as memory ------------------------------------------------------------------------------------

    def __deepcopy__(self, memo: dict) -> Tensor:
        return memo.setdefault(id(self), dense(self))

    def __copy__(self) -> Tensor:
        return self.detach()

    def __reduce_ex__(self, protocol):
        return dense(self).__reduce_ex__(protocol)

    def numpy(self, *, force: bool = False):
        values = dense(self).numpy(force=force)
        values.flags.writeable = False  # a write would be lost
        return values

    def tolist(self):
        return dense(self).tolist()

    def __format__(self, spec: str) -> str:
        return format(dense(self), spec) if self.dim() == 0 else format(str(self), spec)

    def __repr__(self, *, tensor_contents=None) -> str:  # type: ignore[override]
        where = "" if self.device.type == "cpu" else f", device='{self.device}'"
        scheme = self.module.packed_weights[self.weight_name].scheme
        return f"PackedWeight({self.label}, {tuple(self.shape)}, {self.dtype}, {scheme}{where})"

    def apply_(self, function: Callable[[Any], Any]) -> PackedWeight:
        return self.copy_(dense(self).apply_(function))  # type: ignore[return-value]  # self

    def data_ptr(self) -> int:
        return self.packed.codes.data_ptr() + int(self.storage_offset())

    def untyped_storage(self):
        raise TypeError(
            f"int8fx: the packed weight {self.label} has no float values in memory; legal: {type(self.module).__name__}"
            f".dequantize({self.weight_name!r}) for a float copy, .packed({self.weight_name!r}) for its int8 tensors"
        )

    def _no_memory(self, *_: Any, **__: Any) -> Any:
        return self.untyped_storage()

    storage = _typed_storage = share_memory_ = __dlpack__ = _no_memory

    def _use_count(self) -> int:  # ``torch.utils.swap_tensors`` asks before it swaps
        raise TypeError(
            f"int8fx: the packed weight {self.label} cannot be swapped: module.{self.weight_name} is a new view at "
            f"each read; legal: a write into it (module.{self.weight_name}.data = w rounds w to int8)"
        )

    def is_shared(self) -> bool:
        return False


class _Copy:
    """The values of a copy of a packed weight: its packed tensors until something writes to one of the two."""

    living: ClassVar[WeakSet[_Copy]] = WeakSet()

    def __init__(self, packed: Int8Weight) -> None:
        tensors: dict[str, Any] = {k: t.detach() for k, t in packed._asdict().items() if isinstance(t, Tensor)}
        self.packed = packed._replace(**tensors)
        self.dense: Tensor | None = None  # [..., N, K]
        self.living.add(self)

    @classmethod
    def part_from(cls, packed: Int8Weight) -> None:
        """Gives all copies of ``packed`` tensors of their own, as it is about to change."""
        for copy in list(cls.living):
            if copy.packed.codes.data_ptr() == packed.codes.data_ptr():
                tensors: dict[str, Any] = {
                    k: t.clone() for k, t in copy.packed._asdict().items() if isinstance(t, Tensor)
                }
                copy.packed = copy.packed._replace(**tensors)


@lru_cache(maxsize=4096)
def _whole_geometry(reading: Any, shape: torch.Size) -> tuple[torch.Size, tuple[int, ...]]:
    """Shape and strides of a weight as its module uses it; ``shape`` is ``[..., N, K]``."""
    whole = reading.oriented(torch.empty(shape, device="meta"))
    return whole.shape, whole.stride()


# ---- reads, views and writes -----------------------------------------------------------------------------------------


def dense(w: PackedWeight) -> Tensor:
    """The float values of ``w``, a new tensor. Only the rows of the weight that ``w`` has values of are dequantised."""
    if w.copied is not None and w.copied.dense is not None:
        return w.copied.dense.as_strided(*_places(w)).clone()
    if not w.numel():
        return torch.empty_strided(w.shape, w.stride(), dtype=w.dtype, device=w.device)
    rows = _rows_reached([w])
    return _in_rows(w, _dequantize_rows(w, rows, w.dtype), rows)


def _dequantize_rows(w: PackedWeight, rows: slice, dtype: torch.dtype) -> Tensor:
    """``[R, K]``: rows of the weight that ``w`` is a view of, counted through all experts."""
    packed = w.packed
    lead = packed.codes.dim() - 1
    part = packed.of_channels(lambda tensor: tensor.reshape(-1, *tensor.shape[lead:])[rows])
    return int8fx.dequantize.default(*part, dtype=dtype)


def _rows_reached(views: list[PackedWeight]) -> slice:
    """From the first to the last row that one of ``views``, which are views of one weight, has a value of."""
    K = views[0].packed.K
    reached = [_reach(w) for w in views if w.numel()]
    return slice(min(r[0] for r in reached) // K, max(r[1] for r in reached) // K + 1) if reached else slice(0, 0)


def _in_rows(w: PackedWeight, values: Tensor, rows: slice) -> Tensor:
    """``w`` as a view of ``values``, which are the ``rows`` of its weight."""
    return values.as_strided(w.shape, w.stride(), w.storage_offset() - rows.start * values.shape[-1])


def _reach(view: Tensor) -> tuple[int, int]:
    """The first and the last index of the weight that ``view``, which is not empty, has a value of."""
    start = view.storage_offset()
    return int(start), int(start + sum((n - 1) * s for n, s in zip(view.shape, view.stride(), strict=True)))


def _places(view: Tensor) -> tuple:
    return view.shape, view.stride(), view.storage_offset()


_VIEWS_BY_NAME = (aten._unsafe_view.default, aten.unsafe_split.Tensor, aten.unsafe_split_with_sizes.default)
"""Their schemas do not say that they are views."""


@cache
def _kind(func: Any) -> str:
    """``view``, ``write`` or ``read``, by the schema of an operator."""
    if any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments):
        return "write"
    if func in _VIEWS_BY_NAME or any(r.alias_info is not None for r in func._schema.returns):
        return "view"
    return "read"


def _view(func: Any, args: tuple, kwargs: dict) -> Any:
    w = args[0]
    if not isinstance(w, PackedWeight) or func in (aten.view.dtype, aten._neg_view.default):
        args, kwargs = tree_map_only(PackedWeight, dense, (args, kwargs))
        return func(*args, **kwargs)
    geometry = func(w.geometry, *args[1:], **kwargs)

    def wrap(view: Tensor) -> PackedWeight:
        with torch.inference_mode(w.is_inference()):  # as torch wants a view of a tensor made outside
            return PackedWeight(w.module, w.weight_name, view, w.dtype, w.copied)

    return [wrap(g) for g in geometry] if isinstance(geometry, (list, tuple)) else wrap(geometry)


def _write(func: Any, args: tuple, kwargs: dict) -> Any:
    """Runs an operator that writes into packed weights on float values of the rows that it reaches, and stores these.

    The values are float32 if the weight is of 16 bits. Then other operands of its dtype become float32 too.
    """
    written = [w for w in _written(func, args, kwargs) if isinstance(w, PackedWeight)]
    for w in written:
        _check_write(w, func, (args, kwargs))
    owners: dict[tuple, list[PackedWeight]] = {}
    for w in written:
        owners.setdefault(_owner(w), []).append(w)
    targets = [_Target(views) for views in owners.values()]
    views = {id(w): view for target in targets for w, view in target.views}
    others = [t for t in _written(func, args, kwargs) if not isinstance(t, PackedWeight)]
    widened = {target.weight.dtype: target.values.dtype for target in targets}

    def operand(t: Tensor) -> Tensor:
        if id(t) in views:
            return views[id(t)]
        if any(t is other for other in others):
            return t
        t = dense(t) if isinstance(t, PackedWeight) else t
        return t.to(widened.get(t.dtype, t.dtype))

    shapes = {key: view.shape for key, view in views.items()}
    result = func(*tree_map_only(Tensor, operand, args), **tree_map_only(Tensor, operand, kwargs))
    for w in written:
        if views[id(w)].shape != shapes[id(w)]:
            raise _no_resize(w, func)
    for target in targets:
        target.store()
    back = {id(views[id(w)]): w for w in written}
    return tree_map_only(Tensor, lambda t: back.get(id(t), t), result)


def _check_write(w: PackedWeight, func: Any, operands: Any) -> None:
    if torch.Tag.inplace_view in func.tags:
        raise _no_resize(w, func)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tree_leaves(operands) if isinstance(t, Tensor)):
        raise TypeError(
            f"int8fx: {func} writes a value with a gradient into the packed weight {w.label}, which takes none; legal: "
            "under torch.no_grad()"
        )


def _no_resize(w: PackedWeight, func: Any) -> TypeError:
    return TypeError(
        f"int8fx: {func} would change the shape or the memory of the packed weight {w.label}, {tuple(w.shape)}; legal: "
        "writes of values, and new views (w.t() instead of w.t_())"
    )


class _Target:
    """Float values of the rows of one weight that its ``views`` reach, to be written to and then stored."""

    def __init__(self, views: list[PackedWeight]) -> None:
        self.weight = w = views[0]
        if w.copied is not None:
            self.rows = slice(0, math.prod(w.packed.codes.shape[:-1]))
            self.values = _dequantize_rows(w, self.rows, w.dtype) if w.copied.dense is None else w.copied.dense
        else:
            self.rows = _rows_reached(views)
            self.values = _dequantize_rows(w, self.rows, torch.promote_types(w.dtype, torch.float32))
        self.views = [(view, _in_rows(view, self.values, self.rows)) for view in views]

    def store(self) -> None:
        w = self.weight
        if w.copied is not None:
            w.copied.dense = self.values
        else:
            _Copy.part_from(w.packed)
            w.module.requantize(w.weight_name, self.values, self.rows)


def _written(func: Any, args: tuple, kwargs: dict) -> Iterator[Any]:
    """The tensors that ``func`` writes to."""
    arguments = func._schema.arguments
    given = [*zip(arguments, args, strict=False), *((a, kwargs[a.name]) for a in arguments if a.name in kwargs)]
    for argument, value in given:
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from value if isinstance(value, (list, tuple)) else (value,)


def _owner(w: PackedWeight) -> tuple:
    """Equal for views of the same values, also of tied weights."""
    return (id(w.packed.codes),) if w.copied is None else (id(w.copied),)


# ---- matmuls ---------------------------------------------------------------------------------------------------------


def _rows(w: Any) -> Int8Weight | None:
    """The rows of one packed weight that ``w [N', K]`` consists of, in order; None if it is no such matrix."""
    if not isinstance(w, PackedWeight) or w.dim() != 2 or not w.numel():
        return None
    if w.copied is not None and w.copied.dense is not None:
        return None
    packed = w.packed
    N, K = packed.codes.shape[-2], packed.K
    (rows, width), (step, inner) = map(int, w.shape), w.stride()
    if width != K or (inner != 1 and K > 1) or w.storage_offset() % K or (rows > 1 and (step % K or not step)):
        return None
    e, first = divmod(w.storage_offset() // K, N)
    by = step // K if rows > 1 else 1
    end = first + (rows - 1) * by + 1
    if end > N:  # of several experts
        return None
    if packed.codes.dim() == 3:
        packed = packed.of_expert(e)
    if rows == N:
        return packed
    return packed.of_channels(lambda tensor: tensor[first:end:by].contiguous())


class _Stack(NamedTuple):
    weight: Int8Weight
    shared: bool


def _stack(w: Any) -> _Stack | None:
    """The packed weights of experts that ``w [B, N, K]`` consists of, in order, or the one that it repeats."""
    if not isinstance(w, PackedWeight) or w.dim() != 3 or not w.numel():
        return None
    if w.stride(0) == 0 or w.shape[0] == 1:
        one = _rows(w.select(0, 0))
        return None if one is None else _Stack(one, shared=True)
    packed = w.packed
    N, K = packed.codes.shape[-2], packed.K
    if (w.copied is not None and w.copied.dense is not None) or packed.codes.dim() != 3 or w.shape[1:] != (N, K):
        return None
    if w.stride() != (N * K, K, 1) or w.storage_offset() % (N * K):
        return None
    first = w.storage_offset() // (N * K)
    return _Stack(packed.of_channels(lambda tensor: tensor[first : first + w.shape[0]]), False)


def _linear(x: Any, w: Any, bias: Any = None) -> Tensor | None:
    """``x [M, K] @ w.T + bias`` for ``w [N, K]``."""
    rows = _rows(w)
    if rows is None or isinstance(x, PackedWeight) or isinstance(bias, PackedWeight):
        return None
    _same_dtype(x, w)
    return int8fx.linear.default(x, *rows, bias)


def _same_dtype(x: Tensor, w: Tensor) -> None:
    if x.dtype != w.dtype:
        raise RuntimeError(f"expected the activation and the weight to have one dtype, found {x.dtype} and {w.dtype}")


def _mm(a: Any, b: Any) -> Tensor | None:
    if isinstance(b, PackedWeight):
        y = _linear(a, b.t())
        if y is not None or not isinstance(a, PackedWeight):
            return y
    y = _linear(b.t(), a)
    return None if y is None else y.t()


def _addmm(bias: Any, a: Any, b: Any, *, beta: float = 1, alpha: float = 1) -> Tensor | None:
    if beta == 1 and alpha == 1 and isinstance(b, PackedWeight) and bias.dim() == 1 and bias.shape[0] == b.shape[1]:
        y = _linear(a, b.t(), bias)
        if y is not None:
            return y
    y = _mm(a, b)
    return None if y is None else _scaled(y, bias, beta, alpha)


def _scaled(y: Tensor, bias: Any, beta: float, alpha: float) -> Tensor:
    bias = dense(bias) if isinstance(bias, PackedWeight) else bias
    return (y if alpha == 1 else y * alpha) + (bias if beta == 1 else bias * beta if beta else torch.zeros_like(bias))


def _mv(a: Any, x: Any) -> Tensor | None:
    y = None if isinstance(x, PackedWeight) else _linear(x.unsqueeze(0), a)
    return None if y is None else y.squeeze(0)


def _bmm(a: Any, b: Any) -> Tensor | None:
    if isinstance(b, PackedWeight):
        y = _batched(a, b.transpose(1, 2))
        if y is not None or not isinstance(a, PackedWeight):
            return y
    y = _batched(b.transpose(1, 2), a)
    return None if y is None else y.transpose(1, 2)


def _batched(x: Any, w: Any) -> Tensor | None:
    """``x [B, M, K] @ w.mT`` for ``w [B, N, K]``."""
    stack = _stack(w)
    if stack is None or isinstance(x, PackedWeight):
        return None
    _same_dtype(x, w)
    B, M = x.shape[:2]
    if stack.shared:
        return int8fx.linear.default(x, *stack.weight)
    offsets = (
        torch.arange(M, (B + 1) * M, M, device=x.device) if M else torch.zeros(B, dtype=torch.int64, device=x.device)
    )
    y = int8fx.grouped_linear.default(x.reshape(B * M, x.shape[2]), offsets, *stack.weight)
    return y.view(B, M, y.shape[1])


def _baddbmm(bias: Any, a: Any, b: Any, *, beta: float = 1, alpha: float = 1) -> Tensor | None:
    y = _bmm(a, b)
    return None if y is None else _scaled(y, bias, beta, alpha)


def _grouped_mm(a: Any, b: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> Tensor | None:
    if not isinstance(b, PackedWeight) or b.dim() != 3 or isinstance(a, PackedWeight) or offs is None or a.dim() != 2:
        return None
    stack = _stack(b.transpose(1, 2))
    if stack is None or stack.shared or bias is not None or out_dtype not in (None, a.dtype):
        return None
    return int8fx.grouped_linear.default(a, offs, *stack.weight)


def _embedding(table: Any, ids: Tensor, *_: Any) -> Tensor | None:
    """Rows of the table. ``index`` of a whole table is the same."""
    rows = _rows(table)
    if rows is None:
        return None
    return int8fx.dequantize.default(*rows.of_channels(lambda tensor: tensor[ids]), dtype=table.dtype)


def _to(w: Any, *, dtype: torch.dtype | None = None, device: Any = None, **layout: Any) -> Tensor | None:
    """A copy in another float dtype stays packed."""
    elsewhere = device is not None and torch.device(device) != w.device
    if elsewhere or dtype is None or not dtype.is_floating_point or dtype.itemsize < 2 or w.copied is not None:
        return None
    return PackedWeight(w.module, w.weight_name, w.geometry, dtype, _Copy(w.packed))


_MATMULS: dict[Any, Callable[..., Tensor | None]] = {
    aten.mm.default: _mm,
    aten.addmm.default: _addmm,
    aten.mv.default: _mv,
    aten.bmm.default: _bmm,
    aten.baddbmm.default: _baddbmm,
    aten._grouped_mm.default: _grouped_mm,
    aten.embedding.default: _embedding,
    aten._to_copy.default: _to,
}
"""Operator -> its form on packed tensors, which returns None where it has none."""
