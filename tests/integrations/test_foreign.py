"""int8 layers and state dicts of bitsandbytes and torchao become int8fx's without being rounded again, and back."""

import copy
import subprocess
import sys

import bitsandbytes as bnb
import pytest
import torch
from support.helpers import activation
from torch import nn
from torchao.quantization import (
    Int4WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    quantize_,
)

import int8fx
from int8fx.conversion.packed import tensors_of
from int8fx.integrations.bitsandbytes import from_bitsandbytes, to_bitsandbytes

AO = {
    "weight only": Int8WeightOnlyConfig(set_inductor_config=False),
    "dynamic": Int8DynamicActivationInt8WeightConfig(set_inductor_config=False),
}


def bitsandbytes_layer(threshold: float = 6.0, bias: bool = True, ran: bool = False) -> nn.Module:
    torch.manual_seed(0)
    layer = bnb.nn.Linear8bitLt(64, 48, bias=bias, has_fp16_weights=False, threshold=threshold)
    layer.load_state_dict(nn.Linear(64, 48, bias=bias).state_dict())
    layer = layer.to("cpu").eval()
    if ran:
        layer(torch.randn(3, 64))
    return layer


@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ran", [False, True])
def test_a_live_layer_of_bitsandbytes(threshold, bias, ran):
    layer = bitsandbytes_layer(threshold, bias, ran)
    state, x = copy.deepcopy(layer.state_dict()), activation(16, 64, outliers="column")
    y = layer(x)
    model = nn.Sequential(layer)
    assert int8fx.convert(model)[0] is layer
    assert not isinstance(layer, bnb.nn.Linear8bitLt)
    assert isinstance(layer, nn.Linear)
    codes, scale = tensors_of(layer, "weight")[:2]
    assert torch.equal(codes, state["weight"])
    assert torch.equal(scale, state["SCB"] / 127)
    assert layer.packed_weights["weight"].scheme == (int8fx.llm_int8(threshold) if threshold else int8fx.plain())
    assert (layer(x) - y).norm() < 0.02 * y.norm()
    assert [row.converted for row in int8fx.summary(model).rows] == [True]
    other = int8fx.convert(nn.Sequential(nn.Linear(64, 48, bias=bias)), layer.packed_weights["weight"].scheme)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), layer(x))


def test_a_layer_that_bitsandbytes_has_not_quantised_yet_is_converted_as_a_linear():
    layer = bnb.nn.Linear8bitLt(64, 48, has_fp16_weights=True)
    expected = nn.Linear(64, 48)
    expected.load_state_dict(layer.state_dict())
    model, expected = int8fx.convert(nn.Sequential(layer)), int8fx.convert(nn.Sequential(expected))
    x = torch.randn(5, 64)
    assert torch.equal(model(x), expected(x))


@pytest.mark.parametrize("config", AO)
def test_a_live_layer_of_torchao(config):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 48)), torch.randn(16, 64)
    quantize_(model, AO[config])
    weight, y = model[0].weight, model(x)
    floats = weight.dequantize()
    int8fx.convert(model)
    assert type(model[0].weight).__name__ == "PackedWeight"
    assert model[0].packed_weights["weight"].scheme == (
        int8fx.weight_only() if config == "weight only" else int8fx.plain()
    )
    whole = (weight.qdata != -128).all(1)  # a row with a code of -128, which int8fx does not have, is rounded again
    assert torch.equal(tensors_of(model[0], "weight").codes[whole], weight.qdata[whole])
    assert torch.equal(model[0].dequantize()[whole], floats[whole])
    assert (model[0].dequantize() - floats).abs().max() <= weight.scale.max()
    assert (model(x) - y).norm() < 0.02 * y.norm()


def test_schemes_that_need_other_codes_are_refused_and_the_model_is_left():
    for make in (bitsandbytes_layer, lambda: _ao("dynamic")):
        model, x = nn.Sequential(make()), torch.randn(3, 64)
        y, cls = model(x), type(model[0])
        for scheme in (int8fx.rotated(), int8fx.llm_int8(columns=0.1)):
            with pytest.raises(ValueError, match=r"layer .0. is quantised already, which .* cannot take over"):
                int8fx.convert(model, scheme)
        assert type(model[0]) is cls
        assert torch.equal(model(x), y)
        int8fx.convert(model, int8fx.llm_int8(5.0))
        assert model[0].packed_weights["weight"].scheme == int8fx.llm_int8(5.0)


@pytest.mark.parametrize("make", [bitsandbytes_layer, lambda: _ao("dynamic")], ids=["bitsandbytes", "torchao"])
def test_layers_that_are_taken_over_count_as_converted(make, caplog, recwarn):
    caplog.set_level("INFO", logger="int8fx")
    int8fx.convert(nn.Sequential(make(), nn.Linear(48, 8)))
    assert caplog.messages == ["convert: 2 weights to int8; left: none"]
    assert not [w for w in recwarn if "int8fx" in str(w.message)]
    with pytest.warns(UserWarning, match=r"9[0-9] % of the weight bytes .* The largest is 1\b"):
        int8fx.convert(nn.Sequential(make(), nn.Conv2d(64, 64, 3)))


