import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.helpers import (
    DTYPES,
    INF,
    LAYOUTS,
    activation,
    generator,
    packed_weight,
    problem,
    problems,
    seeds,
    unit_roundoff,
    with_layout,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._pytree import tree_map_only

from int8fx import ops
from int8fx.schemes import reference
from int8fx.schemes.quantize import MAX_K, NO_THRESHOLD

LIBRARY = sorted(
    name.removeprefix("int8fx::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("int8fx::")
)


def overload(name: str) -> torch._ops.OpOverload:
    base, _, variant = name.partition(".")
    return getattr(getattr(torch.ops.int8fx, base), variant or "default")


# ---- sample inputs of every op --------------------------------------------------------------------------------------

K, N = 13, 7


def _x(*lead: int, dtype: torch.dtype = torch.float32, grad: bool = False, layout: str = "contiguous") -> torch.Tensor:
    x = activation(math.prod(lead), K, outliers="column", dtype=dtype, seed=1).reshape(*lead, K)
    return with_layout(x, layout).requires_grad_(grad)


def _bias(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> torch.Tensor:
    return torch.randn(shape, generator=generator(3)).to(dtype).requires_grad_(grad)


def _experts(E: int) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.stack(parts) for parts in zip(*(packed_weight(N, K, seed=e) for e in range(E)), strict=True))


def _kept(*lead: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([1, 4, K - 1]), torch.randn(*lead, 3, generator=generator(5)).to(dtype)


def _other(*lead: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*lead, N, generator=generator(4)).to(dtype)


def linear_samples():
    packed = packed_weight(N, K, seed=2)
    for dtype in DTYPES:
        yield f"{dtype}", (_x(5, dtype=dtype, grad=True), *packed, _bias(N, dtype=dtype, grad=True), 6.0)
    for lead in ((), (0,), (1,), (2, 3), (2, 0, 3), (2, 1, 2, 1)):
        yield f"x {(*lead, K)}", (_x(*lead, grad=True), *packed, _bias(N, grad=True), 6.0)
    for layout in LAYOUTS[1:]:
        yield layout, (_x(4, layout=layout), *packed, None, 6.0)
    for threshold in (0.0, INF):
        yield f"threshold {threshold}", (_x(5, grad=True), *packed, None, threshold)
    yield "only x needs a gradient", (_x(5, grad=True), *packed, _bias(N), 6.0)
    yield "only the bias needs a gradient", (_x(5), *packed, _bias(N, grad=True), 6.0)
    yield "bias of another dtype", (_x(5, dtype=torch.bfloat16, grad=True), *packed, _bias(N, grad=True), 6.0)
    yield "batched", (_x(3, 4, grad=True), *_experts(3), _bias(3, N, grad=True), 6.0)
    yield "batched, no rows", (_x(3, 0, grad=True), *_experts(3), None, 6.0)
    yield "batched epilogue", (_x(3, 4), *_experts(3), None, 6.0, "gelu", _other(3, 4), "mul")
    for name in reference.ACTIVATIONS:
        yield name, (_x(5, dtype=torch.bfloat16), *packed, _bias(N), 6.0, name)
    plain = ("none", None, "none")
    yield "rotated", (_x(2, 3, grad=True), *packed, _bias(N, grad=True), NO_THRESHOLD, *plain, 8)
    for dtype in DTYPES:
        x = _x(5, dtype=dtype, grad=True)
        yield f"rotated, columns, {dtype}", (x, *packed, None, NO_THRESHOLD, *plain, 4, *_kept(N, dtype=dtype))
    yield "columns without a rotation", (_x(5, grad=True), *packed, None, 6.0, *plain, 1, *_kept(N))
    yield "rotated, top", (_x(5, grad=True), *packed, None, NO_THRESHOLD, *plain, 8, None, None, 2)
    yield "rotated, no rows", (_x(0, grad=True), *packed, None, NO_THRESHOLD, *plain, 8, *_kept(N), 2)
    yield "rotated, batched", (_x(3, 4, grad=True), *_experts(3), None, NO_THRESHOLD, *plain, 8, *_kept(3, N))
    epilogue = ("gelu", _other(5), "mul")
    yield "rotated, epilogue", (_x(5), *packed, _bias(N), NO_THRESHOLD, *epilogue, 8, *_kept(N))
    for binary in ("add", "mul"):
        yield binary, (_x(2, 3), *packed, _bias(N), 6.0, "silu", _other(2, 3), binary)


def linear_quantized_samples():
    for what, (x, weight, scale, bias, threshold, *rest) in linear_samples():
        if weight.dim() == 2 and not what.startswith(("threshold", "only", "expanded", "broadcast", "relu", "gelu")):
            block, columns, *_, top = rest[3:] if len(rest) == 7 else (*rest[3:], *(1, None, None, 0)[len(rest[3:]) :])
            quantized = ops.quantize_rowwise(x.detach(), threshold, block, columns, top)
            yield what, (x, *quantized, weight, scale, bias, *rest[:6])


def quantize_rowwise_samples():
    for dtype in DTYPES:
        yield f"{dtype}", (_x(5, dtype=dtype, grad=True), 6.0)
    for lead in ((), (0,), (1,), (2, 0, 3), (2, 1, 2, 1)):
        yield f"x {(*lead, K)}", (_x(*lead), 6.0)
    for layout in LAYOUTS[1:]:
        yield layout, (_x(4, layout=layout), 6.0)
        yield f"{layout}, no outliers", (_x(4, layout=layout), INF)
    yield "threshold 0", (_x(5), 0.0)
    yield "rotated", (_x(2, 3), NO_THRESHOLD, 8)
    yield "rotated, columns", (_x(5, dtype=torch.bfloat16, grad=True), NO_THRESHOLD, 8, _kept(N)[0])
    yield "rotated, top", (_x(5), NO_THRESHOLD, 8, _kept(N)[0], 3)
    yield "rotated, no rows", (_x(0), NO_THRESHOLD, 8, _kept(N)[0], 3)


def grouped_linear_samples():
    for dtype in DTYPES:
        offsets = torch.tensor([2, 2, 6], dtype=torch.int32)
        yield (
            f"{dtype}",
            (_x(6, dtype=dtype, grad=True), *_experts(3), _bias(3, N, dtype=dtype, grad=True), offsets, 6.0),
        )
    yield "rows behind the last group", (_x(8, grad=True), *_experts(2), None, torch.tensor([3, 5]), 6.0)
    yield "no rows", (_x(0, grad=True), *_experts(2), None, torch.tensor([0, 0]), 6.0)
    yield "transposed", (_x(4, layout="transposed"), *_experts(1), None, torch.tensor([4]), 6.0)
    rotated = (NO_THRESHOLD, 8, *_kept(2, N), 1)
    yield "rotated", (_x(6, grad=True), *_experts(2), None, torch.tensor([3, 5]), *rotated)


def dequantize_samples():
    weight, scale = packed_weight(N, K, seed=2)
    for dtype in DTYPES:
        yield f"{dtype}", (weight, scale, dtype, 6.0)
    yield "default threshold", (weight, scale, torch.float32)
    yield "batched", (*_experts(3), torch.bfloat16, INF)
    yield "transposed", (packed_weight(K, N, seed=2)[0].t(), scale, torch.bfloat16)
    yield "sliced", (weight[::2, ::3], scale[::2], torch.float32)
    yield "empty", (weight[:0], scale[:0], torch.float16)
    yield "rotated", (weight, scale, torch.bfloat16, NO_THRESHOLD, 8)
    yield "rotated, columns", (*_experts(3), torch.float32, NO_THRESHOLD, 8, *_kept(3, N), 2)


SAMPLES = {
    "linear": linear_samples,
    "linear_quantized": linear_quantized_samples,
    "quantize_rowwise": quantize_rowwise_samples,
    "grouped_linear": grouped_linear_samples,
    "dequantize": dequantize_samples,
}
CASES = [
    pytest.param(name, args, id=f"{name}-{what}".replace("torch.", "").replace(" ", "_"))
    for name in LIBRARY
    for what, args in SAMPLES.get(name, tuple)()
]


def test_every_op_of_the_library_has_samples():
    assert LIBRARY
    assert set(LIBRARY) == set(SAMPLES)


@pytest.mark.parametrize(("name", "args"), CASES)
def test_opcheck(name, args):
    torch.library.opcheck(overload(name), args)


# ---- fakes ----------------------------------------------------------------------------------------------------------


def tensors(result) -> tuple[torch.Tensor, ...]:
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)


def symbolic(args):
    """Fake tensors of the same sizes, every dimension dynamic."""
    mode = FakeTensorMode(shape_env=ShapeEnv())

    def fake(t: torch.Tensor) -> torch.Tensor:
        context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * t.dim())
        return mode.from_tensor(t.detach(), symbolic_context=context)

    return mode, tree_map_only(torch.Tensor, fake, args)


def hint(size) -> int:
    return size.node.hint if isinstance(size, torch.SymInt) else size


@pytest.mark.parametrize(("name", "args"), CASES)
def test_fake_has_the_metadata_of_the_kernel_for_any_shape(name, args):
    real = overload(name)(*args)
    mode, fakes = symbolic(args)
    with mode:
        fake = overload(name)(*fakes)
    for r, f in zip(tensors(real), tensors(fake), strict=True):
        assert tuple(map(hint, f.shape)) == r.shape
        assert tuple(map(hint, f.stride())) == r.stride() or r.numel() == 0
        assert f.dtype == r.dtype
        assert f.device == r.device
        for size in f.shape:  # no size became a constant but for 0 and 1, and none comes from data
            assert isinstance(size, torch.SymInt) or size in (0, 1)
        assert not any(str(s).startswith("u") for size in f.shape if isinstance(size, torch.SymInt)
                       for s in size.node.expr.free_symbols)  # fmt: skip


@given(problems(batched=None))
def test_fake_and_kernel_agree_on_shape_dtype_and_strides(p):
    calls = [("linear", tuple(p)), ("dequantize", (p.codes, p.scale, p.x.dtype))]
    if p.codes.dim() == 2:
        quantized = ops.quantize_rowwise(p.x, p.threshold)
        calls += [
            ("quantize_rowwise", (p.x, p.threshold)),
            ("linear_quantized", (p.x, *quantized, p.codes, p.scale, p.bias)),
        ]
    mode = FakeTensorMode()
    for name, args in calls:
        real = overload(name)(*args)
        with mode:
            fake = overload(name)(*tree_map_only(torch.Tensor, mode.from_tensor, args))
        for r, f in zip(tensors(real), tensors(fake), strict=True):
            assert (f.shape, f.dtype, f.device) == (r.shape, r.dtype, r.device)
            assert f.stride() == r.stride()


@given(problems(), seeds)
def test_no_output_shape_depends_on_data(p, seed):
    x = activation(math.prod(p.x.shape[:-1]), p.x.shape[-1], outliers="columns", dtype=p.x.dtype, seed=seed)
    for other in (x.reshape(p.x.shape), torch.zeros_like(p.x)):
        for a, b in zip(ops.quantize_rowwise(p.x, 6.0), ops.quantize_rowwise(other, 6.0), strict=True):
            assert a.shape == b.shape
        assert ops.linear(p.x, p.codes, p.scale, p.bias, 6.0).shape == (
            ops.linear(other, p.codes, p.scale, p.bias, 6.0).shape
        )


def test_outputs_never_alias_inputs():
    for case in CASES:
        name, args = case.values
        for out in tensors(overload(name)(*args)):
            for arg in args:
                if isinstance(arg, torch.Tensor) and out.numel() and arg.numel():
                    assert out.untyped_storage().data_ptr() != arg.untyped_storage().data_ptr()


# ---- gradients ------------------------------------------------------------------------------------------------------


def gradients(y, inputs, grad):
    return torch.autograd.grad(y, [t for t in inputs if t is not None], grad)


@given(problems(values=("normal", "zero_rows"), layouts=("contiguous", "transposed", "sliced"), batched=None), seeds)
def test_gradients_are_those_of_the_dequantised_linear(p, seed):
    x = p.x.detach().requires_grad_()
    bias = None if p.bias is None else p.bias.requires_grad_()
    y = ops.linear(x, p.codes, p.scale, bias, p.threshold)
    assert y.requires_grad
    grad = torch.randn(y.shape, generator=generator(seed)).to(y.dtype)
    found = gradients(y, (x, bias), grad)

    x64 = x.detach().double().requires_grad_()
    bias64 = None if bias is None else bias.detach().double().requires_grad_()
    w = (p.codes.double() * p.scale.double().unsqueeze(-1)).transpose(-1, -2)
    y64 = x64 @ w
    if bias is not None:
        y64 = y64 + (bias64 if p.codes.dim() == 2 else bias64.unsqueeze(-2))
    exact = gradients(y64, (x64, bias64), grad.double())

    # A float sum of n products, of factors rounded to the dtype, may err by (n + 3) units of roundoff per term.
    u = unit_roundoff(x.dtype) * (2 if x.dtype == torch.float64 else 1)
    terms_x = grad.double().abs() @ w.abs().transpose(-1, -2)
    assert found[0].dtype == x.dtype
    assert found[0].shape == x.shape
    smallest = torch.finfo(x.dtype).smallest_normal
    budget = (y.shape[-1] + 3) * (u * terms_x + smallest)
    assert ((found[0].double() - exact[0]).abs() <= budget).all()
    if bias is not None:
        lead = tuple(range(bias.dim() - 1, y.dim() - 1))
        terms_bias = grad.double().abs().sum(lead) if lead else grad.double().abs()
        assert found[1].dtype == bias.dtype
        assert found[1].shape == bias.shape
        rows = math.prod(y.shape[d] for d in lead)
        budget = ((rows + 3) * u + unit_roundoff(bias.dtype)) * terms_bias
        assert ((found[1].double() - exact[1]).abs() <= budget).all()


@pytest.mark.parametrize("lead", [(), (0,), (5,), (2, 3), (2, 1, 2, 2)])
def test_float32_gradients_equal_autograd_of_the_dequantised_linear(lead):
    weight, scale = packed_weight(N, K, seed=2)
    x, bias = _x(*lead, grad=True), _bias(N, grad=True)
    grad = _other(*lead)
    found = gradients(ops.linear(x, weight, scale, bias, 6.0), (x, bias), grad)
    expected = gradients(F.linear(x, ops.dequantize(weight, scale, x.dtype), bias), (x, bias), grad)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-20, atol=0)


