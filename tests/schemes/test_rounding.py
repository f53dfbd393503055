"""`round_weight`: what it minimises, against rounding each weight for itself; `rotated(rounding="gptq")` in convert."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.helpers import generator, seeds
from torch import Tensor, nn

import int8fx
from int8fx.calibration.calibrate import Calibration, calibrate
from int8fx.conversion.packed import COLUMNS, COLUMNS_WEIGHT, SCALE
from int8fx.schemes.gptq import round_weight
from int8fx.schemes.quantize import dequantize, quantize_weight, rotate

GPTQ = int8fx.rotated(rounding="gptq")


def correlated(M: int, K: int, seed: int = 0) -> Tensor:
    """Inputs of a few directions and a little noise, with one large column."""
    g = generator(seed)
    x = torch.randn(M, max(1, K // 4), generator=g) @ torch.randn(max(1, K // 4), K, generator=g)
    x += 0.1 * torch.randn(M, K, generator=g)
    x[:, K // 2] *= 30
    return x


def weight_of(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


def loss(x: Tensor, weight: Tensor, codes: Tensor, scale: Tensor, block: int, columns, kept) -> float:
    stands = dequantize(codes, scale, torch.float64, block, columns, kept)
    return float((x.double() @ (weight.double() - stands).mT).square().sum())


def columns_of(K: int, count: int) -> Tensor | None:
    return torch.arange(K // 2, K // 2 + count) if count else None


@given(st.integers(1, 20), st.integers(2, 150), st.sampled_from([1, 4, 64]), st.booleans(), seeds)
def test_moments_without_correlation_round_to_nearest(N, K, block, kept, seed):
    """Nothing can be made good: codes are those of each weight for itself, up to ties and the rotation's rounding."""
    weight, columns = weight_of(N, K, seed=seed), columns_of(K, int(kept))
    codes, scale, exact = round_weight(weight, 3 * torch.eye(K), block, columns)
    nearest, same = quantize_weight(weight, block, columns)
    assert torch.equal(scale, same)
    assert (codes - nearest).abs().max() <= (0 if block == 1 else 1)
    if columns is None:
        assert exact is None
    elif block == 1:
        assert torch.equal(exact, weight[:, columns])


@pytest.mark.parametrize("K", [40, 100, 200, 300])
@pytest.mark.parametrize("block", [1, 64])
@pytest.mark.parametrize("count", [0, 3])
def test_the_products_error_is_a_part_of_what_it_was(K, block, count):
    x, weight, columns = correlated(600, K), weight_of(24, K), columns_of(K, count)
    found = round_weight(weight, x.T @ x, block, columns)
    kept = None if columns is None else weight[:, columns]
    nearest = (*quantize_weight(weight, block, columns), kept)
    own, other = (loss(x, weight, codes, scale, block, columns, k) for codes, scale, k in (found, nearest))
    assert own < other / 4  # three quarters of the directions hardly occur
    assert found[0].dtype == torch.int8
    assert found[0].abs().max() <= 127
    assert found[0].is_contiguous()


def test_kept_columns_make_good_what_they_can():
    """The loss has no slope along them: they are the least-squares answer to what rounding left."""
    K, x, columns = 100, correlated(600, 100), columns_of(100, 4)
    weight, moments = weight_of(24, 100), x.double().T @ x.double()
    codes, scale, kept = round_weight(weight, moments, 64, columns)
    left = weight.double() - dequantize(codes, scale, torch.float64, 64, columns, kept)
    exact = weight.double() - dequantize(codes, scale, torch.float64, 64, columns, weight[:, columns])
    slope, before = ((d @ moments)[:, columns].abs().max() for d in (left, exact))
    assert slope < 1e-3 * before
    assert moments.shape[0] == K


def test_the_rotation_is_a_change_of_coordinates():
    x, weight = correlated(600, 96).double(), weight_of(24, 96)
    turned = rotate(x, 32)
    codes, scale, _ = round_weight(weight, x.T @ x, 32)
    plain, same, _ = round_weight(rotate(weight, 32), turned.T @ turned, 1)
    assert torch.equal(scale, same)
    assert (codes != plain).double().mean() < 0.01  # ties


def test_experts_are_rounded_by_their_common_moments():
    x, weight, columns = correlated(300, 60), weight_of(3, 8, 60), columns_of(60, 2)
    found = round_weight(weight, x.T @ x, 64, columns)
    for e in range(3):
        for whole, own in zip(found, round_weight(weight[e], x.T @ x, 64, columns), strict=True):
            assert torch.equal(whole[e], own)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_kept_weights_have_the_weights_dtype(dtype):
    x, columns = correlated(300, 60), columns_of(60, 2)
    codes, scale, kept = round_weight(weight_of(8, 60).to(dtype), x.T @ x, 64, columns)
    assert (codes.dtype, scale.dtype, kept.dtype) == (torch.int8, torch.float32, dtype)