def _ao(config: str) -> nn.Module:
    model = nn.Sequential(nn.Linear(64, 48))
    quantize_(model, AO[config])
    return model[0]


def test_other_forms_are_refused_by_name_or_skipped():
    model = nn.Sequential(bnb.nn.Linear4bit(64, 48), nn.Linear(64, 48))
    with pytest.raises(ValueError, match=r"layer '0' is already quantised by bitsandbytes \(Linear4bit"):
        int8fx.convert(model)
    int8fx.convert(model, skip="0")
    assert int8fx.is_packed(model[1])
    assert isinstance(model[0], bnb.nn.Linear4bit)


def test_converting_imports_neither_package():
    script = "import sys, torch, int8fx; int8fx.convert(torch.nn.Linear(4, 4)); print([m for m in sys.modules if m in ('bitsandbytes', 'torchao')])"  # noqa: E501
    assert subprocess.check_output([sys.executable, "-c", script], text=True).split("\n")[-2] == "[]"


@pytest.mark.parametrize("bias", [False, True])
def test_state_dicts_of_bitsandbytes_and_back(bias):
    source = nn.ModuleDict({"a": bitsandbytes_layer(bias=bias), "norm": nn.LayerNorm(48)})
    state = source.state_dict()
    with torch.device("meta"):
        model = nn.ModuleDict({"a": nn.Linear(64, 48, bias=bias), "norm": nn.LayerNorm(48)})
    int8fx.convert(model)
    model.load_state_dict(from_bitsandbytes(state), assign=True)
    assert torch.equal(model["a"].weight_codes, state["a.weight"])
    x = activation(16, 64, outliers="column")
    assert (model["a"](x) - source["a"](x)).norm() < 0.02 * source["a"](x).norm()
    back = to_bitsandbytes(model.state_dict())
    assert back.keys() == state.keys()
    for key, tensor in state.items():
        assert back[key].dtype == tensor.dtype
        assert torch.allclose(back[key].float(), tensor.float(), rtol=1e-6), key
    again = nn.ModuleDict({"a": bitsandbytes_layer(bias=bias), "norm": nn.LayerNorm(48)})
    again.load_state_dict(back)
    assert torch.allclose(again["a"](x), source["a"](x), rtol=1e-5, atol=1e-6)


def test_state_dicts_that_cannot_be_translated_are_refused_by_name():
    state = nn.Sequential(bitsandbytes_layer()).state_dict()
    with pytest.raises(ValueError, match="cannot become rotated"):
        from_bitsandbytes(state, int8fx.rotated())
    with pytest.raises(ValueError, match=r".0\.weight. is not int8"):
        from_bitsandbytes(state | {"0.weight": torch.zeros(48, 64)})
    with pytest.raises(ValueError, match=r"0\.weight_format is 1; legal: 0, row-major"):
        from_bitsandbytes(state | {"0.weight_format": torch.tensor(1, dtype=torch.uint8)})
    others = (int8fx.weight_only("int8", 32), int8fx.weight_only("int8", asymmetric=True), int8fx.weight_only("nf4"))
    for scheme in (int8fx.rotated(columns=0), int8fx.llm_int8(columns=0.1), *others):
        with pytest.raises(ValueError, match="which bitsandbytes does not have"):
            to_bitsandbytes(int8fx.convert(nn.Sequential(nn.Linear(64, 48)), scheme).state_dict())


def test_int4_of_torchao_is_refused():
    model = nn.Sequential(nn.Linear(128, 128, dtype=torch.bfloat16))
    try:
        quantize_(model, Int4WeightOnlyConfig(group_size=32, set_inductor_config=False))
    except (ImportError, RuntimeError, AssertionError, NotImplementedError) as error:
        pytest.skip(f"torchao cannot make one here: {error}")
    with pytest.raises(ValueError, match="already quantised by torchao"):
        int8fx.convert(model)


ROTATED_ELSEWHERE = {
    "ComfyUI": ({"weight_scale": (48, 1)}, r'"0\.weight_scale" has shape \(48, 1\); legal: \(48,\)'),
    "ComfyUI, scales [N]": (
        {"weight_scale": (48,), "comfy_quant": (67,)},
        r'"0\.comfy_quant" is there, so that "0\.weight" is as ComfyUI stores it',
    ),
    "SDNQ": ({"scale": (48, 1)}, r'"0\.weight" is packed, and a part of it is missing: 0\.weight_scale'),
}


@pytest.mark.parametrize("tool", ROTATED_ELSEWHERE)
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("scheme", [int8fx.plain(), int8fx.rotated(block=64, columns=0)], ids=str)
def test_rotated_files_of_other_tools_are_not_read_as_ours(tool, strict, scheme):
    """Their codes are called ``weight``, as in our version 1, and rotated by another matrix."""
    shapes, message = ROTATED_ELSEWHERE[tool]
    model, x = int8fx.convert(nn.Sequential(nn.Linear(64, 48, bias=False)), scheme), torch.randn(8, 64)
    y = model(x)
    state = {"0.weight": torch.randint(-127, 128, (48, 64), dtype=torch.int8)}
    state |= {f"0.{name}": torch.full(shape, 0.01) for name, shape in shapes.items()}
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(state, strict=strict)
    assert torch.equal(model(x), y)
