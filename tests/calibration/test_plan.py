"""`plan`: its estimate against the loss of the converted model, its choice against every other choice."""

from __future__ import annotations

import copy
import math
from itertools import pairwise, product
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.helpers import generator
from torch import nn

import int8fx
from int8fx.calibration.plan import Option, Plan, _choose, _hull
from int8fx.schemes.calibration import Calibration
from int8fx.tools import metrics

K, M = 48, 3000


def data(rows: int = M) -> list[torch.Tensor]:
    x = torch.randn(2, rows, K, generator=generator(0))
    x[..., 5] *= 20
    return list(x)


class Logits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(K, 16)

    def forward(self, x: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(x) / 4)


@pytest.mark.parametrize("kind", ["distance", "logits"])
def test_the_estimate_is_the_loss_of_the_converted_model(kind):
    """With one layer the rows are independent: only the error of the draws and third-order terms are left."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(K, 16)) if kind == "distance" else Logits()
    scheme, batches = int8fx.rotated(columns=0), data()
    plan = int8fx.plan(model, batches, max_kl=math.inf, schemes=[scheme], samples=4)
    twin = int8fx.convert(copy.deepcopy(model), plan)
    with torch.no_grad():
        pairs = [(model(x), twin(x)) for x in batches]
    if kind == "distance":
        loss = torch.cat([(a - b).double().square().sum(-1) / 2 for a, b in pairs]).mean()
    else:
        loss = torch.cat([metrics.kl_divergence(a.logits.double(), b.logits.double()) for a, b in pairs]).mean()
    draws = 4 * 2 * M
    spread = math.sqrt(8 / draws)  # of the mean of so many squares of normals, with as much again for unequal rows
    assert abs(plan.kl / loss.item() - 1) < 5 * spread + 0.02


def small_model() -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(K, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 8))
    with torch.no_grad():
        model[2].weight[0] *= 100  # one output channel dominates, so coarse scales in the others hardly matter
    return model


def test_plans_keep_their_budgets_and_leave_the_model_alone():
    model, batches = small_model(), data(50)
    before = copy.deepcopy(model.state_dict())
    least = int8fx.plan(model, batches, max_kl=math.inf)
    assert least.bytes == least.smallest
    assert set(least.chosen) == {"0", "2", "4"}
    best = int8fx.plan(model, batches, max_kl=0.0)
    assert all(option.scheme is None for option in best.chosen.values())
    assert (best.kl, best.bytes) == (0, 2 * sum(model[i].weight.numel() for i in (0, 2, 4)))
    last = math.inf
    for budget in torch.linspace(least.bytes, best.bytes, 9).long().tolist():
        plan = int8fx.plan(model, batches, budget_bytes=budget)
        assert least.within(budget_bytes=budget).chosen == plan.chosen
        assert plan.bytes <= budget
        assert plan.kl <= last
        last = plan.kl
        again = int8fx.plan(model, batches, max_kl=plan.kl)
        assert again.kl <= plan.kl
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_no_upgrade_follows_once_the_loss_is_small_enough():
    options = {name: [Option(int8fx.plain(), 10, kl), Option(None, 20, 0.0)] for name, kl in (("a", 0.4), ("b", 1.0))}
    for max_kl, expected in ((1.4, set()), (1.0, {"b"}), (0.4, {"b"}), (0.3, {"a", "b"})):
        chosen = _choose(options, None, max_kl, Calibration()).chosen
        assert {name for name, option in chosen.items() if option.scheme is None} == expected


def test_a_plan_is_a_scheme_for_each_layer_that_is_not_16_bits():
    columns, calibration = int8fx.rotated(columns=0.05), Calibration()
    plan = Plan({"a": Option(columns, 5, 0.1), "b": Option(None, 20, 0.0)}, {}, calibration)
    assert plan.schemes == {"a": columns}
    assert plan.calibration is calibration
    lines = ["layer  scheme                 KB        KL", "a      rotated(columns=0.05)   0  1.00e-01"]
    lines += ["b      16 bits                 0  0.00e+00"]
    lines += ["1 x rotated(columns=0.05), 1 x 16 bits; 25 bytes, estimated KL 0.1"]
    assert str(plan).split("\n") == lines


def test_a_converted_model_has_the_schemes_of_its_plan():
    model, batches = small_model(), data(50)
    smallest = int8fx.plan(model, batches, max_kl=math.inf).bytes
    plan = int8fx.plan(model, batches, budget_bytes=int(1.5 * smallest))
    int8fx.convert(model, plan)
    assert len({option.scheme for option in plan.chosen.values()}) > 1
    for name, option in plan.chosen.items():
        layer = model.get_submodule(name)
        assert int8fx.is_packed(layer) == (option.scheme is not None)
        if option.scheme is not None:
            weight = layer.packed("weight")
            assert weight.block == option.scheme.rotation
            count = 0 if weight.columns is None else len(weight.columns)
            assert count == option.scheme.static_columns(layer.in_features)


FORMATS = [
    int8fx.weight_only("int4_clip", 16, asymmetric=True, scale_dtype="bfloat16"),
    int8fx.weight_only("nf4", 32, double_quant=True, scales="search"),
    int8fx.weight_only("int8", 16, rounding="gptq"),
    int8fx.rotated(16),
]


def test_the_bytes_of_a_plan_are_those_of_the_model_of_16_bits():
    """Of 4 and 8 bits, with scales of each dtype, zero points and unquantised columns."""
    model, batches = small_model(), data(50)
    plan = int8fx.plan(model, batches, max_kl=math.inf, schemes=FORMATS)
    for i, scheme in enumerate(FORMATS):
        twin = int8fx.convert(copy.deepcopy(model).bfloat16(), scheme, calibration=plan.calibration)
        for name, options in plan.options.items():
            tensors = [t for t in twin.get_submodule(name).packed("weight") if isinstance(t, torch.Tensor)]
            assert options[i].bytes == sum(t.nbytes for t in tensors), (scheme, name)


def test_a_plan_chooses_among_4_and_8_bits():
    model, batches = small_model(), data(50)
    smallest = int8fx.plan(model, batches, max_kl=math.inf, schemes=FORMATS)
    largest = int8fx.plan(model, batches, max_kl=0.0, schemes=FORMATS)
    plan = smallest.within(budget_bytes=(smallest.bytes + largest.bytes) // 3)
    int8fx.convert(model, plan)
    kinds = {name: model.get_submodule(name).packed("weight").codes.dtype for name in plan.schemes}
    assert set(kinds.values()) == {torch.int8, torch.uint8}


def test_columns_are_those_of_the_calibration_that_is_given():
    model, batches = small_model(), data(50)
    other = int8fx.calibrate(model, [x.roll(4, -1) for x in batches])
    plan = int8fx.plan(model, batches, max_kl=math.inf, schemes=[int8fx.rotated()], calibration=other)
    int8fx.convert(model, plan)
    assert model[0]._buffers["weight_columns"].tolist() == [9]


class Residual(nn.Module):
    """The same function with and without writes in place; a layer is called by a keyword."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.first, self.second, self.in_place = nn.Linear(K, K), nn.Linear(K, K), in_place

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        y = self.first(input=x)
        if not self.in_place:
            return self.second(x + torch.relu(y))
        x += torch.relu_(y)
        return self.second(x)


