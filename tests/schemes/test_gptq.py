"""`round_weight`: what it minimises, against rounding each value alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.helpers import correlated, generator, groupings, seeds
from torch import Tensor

from int8fx.schemes.formats import FORMATS, Grouping, absmax_scales, decode, encode, per_column
from int8fx.schemes.gptq import round_weight
from int8fx.schemes.quantize import dequantize, pack_weight, quantize_weight
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
    packed, alone = round_weight(weight, Grouping(), 3 * torch.eye(K), block, columns), nearest(weight, block, columns)
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
    packed = round_weight(weight, Grouping(), x.T @ x, block, columns)
    rounded, alone = (loss(x, weight, tensors, block) for tensors in (packed, nearest(weight, block, columns)))
    assert rounded < alone / 4  # three quarters of the directions hardly occur
    assert packed.codes.dtype == torch.int8
    assert packed.codes.abs().max() <= 127
    assert packed.codes.is_contiguous()


def test_unquantised_columns_compensate_for_what_they_can():
    """The loss has no slope along them: they are the least-squares answer to the rounding errors of the others."""
    x, columns = correlated(600, 100), columns_of(100, 4)
    weight, moments = weight_of(24, 100), x.double().T @ x.double()
    packed = round_weight(weight, Grouping(), moments, 64, columns)
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
    packed, alone = (
        round_weight(weight, Grouping(), moments, 1, columns),
        round_weight(weight.index_fill(1, columns, 0), Grouping(), others, 1),
    )
    projected = x - x[:, columns] @ torch.linalg.lstsq(x[:, columns], x).solution
    zeroed = weight.index_fill(1, columns, 0)
    losses = [loss(projected, zeroed, PackedTensors(*tensors[:2]), 1) for tensors in (packed, alone)]
    assert torch.equal(packed.scale, alone.scale)
    assert losses[0] < 0.8 * losses[1]


def test_corrections_do_not_leave_the_range_of_codes():
    """Values near the largest of their channel, which corrections carry over it."""
    x, sign = correlated(600, 100), weight_of(24, 100).sign()
    weight = sign * (1 - 0.02 * weight_of(24, 100, seed=2).abs().clamp(max=3))
    codes = round_weight(weight, Grouping(), x.T @ x, 1).codes.int()
    assert (codes.abs() == 127).double().mean() > 0.1
    assert codes.abs().max() <= 127
    assert (codes.sign() == sign).all()


def test_the_rotation_is_a_change_of_coordinates():
    x, weight = correlated(600, 96).double(), weight_of(24, 96)
    rotated_x = rotate(x, 32)
    rotated = round_weight(weight, Grouping(), x.T @ x, 32)
    plain = round_weight(rotate(weight, 32), Grouping(), rotated_x.T @ rotated_x, 1)
    assert torch.equal(rotated.scale, plain.scale)
    assert (rotated.codes != plain.codes).double().mean() < 0.01  # ties


def test_experts_are_rounded_by_their_common_moments():
    x, weight, columns = correlated(300, 60), weight_of(3, 8, 60), columns_of(60, 2)
    packed = round_weight(weight, Grouping(), x.T @ x, 64, columns)
    for e in range(3):
        expert = round_weight(weight[e], Grouping(), x.T @ x, 64, columns)
        assert torch.equal(expert.columns, packed.columns)
        for name in ("codes", "scale", "columns_weight"):
            assert torch.equal(getattr(packed, name)[e], getattr(expert, name))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_unquantised_columns_have_the_weights_dtype(dtype):
    x, columns = correlated(300, 60), columns_of(60, 2)
    codes, scale, _, columns_weight, *_ = round_weight(weight_of(8, 60).to(dtype), Grouping(), x.T @ x, 64, columns)
    assert (codes.dtype, scale.dtype, columns_weight.dtype) == (torch.int8, torch.float32, dtype)


@pytest.mark.parametrize("moments", [torch.zeros(60, 60), torch.ones(60, 60), 1e30 * torch.eye(60)])
@pytest.mark.parametrize("count", [0, 2])
def test_moments_of_few_or_no_directions_are_no_trouble(moments, count):
    """Inputs of zeros, or all alike: damping decides."""
    weight = weight_of(8, 60)
    read_back = read(round_weight(weight, Grouping(), moments, 64, columns_of(60, count)), 64, torch.float32)
    assert read_back.isfinite().all()
    assert (read_back - weight).norm() < 0.1 * weight.norm()


@pytest.mark.parametrize("shape", [(0, 60), (4, 0), (0, 4, 60), (3, 0, 60), (2, 4, 0)])
def test_weights_without_elements_are_no_trouble(shape):
    weight, columns = torch.randn(shape), columns_of(shape[-1], min(2, shape[-1]))
    packed = round_weight(weight, Grouping(), torch.eye(shape[-1]), 64, columns)
    assert (packed.codes.shape, packed.scale.shape) == (shape, shape[:-1])
    assert packed.columns_weight is None or packed.columns_weight.shape == (*shape[:-1], 2)


# ---- groups and formats ----------------------------------------------------------------------------------------------


def as_weight(packed: PackedTensors, grouping: Grouping, K: int) -> Int8Weight:
    name = None if grouping.format == "int8" else grouping.format
    return Int8Weight(
        packed.codes, packed.scale, format=name, group_size=grouping.size, in_features=None if name is None else K,
        zero_point=packed.zero_point, scale_range=packed.scale_range,
    )  # fmt: skip


def matmul_error(x: Tensor, weight: Tensor, packed: PackedTensors, grouping: Grouping) -> float:
    v = dequantize(as_weight(packed, grouping, weight.shape[-1]), torch.float64)
    return float((x.double() @ (weight.double() - v).mT).square().sum())


@given(groupings(), st.integers(1, 8), st.integers(1, 100), seeds)
def test_groups_keep_the_scales_of_the_weight(grouping, N, K, seed):
    weight, x = weight_of(N, K, seed=seed), correlated(200, K, seed)
    packed, alone = round_weight(weight, grouping, x.T @ x), pack_weight(weight, grouping)
    for name in ("scale", "zero_point", "scale_range"):
        of_packed, of_alone = getattr(packed, name), getattr(alone, name)
        assert (of_packed is None) == (of_alone is None)
        assert of_packed is None or torch.equal(of_packed, of_alone)
    assert (packed.codes.shape, packed.codes.dtype) == (alone.codes.shape, alone.codes.dtype)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("size", [None, 32, 48])
def test_the_error_of_groups_is_a_part_of_what_it_was(format, size):
    grouping, weight, x = Grouping(format, size), weight_of(24, 200), correlated(600, 200)
    packed = round_weight(weight, grouping, x.T @ x)
    assert (
        matmul_error(x, weight, packed, grouping) < matmul_error(x, weight, pack_weight(weight, grouping), grouping) / 3
    )


def test_asymmetric_groups_gain_too():
    grouping, weight, x = Grouping("int4_clip", 32, asymmetric=True), weight_of(24, 200) + 0.5, correlated(600, 200)
    packed = round_weight(weight, grouping, x.T @ x)
    assert (
        matmul_error(x, weight, packed, grouping) < matmul_error(x, weight, pack_weight(weight, grouping), grouping) / 3
    )


@given(st.sampled_from(["int4_clip", "nf4", "int8"]), st.sampled_from([None, 8]), st.integers(1, 12), seeds)
def test_codes_are_those_of_the_greedy_solution(format, size, K, seed):
    """After each column the others become the least-squares answer to the errors so far, solved anew for each."""
    grouping, weight, x = Grouping(format, size), weight_of(3, K, seed=seed), correlated(50, K, seed).double()
    H = x.T @ x
    packed = round_weight(weight, grouping, H)
    scales = absmax_scales(weight, grouping)
    scale = per_column(scales.scale, K, size or K)
    H += 0.01 * H.diagonal().mean() * torch.eye(K)
    w, v, rest = weight.double(), torch.zeros(3, K, dtype=torch.float64), list(range(K))
    margin = torch.full((3,), math.inf, dtype=torch.float64)
    for j in H.diagonal().argsort(descending=True, stable=True).tolist():
        free = [k for k in rest if k != j]
        done = [k for k in range(K) if k not in rest]
        # the minimum over w[rest]: w0[rest] + inv(H[rest, rest]) H[rest, done] (w0 - v)[done]
        target = w[:, rest].clone()
        if done:
            target += torch.linalg.solve(H[rest][:, rest], H[rest][:, done] @ (w - v)[:, done].T).T
        value = target[:, rest.index(j)]
        code = encode(value.float(), scale[:, j], None, grouping)
        v[:, j] = decode(code, scale[:, j], None, grouping).double()
        near = decode(
            encode((value + 1e-3 * scale[:, j]).float(), scale[:, j], None, grouping), scale[:, j], None, grouping
        )
        also = decode(
            encode((value - 1e-3 * scale[:, j]).float(), scale[:, j], None, grouping), scale[:, j], None, grouping
        )
        margin = torch.where(near == also, margin, 0.0)  # a tie may be rounded either way
        rest = free
    found = dequantize(as_weight(packed, grouping, K), torch.float64)
    clear = margin > 0
    assert torch.allclose(found[clear], v[clear], rtol=1e-6, atol=0)


@given(
    st.sampled_from([Grouping(), Grouping("int4_clip", 16), Grouping("nf4", 32, double_quant=True)]),
    st.integers(1, 4),
    st.sampled_from([0, 1, 3]),
    st.sampled_from([1, 16]),
    seeds,
)
def test_few_rows_and_entries_far_apart_are_no_trouble(grouping, rows, count, block, seed):
    """Fewer rows than columns, and input channels a thousand to a million times as large as others, in float32."""
    K = 96
    g = generator(seed)
    x = torch.randn(8 * rows, K, generator=g) * 10 ** (6 * torch.rand(K, generator=g) - 3)
    weight, columns = weight_of(8, K, seed=seed), columns_of(K, count)
    packed = round_weight(weight, grouping, x.T @ x, block, columns)
    alone = pack_weight(weight, grouping, block, columns)
    losses = []
    for tensors in (packed, alone):
        read_back = dequantize(
            as_weight(tensors, grouping, K)._replace(
                block=block, columns=tensors.columns, columns_weight=tensors.columns_weight
            ),
            torch.float64,
        )
        assert read_back.isfinite().all()
        losses.append(float((x.double() @ (weight.double() - read_back).mT).square().sum()))
    assert losses[0] <= losses[1] * 1.01


def test_moments_that_are_none_are_refused():
    weight = weight_of(4, 8)
    for moments in (-torch.eye(8), torch.full((8, 8), math.nan), torch.eye(8) - 20 * (1 - torch.eye(8))):
        with pytest.raises(ValueError, match=r"moments of its inputs are .*; legal: x.T @ x"):
            round_weight(weight, Grouping(), moments)
