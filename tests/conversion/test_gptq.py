"""``rotated(rounding="gptq")`` in `calibrate`, `convert` and `plan`; `schemes/test_gptq.py` tests the rounding."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from support.helpers import correlated
from torch import Tensor, nn

import int8fx
from int8fx import Calibration, calibrate
from int8fx.conversion.packed import tensors_of
from int8fx.schemes.formats import Grouping
from int8fx.schemes.gptq import round_weight

GPTQ = int8fx.rotated(rounding="gptq")


def model_and_data() -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(100, 48), nn.ReLU(), nn.Linear(48, 8)), list(correlated(600, 100).split(200))


def test_a_converted_model_holds_these_codes_and_loses_less():
    model, data = model_and_data()
    calibration = calibrate(model, data, moments=True)
    x = torch.cat(data)
    assert (calibration.moments["0"] - x.T @ x).norm() <= 1e-5 * (x.T @ x).norm()
    twins = [int8fx.convert(copy.deepcopy(model), s, calibration=calibration) for s in (GPTQ, int8fx.rotated())]
    packed, nearest = (tensors_of(twin[0], "weight") for twin in twins)
    assert torch.equal(packed.columns, nearest.columns)
    expected = round_weight(
        model[0].weight.detach(), Grouping(), calibration.moments["0"], GPTQ.rotation, packed.columns
    )
    for name in ("codes", "scale", "columns_weight"):
        assert torch.equal(getattr(packed, name), getattr(expected, name))
    with torch.no_grad():
        of_gptq, of_nearest = ((twin[0](x) - model[0](x)).norm() for twin in twins)
    assert of_gptq < 0.9 * of_nearest  # rounding x, which both do, is the larger part
    program = torch.export.export(copy.deepcopy(model), (x,))
    int8fx.convert(program, GPTQ, calibration=calibration)
    assert torch.equal(program.module()(x), twins[0](x))


@pytest.mark.parametrize("calibration", [None, Calibration(), "without moments"])
@pytest.mark.parametrize("kind", ["module", "graph", "export"])
def test_without_moments_it_is_refused_and_nothing_is_converted(kind, calibration):
    model, data = model_and_data()
    given = calibrate(model, data) if calibration == "without moments" else calibration
    target = {
        "module": lambda: model,
        "graph": lambda: torch.fx.symbolic_trace(model),
        "export": lambda: torch.export.export(model, (data[0],)),
    }[kind]()
    with pytest.raises(
        ValueError, match=r"inputs of layer '0'; legal: calibration=int8fx\.calibrate\(model, data, mom"
    ):
        int8fx.convert(target, GPTQ, calibration=given)
    assert not any(int8fx.is_packed(m) for m in model.modules())


def test_layers_that_the_data_does_not_reach_are_named():
    model, data = model_and_data()
    model.unused = nn.Linear(8, 8)
    calibration = calibrate(model[:3], data, moments=True)
    with pytest.raises(ValueError, match="inputs of layer 'unused'"):
        int8fx.convert(model, GPTQ, calibration=calibration)
    int8fx.convert(model, GPTQ, calibration=calibration, skip="unused")
    assert [int8fx.is_packed(m) for m in (model[0], model.unused)] == [True, False]


def test_plans_take_it():
    model, data = model_and_data()
    nearest, gptq = (int8fx.rotated(columns=0, rounding=r) for r in ("nearest", "gptq"))
    plan = int8fx.plan(model, data, max_kl=math.inf, schemes=[nearest, gptq])
    assert plan.smallest == sum(options[0].bytes for options in plan.options.values())
    for options in plan.options.values():
        assert options[1].kl < options[0].kl
        assert options[1].bytes == options[0].bytes


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_inputs_that_are_not_finite_are_named(value):
    model, data = model_and_data()
    data[1][3, 5] = value
    with pytest.raises(ValueError, match=r"int8fx\.calibrate: layer '0' gets NaN or inf from these batches"):
        calibrate(model, data)


def test_moments_that_overflow_are_named():
    model, data = model_and_data()
    data[1] *= 1e19
    assert calibrate(model, data).absmax["0"].isfinite().all()
    with pytest.raises(ValueError, match=r"int8fx\.calibrate: moments of layer '0' overflow float32, its inputs reach"):
        calibrate(model, data, moments=True)
