"""What the tests share: activations with outliers, a float64 oracle, computed error budgets, hypothesis strategies.

No tolerance here is chosen. A budget is the reference's own error against float64 plus the rounding that
`reference.linear` derives for its sums and for the dtype of the result.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from int8fx.ops.rows import Form, form
from int8fx.schemes import reference
from int8fx.schemes.formats import FORMATS, ChooseScales, Grouping, absmax_scales, read_scale
from int8fx.schemes.quantize import (
    compute_dtype,
    dequantize,
    outlier_mask,
    pack_weight,
    quantize_rowwise,
    quantize_weight,
)
from int8fx.schemes.rotate import rotate, rotation_blocks
from int8fx.schemes.weight import NO_EPILOGUE, Epilogue, Int8Weight

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INF = float("inf")


# ---- tensors ---------------------------------------------------------------------------------------------------------

OUTLIERS = ("none", "column", "columns", "row", "token", "some")
VALUES = ("normal", "zero_rows", "nan", "inf", "denormal", "huge")
LAYOUTS = ("contiguous", "transposed", "sliced", "expanded", "broadcast")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def activation(
    M: int,
    K: int,
    *,
    outliers: str = "none",
    values: str = "normal",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Tensor:
    """``[M, K]`` normal values, below 6 but for the outliers.

    Args:
        outliers: none; one ``column``; all ``columns``; one ``row``; one element of the first ``token``; ``some``
            columns (one in eight) with outliers in some of their rows, as in a language model.
        values: normal; every second row zero; one NaN; one inf; all ``denormal``; ``huge``, up to float16's maximum or
            ``2**80``.
    """
    g = generator(seed)
    x = torch.randn(M, K, generator=g, dtype=torch.float64).clamp(-5, 5)
    size = 20 + 40 * torch.rand(M, K, generator=g, dtype=torch.float64)
    if x.numel():
        m, k = (int(torch.randint(n, (), generator=g)) for n in (M, K))
        where = torch.zeros(M, K, dtype=torch.bool)
        if outliers == "column":
            where[:, k] = True
        elif outliers == "columns":
            where[:] = True
        elif outliers == "row":
            where[m] = True
        elif outliers == "token":
            where[0, k] = True
        elif outliers == "some":
            columns = torch.rand(K, generator=g) < 1 / 8
            where = columns & (torch.rand(M, K, generator=g) < 0.5)
        x = torch.where(where, x.sign() * size, x)
        if values == "zero_rows":
            x[::2] = 0
        elif values == "nan":
            x[m, k] = float("nan")
        elif values == "inf":
            x[m, k] = math.copysign(INF, x[m, k])
        elif values == "denormal":
            x = x * (torch.finfo(dtype).smallest_normal / 64)
        elif values == "huge":
            x = x / x.abs().max() * (torch.finfo(dtype).max if dtype == torch.float16 else 2.0**80)
    return x.to(dtype)


def correlated(M: int, K: int, seed: int = 0) -> Tensor:
    """``[M, K]`` of a few directions and a little noise, with one large column: what GPTQ profits from."""
    g = generator(seed)
    x = torch.randn(M, max(1, K // 4), generator=g) @ torch.randn(max(1, K // 4), K, generator=g)
    x += 0.1 * torch.randn(M, K, generator=g)
    x[:, K // 2] *= 30
    return x


def with_layout(x: Tensor, layout: str) -> Tensor:
    """x's values in another memory layout; ``expanded`` repeats its first row and ``broadcast`` its first column."""
    if layout == "transposed" and x.dim() > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced":  # the elements between are NaN: a kernel that reads them gives NaN
        buffer = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 1), float("nan"))
        view = buffer[..., 1::2]
        view.copy_(x)
        return view
    if layout == "expanded" and x.dim() > 1:
        return x[:1].expand(x.shape)
    if layout == "broadcast":
        return x[..., :1].expand(x.shape)
    return x