@pytest.mark.parametrize("trained", [False, True])
def test_writes_in_place_change_no_estimate(trained):
    torch.manual_seed(0)
    model = Residual(False).requires_grad_(trained)
    twin = Residual(True).requires_grad_(trained)
    twin.load_state_dict(model.state_dict())
    plans = [int8fx.plan(m, data(50), max_kl=math.inf) for m in (model, twin)]
    for name, options in plans[0].options.items():
        assert [o.kl for o in options] == pytest.approx([o.kl for o in plans[1].options[name]], rel=1e-4)


def test_frozen_models_are_measured_too():
    model = small_model().requires_grad_(False)
    assert int8fx.plan(model, data(50), max_kl=math.inf).kl > 0
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("budgets", "said"),
    [
        ({}, "give budget_bytes or max_kl"),
        ({"budget_bytes": 10**6, "max_kl": 1.0}, "give budget_bytes or max_kl"),
        ({"budget_bytes": 10}, r"budget_bytes is 10; legal: 4,\d\d\d or more"),
        ({"max_kl": -1.0}, "max_kl is -1.0; legal: 0 or more"),
        ({"budget_bytes": math.nan}, "budget_bytes is nan; legal: 0 or more"),
    ],
)
def test_budgets_that_cannot_be_met_are_refused(budgets, said):
    with pytest.raises(ValueError, match=said):
        int8fx.plan(small_model(), data(20), **budgets)
    with pytest.raises(ValueError, match=said):
        int8fx.plan(small_model(), data(20), max_kl=math.inf).within(**budgets)


def test_no_samples_are_refused():
    with pytest.raises(ValueError, match=r"int8fx\.plan: samples is 0; legal: 1 or more"):
        int8fx.plan(small_model(), data(20), max_kl=1.0, samples=0)


def test_losses_that_are_not_finite_are_named():
    model, batches = small_model(), data(20)
    calibration = int8fx.calibrate(model, batches)
    batches[0][3, 4] = math.nan
    with pytest.raises(ValueError, match=r"int8fx\.plan: layer '0' has a loss of NaN or inf"):
        int8fx.plan(model, batches, max_kl=math.inf, calibration=calibration)


def test_models_without_linear_layers_are_refused():
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(K, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.w

    with pytest.raises(ValueError, match="no linear layer of the model in these batches"):
        int8fx.plan(Bare(), data(20), max_kl=1.0)


# ---- choosing -------------------------------------------------------------------------------------------------------

layer_options = st.lists(
    st.tuples(st.integers(1, 30), st.integers(0, 30)), min_size=1, max_size=4, unique_by=lambda o: o[0]
)


@given(st.lists(layer_options, min_size=1, max_size=4), st.integers(0, 100))
def test_no_choice_of_fewer_bytes_costs_less(layers, extra):
    """The greedy choice is the best of its own size: on the hull, what it takes first gains most per byte."""
    options = {str(i): [Option(None, b, float(k)) for b, k in choices] for i, choices in enumerate(layers)}
    smallest = sum(min(o.bytes for o in choices) for choices in options.values())
    plan = _choose(options, smallest + extra, None, Calibration())
    assert plan.smallest <= plan.bytes <= smallest + extra
    upgrades = [max(0, a.kl - b.kl) for choices in options.values() for a, b in pairwise(_hull(choices))]
    for choice in product(*options.values()):
        if sum(o.bytes for o in choice) <= smallest + extra:
            assert plan.kl <= sum(o.kl for o in choice) + max(upgrades, default=0)  # at most one upgrade from the best


@given(layer_options)
def test_upgrades_on_the_hull_gain_ever_less_per_byte(choices):
    path = _hull([Option(None, b, float(k)) for b, k in choices])
    gains = [(a.kl - b.kl) / (b.bytes - a.bytes) for a, b in pairwise(path)]
    assert gains == sorted(gains, reverse=True)
    assert all(g > 0 for g in gains)
    assert path[0].bytes == min(b for b, _ in choices)
    assert path[-1].kl == min(k for _, k in choices)
