"""The types that carry a packed weight and an epilogue through the library.

A tensor field may also hold a ``torch.fx.Node`` that stands for the tensor: the passes use the same types.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

CODES, SCALE, COLUMNS, COLUMNS_WEIGHT, ZERO_POINT, SCALE_RANGE = SUFFIXES = (
    "_codes",
    "_scale",
    "_columns",
    "_columns_weight",
    "_zero_point",
    "_scale_range",
)
"""The suffixes of a packed weight's tensors, in the order of `PackedTensors`: a tensor is called name + suffix."""


class PackedTensors(NamedTuple):
    """What a module stores of a packed weight. With the weights of E experts all but ``columns`` are ``[E, N, ...]``.

    codes: ``[N, K]`` int8, or ``[N, ceil(K / 2)]`` uint8, two codes of 4 bits to a byte.
    scale: ``[N]`` or, in groups, ``[N, G]``. Of int8 codes in no groups it is float32, ``absmax / 127`` per output
        channel; else as `formats.GroupCodes` says.
    columns: ``[C]`` int64, the input columns that are not quantised, or None.
    columns_weight: ``[N, C]``, the float weights of these columns, or None.
    zero_point: like ``scale``, int8 or uint8, or None for symmetric codes.
    scale_range: ``[N, 2]`` float32, or None if scales are not quantised themselves.
    """

    codes: Tensor
    scale: Tensor
    columns: Tensor | None = None
    columns_weight: Tensor | None = None
    zero_point: Tensor | None = None
    scale_range: Tensor | None = None

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
    format: a name in `formats.FORMATS`; None for ``int8``.
    group_size: how many input channels have one scale; None for all.
    in_features: K of a weight whose codes have 4 bits, else None.
    """

    codes: Tensor
    scale: Tensor
    threshold: float | None = None
    block: int = 1
    columns: Tensor | None = None
    columns_weight: Tensor | None = None
    format: str | None = None
    group_size: int | None = None
    in_features: int | None = None
    zero_point: Tensor | None = None
    scale_range: Tensor | None = None

    @property
    def K(self) -> int:
        """How many input channels it has."""
        return self.codes.shape[-1] if self.in_features is None else self.in_features

    @property
    def is_plain(self) -> bool:
        """Whether it is int8 codes with one scale per output channel."""
        return all(field is None for field in self[_FORMAT_AT:])

    def of_channels(self, select: Callable[[Any], Any]) -> Int8Weight:
        """The weight whose tensors are ``select`` of those that have a row per output channel."""
        channels = {name: select(t) for name in PER_CHANNEL if (t := getattr(self, name)) is not None}
        return self._replace(**channels)

    def of_expert(self, e: int) -> Int8Weight:
        """The weight of expert ``e``; columns are the same for all experts."""
        return self.of_channels(lambda tensor: tensor[e])


_FORMAT_AT = Int8Weight._fields.index("format")

PER_CHANNEL = ("codes", "scale", "columns_weight", "zero_point", "scale_range")
"""The tensors of an `Int8Weight` whose leading dimensions are those of the output channels."""


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