@given(problems(values=("normal",), layouts=("contiguous", "sliced")), seeds)
def test_quantising_first_has_the_gradients_of_linear(p, seed):
    x = p.x.detach().requires_grad_()
    bias = None if p.bias is None else p.bias.requires_grad_()
    y = ops.linear(x, p.codes, p.scale, bias, p.threshold)
    grad = torch.randn(y.shape, generator=generator(seed)).to(y.dtype)
    quantized = ops.quantize_rowwise(x, p.threshold)
    assert not any(t.requires_grad for t in quantized)
    again = ops.linear_quantized(x, *quantized, p.codes, p.scale, bias)
    for a, b in zip(gradients(again, (x, bias), grad), gradients(y, (x, bias), grad), strict=True):
        assert torch.equal(a, b)


def test_weights_are_frozen():
    weight, scale = packed_weight(N, K, seed=2)
    scale = scale.clone().requires_grad_()
    x = _x(5, grad=True)
    ops.linear(x, weight, scale, None, 6.0).sum().backward()
    assert x.grad is not None
    assert scale.grad is None
    with torch.no_grad():
        assert not ops.linear(x, weight, scale, None, 6.0).requires_grad


def test_gradient_of_a_gradient():
    weight, scale = packed_weight(N, K, seed=2)
    x, v = _x(5, grad=True), torch.ones(5, N, requires_grad=True)
    (first,) = torch.autograd.grad(ops.linear(x, weight, scale, None, 6.0), x, v, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), v)
    torch.testing.assert_close(second, ops.dequantize(weight, scale, torch.float32).sum(1).expand(5, N))


