"""Formats of `weight_only` in modules and files: outputs, reloads, what a load refuses, and other schemes' tensors."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.conversion import saved
from support.helpers import assert_within_budget, generator, groupings, seeds
from torch import nn

import int8fx
from int8fx.schemes import WeightOnly
from int8fx.schemes.formats import Grouping
from int8fx.schemes.weight import CODES, COLUMNS, SCALE, SCALE_RANGE, ZERO_POINT, Epilogue

ASYMMETRIC = int8fx.weight_only("int4_clip", 16, asymmetric=True, scale_dtype="bfloat16")
NESTED = int8fx.weight_only("nf4", 16, double_quant=True)
FULL = int8fx.weight_only("int4_fullrange", 16, compute="int8")
INT8 = int8fx.weight_only("int8", 16, asymmetric=True)


def scheme_of(grouping: Grouping, compute: str) -> WeightOnly:
    size = -1 if grouping.size is None else grouping.size
    scale_dtype = str(grouping.scale_dtype).removeprefix("torch.")
    return int8fx.weight_only(grouping.format, size, grouping.asymmetric, scale_dtype, grouping.double_quant, compute)


def model_of(scheme: WeightOnly, K: int = 33, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return int8fx.convert(nn.Sequential(nn.Linear(K, 24), nn.SiLU(), nn.Linear(24, 7, bias=False)), scheme)


@given(groupings(), st.sampled_from(("fp32", "int8")), st.integers(1, 70), st.integers(0, 9), seeds)
def test_a_layer_is_within_its_budget_and_reloads_to_the_same_bits(grouping, compute, K, rows, seed):
    scheme = scheme_of(grouping, compute)
    model, x = model_of(scheme, K, seed), torch.randn(rows, K, generator=generator(seed))
    layer = model[0]
    assert_within_budget(layer(x).detach(), x, layer.packed(), Epilogue(layer.bias.detach()))
    other = model_of(scheme, K, seed + 1)
    other.load_state_dict(saved(model.state_dict()))
    assert torch.equal(other(x), model(x))
    assert other.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(t, model.state_dict()[k]) for k, t in other.state_dict().items())


@pytest.mark.parametrize("scheme", [ASYMMETRIC, NESTED, FULL, INT8], ids=str)
def test_summary_has_the_shape_and_all_bytes(scheme):
    model = model_of(scheme)
    summary = int8fx.summary(model)
    assert [row.shape for row in summary.converted] == [(24, 33), (7, 24)]
    assert summary.int8_parameters == 24 * 33 + 7 * 24
    assert summary.parameters == summary.int8_parameters + 24
    packed = {k: t for k, t in model.state_dict().items() if not k.endswith(("_format", "bias"))}
    assert summary.bytes_after == sum(t.nbytes for t in packed.values())
    assert str(scheme.dtype) in repr(model[0])


def _with(suffix, change):
    return lambda state: state.update({"0.weight" + suffix: change(state["0.weight" + suffix].clone())})


def _set(value):
    def change(tensor):
        tensor.view(-1)[0] = value
        return tensor

    return change


HOSTILE = {
    "codes of int8": (ASYMMETRIC, _with(CODES, lambda t: t.to(torch.int8)), "takes uint8 codes, found torch.int8"),
    "codes of another K": (ASYMMETRIC, _with(CODES, lambda t: t[:, 1:]), "has shape (24, 16); legal: (24, 17)"),
    "a scale of 0": (ASYMMETRIC, _with(SCALE, _set(0)), "zero or negative"),
    "a negative scale": (ASYMMETRIC, _with(SCALE, _set(-1)), "zero or negative"),
    "a full-range scale of 0": (FULL, _with(SCALE, _set(0)), "has a scale that is NaN, inf, zero"),
    "a full-range scale of NaN": (FULL, _with(SCALE, _set(float("nan"))), "has a scale that is NaN, inf, zero"),
    "a scale of another dtype": (ASYMMETRIC, _with(SCALE, lambda t: t.float()), "dtype torch.float32; legal: torch.bf"),
    "a zero point of 16": (ASYMMETRIC, _with(ZERO_POINT, _set(16)), "has a zero point of 16; legal: 0 to 15"),
    "a zero point of int8": (ASYMMETRIC, _with(ZERO_POINT, lambda t: t.to(torch.int8)), "legal: torch.uint8"),
    "no zero point": (ASYMMETRIC, lambda s: s.pop("0.weight" + ZERO_POINT), "a part of it is missing"),
    "a zero point too many": (
        FULL, lambda s: s.update({"0.weight" + ZERO_POINT: torch.zeros(24, 3, dtype=torch.uint8)}), "are symmetric",
    ),
    "a negative step": (NESTED, _with(SCALE_RANGE, lambda t: -t.abs()), "or a negative step"),
    "a range of inf": (NESTED, _with(SCALE_RANGE, _set(float("inf"))), "not finite"),
    "a range too many": (
        FULL, lambda s: s.update({"0.weight" + SCALE_RANGE: torch.zeros(24, 2)}), "are not quantised",
    ),
    "columns": (FULL, lambda s: s.update({"0.weight" + COLUMNS: torch.tensor([1])}), "all columns of this layer"),
    "float scales in place of codes": (NESTED, _with(SCALE, lambda t: t.float()), "legal: torch.uint8"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_tensors_are_refused_and_change_nothing(case):
    scheme, change, says = HOSTILE[case]
    state = saved(model_of(scheme, seed=1).state_dict())
    change(state)
    model = model_of(scheme)
    before = saved(model.state_dict())
    with pytest.raises(RuntimeError) as error:
        model.load_state_dict(state)
    assert says in str(error.value)
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())


@pytest.mark.parametrize(
    ("mine", "its"),
    itertools.permutations(
        [FULL, int8fx.weight_only("int4_clip", 16, compute="int8"), int8fx.weight_only("nf4", 16), NESTED], 2
    ),
    ids=str,
)
def test_tensors_of_another_format_are_refused_by_name(mine, its):
    """Also where dtypes and shapes are the same, and the numbers would merely be different."""
    model = model_of(mine)
    with pytest.raises(RuntimeError) as error:
        model.load_state_dict(saved(model_of(its).state_dict()))
    text = str(error.value)
    assert f"was quantised by {its}, and this layer by {mine}" in text or "0.weight_scale" in text


@pytest.mark.parametrize("scheme", [ASYMMETRIC, NESTED, FULL, INT8], ids=str)
def test_moves_and_casts_keep_the_packed_tensors(scheme):
    model = model_of(scheme)
    state, x = saved(model.state_dict()), torch.randn(5, 33)
    y = model(x)
    for cast in (torch.bfloat16, torch.float64, torch.float32):
        model.to(cast)
        assert model(x.to(cast)).dtype == cast
    packed = {k: t for k, t in model.state_dict().items() if "weight_" in k}
    assert all(torch.equal(t, state[k]) and t.dtype == state[k].dtype for k, t in packed.items())
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    assert (model(x) - y).norm() <= 1e-2 * y.norm()  # the biases went through bfloat16


def test_a_layer_with_a_scale_that_its_dtype_does_not_hold_is_named():
    model = nn.Sequential(nn.Linear(8, 8))
    with torch.no_grad():
        model[0].weight.fill_(1e8)
    before = model[0].weight.clone()
    with pytest.raises(ValueError, match=r"layer '0': .*torch.float16 does not hold; legal: another scale_dtype"):
        int8fx.convert(model, int8fx.weight_only("int4_clip", 4, scale_dtype="float16"))
    assert torch.equal(model[0].weight, before)
    int8fx.convert(model, int8fx.weight_only("int4_clip", 4, scale_dtype="bfloat16"))
    with (
        pytest.raises(ValueError, match="of NaN, inf or values that overflow float32 into the packed '0'"),
        torch.no_grad(),
    ):
        model[0].weight[0, 0] = float("inf")
