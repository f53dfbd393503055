"""`PackedWeight`: views and reads are those of the dequantised weight; writes land or raise."""

from __future__ import annotations

import copy
import operator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.conversion import SCHEMES
from support.helpers import largest_scale
from torch import Tensor, nn
from torch.utils.dlpack import to_dlpack

import int8fx
from int8fx.conversion.view import PackedWeight, dense
from int8fx.schemes.formats import FORMATS

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def layer(scheme: int8fx.Scheme, N: int = 6, K: int = 32, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(N * K)
    return int8fx.convert(nn.Linear(K, N, bias=False).to(dtype), scheme, select=["*"])


# ---- views and reads -------------------------------------------------------------------------------------------------


def a_view(draw: Any, w: Tensor) -> Any:
    """A function that makes a view, or a few, of tensors of the shape of ``w``."""
    dims = st.integers(0, max(w.dim() - 1, 0))
    makers: dict[str, Any] = {"detach": lambda t: t.detach(), "alias": lambda t: t[...], "unsqueeze": None}
    if w.dim():
        makers |= {"transpose": None, "select": None, "narrow": None, "every second": None, "split": None}
        makers |= {"permute": None, "flatten": lambda t: t.flatten() if t.is_contiguous() else t, "expand": None}
    name = draw(st.sampled_from(sorted(makers)))
    if makers[name] is not None:
        return makers[name]
    d = draw(dims)
    size = w.shape[d] if w.dim() else 1
    if name == "unsqueeze":
        return lambda t: t.unsqueeze(d)
    if name == "transpose":
        e = draw(dims)
        return lambda t: t.transpose(d, e)
    if name == "permute":
        order = draw(st.permutations(range(w.dim())))
        return lambda t: t.permute(order)
    if name == "select" and size:
        i = draw(st.integers(-size, size - 1))
        return lambda t: t.select(d, i)
    if name == "narrow":
        start = draw(st.integers(0, size))
        length = draw(st.integers(0, size - start))
        return lambda t: t.narrow(d, start, length)
    if name == "split" and size > 1:
        at, part = draw(st.integers(1, size - 1)), draw(st.integers(0, 1))
        return lambda t: t.split([at, size - at], d)[part]
    if name == "expand":
        return lambda t: t.unsqueeze(0).expand(2, *t.shape)
    return lambda t: t[(slice(None),) * d + (slice(None, None, 2),)] if t.dim() else t


@given(st.data())
def test_views_and_reads_are_those_of_the_dequantised_weight(data):
    module = layer(SCHEMES[data.draw(st.sampled_from(sorted(SCHEMES)))], dtype=data.draw(st.sampled_from(DTYPES)))
    before = {k: t.clone() for k, t in module.state_dict().items()}
    view, expected = module.weight, module.dequantize()
    for _ in range(data.draw(st.integers(0, 5))):
        change = a_view(data.draw, expected)
        view, expected = change(view), change(expected)
        assert isinstance(view, PackedWeight)
        assert (view.shape, view.stride(), view.dtype) == (expected.shape, expected.stride(), expected.dtype)
    assert torch.equal(dense(view), expected)
    assert torch.equal(view + 1, expected + 1)
    assert torch.equal(view.sum(), expected.sum())
    assert view.tolist() == expected.tolist()
    assert torch.equal(view.clone().contiguous() * 2, expected * 2)
    assert all(torch.equal(t, before[k]) for k, t in module.state_dict().items())


# ---- writes ----------------------------------------------------------------------------------------------------------

WRITES = {
    "zero_": lambda t, v: t.zero_(),
    "fill_": lambda t, v: t.fill_(0.3),
    "copy_": lambda t, v: t.copy_(v),
    "add_": lambda t, v: t.add_(v, alpha=0.5),
    "mul_": lambda t, v: t.mul_(-1.5),
    "+=": lambda t, v: operator.iadd(t, v),
    "data +=": lambda t, v: operator.iadd(t.data, v),
    "clamp_": lambda t, v: t.clamp_(-0.05, 0.05),
    "[...] =": lambda t, v: t.__setitem__(..., v),
    "lerp_": lambda t, v: t.lerp_(v, 0.25),
}


@given(st.data())
def test_a_write_lands_within_half_a_step_and_other_rows_keep_their_bits(data):
    name = data.draw(st.sampled_from(sorted(SCHEMES)))
    scheme = SCHEMES[name]
    module, how = layer(scheme), data.draw(st.sampled_from(sorted(WRITES)))
    before, expected = copy.deepcopy(module), module.dequantize()
    first, count = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 6))
    columns = slice(*sorted(data.draw(st.lists(st.integers(0, 32), min_size=2, max_size=2))))
    rows = slice(first, min(first + count, 6))
    values = torch.randn(expected[rows, columns].shape)
    with torch.no_grad():
        WRITES[how](module.weight[rows, columns], values)
        WRITES[how](expected[rows, columns], values)
    assert module(torch.randn(3, 32)).isfinite().all()

    reached = torch.zeros(6, dtype=torch.bool)
    if expected[rows, columns].numel():
        reached[rows] = True
    was, now = before.dequantize(), module.dequantize()
    assert torch.equal(now[~reached], was[~reached])
    spread = abs(scheme.rotation) ** 0.5  # one rounding of a rotated weight moves the values of its block
    steps = 0.5 if FORMATS[scheme.grouping.format].bits == 8 else 1.0  # of 4 bits: full range ends at 7, nf4 is uneven
    half = steps * largest_scale(module.packed()) * spread * (1 + 1e-5) + 1e-6
    assert ((now - expected).abs() <= half)[reached].all()


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_are_refused_and_nothing_is_written(scheme, value):
    module = layer(scheme)
    before = {k: t.clone() for k, t in module.state_dict().items()}
    with pytest.raises(ValueError, match="NaN, inf or values that overflow"), torch.no_grad():
        module.weight[2, 3] = value
    assert all(torch.equal(t, before[k]) for k, t in module.state_dict().items())