@pytest.mark.parametrize("name", ["linear", "linear_quantized"])
@pytest.mark.parametrize("grad_of", ["x", "bias", "other"])
@pytest.mark.parametrize(("activation_name", "binary"), [("silu", "none"), ("none", "add"), ("gelu", "mul")])
def test_no_gradient_through_an_epilogue(name, grad_of, activation_name, binary):
    packed = packed_weight(N, K, seed=2)
    x, bias, other = _x(5), _bias(N), None if binary == "none" else _other(5)
    needs = {"x": x, "bias": bias, "other": other}[grad_of]
    if needs is None:
        return
    between = () if name == "linear" else ops.quantize_rowwise(x, 6.0)
    needs.requires_grad_()
    after = (6.0,) if name == "linear" else ()
    args = (x, *between, *packed, bias, *after, activation_name, other, binary)
    with pytest.raises(RuntimeError, match=f"int8fx::{name} has no gradient through its epilogue"):
        overload(name)(*args)
    with torch.no_grad():
        overload(name)(*args)


@pytest.mark.parametrize("name", ["linear", "linear_quantized"])
def test_no_gradient_through_an_epilogue_of_fakes(name):
    x, between, after = _x(5, grad=True), (), (6.0,)
    if name == "linear_quantized":
        between, after = ops.quantize_rowwise(x.detach(), 6.0), ()
    args = (x, *between, *packed_weight(N, K, seed=2), None, *after, "silu", None, "none")
    mode = FakeTensorMode()
    fakes = tree_map_only(torch.Tensor, mode.from_tensor, args)
    with mode, pytest.raises(RuntimeError, match="no gradient through its epilogue"):
        overload(name)(*fakes).sum().backward()


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=4),
    st.integers(0, 3),
    st.sampled_from(DTYPES),
    seeds,
)
def test_grouped_gradients_are_those_of_linear_per_group(sizes, behind, dtype, seed):
    E, S = len(sizes), sum(sizes) + behind
    weight, scale = _experts(E)
    x = activation(S, K, outliers="some", dtype=dtype, seed=seed).requires_grad_()
    bias = _bias(E, N, dtype=dtype, grad=True)
    offsets = torch.tensor(sizes).cumsum(0)
    y = ops.grouped_linear(x, weight, scale, bias, offsets, 6.0)
    grad = torch.randn(S, N, generator=generator(seed)).to(dtype)
    grad_x, grad_bias = gradients(y, (x, bias), grad)
    assert (grad_x[sum(sizes) :] == 0).all()
    u = unit_roundoff(dtype) * (2 if dtype == torch.float64 else 1)
    begin = 0
    for e, end in enumerate(offsets.tolist()):
        g, w = grad[begin:end].double(), weight[e].double() * scale[e].double()[:, None]
        slack = (N + 3 + E) * (u * (g.abs() @ w.abs()) + torch.finfo(dtype).smallest_normal)
        assert ((grad_x[begin:end].double() - g @ w).abs() <= slack).all()
        assert ((grad_bias[e].double() - g.sum(0)).abs() <= (end - begin + 3) * u * g.abs().sum(0)).all()
        begin = end


