"""Sample arguments of every op of the ``int8fx`` library: what `opcheck`, fakes and devices are tested on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from support.helpers import DTYPES, LAYOUTS, activation, generator, in_groups, packed_weight, with_layout
from torch import Tensor

from int8fx import ops
from int8fx.ops import rows
from int8fx.schemes import reference
from int8fx.schemes.formats import Grouping
from int8fx.schemes.weight import Epilogue, Int8Weight

LIBRARY = sorted(
    name.removeprefix("int8fx::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("int8fx::")
)
"""The names of all ops, as torch's dispatcher has them."""

K, N = 13, 7


class Sample(NamedTuple):
    what: str
    args: tuple
    kwargs: dict[str, Any] = {}  # noqa: RUF012  never changed


def overload(name: str) -> torch._ops.OpOverload:
    base, _, variant = name.partition(".")
    return getattr(getattr(torch.ops.int8fx, base), variant or "default")


# ---- tensors ---------------------------------------------------------------------------------------------------------


def make_x(*lead: int, dtype: torch.dtype = torch.float32, grad: bool = False, layout: str = "contiguous") -> Tensor:
    x = activation(math.prod(lead), K, outliers="column", dtype=dtype, seed=1).reshape(*lead, K)
    return with_layout(x, layout).requires_grad_(grad)


