"""The library of ops: opcheck of every op, and fakes that have the metadata of the kernels' results for any shape."""

import math

import pytest
import torch
from hypothesis import given
from support.helpers import activation, problems, seeds
from support.samples import LIBRARY, SAMPLES, K, make_weight, make_x, overload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._pytree import tree_map_only

from int8fx import ops
from int8fx.ops import fallback

CASES = [
    pytest.param(name, args, kwargs, id=f"{name}-{what}".replace("torch.", "").replace(" ", "_"))
    for name in LIBRARY
    for what, args, kwargs in SAMPLES.get(name, tuple)()
]


def test_every_op_of_the_library_has_samples():
    assert LIBRARY
    assert set(LIBRARY) == set(SAMPLES)


@pytest.mark.parametrize(("name", "args", "kwargs"), CASES)
def test_opcheck(name, args, kwargs):
    torch.library.opcheck(overload(name), args, kwargs)


# ---- fakes -----------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(("name", "args", "kwargs"), CASES)
def test_fake_has_the_metadata_of_the_kernel_for_any_shape(name, args, kwargs):
    real = overload(name)(*args, **kwargs)
    mode, fakes = symbolic(args)
    with mode:
        fake = overload(name)(*fakes, **kwargs)
    names = [argument.name for argument in overload(name)._schema.arguments]
    in_features = [value for key, value in zip(names, args, strict=False) if key == "in_features"]
    for r, f in zip(tensors(real), tensors(fake), strict=True):
        assert tuple(map(hint, f.shape)) == r.shape
        assert tuple(map(hint, f.stride())) == r.stride() or r.numel() == 0
        assert f.dtype == r.dtype
        assert f.device == r.device
        for size in f.shape:  # no size became a constant but for 0 and 1, and none comes from data
            assert isinstance(size, torch.SymInt) or size in (0, 1, *in_features)
        symbols = [s for size in f.shape if isinstance(size, torch.SymInt) for s in size.node.expr.free_symbols]
        assert not any(str(s).startswith("u") for s in symbols)


@given(problems(batched=None))
def test_fake_and_kernel_agree_on_shape_dtype_and_strides(p):
    calls = [("linear", p.args, {}), ("dequantize", tuple(p.weight), {"dtype": p.x.dtype})]
    if p.weight.codes.dim() == 2:
        quantized = ops.quantize_rowwise(*p.quantize_args)
        calls += [
            ("quantize_rowwise", p.quantize_args, {}),
            ("quantize_rowwise", p.quantize_args, {"for_linear": True}),
            ("linear_quantized", (p.x, *quantized, *p.weight, *p.epilogue), {}),
        ]
    mode = FakeTensorMode()
    for name, args, kwargs in calls:
        real = overload(name)(*args, **kwargs)
        with mode:
            fake = overload(name)(*tree_map_only(torch.Tensor, mode.from_tensor, args), **kwargs)
        for r, f in zip(tensors(real), tensors(fake), strict=True):
            assert (f.shape, f.dtype, f.device) == (r.shape, r.dtype, r.device)
            assert f.stride() == r.stride()


@given(problems(), seeds)
def test_no_output_shape_depends_on_data(p, seed):
    x = activation(math.prod(p.x.shape[:-1]), p.x.shape[-1], outliers="columns", dtype=p.x.dtype, seed=seed)
    for other in (p.with_x(x.reshape(p.x.shape)), p.with_x(torch.zeros_like(p.x))):
        quantized = ops.quantize_rowwise(*p.quantize_args), ops.quantize_rowwise(*other.quantize_args)
        for a, b in zip(*quantized, strict=True):
            assert a.shape == b.shape
        assert ops.linear(*p.args).shape == ops.linear(*other.args).shape


@pytest.mark.parametrize(("name", "args", "kwargs"), CASES)
def test_outputs_never_alias_inputs(name, args, kwargs):
    for y in tensors(overload(name)(*args, **kwargs)):
        for argument in args:
            if isinstance(argument, torch.Tensor) and y.numel() and argument.numel():
                assert y.untyped_storage().data_ptr() != argument.untyped_storage().data_ptr()


def test_arguments_may_be_named():
    """What follows the scale has defaults: int8 without outliers, no epilogue."""
    x, (codes, scale, *_) = make_x(6), make_weight()
    named = ops.linear(x=x, weight=codes, weight_scale=scale, activation="relu")
    assert torch.equal(named, ops.linear(x, codes, scale, None, 1, *[None] * 8, "relu", None, "none"))


@pytest.mark.parametrize(("rows", "threshold", "block", "calls"), [(4, 6.0, 1, 0), (5, 6.0, 1, 1), (4, None, 8, 1)])
def test_torchs_operators_quantise_for_a_linear_layer_only_what_it_reads(monkeypatch, rows, threshold, block, calls):
    quantised = []
    real = fallback.quantize_rowwise
    monkeypatch.setattr(fallback, "quantize_rowwise", lambda *args: quantised.append(args) or real(*args))
    quantize_rowwise = ops.kernel_on(fallback, "quantize_rowwise")
    codes, scale, mask = quantize_rowwise(make_x(rows), threshold, block, for_linear=True)
    assert (codes.shape, scale.shape, mask.shape) == ((rows, K), (rows,), (K,))
    assert len(quantised) == calls
