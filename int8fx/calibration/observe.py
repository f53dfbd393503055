"""``observe``: the inputs of a model's matmuls while it runs, whichever torch functions its code calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..conversion.layers import Layer, walk
from ..conversion.view import PackedWeight

aten = torch.ops.aten
_MATMULS = {  # op -> positions of its two operands
    aten.mm.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.bmm.default: (0, 1),
    aten.baddbmm.default: (1, 2),
    aten.mv.default: (0, 1),
    aten.addmv.default: (1, 2),
    aten._grouped_mm.default: (0, 1),
    aten.convolution.default: (0, 1),
}


class _Matmuls(TorchDispatchMode):
    """Calls ``see(name, x [M, K])`` for every matmul of an activation with the weight of a layer or a view of it."""

    def __init__(self, layers: list[Layer], see: Callable[[str, Tensor], None]) -> None:
        super().__init__()
        self.see = see
        self._last: tuple[Tensor, tuple, Tensor] | None = None
        self.by_storage: dict[int, list[Layer]] = {}
        for layer in layers:
            self.by_storage.setdefault(layer.weight.untyped_storage().data_ptr(), []).append(layer)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in _MATMULS:
            a, b = (args[i] for i in _MATMULS[func])
            for x, weight, on_the_left in ((a, b, False), (b, a, True)):
                names = self._layers(weight)
                if names:
                    rows = self._rows(func, x, on_the_left)
                    for name in names:
                        self.see(name, rows)
                    break
        else:
            with self:  # in inference mode, composite ops arrive here without being decomposed
                parts = func.decompose(*args, **(kwargs or {}))
            if parts is not NotImplemented:
                return parts
        return func(*args, **(kwargs or {}))

    def _rows(self, func: object, x: Tensor, on_the_left: bool) -> Tensor:
        """`_rows`: the same object as for the last matmul if x is the same and was not written since.

        What is made here shares no count of writes with x, so x's own is compared.
        """
        if x.is_inference():
            return _rows(func, x, on_the_left)
        key = x._version, func is aten.convolution.default, on_the_left
        if self._last is None or self._last[1] != key or not _same(self._last[0], x):
            self._last = x, key, _rows(func, x, on_the_left)  # holding x, whose memory nobody reuses then
        return self._last[2]

    def _layers(self, weight: Tensor) -> list[str]:
        """Names of the layers whose Parameter contains ``weight``. Packed weights are in none."""
        if isinstance(weight, PackedWeight):
            return []
        layers = self.by_storage.get(weight.untyped_storage().data_ptr(), ())
        offset = weight.storage_offset()
        return [w.name for w in layers if 0 <= offset - w.weight.storage_offset() < max(1, w.weight.numel())]


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same elements of the same memory."""
    same = (a.data_ptr(), a.shape, a.stride(), a.dtype) == (b.data_ptr(), b.shape, b.stride(), b.dtype)
    return same and a.device == b.device


def _rows(func: object, x: Tensor, on_the_left: bool) -> Tensor:
    """The activation ``x`` of a matmul as ``[M, K]``."""
    if x.dim() == 1:
        return x[None]
    if func is aten.convolution.default:
        x = x.movedim(1, -1)
    elif on_the_left:
        x = x.transpose(-1, -2)
    return x.reshape(-1, x.shape[-1])


@contextmanager
def without_fast_path() -> Iterator[None]:
    """Disables the fused inference paths of ``nn.TransformerEncoder`` and ``nn.MultiheadAttention``.

    They hide their matmuls. The switch is global.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def matmuls(model: nn.Module, see: Callable[[str, Tensor], None]) -> TorchDispatchMode:
    """`observe` for this thread, without `without_fast_path`."""
    return _Matmuls([layer for layer in walk(model) if layer.layout is not None], see)


@contextmanager
def observe(model: nn.Module, see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """In this context, matmuls of ``model`` with its float weights call ``see(layer name, x [M, K])`` before they run.

    If layers share a weight, each call is reported for all of them.
    """
    with without_fast_path(), matmuls(model, see):
        yield