def make_bias(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    return torch.randn(shape, generator=generator(3)).to(dtype).requires_grad_(grad)


def make_other(*lead: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*lead, N, generator=generator(4)).to(dtype)


def make_weight(
    *, experts: int | None = None, columns: bool = False, dtype: torch.dtype = torch.float32, **fields
) -> Int8Weight:
    """A weight ``[N, K]``, or ``[experts, N, K]``; ``fields`` of `Int8Weight` (threshold 6.0 unless it is rotated)."""
    packed = [packed_weight(N, K, seed=2 + e) for e in range(experts or 1)]
    codes, scale = (torch.stack(parts) if experts else parts[0] for parts in zip(*packed, strict=True))
    fields = {"threshold": None if fields.get("block", 1) != 1 else 6.0, **fields}
    weight = Int8Weight(codes, scale, **fields)
    if columns:
        columns_weight = torch.randn(*scale.shape, 3, generator=generator(5)).to(dtype)
        weight = weight._replace(columns=torch.tensor([1, 4, K - 1]), columns_weight=columns_weight)
    return weight


# ---- samples ---------------------------------------------------------------------------------------------------------


GROUPINGS = (
    Grouping("int4_fullrange", 16),
    Grouping("int4_clip", 8, asymmetric=True, scale_dtype=torch.bfloat16),
    Grouping("int8", 5, asymmetric=True),
    Grouping("nf4", 8, double_quant=True),
    Grouping("fp4_e2m1"),
)


def _in_groups(*lead: int) -> Iterator[tuple[str, Int8Weight]]:
    """Weights ``[*lead, N, K]`` of other formats."""
    for i, grouping in enumerate(GROUPINGS):
        weight = torch.randn(*lead, N, K, generator=generator(20 + i))
        yield f"{grouping}", in_groups(weight, grouping, (None, 0.0, 6.0)[i % 3])


def _linears() -> Iterator[tuple[str, Tensor, Int8Weight, Epilogue]]:
    """What ``linear`` and, with a 2-D weight, ``linear_quantized`` are called with."""
    for dtype in DTYPES:
        bias = make_bias(N, dtype=dtype, grad=True)
        yield f"{dtype}", make_x(5, dtype=dtype, grad=True), make_weight(), Epilogue(bias)
    for lead in ((), (0,), (1,), (2, 3), (2, 0, 3), (2, 1, 2, 1)):
        yield f"x {(*lead, K)}", make_x(*lead, grad=True), make_weight(), Epilogue(make_bias(N, grad=True))
    for layout in LAYOUTS[1:]:
        yield layout, make_x(6, layout=layout), make_weight(), Epilogue()
    for threshold in (0.0, None):
        yield f"threshold {threshold}", make_x(5, grad=True), make_weight(threshold=threshold), Epilogue()
    for name, weight in _in_groups():
        yield name, make_x(5, grad=True), weight, Epilogue(make_bias(N, grad=True))
    yield "only x needs a gradient", make_x(5, grad=True), make_weight(), Epilogue(make_bias(N))
    yield "only the bias needs a gradient", make_x(5), make_weight(), Epilogue(make_bias(N, grad=True))
    x = make_x(5, dtype=torch.bfloat16, grad=True)
    yield "bias of another dtype", x, make_weight(), Epilogue(make_bias(N, grad=True))
    for name in reference.ACTIVATIONS:
        yield name, make_x(5, dtype=torch.bfloat16), make_weight(), Epilogue(make_bias(N), name)
    for binary in ("add", "mul"):
        yield binary, make_x(2, 3), make_weight(), Epilogue(make_bias(N), "silu", make_other(2, 3), binary)
    yield "rotated", make_x(2, 3, grad=True), make_weight(block=8), Epilogue(make_bias(N, grad=True))
    for dtype in DTYPES:
        x = make_x(5, dtype=dtype, grad=True)
        yield f"rotated, columns, {dtype}", x, make_weight(block=4, columns=True, dtype=dtype), Epilogue()
    yield "rotated by regular blocks", make_x(2, 3, grad=True), make_weight(block=-16, columns=True), Epilogue()
    yield "rotated, no rows", make_x(0, grad=True), make_weight(block=8, columns=True), Epilogue()
    epilogue = Epilogue(make_bias(N), "gelu", make_other(5), "mul")
    yield "rotated, epilogue", make_x(5), make_weight(block=8, columns=True), epilogue
    for lead in ((5,), (3,)):
        yield f"columns, x {(*lead, K)}", make_x(*lead, grad=True), make_weight(columns=True), Epilogue()
    experts = make_weight(experts=3)
    yield "batched", make_x(3, 5, grad=True), experts, Epilogue(make_bias(3, N, grad=True))
    yield "batched, no rows", make_x(3, 0, grad=True), experts, Epilogue()
    yield "batched epilogue", make_x(3, 4), experts, Epilogue(None, "gelu", make_other(3, 4), "mul")
    yield "rotated, batched", make_x(3, 4, grad=True), make_weight(experts=3, block=8, columns=True), Epilogue()


def _linear() -> Iterator[Sample]:
    for what, x, weight, epilogue in _linears():
        yield Sample(what, (x, *weight, *epilogue))


def _linear_quantized() -> Iterator[Sample]:
    for what, x, weight, epilogue in _linears():
        if weight.codes.dim() == 2 and not what.startswith(("only", "expanded", "broadcast", "relu", "gelu")):
            quantized = ops.quantize_rowwise(x.detach(), weight.threshold, weight.block, weight.columns)
            yield Sample(what, (x, *quantized, *weight, *epilogue))


def _quantize_rowwise() -> Iterator[Sample]:
    for dtype in DTYPES:
        yield Sample(f"{dtype}", (make_x(5, dtype=dtype, grad=True), 6.0))
    for lead in ((), (0,), (1,), (2, 0, 3), (2, 1, 2, 1)):
        yield Sample(f"x {(*lead, K)}", (make_x(*lead), 6.0))
    for layout in LAYOUTS[1:]:
        yield Sample(layout, (make_x(4, layout=layout), 6.0))
        yield Sample(f"{layout}, no outliers", (make_x(4, layout=layout),))
    yield Sample("threshold 0", (make_x(5), 0.0))
    columns = make_weight(columns=True).columns
    yield Sample("columns", (make_x(5, grad=True), 6.0, 1, columns))
    yield Sample("rotated", (make_x(2, 3), None, 8))
    yield Sample("rotated, columns", (make_x(5, dtype=torch.bfloat16, grad=True), None, 8, columns))
    yield Sample("rotated by regular blocks", (make_x(5), None, -16, columns))
    yield Sample("rotated, no rows", (make_x(0), None, 8, columns))
    # of few rows it computes nothing: what the result holds then is undefined, and nothing to compare
    many = rows.WEIGHT_ONLY_ROWS_GPU + 1
    for what, arguments in (("llm_int8", (6.0,)), ("plain", ()), ("columns", (6.0, 1, columns))):
        yield Sample(f"for linear, {what}", (make_x(many, grad=True), *arguments), {"for_linear": True})
    for M in (1, many):
        yield Sample(f"for linear, rotated, {M}", (make_x(M), None, 8, columns), {"for_linear": True})


def _grouped_linear() -> Iterator[Sample]:
    for dtype in DTYPES:
        offsets = torch.tensor([2, 2, 6], dtype=torch.int32)
        bias = make_bias(3, N, dtype=dtype, grad=True)
        yield Sample(f"{dtype}", (make_x(6, dtype=dtype, grad=True), offsets, *make_weight(experts=3), bias))
    two = make_weight(experts=2)
    yield Sample("rows after the last group", (make_x(8, grad=True), torch.tensor([3, 5]), *two))
    yield Sample("many rows of a group", (make_x(13, grad=True), torch.tensor([3, 13]), *two))
    yield Sample("no rows", (make_x(0, grad=True), torch.tensor([0, 0]), *two))
    yield Sample("transposed", (make_x(4, layout="transposed"), torch.tensor([4]), *make_weight(experts=1)))
    for what, fields in (("columns", {}), ("rotated", {"block": 8})):
        weight = make_weight(experts=2, columns=True, **fields)
        yield Sample(what, (make_x(12, grad=True), torch.tensor([3, 11]), *weight))
    for name, weight in _in_groups(2):
        yield Sample(name, (make_x(12, grad=True), torch.tensor([3, 11]), *weight))


def _dequantize() -> Iterator[Sample]:
    weight = make_weight()
    for dtype in DTYPES:
        yield Sample(f"{dtype}", tuple(weight), {"dtype": dtype})
    yield Sample("no threshold", tuple(weight[:2]), {"dtype": torch.float32})
    yield Sample("batched", tuple(make_weight(experts=3)), {"dtype": torch.bfloat16})
    yield Sample("transposed", (packed_weight(K, N, seed=2)[0].t(), weight.scale), {"dtype": torch.bfloat16})
    yield Sample("sliced", (weight.codes[::2, ::3], weight.scale[::2]), {"dtype": torch.float32})
    yield Sample("empty", (weight.codes[:0], weight.scale[:0]), {"dtype": torch.float16})
    yield Sample("rotated", tuple(make_weight(block=8)), {"dtype": torch.bfloat16})
    yield Sample("rotated by regular blocks", tuple(make_weight(block=-16)), {"dtype": torch.float16})
    yield Sample("rotated, columns", tuple(make_weight(experts=3, block=8, columns=True)), {"dtype": torch.float32})
    for name, grouped in (*_in_groups(), *_in_groups(3)):
        yield Sample(f"{name} {grouped.codes.dim()}", tuple(grouped), {"dtype": torch.float32})


SAMPLES = {
    "linear": _linear,
    "linear_quantized": _linear_quantized,
    "quantize_rowwise": _quantize_rowwise,
    "grouped_linear": _grouped_linear,
    "dequantize": _dequantize,
}
"""Op -> a function that makes its samples afresh. A new op has none, which `test_ops` refuses."""