# ---- autocast -------------------------------------------------------------------------------------------------------

AUTOCAST = ("linear", "grouped_linear")


def autocast_args(name: str):
    if name == "linear":
        return lambda x, bias, scale: (x, packed_weight(N, K, seed=2)[0], scale, bias, 6.0)
    offsets = torch.tensor([2, 6])
    return lambda x, bias, scale: (x, _experts(2)[0], scale, bias, offsets, 6.0)


@pytest.mark.parametrize("name", AUTOCAST)
@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_autocast_casts_x_and_bias_and_leaves_the_scale(name, to, dtype):
    args = autocast_args(name)
    x = _x(6, dtype=dtype)
    bias = _bias(N) if name == "linear" else _bias(2, N)
    scale = packed_weight(N, K, seed=2)[1] if name == "linear" else _experts(2)[1]
    with torch.autocast("cpu", to):
        y = overload(name)(*args(x, bias, scale))
    assert y.dtype == to
    assert torch.equal(y, overload(name)(*args(x.to(to), bias.to(to), scale)))
    assert not torch.equal(y, overload(name)(*args(x.to(to), bias.to(to), scale.to(to).float())))


@pytest.mark.parametrize("name", AUTOCAST)
def test_autocast_leaves_float64(name):
    args = autocast_args(name)
    bias = _bias(N, dtype=torch.float64) if name == "linear" else _bias(2, N, dtype=torch.float64)
    scale = packed_weight(N, K, seed=2)[1] if name == "linear" else _experts(2)[1]
    x = _x(6, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        y = overload(name)(*args(x, bias, scale))
    assert y.dtype == torch.float64
    assert torch.equal(y, overload(name)(*args(x, bias, scale)))


def test_autocast_casts_other_like_x():
    packed = packed_weight(N, K, seed=2)
    x, other = _x(6), _other(6)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.linear(x, *packed, None, 6.0, "silu", other, "mul")
    assert torch.equal(y, ops.linear(x.bfloat16(), *packed, None, 6.0, "silu", other.bfloat16(), "mul"))


def test_autocast_that_is_off_does_nothing():
    packed, x = packed_weight(N, K, seed=2), _x(6)
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert ops.linear(x, *packed, None, 6.0).dtype == torch.float32


def test_autocast_refuses_what_is_refused_without():
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="x has dtype"):
        ops.linear(_x(6).long(), *packed_weight(N, K, seed=2), None, 6.0)