@pytest.mark.parametrize("moments", [torch.zeros(60, 60), torch.ones(60, 60), 1e30 * torch.eye(60)])
@pytest.mark.parametrize("count", [0, 2])
def test_moments_of_few_or_no_directions_are_no_trouble(moments, count):
    """Inputs of zeros, or all alike: damping decides."""
    weight, columns = weight_of(8, 60), columns_of(60, count)
    codes, scale, kept = round_weight(weight, moments, 64, columns)
    stands = dequantize(codes, scale, torch.float32, 64, columns, kept)
    assert stands.isfinite().all()
    assert (stands - weight).norm() < 0.1 * weight.norm()


@pytest.mark.parametrize("shape", [(0, 60), (4, 0), (0, 4, 60), (3, 0, 60), (2, 4, 0)])
def test_weights_without_elements_are_no_trouble(shape):
    weight, columns = torch.randn(shape), columns_of(shape[-1], min(2, shape[-1]))
    codes, scale, kept = round_weight(weight, torch.eye(shape[-1]), 64, columns)
    assert (codes.shape, scale.shape) == (shape, shape[:-1])
    assert kept is None or kept.shape == (*shape[:-1], 2)


# ---- convert --------------------------------------------------------------------------------------------------------


def model_and_data() -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(100, 48), nn.ReLU(), nn.Linear(48, 8)), list(correlated(600, 100).split(200))


def test_a_converted_model_holds_these_codes_and_loses_less():
    model, data = model_and_data()
    calibration = calibrate(model, data, moments=True)
    x = torch.cat(data)
    assert (calibration.moments["0"] - x.T @ x).norm() <= 1e-5 * (x.T @ x).norm()
    twins = [int8fx.convert(copy.deepcopy(model), s, calibration=calibration) for s in (GPTQ, int8fx.rotated())]
    columns = twins[0][0]._buffers["weight" + COLUMNS]
    assert torch.equal(columns, twins[1][0]._buffers["weight" + COLUMNS])
    packed = round_weight(model[0].weight.detach(), calibration.moments["0"], 64, columns)
    for suffix, tensor in zip(("", SCALE, COLUMNS_WEIGHT), packed, strict=True):
        assert torch.equal(twins[0][0]._buffers["weight" + suffix], tensor)
    with torch.no_grad():
        own, other = ((twin[0](x) - model[0](x)).norm() for twin in twins)
    assert own < 0.9 * other  # rounding x, which both do, is the larger part
    program = torch.export.export(copy.deepcopy(model), (x,))
    int8fx.convert(program, GPTQ, calibration=calibration)
    assert torch.equal(program.module()(x), twins[0](x))


@pytest.mark.parametrize("calibration", [None, Calibration(), "without moments"])
@pytest.mark.parametrize("kind", ["module", "graph", "export"])
def test_without_moments_it_is_refused_and_nothing_is_converted(kind, calibration):
    model, data = model_and_data()
    known = calibrate(model, data) if calibration == "without moments" else calibration
    target = {
        "module": lambda: model,
        "graph": lambda: torch.fx.symbolic_trace(model),
        "export": lambda: torch.export.export(model, (data[0],)),
    }[kind]()
    with pytest.raises(
        ValueError, match=r"inputs of layer '0'; legal: calibration=int8fx\.calibrate\(model, data, mom"
    ):
        int8fx.convert(target, GPTQ, calibration=known)
    assert not any(int8fx.is_packed(m) for m in model.modules())


def test_layers_that_the_data_does_not_reach_are_named():
    model, data = model_and_data()
    model.unused = nn.Linear(8, 8)
    calibration = calibrate(model[:3], data, moments=True)
    with pytest.raises(ValueError, match="knows nothing of the inputs of layer 'unused'"):
        int8fx.convert(model, GPTQ, calibration=calibration)
    int8fx.convert(model, GPTQ, calibration=calibration, skip="unused")
    assert [int8fx.is_packed(m) for m in (model[0], model.unused)] == [True, False]


def test_plans_take_it():
    model, data = model_and_data()
    nearest, gptq = (int8fx.rotated(budget=0, rounding=r) for r in ("nearest", "gptq"))
    found = int8fx.plan(model, data, max_kl=float("inf"), schemes=[nearest, gptq])
    assert found.smallest == sum(own[0].bytes for own in found.options.values())
    for own in found.options.values():
        assert own[1].kl < own[0].kl
        assert own[1].bytes == own[0].bytes


def test_other_roundings_are_named():
    with pytest.raises(ValueError, match="rounding must be 'nearest' or 'gptq', found 'up'"):
        int8fx.rotated(rounding="up")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
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
