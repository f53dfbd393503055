"""Illegal arguments of the ops and the error messages, the same for kernels, fakes and meta tensors."""

import math

import pytest
import torch
from support.helpers import problem
from support.samples import LIBRARY, SAMPLES, K, N, make_bias, make_weight, overload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from int8fx import ops
from int8fx.ops import fallback
from int8fx.schemes import reference
from int8fx.schemes.quantize import MAX_K, MAX_THRESHOLD
from int8fx.schemes.weight import Int8Weight

LINEARS = ("linear", "linear_quantized")
MATMULS = (*LINEARS, "grouped_linear")
EPILOGUE = {"activation": "none", "other": None, "binary": "none"}


def arguments(weight) -> dict:
    """An `Int8Weight` by the names of the ops' arguments."""
    names = {"codes": "weight", "scale": "weight_scale"}
    return {names.get(field, field): value for field, value in weight._asdict().items()}


def legal(name: str) -> dict:
    p = problem(5, K, N, seed=1)
    codes, x_scale, mask = ops.quantize_rowwise(*p.quantize_args)
    quantized = {"codes": codes, "x_scale": x_scale, "outlier_mask": mask}
    grouped = {"offsets": torch.tensor([2, 5]), **arguments(make_weight(experts=2)), "bias": make_bias(2, N)}
    return {
        "linear": {"x": p.x, **arguments(p.weight), "bias": p.bias, **EPILOGUE},
        "linear_quantized": {"x": p.x, **quantized, **arguments(p.weight), "bias": p.bias, **EPILOGUE},
        "grouped_linear": {"x": p.x, **grouped},
        "quantize_rowwise": {"x": p.x, "threshold": 6.0},
        "dequantize": {**arguments(p.weight), "dtype": torch.float32},
    }[name]


def refused_x():
    for name in (*MATMULS, "quantize_rowwise"):
        for dtype in (torch.int64, torch.complex64, torch.float8_e4m3fn, torch.bool):
            x = torch.zeros(5, K).to(dtype)
            yield name, {"x": x}, f"x has dtype {dtype}; legal: float16, bfloat16, float32 or float64"
        yield name, {"x": torch.zeros(())}, "x has 0 dimensions; legal: [..., K]"
    for name in MATMULS:
        x = torch.zeros(5, K + 1)
        yield name, {"x": x}, f"x has shape (5, {K + 1}); legal: [..., {K}] for K = {K}"
    batched = {**arguments(make_weight(experts=2)), "bias": None}
    for shape in ((5, K), (3, 5, K), (2, 5, 5, K), (K,)):
        x = torch.zeros(shape)
        yield "linear", {**batched, "x": x}, f"x has shape {shape}; legal: [2, M, K] for a 3-D weight"


def refused_weights():
    for name in (*MATMULS, "dequantize"):
        weight = legal(name)["weight"]
        for dtype in (torch.float32, torch.uint8):
            yield name, {"weight": weight.to(dtype)}, f"weight has dtype {dtype}; legal: torch.int8 codes of 8 bits"
        message = f"weight_scale has shape (3,), dtype torch.float32 for a weight {tuple(weight.shape)}"
        yield name, {"weight_scale": torch.ones(3)}, f"{message}; legal: one float scale per output channel"
        for dtype in (torch.int32, torch.float8_e4m3fn):
            scale = torch.ones(weight.shape[:-1]).to(dtype)
            yield name, {"weight_scale": scale}, f"dtype {dtype} for a weight"
        yield name, {"weight_scale": torch.ones(*weight.shape[:-1], 1)}, "weight_scale has shape"
    scalars = {"weight": torch.tensor(1, dtype=torch.int8), "weight_scale": torch.tensor(1.0)}
    yield "dequantize", scalars, "weight has 0 dimensions; legal: [..., K]"
    codes, experts = (legal(name)["weight"] for name in ("linear", "grouped_linear"))
    long = {"x": torch.zeros(1, MAX_K + 1), "weight": torch.zeros(1, MAX_K + 1, dtype=torch.int8)}
    too_long = f"K = {MAX_K + 1}; legal: K <= {MAX_K}, or int32 sums could overflow"
    for name in LINEARS:
        yield name, {**long, "weight_scale": torch.ones(1), "bias": None}, too_long
    grouped = {"weight": long["weight"].expand(2, 1, -1), "weight_scale": torch.ones(2, 1), "bias": None}
    yield "grouped_linear", {**long, **grouped}, too_long
    for name, dims, weight in (
        ("linear", "2 or 3", codes[0]),
        ("linear", "2 or 3", codes[None, None]),
        ("linear_quantized", "2", experts),
        ("grouped_linear", "3", codes),
    ):
        scale = torch.ones(weight.shape[:-1])
        yield name, {"weight": weight, "weight_scale": scale}, f"weight has {weight.dim()} dimensions; legal: {dims}"