def test_gradients_through_autocast_have_the_dtype_of_their_tensor():
    packed = packed_weight(N, K, seed=2)
    x, bias = _x(6, grad=True), _bias(N, grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.linear(x, *packed, bias, 6.0)
    grad = _other(6, dtype=torch.bfloat16)
    found = gradients(y, (x, bias), grad)
    x16, bias16 = x.detach().bfloat16().requires_grad_(), bias.detach().bfloat16().requires_grad_()
    expected = gradients(ops.linear(x16, *packed, bias16, 6.0), (x16, bias16), grad)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b.float())


# ---- refusals -------------------------------------------------------------------------------------------------------


def legal(name: str) -> dict:
    p = problem(5, K, N, seed=1)
    codes, x_scale, mask = ops.quantize_rowwise(p.x, 6.0)
    weight, scale = _experts(2)
    epilogue = {"activation": "none", "other": None, "binary": "none"}
    return {
        "linear": {"x": p.x, "weight": p.codes, "weight_scale": p.scale, "bias": p.bias, "threshold": 6.0, **epilogue},
        "linear_quantized": {
            "x": p.x, "codes": codes, "x_scale": x_scale, "outlier_mask": mask, "weight": p.codes,
            "weight_scale": p.scale, "bias": p.bias, **epilogue,
        },
        "grouped_linear": {
            "x": p.x, "weight": weight, "weight_scale": scale, "bias": _bias(2, N), "offsets": torch.tensor([2, 5]),
            "threshold": 6.0,
        },
        "quantize_rowwise": {"x": p.x, "threshold": 6.0},
        "dequantize": {"weight": p.codes, "weight_scale": p.scale, "dtype": torch.float32, "threshold": 6.0},
    }[name]  # fmt: skip


