"""The types that carry a packed weight and an epilogue through the library.

A tensor field may also hold a ``torch.fx.Node`` that stands for the tensor: the passes use the same types.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

CODES, SCALE, COLUMNS, COLUMNS_WEIGHT = SUFFIXES = ("_codes", "_scale", "_columns", "_columns_weight")
"""The suffixes of a packed weight's tensors, in the order of `PackedTensors`: a tensor is called name + suffix."""


class PackedTensors(NamedTuple):
    """What a module stores of a packed weight.

    codes: ``[N, K]`` int8, or ``[E, N, K]`` for the weights of E experts.
    scale: ``[N]`` or ``[E, N]`` float32, ``absmax / 127`` per output channel.
    columns: ``[C]`` int64, the input columns that are not quantised, or None.
    columns_weight: ``[N, C]`` or ``[E, N, C]``, the float weights of these columns, or None.
    """

    codes: Tensor
    scale: Tensor
    columns: Tensor | None = None
    columns_weight: Tensor | None = None

    def named(self, name: str) -> dict[str, Tensor]:
        """Name -> tensor, for the weight called ``name``. Fields that are None are left out."""
        return {name + suffix: t for suffix, t in zip(SUFFIXES, self, strict=True) if t is not None}

    @classmethod
    def of(cls, tensors: Mapping[str, Any], name: str) -> PackedTensors:
        """The tensors of the weight called ``name`` among ``tensors``."""
        return cls(*(tensors.get(name + suffix) for suffix in SUFFIXES))  # type: ignore[arg-type]  # codes, scale: there


class Int8Weight(NamedTuple):
    """A packed weight as the ops take it: `PackedTensors`, and how its scheme multiplies by it.

    threshold: an input column with an ``abs(x) >= threshold`` is an outlier and stays in 16 bits. None: there are no
        outliers.
    block: of the rotation that the codes are in, as `rotate.rotate` takes it: a power of two, negative if the matrices
        are regular; 1 for none.
    """

    codes: Tensor
    scale: Tensor
    threshold: float | None = None
    block: int = 1
    columns: Tensor | None = None
    columns_weight: Tensor | None = None

    def of_expert(self, e: int) -> Int8Weight:
        """The weight of expert ``e``; columns are the same for all experts."""
        columns_weight = None if self.columns_weight is None else self.columns_weight[e]
        return self._replace(codes=self.codes[e], scale=self.scale[e], columns_weight=columns_weight)


class Epilogue(NamedTuple):
    """What follows a matmul before its result is rounded: ``binary(activation(y + bias), other)``.

    bias: ``[N]`` or ``[E, N]``, any float dtype.
    activation: none, relu, silu, gelu or gelu_tanh.
    other: a tensor of y's shape for ``binary``.
    binary: none, add or mul.
    """

    bias: Tensor | None = None
    activation: str = "none"
    other: Tensor | None = None
    binary: str = "none"

    def of_expert(self, e: int) -> Epilogue:
        """The epilogue of expert ``e``."""
        bias, other = (None if t is None else t[e] for t in (self.bias, self.other))
        return self._replace(bias=bias, other=other)


NO_EPILOGUE = Epilogue()