def packed_weight(
    N: int, K: int, *, zero_row: bool = False, spread: float = 1.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """``(codes [N, K], scale [N])`` of a normal weight whose channels differ in size by up to ``2**spread``."""
    g = generator(seed)
    weight = torch.randn(N, K, generator=g) * torch.exp2(spread * torch.rand(N, 1, generator=g)) / math.sqrt(max(K, 1))
    if zero_row and N:
        weight[int(torch.randint(N, (), generator=g))] = 0
    return quantize_weight(weight)


@dataclass(frozen=True)
class Problem:
    """The arguments of `int8fx::linear`."""

    x: Tensor
    weight: Int8Weight
    epilogue: Epilogue = NO_EPILOGUE

    def __iter__(self):
        """``linear(*problem)`` of `reference`, `fallback` and `gpu`."""
        return iter((self.x, self.weight, self.epilogue))

    @property
    def args(self) -> tuple:
        """``torch.ops.int8fx.linear(*problem.args)``."""
        return (self.x, *self.weight, *self.epilogue)

    @property
    def quantize_args(self) -> tuple:
        """``torch.ops.int8fx.quantize_rowwise(*problem.quantize_args)``."""
        return self.x, self.weight.threshold, self.weight.block, self.weight.columns

    @property
    def bias(self) -> Tensor | None:
        return self.epilogue.bias

    def with_x(self, x: Tensor) -> Problem:
        return replace(self, x=x)

    def with_epilogue(self, **fields) -> Problem:
        return replace(self, epilogue=self.epilogue._replace(**fields))


def problem(
    M: int,
    K: int,
    N: int,
    *,
    outliers: str = "some",
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    threshold: float | None = 6.0,
    block: int = 1,
    columns: int = 0,
    seed: int = 0,
) -> Problem:
    """A problem with a normal x and weight; ``columns``: how many are not quantised."""
    x = activation(M, K, outliers=outliers, dtype=dtype, seed=seed)
    packed, g = packed_weight(N, K, seed=seed + 1), generator(seed + 2)
    b = torch.randn(N, generator=g).to(dtype) if bias else None
    weight = Int8Weight(*packed, None if block != 1 else threshold, block)
    if columns:
        weight = weight._replace(
            columns=torch.randperm(K, generator=g)[:columns].sort().values,
            columns_weight=torch.randn(N, min(K, columns), generator=g).to(dtype),
        )
    return Problem(x, weight, Epilogue(b))


# ---- the oracle and the budgets --------------------------------------------------------------------------------------


def oracle(x: Tensor, weight: Int8Weight, bias: Tensor | None = None) -> Tensor:
    """``x @ W.T + bias`` in float64, W the dequantised weight: the matmul of x as it is."""
    y = x.double() @ dequantize(weight, torch.float64).transpose(-1, -2)
    if bias is not None:
        y = y + (bias.double() if weight.codes.dim() == 2 else bias.double().unsqueeze(-2))
    return y


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def half_subnormal(dtype: torch.dtype) -> float:
    """The rounding error of a result in dtype's subnormal range. For float64, where no half exists, it is the whole."""
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    return smallest / 2 or smallest


def output_rounding(y: Tensor, dtype: torch.dtype) -> Tensor:
    """How far ``y`` can move when it is rounded from its compute dtype to ``dtype``; nothing if that is ``dtype``."""
    if dtype == compute_dtype(dtype):
        return torch.zeros_like(y)
    return unit_roundoff(dtype) * y.abs() + half_subnormal(dtype)


@dataclass(frozen=True)
class Bound:
    """The terms of the bound in `reference.linear`, each float64 ``[..., N]``.

    codes: what rounding x to codes can cost.
    sums: what the float32 (float64) sums can cost; ``magnitude`` is the sum of the absolute values of all terms.
    """

    codes: Tensor
    sums: Tensor
    magnitude: Tensor

    def total(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        error = self.codes + self.sums
        return error + output_rounding(y.abs() + error, dtype)


def form_of(x: Tensor, weight: Int8Weight) -> Form:
    """Which form serves x on its device."""
    rows = math.prod(x.shape[:-1]) if weight.codes.dim() == 2 else x.shape[-2]
    return form(rows, x.device.type, weight.threshold, weight.block, weight.columns is not None, weight.is_plain)


def kernels_linear(x: Tensor, weight: Int8Weight, epilogue: Epilogue = NO_EPILOGUE) -> Tensor:
    """`reference.linear` as the kernels compute it: x is not quantised where they do not quantise it."""
    if form_of(x, weight) is Form.WEIGHT_ONLY:
        weight = weight._replace(threshold=0.0)
    return reference.linear(x, weight, epilogue)


def slices_of(x: Tensor, weight: Int8Weight) -> int:
    """Into how many parts a kernel may cut its int8 sum: what each part adds is a rounding.

    Groups, and other formats than int8: floating point. torch's operators: float32 sums of 1040 integers. Weight-only
    kernels: floating point, 16 sums at once at least (8 in float64), a remainder of less than two vectors, and the sum
    of the sums.
    """
    K = x.shape[-1]
    if not weight.is_plain:
        return K + 4
    return math.ceil(K / 8) + 32 if form_of(x, weight) is Form.WEIGHT_ONLY else math.ceil(K / 1040)


def stored_rows(weight: Int8Weight) -> Tensor:
    """The values that the codes of ``weight`` stand for, before the rotation, as float64."""
    return dequantize(weight._replace(block=1, columns=None, columns_weight=None), torch.float64)


def largest_scale(weight: Int8Weight) -> Tensor:
    """``[N, 1]``: the largest scale of each channel, as float64."""
    scale = read_scale(weight.scale, weight.scale_range, torch.float64).abs()
    return (scale if weight.group_size is None else scale.amax(-1)).unsqueeze(-1)


def scale_of_columns(weight: Int8Weight) -> Tensor:
    """``[N, K]``: the size of the scale of each weight, as float64."""
    scale = read_scale(weight.scale, weight.scale_range, torch.float64).abs()
    if weight.group_size is None:
        return scale.unsqueeze(-1).expand(-1, weight.K)
    return scale.repeat_interleave(weight.group_size, -1)[:, : weight.K]


def rotation_error(z: Tensor, block: int, ct: torch.dtype) -> Tensor:
    """``t(z)`` of `reference.linear`'s docstring: how far the rotation of z, in ``ct``, may be off."""
    t = torch.zeros_like(z, dtype=torch.float64)
    u, h = unit_roundoff(ct), half_subnormal(ct)
    for i, n in rotation_blocks(z.shape[-1], block) if block != 1 else ():
        roundings = (math.log2(n) + 3) * u
        total = z[..., i : i + n].double().abs().sum(-1, keepdim=True)
        t[..., i : i + n] = roundings / (1 - roundings) / math.sqrt(n) * total + (math.sqrt(n) + 1) * h
    return t


def bound(x: Tensor, weight: Int8Weight, bias: Tensor | None = None, slices: int | None = None) -> Bound:
    """The bound in `reference.linear`'s docstring; ``slices``: see `slices_of`."""
    slices = slices_of(x, weight) if slices is None else slices
    if weight.codes.dim() == 3:
        parts = [
            bound(x[e], weight.of_expert(e), None if bias is None else bias[e], slices)
            for e in range(weight.codes.shape[0])
        ]
        return Bound(*(torch.stack([getattr(p, name) for p in parts]) for name in ("codes", "sums", "magnitude")))
    codes, _, threshold, block, columns, columns_weight, *_ = weight
    K, ct = x.shape[-1], compute_dtype(x.dtype)
    x2d = x.reshape(math.prod(x.shape[:-1]), K).to(ct)
    quantised = x2d if columns is None else x2d.index_fill(1, columns, 0)
    mask = outlier_mask(quantised, threshold, columns)
    quantised = quantised.masked_fill(mask, 0)
    x_codes, x_scale = quantize_rowwise(rotate(quantised, block))
    x_scale = x_scale.double().unsqueeze(-1)
    v = stored_rows(weight).abs()
    included = ~mask if block == 1 else torch.ones_like(mask)
    rounded = x_scale / 2 * (1 + 2**-16) * v[:, included].sum(-1)
    magnitude = (x_codes.double().abs() * x_scale) @ v.T + x2d[:, mask].double().abs() @ v[:, mask].T
    outliers = int(mask.sum()) if weight.is_plain else K
    if columns is not None:
        magnitude = magnitude + x2d[:, columns].double().abs() @ columns_weight.double().abs().T
        outliers += len(columns)
    if bias is not None:
        magnitude = magnitude + bias.double().abs()
    n = (outliers + slices + 4) * unit_roundoff(ct)
    sums = n / (1 - n) * magnitude + (outliers + 1) * half_subnormal(ct)
    if x.dtype == torch.bfloat16:  # D
        sums = sums + torch.finfo(x.dtype).tiny * (v + largest_scale(weight)).sum(-1)
        if columns is not None:
            of_x, of_w = x2d[:, columns].double().abs().sum(-1), columns_weight.double().abs().sum(-1)
            sums = sums + torch.finfo(x.dtype).tiny * (of_x.unsqueeze(-1) + of_w + len(columns))
    if x.dtype in (torch.bfloat16, torch.float16) and K > 0 and form_of(x, weight) is Form.WEIGHT_ONLY:  # F
        sums = sums + 2.0**-30 * x2d.double().abs().nan_to_num().amax(-1, keepdim=True) * v.sum(-1)
    if (
        weight.format is not None and not FORMATS[weight.format].is_integer and form_of(x, weight) is Form.QUANTIZED
    ):  # L
        sums = sums + (x_codes.double().abs() * x_scale) @ scale_of_columns(weight).T / 254
    sums = sums + (K + 3) * unit_roundoff(torch.float64) * magnitude  # the oracle's own
    if block != 1:
        sums = sums + rotation_error(quantised, block, ct) @ v.T
        sums = sums + x2d.double().abs() @ rotation_error(v, block, torch.float64).T  # the oracle's own rotation
    shape = (*x.shape[:-1], codes.shape[0])
    return Bound(rounded.reshape(shape), sums.reshape(shape), magnitude.reshape(shape))


_SLOPE = {"none": 1.0, "relu": 1.0, "silu": 1.0999, "gelu": 1.129, "gelu_tanh": 1.1291}  # max abs derivative
_ACTIVATION_ROUNDINGS = 8  # of exp, erf or tanh and the few operations around them, relative to their argument


def apply(epilogue: Epilogue, v: Tensor) -> Tensor:
    """Activation and binary of ``epilogue`` on v, which has the bias already."""
    v = reference.ACTIVATIONS[epilogue.activation](v)
    return v if epilogue.other is None else reference.BINARIES[epilogue.binary](v, epilogue.other.to(v.dtype))


def error_budget(
    x: Tensor,
    weight: Int8Weight,
    epilogue: Epilogue = NO_EPILOGUE,
    *,
    slices: int | None = None,
) -> tuple[Tensor, Tensor]:
    """``(exact, budget)``, both float64 ``[..., N]``: what a kernel computes, and how far it may be from it.

    ``budget = 1.05 * error of the reference before its last rounding + what two float32 sums can differ by
    + rounding of the output dtype``.
    """
    ct, u = compute_dtype(x.dtype), unit_roundoff(compute_dtype(x.dtype))
    _, activation, other, binary = epilogue
    v = oracle(x, weight, epilogue.bias)
    exact = apply(epilogue, v)
    y = reference.linear(x.to(ct), weight, epilogue).double()
    slack = 2 * bound(x, weight, epilogue.bias, slices).sums * _SLOPE[activation]
    if activation not in ("none", "relu"):
        slack = slack + 2 * _ACTIVATION_ROUNDINGS * u * v.abs()
    if other is not None:
        slack = slack * other.double().abs() if binary == "mul" else slack + 2 * u * other.double().abs()
        slack = slack + 4 * u * exact.abs()
    error = 1.05 * (y - exact).abs() + slack
    return exact, error + output_rounding(exact.abs() + error, x.dtype)


def assert_within(y: Tensor, exact: Tensor, budget: Tensor, magnitude: Tensor) -> None:
    """``abs(y - exact) <= budget``; not finite where ``exact`` is not; inf where ``exact`` overflows y's dtype.

    Where the ``magnitude`` of the sums is beyond what their dtype holds, y is not checked.
    """
    assert y.shape == exact.shape
    largest = torch.finfo(y.dtype).max
    finite = exact.isfinite()
    assert not y[~finite].isfinite().any(), "NaN or inf of x is lost"
    checked = finite & (magnitude < torch.finfo(compute_dtype(y.dtype)).max / 2**24)
    over = checked & (exact.abs() - budget > largest * (1 + unit_roundoff(y.dtype)))
    assert (y[over] == exact[over].sign() * INF).all(), "not inf beyond the output dtype"
    may_be_inf = exact.abs() + budget > largest
    checked = checked & ~(may_be_inf & y.isinf())
    error = (y.double() - exact).abs()
    worst = torch.where(checked, error - budget, -INF)
    if bool((worst > 0).any()) or bool((checked & error.isnan()).any()):
        at = tuple(
            int(i) for i in torch.unravel_index(torch.where(error.isnan() & checked, INF, worst).argmax(), y.shape)
        )
        raise AssertionError(
            f"y{list(at)} = {y[at].item()}, exact {exact[at].item()}: error {error[at].item():.3e}, "
            f"budget {budget[at].item():.3e}"
        )


def assert_within_budget(
    y: Tensor,
    x: Tensor,
    weight: Int8Weight,
    epilogue: Epilogue = NO_EPILOGUE,
    *,
    slices: int | None = None,
) -> None:
    """``error(y) <= 1.05 * error(reference) + rounding``, element by element against float64; see `error_budget`."""
    assert y.dtype == x.dtype
    assert y.shape == (*x.shape[:-1], weight.codes.shape[-2])
    exact, budget = error_budget(x, weight, epilogue, slices=slices)
    magnitude = bound(x, weight, epilogue.bias).magnitude
    other = epilogue.other
    assert_within(y, exact, budget, magnitude if other is None else magnitude * other.double().abs().clamp_min(1))


def assert_within_bound(y: Tensor, x: Tensor, weight: Int8Weight, epilogue: Epilogue = NO_EPILOGUE) -> None:
    """``abs(y - y*) <= Q + S + R`` of `reference.linear`'s docstring, element by element against float64."""
    assert epilogue._replace(bias=None) == NO_EPILOGUE, "the bound is for results before an activation"
    assert y.dtype == x.dtype
    exact = oracle(x, weight, epilogue.bias)
    terms = bound(x, weight, epilogue.bias)
    assert_within(y, exact, terms.total(exact, x.dtype), terms.magnitude)


# ---- strategies ------------------------------------------------------------------------------------------------------

seeds = st.integers(0, 2**31 - 1)
dtypes = st.sampled_from(DTYPES)
thresholds = st.sampled_from((6.0, None, 0.0, 2.5))
sizes = st.integers(0, 130)


@st.composite
def leads(draw, max_rows: int = 40) -> tuple[int, ...]:
    """The shape of x but for K: no to four dimensions, of together at most ``max_rows`` rows, or none."""
    lead: list[int] = []
    for _ in range(draw(st.integers(0, 4))):
        lead.append(draw(st.integers(0, max(1, max_rows // max(1, math.prod(lead))))))
    return tuple(lead)


@st.composite
def activations(draw, lead=None, K=None, dtype=dtypes, values=VALUES, layouts=LAYOUTS) -> Tensor:
    lead = draw(leads()) if lead is None else lead
    K = draw(sizes) if K is None else K
    x = activation(
        math.prod(lead),
        K,
        outliers=draw(st.sampled_from(OUTLIERS)),
        values=draw(st.sampled_from(values)),
        dtype=draw(dtype),
        seed=draw(seeds),
    )
    return with_layout(x.reshape(*lead, K), draw(st.sampled_from(layouts)))


SCHEMES = ("llm_int8", "columns", "rotated", "rotated columns", "groups")
"""What an `Int8Weight` can be: with a threshold (or none), unquantised columns, a rotation, both of the latter, or of
any format of `formats.FORMATS` and any of these too."""
schemes = st.sampled_from(SCHEMES)


@st.composite
def weights(draw, K: int, experts: int | None = None, scheme=schemes, dtype=torch.float32) -> Int8Weight:
    """A packed weight of any scheme; ``experts``: a 3-D weight. ``dtype``: of unquantised columns, or a 16-bit one."""
    N, seed, name = draw(sizes), draw(seeds), draw(scheme)
    if name == "groups":
        return draw(weights_in_groups(N, K, experts, seed, dtype))
    zero_row, spread = draw(st.booleans()), draw(st.sampled_from((0.0, 8.0)))
    packed = [packed_weight(N, K, zero_row=zero_row, spread=spread, seed=seed + e) for e in range(experts or 1)]
    codes, scale = (torch.stack(parts) if experts else parts[0] for parts in zip(*packed, strict=True))
    weight = Int8Weight(codes, scale)
    if "rotated" in name:
        weight = weight._replace(block=draw(st.sampled_from((2, 16, 64, -8, -16, -64, -256))))
    else:
        weight = weight._replace(threshold=draw(thresholds))
    if "columns" in name:
        count, g = min(K, draw(st.integers(0, 4))), generator(draw(seeds))
        columns_weight = torch.randn(*codes.shape[:-1], count, generator=g)
        weight = weight._replace(
            columns=torch.randperm(K, generator=g)[:count].sort().values,
            columns_weight=columns_weight.to(draw(st.sampled_from((dtype, torch.float16, torch.bfloat16)))),
        )
    return weight


@st.composite
def groupings(draw) -> Grouping:
    """Any grouping that a weight can have."""
    name, size = draw(st.sampled_from(sorted(FORMATS))), draw(st.sampled_from((None, 1, 7, 16, 32, 64, 200)))
    double_quant = size is not None and draw(st.booleans())
    dtype = torch.float32 if double_quant else draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16)))
    return Grouping(name, size, name in ("int8", "int4_clip") and draw(st.booleans()), dtype, double_quant)


@st.composite
def weights_in_groups(draw, N: int, K: int, experts: int | None, seed: int, dtype: torch.dtype) -> Int8Weight:
    grouping, block = draw(groupings()), draw(st.sampled_from((1, 1, 1, -16)))
    w = torch.randn(*(experts or 1,), N, K, generator=generator(seed))
    w = w * torch.exp2(draw(st.sampled_from((0.0, 8.0))) * torch.rand(N, 1, generator=generator(seed + 1)))
    columns = None
    if draw(st.booleans()):
        columns = torch.randperm(K, generator=generator(seed))[: draw(st.integers(0, 4))].sort().values
    threshold = draw(thresholds) if block == 1 else None
    return in_groups(w if experts else w[0], grouping, threshold, block, columns, dtype)


def in_groups(
    weight: Tensor,
    grouping: Grouping,
    threshold: float | None = None,
    block: int = 1,
    columns: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    choose: ChooseScales = absmax_scales,
) -> Int8Weight:
    """``weight [..., N, K]`` as ``grouping`` has it; ``dtype``: of unquantised columns."""
    tensors = pack_weight(weight, grouping, block, columns, choose)
    columns_weight = None if tensors.columns_weight is None else tensors.columns_weight.to(dtype)
    is_int8 = grouping.format == "int8"
    name, K = None if is_int8 else grouping.format, None if is_int8 else weight.shape[-1]
    return Int8Weight(
        tensors.codes, tensors.scale, threshold, block, columns, columns_weight, name, grouping.size, K,
        tensors.zero_point, tensors.scale_range,
    )  # fmt: skip


def weight_in_groups(
    N: int,
    K: int,
    grouping: Grouping,
    *,
    experts: int | None = None,
    threshold: float | None = None,
    block: int = 1,
    columns: int = 0,
    seed: int = 0,
) -> Int8Weight:
    """The weight of a normal one whose channels differ in size; ``columns``: how many are not quantised."""
    g = generator(seed)
    shape = (N,) if experts is None else (experts, N)
    size = torch.exp2(3 * torch.rand(*shape, 1, generator=g)) / math.sqrt(max(K, 1))
    values = torch.randn(*shape, K, generator=g) * size
    indices = torch.randperm(K, generator=g)[:columns].sort().values if columns else None
    return in_groups(values, grouping, threshold, block, indices)


@st.composite
def problems_in_groups(draw, values=VALUES, layouts=LAYOUTS) -> Problem:
    """Arguments of `int8fx::linear` with a weight of any format."""
    M, K = draw(st.sampled_from((0, 1, 4, 5, 17, 130))), draw(st.sampled_from((1, 2, 33, 64, 129, 256, 385)))
    x = draw(activations(lead=(M,), K=K, values=values, layouts=layouts))
    rotated, seed = draw(st.booleans()), draw(seeds)
    weight = weight_in_groups(
        draw(st.sampled_from((0, 1, 5, 48, 67))),
        K,
        draw(groupings()),
        threshold=None if rotated else draw(thresholds),
        block=draw(st.sampled_from((16, -64))) if rotated else 1,
        columns=draw(st.integers(0, min(K, 3))),
        seed=seed,
    )
    bias = torch.randn(len(weight.codes), generator=generator(seed)) if draw(st.booleans()) else None
    return Problem(x, weight, Epilogue(bias))


@st.composite
def problems(
    draw, dtype=dtypes, values=VALUES, layouts=LAYOUTS, batched: bool | None = False, scheme=schemes
) -> Problem:
    """Arguments of `int8fx::linear` with a bias or none; ``batched``: a 3-D weight (None: either)."""
    batched = draw(st.booleans()) if batched is None else batched
    lead = (draw(st.integers(1, 4)), draw(st.integers(0, 12))) if batched else draw(leads())
    x = draw(activations(lead=lead, dtype=dtype, values=values, layouts=layouts))
    weight = draw(weights(x.shape[-1], x.shape[0] if batched else None, scheme, x.dtype))
    bias_dtype = draw(st.sampled_from((None, x.dtype, torch.float32, torch.float64)))
    bias = None
    if bias_dtype is not None:
        bias = torch.randn(weight.codes.shape[:-1], generator=generator(draw(seeds))).to(bias_dtype)
    return Problem(x, weight, Epilogue(bias))