LINEARS = ("linear", "linear_quantized")
PRODUCTS = (*LINEARS, "grouped_linear")


def refusals():
    codes = torch.zeros(N, K, dtype=torch.int8)
    experts = torch.zeros(2, N, K, dtype=torch.int8)
    for name in (*PRODUCTS, "quantize_rowwise"):
        for dtype in (torch.int64, torch.complex64, torch.float8_e4m3fn, torch.bool):
            x = torch.zeros(5, K).to(dtype)
            yield name, {"x": x}, f"x has dtype {dtype}; legal: float16, bfloat16, float32 or float64"
        yield name, {"x": torch.zeros(())}, "x has 0 dimensions; legal: [..., K]"
    for name in (*PRODUCTS, "dequantize"):
        weight = legal(name)["weight"]
        yield name, {"weight": weight.float()}, "weight has dtype torch.float32; legal: int8 codes"
        yield name, {"weight": weight.to(torch.uint8)}, "weight has dtype torch.uint8; legal: int8 codes"
        found = f"weight_scale has shape (3,), dtype torch.float32 for a weight {tuple(weight.shape)}"
        yield name, {"weight_scale": torch.ones(3)}, f"{found}; legal: one float scale per output channel"
        yield name, {"weight_scale": torch.ones(weight.shape[:-1], dtype=torch.int32)}, "dtype torch.int32 for a weight"
        yield name, {"weight_scale": torch.ones(*weight.shape[:-1], 1)}, "weight_scale has shape"
    for name in PRODUCTS:
        K1 = torch.zeros(5, K + 1)
        yield name, {"x": K1}, f"x has shape (5, {K + 1}); legal: [..., {K}] for K = {K}"
        shape = tuple(legal(name)["weight"].shape[:-1])
        legal_bias = f"legal: one float value per output channel, {shape}"
        for bias in (torch.zeros(N + 1), torch.zeros(1), torch.zeros(*shape, 1), torch.zeros(())):
            yield name, {"bias": bias}, f"bias has shape {tuple(bias.shape)}, dtype torch.float32; {legal_bias}"
        for dtype in (torch.int64, torch.complex64, torch.bool):
            bias = torch.zeros(shape, dtype=dtype)
            yield name, {"bias": bias}, f"bias has shape {shape}, dtype {dtype}; {legal_bias}"
    long = {"x": torch.zeros(1, MAX_K + 1), "weight": torch.zeros(1, MAX_K + 1, dtype=torch.int8)}
    too_long = f"K = {MAX_K + 1}; legal: K <= {MAX_K}, or int32 sums could overflow"
    for name in LINEARS:
        yield name, {**long, "weight_scale": torch.ones(1), "bias": None}, too_long
    grouped = {"weight_scale": torch.ones(2, 1), "bias": None}
    yield "grouped_linear", {**long, "weight": long["weight"].expand(2, 1, -1), **grouped}, too_long
    for name, dims, weight in (
        ("linear", "2 or 3", codes[0]),
        ("linear", "2 or 3", codes[None, None]),
        ("linear_quantized", "2", experts),
        ("grouped_linear", "3", codes),
    ):
        scale = torch.ones(weight.shape[:-1])
        yield name, {"weight": weight, "weight_scale": scale}, f"weight has {weight.dim()} dimensions; legal: {dims}"
    batched = {"weight": experts, "weight_scale": torch.ones(2, N), "bias": None}
    for shape in ((5, K), (3, 5, K), (2, 5, 5, K), (K,)):
        x = torch.zeros(shape)
        yield "linear", {**batched, "x": x}, f"x has shape {shape}; legal: [2, M, K] for a 3-D weight"
    for name in LINEARS:
        names = ", ".join(reference.ACTIVATIONS)
        yield name, {"activation": "tanh"}, f"activation 'tanh'; legal: {names}"
        legal_binary = "legal: add or mul with other, none without"
        other = torch.zeros(5, N)
        yield name, {"binary": "add"}, f"binary 'add' without other; {legal_binary}"
        yield name, {"other": other}, f"binary 'none' with other; {legal_binary}"
        yield name, {"other": other, "binary": "sub"}, f"binary 'sub' with other; {legal_binary}"
        for wrong in (other[:1], other[0], other.t(), other.long()):
            found = f"other has shape {tuple(wrong.shape)}, dtype {wrong.dtype}"
            message = f"{found}; legal: float values in the shape of y, (5, {N})"
            yield name, {"other": wrong, "binary": "add"}, message
    quantized = legal("linear_quantized")
    for key, wrong, good in (
        ("codes", quantized["codes"][:1], "(5, 13), torch.int8"),
        ("codes", quantized["codes"].float(), "(5, 13), torch.int8"),
        ("x_scale", quantized["x_scale"][:1], "(5,), torch.float32"),
        ("x_scale", quantized["x_scale"].double(), "(5,), torch.float32"),
        ("outlier_mask", quantized["outlier_mask"][:1], "(13,), torch.bool"),
        ("outlier_mask", quantized["outlier_mask"].int(), "(13,), torch.bool"),
    ):
        found = f"{key} has shape {tuple(wrong.shape)}, dtype {wrong.dtype}"
        yield "linear_quantized", {key: wrong}, f"{found}; legal: {good}: what quantize_rowwise(x) returns"
    for shape, offsets in (
        ((1, 5, K), torch.tensor([2, 5])),
        ((5, K), torch.tensor([5])),
        ((5, K), torch.tensor([2.0, 5.0])),
    ):
        found = f"x has shape {shape}, offsets {tuple(offsets.shape)}, dtype {offsets.dtype}"
        message = f"{found}; legal: [S, K] and one integer end per group, [2]"
        yield "grouped_linear", {"x": torch.zeros(shape), "offsets": offsets}, message
    for dtype in (torch.int8, torch.complex64, torch.float8_e4m3fn):
        yield "dequantize", {"dtype": dtype}, f"dtype {dtype}; legal: float16, bfloat16, float32 or float64"
    for name in LIBRARY:
        for block in (0, -2, 3, 96):
            yield name, {"block": block}, f"block {block}; legal: a power of two"
        for columns in (torch.tensor([1], dtype=torch.int32), torch.tensor([[1]]), torch.tensor(1)):
            wrong = {"columns": columns}
            if name != "quantize_rowwise":
                wrong["columns_weight"] = torch.zeros(*legal(name)["weight"].shape[:-1], 1)
            found = f"columns has shape {tuple(columns.shape)}, dtype {columns.dtype}"
            yield name, wrong, f"{found}; legal: [C] int64 indices below K = {K}"
        if name != "linear_quantized":
            yield name, {"top": -1}, "top -1; legal: a number of columns >= 0"
        if name == "quantize_rowwise":
            continue
        columns, shape = torch.tensor([1, 2]), tuple(legal(name)["weight"].shape[:-1])
        yield name, {"columns": columns}, "columns without columns_weight; legal: both or none"
        yield name, {"columns_weight": torch.zeros(*shape, 2)}, "columns_weight without columns; legal: both or none"
        for kept in (torch.zeros(*shape, 1), torch.zeros(2), torch.zeros(*shape, 2).to(torch.int8)):
            found = f"columns_weight has shape {tuple(kept.shape)}, dtype {kept.dtype}"
            message = f"{found}; legal: the float weights of those columns, {(*shape, 2)}"
            yield name, {"columns": columns, "columns_weight": kept}, message


@pytest.mark.parametrize(("name", "wrong", "message"), list(refusals()))
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
    overload(name)(*legal(name).values())
