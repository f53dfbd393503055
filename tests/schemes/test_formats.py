"""`formats` and `quantize.pack_weight`: the values of formats, groups, scales, and how codes are packed."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.helpers import generator, groupings, in_groups, largest_scale, seeds, stored_rows

from int8fx.schemes.formats import FORMATS, Grouping, format_of, read_levels, read_scale, unpack
from int8fx.schemes.quantize import dequantize, pack_weight


def snr(weight, grouping) -> float:
    """Signal-to-noise ratio in dB."""
    error = dequantize(in_groups(weight, grouping)) - weight
    return float(10 * torch.log10(weight.square().sum() / error.square().sum()))


# In dB, of independent Gaussian weights in groups of 32, 64 and 128, computed by other code.
SNR = {
    ("int4_clip", False): (20.2, 19.4, 18.6),
    ("int4_fullrange", False): (21.3, 20.5, 19.8),
    ("int4_clip", True): (21.9, 20.8, 19.9),
    ("nf4", False): (21.2, 20.7, 20.4),
    ("fp4_e2m1_bnb", False): (18.9, 18.3, 17.8),
    ("fp4_e2m1_itrex", False): (19.0, 18.4, 18.0),
    ("fp4_e2m1", False): (19.9, 19.5, 19.3),
}


@pytest.mark.parametrize(("format", "asymmetric"), SNR)
def test_signal_to_noise_of_gaussian_weights(format, asymmetric):
    weight = torch.randn(4096, 1024, generator=generator(0))
    for size, expected in zip((32, 64, 128), SNR[format, asymmetric], strict=True):
        assert abs(snr(weight, Grouping(format, size, asymmetric)) - expected) <= 0.1  # of the published rounding, .05


@pytest.mark.parametrize(("format", "theirs"), [("nf4", "nf4"), ("fp4_e2m1_bnb", "fp4")])
@pytest.mark.parametrize("size", [32, 64, 128])
def test_codebooks_are_those_of_bitsandbytes(format, theirs, size):
    """Scales and values bit for bit; codes but for the sign of 0, of which its formats have two."""
    bitsandbytes = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(64, 1024, generator=generator(size))
    codes, state = bitsandbytes.quantize_4bit(weight.clone(), blocksize=size, quant_type=theirs)
    mine = in_groups(weight, Grouping(format, size))
    assert torch.equal(mine.scale, state.absmax.view(64, -1))
    assert torch.equal(dequantize(mine), bitsandbytes.dequantize_4bit(codes, state))
    loaded = mine._replace(codes=codes.view(64, -1))
    assert torch.equal(dequantize(loaded), dequantize(mine))
    a, b = unpack(mine.codes, 1024), unpack(loaded.codes, 1024)
    zero = stored_rows(mine) == 0
    assert torch.equal(a[~zero], b[~zero])
    assert (a[zero] == FORMATS[format].levels.index(0.0)).all()


@given(groupings(), st.integers(0, 5), st.integers(0, 70), seeds, st.sampled_from((1.0, 1e-30, 1e-6, 1e6)))
def test_a_value_gets_the_nearest_one_that_its_group_has(grouping, N, K, seed, size):
    """No level of the format is nearer, in the scale and with the zero point that are stored."""
    size = min(size, 1e3) if grouping.scale_dtype is torch.float16 else size
    weight = torch.randn(N, K, generator=generator(seed)) * size
    packed = in_groups(weight, grouping)
    spec = format_of(packed.format)
    values = torch.tensor(spec.levels or range(16) if spec.bits == 4 else range(-128, 128)).double()
    if spec.bits == 8 and not grouping.asymmetric:
        values = values[1:]
    scale = read_scale(packed.scale, packed.scale_range, torch.float64)
    zero = torch.full_like(scale, spec.zero_point) if packed.zero_point is None else packed.zero_point.double()
    shape = (N, packed.scale.shape[-1] if grouping.size else 1, 1, 1)
    legal = (values - zero.view(shape)) * scale.view(shape)
    step = grouping.size or max(K, 1)
    legal = legal.expand(-1, -1, step, -1).flatten(1, 2)[:, :K]
    best = (legal - weight.double().unsqueeze(-1)).abs().amin(-1)
    error = (stored_rows(packed) - weight.double()).abs()
    slack = 2**-22 * (weight.double().abs() + largest_scale(packed) * spec.largest_step(grouping.asymmetric))
    assert (error <= best + slack).all()


@given(groupings(), st.integers(1, 4), st.integers(1, 70), seeds)
def test_groups_are_alone(grouping, N, K, seed):
    """What a group's codes mean does not depend on other groups or, without double quantisation, on other rows."""
    weight = torch.randn(N, K, generator=generator(seed))
    size = grouping.size or K
    whole = stored_rows(in_groups(weight, grouping))
    for n in range(N):
        assert torch.equal(stored_rows(in_groups(weight[n : n + 1], grouping))[0], whole[n])
    if not grouping.double_quant:
        parts = [stored_rows(in_groups(weight[:, k : k + size], grouping)) for k in range(0, K, size)]
        assert torch.equal(torch.cat(parts, 1), whole)


