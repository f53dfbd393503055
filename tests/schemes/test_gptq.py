"""`round_weight`: what it minimises, against rounding each value alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.helpers import correlated, generator, seeds
from torch import Tensor

from int8fx.schemes.gptq import round_weight
from int8fx.schemes.quantize import dequantize, quantize_weight
from int8fx.schemes.rotate import rotate
from int8fx.schemes.weight import Int8Weight, PackedTensors


def weight_of(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


def columns_of(K: int, count: int) -> Tensor | None:
    return torch.arange(K // 2, K // 2 + count) if count else None


def read(packed: PackedTensors, block: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return dequantize(Int8Weight(packed.codes, packed.scale, None, block, *packed[2:]), dtype)


def loss(x: Tensor, weight: Tensor, packed: PackedTensors, block: int) -> float:
    return float((x.double() @ (weight.double() - read(packed, block)).mT).square().sum())


def nearest(weight: Tensor, block: int, columns: Tensor | None) -> PackedTensors:
    columns_weight = None if columns is None else weight[..., columns]
    return PackedTensors(*quantize_weight(weight, block, columns), columns, columns_weight)


@given(st.integers(1, 20), st.integers(2, 150), st.sampled_from([1, 4, 64]), st.integers(0, 1), seeds)
def test_moments_without_correlation_round_to_nearest(N, K, block, count, seed):
    """No column can compensate: codes are those of each value alone, up to ties and the rotation's rounding."""
    weight, columns = weight_of(N, K, seed=seed), columns_of(K, count)
    packed, alone = round_weight(weight, 3 * torch.eye(K), block, columns), nearest(weight, block, columns)
    assert torch.equal(packed.scale, alone.scale)
    assert (packed.codes - alone.codes).abs().max() <= (0 if block == 1 else 1)
    assert packed.columns is columns
    if columns is None:
        assert packed.columns_weight is None
    elif block == 1:
        assert torch.equal(packed.columns_weight, weight[:, columns])


@pytest.mark.parametrize("K", [40, 100, 200, 300])
@pytest.mark.parametrize("block", [1, 64])
@pytest.mark.parametrize("count", [0, 3])
def test_the_matmuls_error_is_a_part_of_what_it_was(K, block, count):
    x, weight, columns = correlated(600, K), weight_of(24, K), columns_of(K, count)
    packed = round_weight(weight, x.T @ x, block, columns)
    rounded, alone = (loss(x, weight, tensors, block) for tensors in (packed, nearest(weight, block, columns)))
    assert rounded < alone / 4  # three quarters of the directions hardly occur
    assert packed.codes.dtype == torch.int8
    assert packed.codes.abs().max() <= 127
    assert packed.codes.is_contiguous()


def test_unquantised_columns_compensate_for_what_they_can():
    """The loss has no slope along them: they are the least-squares answer to the rounding errors of the others."""
    x, columns = correlated(600, 100), columns_of(100, 4)
    weight, moments = weight_of(24, 100), x.double().T @ x.double()
    packed = round_weight(weight, moments, 64, columns)
    uncorrected = packed._replace(columns_weight=weight[:, columns])
    errors = (weight.double() - read(tensors, 64) for tensors in (packed, uncorrected))
    slope, before = ((error @ moments)[:, columns].abs().max() for error in errors)
    assert slope < 1e-3 * before


def test_the_others_are_rounded_for_what_unquantised_columns_cannot_compensate():
    """Against codes that were rounded as if the unquantised columns could compensate for nothing."""
    K, columns = 60, torch.tensor([7, 30])
    x, common = weight_of(500, K).double(), 10 * weight_of(500, 2, seed=2).double()
    x += common @ weight_of(2, K, seed=3).double()
    x[:, columns] = common
    weight, moments = weight_of(24, K), x.T @ x
    others = moments.index_fill(0, columns, 0).index_fill(1, columns, 0)
    packed, alone = round_weight(weight, moments, 1, columns), round_weight(weight.index_fill(1, columns, 0), others, 1)
    projected = x - x[:, columns] @ torch.linalg.lstsq(x[:, columns], x).solution
    zeroed = weight.index_fill(1, columns, 0)
    losses = [loss(projected, zeroed, PackedTensors(*tensors[:2]), 1) for tensors in (packed, alone)]
    assert torch.equal(packed.scale, alone.scale)
    assert losses[0] < 0.8 * losses[1]


def test_corrections_do_not_leave_the_range_of_codes():
    """Values near the largest of their channel, which corrections carry over it."""
    x, sign = correlated(600, 100), weight_of(24, 100).sign()
    weight = sign * (1 - 0.02 * weight_of(24, 100, seed=2).abs().clamp(max=3))
    codes = round_weight(weight, x.T @ x, 1).codes.int()
    assert (codes.abs() == 127).double().mean() > 0.1
    assert codes.abs().max() <= 127
    assert (codes.sign() == sign).all()


def test_the_rotation_is_a_change_of_coordinates():
    x, weight = correlated(600, 96).double(), weight_of(24, 96)
    rotated_x = rotate(x, 32)
    rotated = round_weight(weight, x.T @ x, 32)
    plain = round_weight(rotate(weight, 32), rotated_x.T @ rotated_x, 1)
    assert torch.equal(rotated.scale, plain.scale)
    assert (rotated.codes != plain.codes).double().mean() < 0.01  # ties


def test_experts_are_rounded_by_their_common_moments():
    x, weight, columns = correlated(300, 60), weight_of(3, 8, 60), columns_of(60, 2)
    packed = round_weight(weight, x.T @ x, 64, columns)
    for e in range(3):
        expert = round_weight(weight[e], x.T @ x, 64, columns)
        assert torch.equal(expert.columns, packed.columns)
        for name in ("codes", "scale", "columns_weight"):
            assert torch.equal(getattr(packed, name)[e], getattr(expert, name))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_unquantised_columns_have_the_weights_dtype(dtype):
    x, columns = correlated(300, 60), columns_of(60, 2)
    codes, scale, _, columns_weight, *_ = round_weight(weight_of(8, 60).to(dtype), x.T @ x, 64, columns)
    assert (codes.dtype, scale.dtype, columns_weight.dtype) == (torch.int8, torch.float32, dtype)


@pytest.mark.parametrize("moments", [torch.zeros(60, 60), torch.ones(60, 60), 1e30 * torch.eye(60)])
@pytest.mark.parametrize("count", [0, 2])
def test_moments_of_few_or_no_directions_are_no_trouble(moments, count):
    """Inputs of zeros, or all alike: damping decides."""
    weight = weight_of(8, 60)
    read_back = read(round_weight(weight, moments, 64, columns_of(60, count)), 64, torch.float32)
    assert read_back.isfinite().all()
    assert (read_back - weight).norm() < 0.1 * weight.norm()


@pytest.mark.parametrize("shape", [(0, 60), (4, 0), (0, 4, 60), (3, 0, 60), (2, 4, 0)])
def test_weights_without_elements_are_no_trouble(shape):
    weight, columns = torch.randn(shape), columns_of(shape[-1], min(2, shape[-1]))
    packed = round_weight(weight, torch.eye(shape[-1]), 64, columns)
    assert (packed.codes.shape, packed.scale.shape) == (shape, shape[:-1])
    assert packed.columns_weight is None or packed.columns_weight.shape == (*shape[:-1], 2)
