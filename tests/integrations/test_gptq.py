"""GPTQ and AWQ layers: the same weights bit for bit, the same outputs, and an error for what int8fx cannot hold."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import foreign
from support.foreign import Groups
from torch import nn

import int8fx
from int8fx.conversion.format import read_scheme
from int8fx.integrations.gptq import from_awq, from_gptq
from int8fx.integrations.stored import convert_as_stored, read_schemes

LAYOUTS = ("gptq", "gptq_v2", "awq")


def stored(layout: str, layer: Groups, prefix: str = "layer.") -> dict:
    return foreign.awq(prefix, layer) if layout == "awq" else foreign.gptq(prefix, layer, v2=layout == "gptq_v2")


def read(layout: str, state: dict, **options) -> dict:
    return from_awq(state, **options) if layout == "awq" else from_gptq(state, v2=layout == "gptq_v2", **options)


def loaded(state: dict, N: int, K: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model with ``layer``, a linear layer of these tensors, loaded as a user does."""
    with torch.device("meta"):
        model = nn.ModuleDict({"layer": nn.Linear(K, N, bias=False, dtype=dtype)})
    convert_as_stored(model, read_schemes(state))
    model.load_state_dict(state, assign=True)
    return model


@st.composite
def layers(draw, layout: str) -> Groups:
    bits = 4 if layout == "awq" else draw(st.sampled_from((4, 8)))
    size = draw(st.sampled_from((8, 16, 40)))
    K = size * draw(st.integers(1, 3))
    if layout != "awq" and draw(st.booleans()):
        K += 8 * draw(st.integers(0, size // 8 - 1))  # a shorter last group
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    lowest = 1 if layout == "gptq" else 0
    layer = foreign.groups(
        rng, 8 * draw(st.integers(1, 3)), K, size, bits, symmetric=draw(st.booleans()), lowest=lowest
    )
    special = draw(st.sampled_from((None, 0.0, -1.0, 6e-8)))  # of a group: no scale, a negative one, a subnormal one
    if special is not None:
        layer.scale[rng.integers(len(layer.scale)), rng.integers(layer.scale.shape[1])] *= np.float16(special)
    return layer


@pytest.mark.parametrize("layout", LAYOUTS)
@given(st.data())
def test_weights_are_equal_bit_for_bit(layout, data):
    """In float16 too, where their kernels round the product of the scale and an integer once."""
    layer = data.draw(layers(layout))
    state, weight = read(layout, stored(layout, layer)), torch.from_numpy(layer.weight())
    for dtype in (torch.float32, torch.float16):
        assert torch.equal(loaded(state, *weight.shape, dtype).layer.dequantize(), weight.to(dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("compute", ["fp32", "int8"])
@pytest.mark.parametrize("M", [1, 9])
def test_outputs_are_those_of_the_float_weight(layout, compute, M):
    layer = foreign.groups(np.random.default_rng(0), 24, 96, 32)
    model = loaded(read(layout, stored(layout, layer), compute=compute), 24, 96)
    x = torch.randn(M, 96)
    expected = x.double() @ torch.from_numpy(layer.weight()).double().T
    error = (model.layer(x) - expected).norm() / expected.norm()
    assert error <= (1e-6 if compute == "fp32" else 0.02)
    assert read_scheme(model.state_dict()["layer.weight_format"]).compute == compute


@pytest.mark.parametrize("bits", [4, 8])
def test_symmetric_layers_have_no_zero_points(bits):
    rng = np.random.default_rng(0)
    layer = foreign.groups(rng, 8, 64, 32, bits, symmetric=True)
    layer = layer._replace(codes=layer.codes.clip(1))
    state = from_gptq(stored("gptq", layer))
    assert "layer.weight_zero_point" not in state
    assert str(read_scheme(state["layer.weight_format"])) == str(
        int8fx.weight_only({4: "int4_fullrange", 8: "int8"}[bits], 32, scale_dtype="float16")
    )
    layer.zero_point[0, 0] -= 1
    assert "layer.weight_zero_point" in from_gptq(stored("gptq", layer))


def test_without_g_idx_a_shorter_last_group_is_not_taken_for_equal_groups():
    """96 columns in groups of 64 have two groups, as in groups of 48."""
    state = {"layer.qweight": torch.zeros(12, 8, dtype=torch.int32), "layer.scales": torch.ones(2, 8).half()}
    state["layer.qzeros"] = torch.full((2, 1), 0x77777777, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"2 groups of K = 96 input channels, and no g_idx .*legal: .*power of two"):
        from_gptq(state)


def test_one_group_for_a_whole_row_and_layers_without_g_idx():
    layer = foreign.groups(np.random.default_rng(0), 8, 64, 64)
    state = stored("gptq", layer)
    result = from_gptq(state)
    assert read_scheme(result["layer.weight_format"]).group_size == -1
    del state["layer.g_idx"]
    assert result.keys() == from_gptq(state).keys()
    assert all(torch.equal(result[k], t) for k, t in from_gptq(state).items())


def test_other_tensors_stay_and_a_state_dict_may_be_of_the_layer_itself():
    layer = foreign.groups(np.random.default_rng(0), 8, 32, 32)
    norm = torch.ones(3)
    state = stored("awq", layer, "") | {"norm.weight": norm, "scales": torch.from_numpy(layer.scale.T.copy())}
    result = from_awq(state)
    assert result["norm.weight"] is norm
    assert result.keys() == {"weight_codes", "weight_scale", "weight_zero_point", "weight_format", "norm.weight"}


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_a_zero_point_that_libraries_read_differently_is_refused():
    layer = foreign.groups(np.random.default_rng(0), 8, 32, 32)
    layer.zero_point[0] = 15
    state = foreign.gptq("a.b.", layer, v2=True)
    assert from_gptq(state, v2=True)["a.b.weight_zero_point"][0] == 15
    message = (
        r"layer 'a\.b': a zero point is stored as 15, which libraries read as 16 or as 0; legal: 0 to 14, or gptq_v2"
    )
    with pytest.raises(ValueError, match=message):
        from_gptq(state)


def test_act_order_is_refused():
    state = stored("gptq", foreign.groups(np.random.default_rng(0), 8, 64, 32))
    state["layer.g_idx"] = state["layer.g_idx"].flip(0)
    with pytest.raises(ValueError, match=r"layer 'layer': g_idx is not k // group_size.*legal: a model quantised with"):
        from_gptq(state)


FAULTS = {
    "no scales": (lambda s: s.pop("layer.scales"), "lacks scales"),
    "no qzeros": (lambda s: s.pop("layer.qzeros"), "lacks qzeros"),
    "no qweight": (lambda s: s.pop("layer.qweight"), "has qzeros and lacks qweight"),
    "weight too": (lambda s: s.update({"layer.weight": torch.ones(1)}), "has qweight and weight"),
    "float codes": (lambda s: s.update({"layer.qweight": s["layer.qweight"].float()}), "qweight has shape"),
    "a vector": (lambda s: s.update({"layer.qzeros": s["layer.qzeros"].view(-1)}), "qzeros has shape"),
    "fewer channels": (lambda s: s.update({"layer.scales": s["layer.scales"][:, 1:]}), "shape (2, 15)"),
    "fewer groups": (lambda s: s.update({"layer.scales": s["layer.scales"][1:]}), "as many rows, one per group"),
    "no groups": (lambda s: s.update({"layer.scales": s["layer.scales"][:0]}), "scales has shape"),
    "fewer zeros": (lambda s: s.update({"layer.qzeros": s["layer.qzeros"][:, 1:]}), "qzeros"),
    "integer scales": (lambda s: s.update({"layer.scales": s["layer.scales"].int()}), "scales has shape"),
    "NaN": (lambda s: s["layer.scales"].fill_(float("nan")), "a scale that is NaN or inf"),
    "float64 scales": (lambda s: s.update({"layer.scales": s["layer.scales"].double()}), "scales of torch.float64"),
}
G_IDX_FAULTS = {
    "beyond": (lambda s: s["layer.g_idx"].fill_(2), "g_idx has 2 to 2; legal: 0 to 1"),
    "below": (lambda s: s["layer.g_idx"].fill_(-1), "g_idx has -1 to -1"),
    "shorter": (lambda s: s.update({"layer.g_idx": s["layer.g_idx"][1:]}), "g_idx has shape"),
    "float": (lambda s: s.update({"layer.g_idx": s["layer.g_idx"].float()}), "g_idx has shape"),
    "all 0": (lambda s: s["layer.g_idx"].zero_(), "g_idx is not k // group_size"),
    "all 1": (lambda s: s["layer.g_idx"].fill_(1), "g_idx is not k // group_size"),
    "2 bits": (
        lambda s: s.update({"layer.qzeros": s["layer.qzeros"][:, :1]}),
        "1 columns of qzeros for N = 16 output channels",
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fault", FAULTS)
def test_hostile_layers_are_refused_by_name(layout, fault):
    _refused(layout, *FAULTS[fault])


@pytest.mark.parametrize("fault", G_IDX_FAULTS)
def test_hostile_groups_are_refused_by_name(fault):
    _refused("gptq", *G_IDX_FAULTS[fault])


def _refused(layout, change, message):
    state = stored(layout, foreign.groups(np.random.default_rng(0), 16, 64, 32))
    change(state)
    with pytest.raises(ValueError, match=r"'layer(\.weight)?'") as error:
        read(layout, state)
    assert message in str(error.value)
    assert "; legal: " in str(error.value)


def test_the_layouts_are_not_taken_for_each_other():
    layer = foreign.groups(np.random.default_rng(0), 16, 64, 32)
    with pytest.raises(ValueError, match="as AutoAWQ's gemm has them"):
        from_awq(stored("gptq", layer))
    with pytest.raises(ValueError, match=r"scales has shape \(2, 16\)"):
        from_gptq(stored("awq", layer))