@pytest.mark.parametrize("scheme", ["rotated", "rotated columns"])
def test_values_whose_rotation_overflows_are_refused_and_nothing_is_written(scheme):
    module = layer(SCHEMES[scheme])
    before = {k: t.clone() for k, t in module.state_dict().items()}
    with pytest.raises(ValueError, match="NaN, inf or values that overflow"), torch.no_grad():
        module.weight.fill_(3e38)
    assert all(torch.equal(t, before[k]) for k, t in module.state_dict().items())
    with torch.no_grad():
        module.weight.fill_(3e36)
    assert module.dequantize().isfinite().all()


@pytest.mark.parametrize(
    "view", [copy.copy, lambda w: w.unsafe_chunk(2)[0], lambda w: w.unsafe_split_with_sizes([2, 4])[1]]
)
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_writes_into_shallow_copies_and_unsafe_views_land(scheme, view):
    module = layer(scheme)
    expected = module.dequantize().clone()
    with torch.no_grad():
        view(module.weight).zero_()
        view(expected).zero_()
    assert torch.equal(module.dequantize() == 0, expected == 0)


def test_a_write_into_two_tied_weights_at_once_lands_in_both():
    one, other = layer(SCHEMES["plain"]), layer(SCHEMES["plain"])
    other.weight = one.weight
    with torch.no_grad():
        torch._foreach_mul_([one.weight[:2], other.weight[3:]], 0.0)
    assert not one.dequantize()[[0, 1, 3, 4, 5]].any()
    assert one.dequantize()[2].any()
    assert torch.equal(one.dequantize(), other.dequantize())


def test_a_copy_of_another_dtype_is_apart_from_the_module():
    module = layer(SCHEMES["rotated"])
    expected = module.dequantize().bfloat16()
    taken = module.weight.to(torch.bfloat16)
    with torch.no_grad():
        module.weight.zero_()
    assert torch.equal(dense(taken), expected)
    with torch.no_grad():
        taken.add_(1)
    assert torch.equal(dense(taken), expected + 1)
    assert not module.dequantize().any()


# ---- what is no float tensor in memory -------------------------------------------------------------------------------

REFUSED = {
    "storage": (lambda w: w.untyped_storage(), TypeError, "no float values in memory"),
    "typed storage": (lambda w: w.storage(), TypeError, "no float values in memory"),
    "share_memory_": (lambda w: w.share_memory_(), TypeError, "no float values in memory"),
    "dlpack": (lambda w: torch.from_dlpack(w), TypeError, "no float values in memory"),
    "to_dlpack": (lambda w: to_dlpack(w), Exception, ""),
    "t_": (lambda w: w.t_(), TypeError, "change the shape or the memory"),
    "resize_": (lambda w: w.resize_(2, 2), Exception, ""),
    "set_": (lambda w: w.set_(torch.zeros(6, 32)), Exception, ""),
    "out of another shape": (lambda w: torch.add(torch.ones(3, 3), 1, out=w), Exception, ""),
    "grad": (lambda w: setattr(w, "grad", torch.zeros(6, 32)), TypeError, "takes no gradient"),
    "requires_grad_": (lambda w: w.requires_grad_(), TypeError, "takes no gradient"),
    "requires_grad": (lambda w: setattr(w, "requires_grad", True), TypeError, "takes no gradient"),
    "data of another shape": (lambda w: setattr(w, "data", torch.zeros(3, 3)), ValueError, "found torch.float32"),
    "integers as data": (lambda w: setattr(w, "data", torch.zeros(6, 32).int()), ValueError, "found torch.int32"),
    "a gradient": (lambda w: w.copy_(torch.ones(6, 32, requires_grad=True)), TypeError, "under torch.no_grad"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_refused_and_nothing_is_changed(what):
    module, (act, error, words) = layer(SCHEMES["rotated columns"]), REFUSED[what]
    before = {k: t.clone() for k, t in module.state_dict().items()}
    with pytest.raises(error, match=words or None):
        act(module.weight)
    assert module.weight.shape == (6, 32)
    assert all(torch.equal(t, before[k]) for k, t in module.state_dict().items())


def test_numpy_is_a_copy_that_cannot_be_written():
    module = layer(SCHEMES["plain"])
    values = module.weight.numpy()
    assert values.tolist() == module.dequantize().tolist()
    with pytest.raises(ValueError, match="read-only"):
        values[0, 0] = 1


def test_apply_lands():
    module = layer(SCHEMES["plain"])
    with torch.no_grad():
        module.weight.apply_(lambda value: 0.0)
    assert not module.dequantize().any()


def test_no_rows_in_a_batch_of_matmuls():
    module = layer(SCHEMES["plain"])
    assert torch.bmm(torch.randn(2, 0, 32), module.weight.T.expand(2, 32, 6)).shape == (2, 0, 6)