@given(groupings(), st.integers(1, 4), st.integers(1, 70))
def test_zeros_stay_zeros(grouping, N, K):
    assert not stored_rows(in_groups(torch.zeros(N, K), grouping)).any()


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_value_of_full_range_is_minus_eight_steps(sign):
    weight = sign * torch.tensor([[7.0, -2, 8, 1], [0.5, -0.25, 0.125, 0.5]])
    packed = in_groups(weight, Grouping("int4_fullrange", 4))
    assert packed.scale.flatten().tolist() == [-sign * 1.0, -sign * 0.0625]
    assert unpack(packed.codes, 4)[0].tolist()[2] == 0
    assert torch.equal(dequantize(packed)[0], sign * torch.tensor([7.0, -2, 8, 1]))


def test_asymmetric_groups_reach_both_ends():
    weight = torch.tensor([[0.0, 1, 2, 15]])
    packed = in_groups(weight, Grouping("int4_clip", 4, asymmetric=True))
    assert (packed.scale.item(), packed.zero_point.item()) == (1, 0)
    assert torch.equal(dequantize(packed), weight)


def test_two_codes_are_in_a_byte_the_first_in_the_upper_half():
    packed = in_groups(torch.tensor([[-7.0, 7.0, 1.0]]), Grouping("int4_clip"))
    assert packed.codes.tolist() == [[1 << 4 | 15, 9 << 4]]
    assert read_levels(packed.codes, FORMATS["int4_clip"], 3, torch.float32).tolist() == [[1, 15, 9]]


@pytest.mark.parametrize("format", ["int8", "int4_clip", "nf4"])
def test_a_scale_that_its_dtype_does_not_hold_is_refused(format):
    weight = torch.full((2, 8), 1e8)
    with pytest.raises(ValueError, match=r"scale .* torch.float16 does not hold; legal: another scale_dtype"):
        pack_weight(weight, Grouping(format, 4, scale_dtype=torch.float16))
    assert pack_weight(weight, Grouping(format, 4, scale_dtype=torch.bfloat16)).scale.dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(3, 4, 33), (3, 33), (0, 33), (3, 0)])
def test_shapes(shape):
    weight = torch.randn(shape, generator=generator(1))
    tensors = pack_weight(weight, Grouping("nf4", 16, double_quant=True))
    groups = max(1, math.ceil(shape[-1] / 16))
    assert tensors.codes.shape == (*shape[:-1], math.ceil(shape[-1] / 2))
    assert tensors.scale.shape == (*shape[:-1], groups)
    assert tensors.scale.dtype == torch.uint8
    assert tensors.scale_range.shape == (*shape[:-1], 2)