def refused_formats():
    for name in (*MATMULS, "dequantize"):
        weight = legal(name)["weight"]
        channels = weight.shape[:-1]
        fours = {"weight": torch.zeros(*channels, -(-K // 2), dtype=torch.uint8), "format": "nf4", "in_features": K}
        scales, zeros = torch.ones(*channels, 3), torch.zeros(*channels, 3, dtype=torch.uint8)
        groups = {**fours, "group_size": 8, "weight_scale": torch.ones(*channels, -(-K // 8))}
        yield name, {"format": "int3"}, "format 'int3'; legal: None, int8, int4_clip"
        yield name, {"format": "nf4"}, "weight has dtype torch.int8; legal: torch.uint8 codes of 4 bits"
        yield name, {"in_features": K}, f"in_features {K} for codes {tuple(weight.shape)} of 8 bits; legal: K of codes"
        for wrong in (None, K + 2, -1):
            shape = tuple(fours["weight"].shape)
            yield name, {**fours, "in_features": wrong}, f"in_features {wrong} for codes {shape} of 4 bits; legal: K of"
        for size in (0, -1, MAX_K + 1):
            yield name, {"group_size": size}, f"group_size {size}; legal: None, or 1 to {MAX_K}"
        yield name, {**groups, "weight_scale": scales}, f"weight_scale has shape {(*channels, 3)}, dtype torch.float32"
        yield name, {**fours, "weight_scale": scales}, f"weight_scale has shape {(*channels, 3)}, dtype torch.float32"
        yield name, {**groups, "zero_point": zeros}, "zero_point has shape"
        for format in ("nf4", "int4_clip"):
            whole = torch.zeros_like(groups["weight_scale"])
            if format == "nf4":
                yield name, {**groups, "zero_point": whole.to(torch.uint8)}, "legal: None for nf4"
            else:
                wrong = {**groups, "format": format, "zero_point": whole.to(torch.int8)}
                yield name, wrong, f"legal: {tuple(whole.shape)}, torch.uint8"
        bytes_ = {**groups, "weight_scale": groups["weight_scale"].to(torch.uint8)}
        yield name, bytes_, "of a float dtype, or uint8 with scale_range"
        scale_range = torch.zeros(*channels, 2)
        yield name, {**groups, "scale_range": scale_range}, "of a float dtype, or uint8 with scale_range"
        for wrong in (scale_range.double(), scale_range[..., :1]):
            yield name, {**bytes_, "scale_range": wrong}, f"legal: {(*channels, 2)}, torch.float32"


def refused_schemes():
    for name in LIBRARY:
        for threshold in (-1.0, -math.inf, math.nan, math.inf, 2 * MAX_THRESHOLD):
            yield name, {"threshold": threshold}, f"threshold {threshold}; legal: None, or 0 to {MAX_THRESHOLD:.4g}"
        for block in (0, -1, 3, 96, -3, -96, 2**18, -(2**18), 2**62, -(2**63)):
            message = f"block {block}; legal: a power of two up to 133144, negative for regular Hadamard matrices"
            yield name, {"threshold": None, "block": block}, message
        for threshold in (6.0, 0.0):
            for block in (8, -8):
                message = f"threshold {threshold} and block {block}; legal: a threshold or a rotation (a block but 1)"
                yield name, {"threshold": threshold, "block": block}, message
        for columns in (torch.tensor([1], dtype=torch.int32), torch.tensor([[1]]), torch.tensor(1)):
            wrong = {"columns": columns}
            if name != "quantize_rowwise":
                wrong["columns_weight"] = torch.zeros(*legal(name)["weight"].shape[:-1], 1)
            message = f"columns has shape {tuple(columns.shape)}, dtype {columns.dtype}"
            yield name, wrong, f"{message}; legal: [C] int64 indices below K = {K}"
        if name == "quantize_rowwise":
            continue
        columns, shape = torch.tensor([1, 2]), tuple(legal(name)["weight"].shape[:-1])
        yield name, {"columns": columns}, "columns without columns_weight; legal: both or none"
        yield name, {"columns_weight": torch.zeros(*shape, 2)}, "columns_weight without columns; legal: both or none"
        right = torch.zeros(*shape, 2)
        for weight in (torch.zeros(*shape, 1), torch.zeros(2), right.to(torch.int8), right.to(torch.float8_e5m2)):
            message = f"columns_weight has shape {tuple(weight.shape)}, dtype {weight.dtype}"
            message += f"; legal: the float weights of those columns, {(*shape, 2)}"
            yield name, {"columns": columns, "columns_weight": weight}, message
    for dtype in (torch.int8, torch.complex64, torch.float8_e4m3fn):
        yield "dequantize", {"dtype": dtype}, f"dtype {dtype}; legal: float16, bfloat16, float32 or float64"


def refused_epilogues():
    for name in MATMULS:
        shape = tuple(legal(name)["weight"].shape[:-1])
        legal_bias = f"legal: one float value per output channel, {shape}"
        for bias in (torch.zeros(N + 1), torch.zeros(1), torch.zeros(*shape, 1), torch.zeros(())):
            yield name, {"bias": bias}, f"bias has shape {tuple(bias.shape)}, dtype torch.float32; {legal_bias}"
        for dtype in (torch.int64, torch.complex64, torch.bool, torch.float8_e4m3fn):
            bias = torch.zeros(shape).to(dtype)
            yield name, {"bias": bias}, f"bias has shape {shape}, dtype {dtype}; {legal_bias}"
    other, legal_binary = torch.zeros(5, N), "legal: add or mul with other, none without"
    for name in LINEARS:
        yield name, {"activation": "tanh"}, f"activation 'tanh'; legal: {', '.join(reference.ACTIVATIONS)}"
        yield name, {"binary": "add"}, f"binary 'add' without other; {legal_binary}"
        yield name, {"other": other}, f"binary 'none' with other; {legal_binary}"
        yield name, {"other": other, "binary": "sub"}, f"binary 'sub' with other; {legal_binary}"
        for wrong in (other[:1], other[0], other.t(), other.long(), other.to(torch.float8_e4m3fn)):
            message = f"other has shape {tuple(wrong.shape)}, dtype {wrong.dtype}"
            message += f"; legal: float values in the shape of y, (5, {N})"
            yield name, {"other": wrong, "binary": "add"}, message


def refused_quantized():
    quantized = legal("linear_quantized")
    for key, wrong, good in (
        ("codes", quantized["codes"][:1], "(5, 13), torch.int8"),
        ("codes", quantized["codes"].float(), "(5, 13), torch.int8"),
        ("x_scale", quantized["x_scale"][:1], "(5,), torch.float32"),
        ("x_scale", quantized["x_scale"].double(), "(5,), torch.float32"),
        ("outlier_mask", quantized["outlier_mask"][:1], "(13,), torch.bool"),
        ("outlier_mask", quantized["outlier_mask"].int(), "(13,), torch.bool"),
    ):
        message = f"{key} has shape {tuple(wrong.shape)}, dtype {wrong.dtype}"
        yield "linear_quantized", {key: wrong}, f"{message}; legal: {good}: what quantize_rowwise(x) returns"


def refused_groups():
    for shape, offsets in (
        ((1, 5, K), torch.tensor([2, 5])),
        ((5, K), torch.tensor([5])),
        ((5, K), torch.tensor([2.0, 5.0])),
    ):
        message = f"x has shape {shape}, offsets {tuple(offsets.shape)}, dtype {offsets.dtype}"
        message += "; legal: [S, K] and one integer end per group, [2]"
        yield "grouped_linear", {"x": torch.zeros(shape), "offsets": offsets}, message


REFUSED = [
    case
    for cases in (
        refused_x,
        refused_weights,
        refused_formats,
        refused_schemes,
        refused_epilogues,
        refused_quantized,
        refused_groups,
    )
    for case in cases()
]


@pytest.mark.parametrize(("name", "wrong", "message"), REFUSED)
@pytest.mark.parametrize("kind", ["real", "fake", "meta"])
def test_bad_arguments_are_refused(name, wrong, message, kind):
    args = {**legal(name), **wrong}
    mode = FakeTensorMode()
    if kind == "fake":
        args = tree_map_only(torch.Tensor, mode.from_tensor, args)
    elif kind == "meta":
        args = tree_map_only(torch.Tensor, lambda t: t.to("meta"), args)
    with pytest.raises(ValueError) as refused:  # noqa: PT011  the message is compared below
        overload(name)(**args)
    assert f"int8fx::{name}: " in str(refused.value)
    assert message in str(refused.value)


@pytest.mark.parametrize("name", list(SAMPLES))
def test_what_the_refusals_start_from_is_legal(name):
    overload(name)(**legal(name))


@pytest.mark.parametrize("threshold", [None, 0.0, MAX_THRESHOLD])
@pytest.mark.parametrize("name", LIBRARY)
def test_the_limits_of_a_threshold_are_legal(name, threshold):
    overload(name)(**{**legal(name), "threshold": threshold})


@pytest.mark.parametrize("kernels", ["native", "fallback"])
@pytest.mark.parametrize(
    ("index", "message"),
    [
        (-1, f"columns has -1; legal: 0 to K - 1 for K = {K}"),
        (K, f"columns has {K}; legal: 0 to K - 1 for K = {K}"),
        (2**40, f"columns has {2**40}; legal: 0 to K - 1 for K = {K}"),
        (0, "columns has 0 twice; legal: different columns"),
    ],
)
@pytest.mark.parametrize("name", ["linear", "linear_quantized", "grouped_linear", "quantize_rowwise"])
def test_kernels_on_a_cpu_refuse_columns_that_x_does_not_have_or_that_are_there_twice(name, index, message, kernels):
    op = overload(name) if kernels == "native" else ops.kernel_on(fallback, name)
    order = {a.name: a.default_value for a in overload(name)._schema.arguments if not a.kwarg_only}
    wrong = {"columns": torch.tensor([0, index])}
    if name != "quantize_rowwise":
        wrong["columns_weight"] = torch.zeros(*legal(name)["weight"].shape[:-1], 2)
    with pytest.raises(IndexError, match=message):
        op(*{**order, **legal(name), **wrong}.values())


def test_codes_of_fewer_rows_than_x_are_refused_without_columns():
    x, weight, scale = torch.zeros(9, 0), torch.zeros(1, 0, dtype=torch.int8), torch.ones(1)
    codes, x_scale, mask = ops.quantize_rowwise(torch.zeros(8, 0))
    with pytest.raises(ValueError, match=r"codes has shape \(8, 0\), dtype torch.int8; legal: \(9, 0\)"):
        ops.linear_quantized(x, codes, x_scale, mask, weight, scale)


@pytest.mark.parametrize("kernels", ["native", "fallback"])
@pytest.mark.parametrize("ends", [[4, 2, 5], [-1, 3, 5], [9, 9, 9]])
def test_groups_that_end_out_of_order_or_range_are_those_of_the_reference(ends, kernels):
    op = ops.grouped_linear if kernels == "native" else ops.kernel_on(fallback, "grouped_linear")
    weight = make_weight(experts=3)
    x, offsets = torch.randn(5, K), torch.tensor(ends)
    expected = reference.grouped_linear(x, offsets, weight)
    torch.testing.assert_close(op(x, offsets, *weight), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("part", ["codes", "scale"])
def test_tensors_on_several_devices_are_refused(part):
    """The dispatcher would take the fake kernel, and return memory that nobody has written to."""
    weight = Int8Weight(torch.ones(4, 8, dtype=torch.int8), torch.ones(4), 6.0)
    mixed = weight._replace(**{part: getattr(weight, part).to("meta")})
    with pytest.raises(ValueError, match=r"int8fx::linear: x is on cpu and weight(_scale)? on meta; legal: one device"):
        torch.ops.int8fx.linear(torch.ones(2, 8), *mixed)
    with pytest.raises(ValueError, match="legal: one device"):
        torch.ops.int8fx.linear(torch.ones(2, 8, device="meta"), *weight)
