"""``torchao.quantize_(model, int8fx.LLMInt8Config())`` packs what its filter chooses, as `int8fx.convert` would."""

import copy
import json
import subprocess
import sys
from collections import OrderedDict

import pytest
import torch
import transformers
from support import models
from support.conversion import SCHEMES, assert_same_tensors
from torch import Tensor, nn
from torchao import quantize_
from torchao.core.config import config_from_dict, config_to_dict
from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, TorchAoConfig

import int8fx
from int8fx.conversion.packed import PackedModule

PACKED_ONE_BY_ONE = [name for name in SCHEMES if "columns" not in name]


def mlp(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 64, bias=False)).to(dtype)


def is_linear(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def logits(model: nn.Module, inputs: dict) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def converted(model: nn.Module) -> dict[str, str]:
    return {row.name: row.scheme for row in int8fx.summary(model).converted}


# ---- the configuration ----------------------------------------------------------------------------------------------


def test_its_argument():
    assert int8fx.LLMInt8Config() == int8fx.LLMInt8Config(int8fx.llm_int8())
    assert int8fx.LLMInt8Config("rotated(columns=0)").scheme == int8fx.rotated(columns=0)
    with pytest.raises(TypeError, match=r"LLMInt8Config: scheme is 6\.0; legal: int8fx\.llm_int8"):
        int8fx.LLMInt8Config(6.0)
    with pytest.raises(ValueError, match="scheme 'int4'"):
        int8fx.LLMInt8Config("int4")
    with pytest.raises(ValueError, match=r"rotated\(rounding='gptq'\) needs data"):
        int8fx.LLMInt8Config(int8fx.rotated(rounding="gptq"))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_torchao_writes_and_reads_it(scheme):
    config = int8fx.LLMInt8Config(SCHEMES[scheme])
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


@pytest.mark.slow  # starts a process
def test_import_int8fx_does_not_import_torchao():
    script = "import sys, int8fx; dir(int8fx); print('torchao' in sys.modules); int8fx.LLMInt8Config; print('torchao' in sys.modules)"  # noqa: E501
    assert subprocess.check_output([sys.executable, "-c", script], text=True).split()[-2:] == ["False", "True"]
    assert "LLMInt8Config" in dir(int8fx)


# ---- quantize_ ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_linear_has_the_bits_of_convert(scheme, dtype):
    model, x = mlp(dtype), torch.randn(5, 64, dtype=dtype)
    expected = copy.deepcopy(model)
    for i in (0, 2):
        int8fx.convert(expected[i], SCHEMES[scheme])
    quantize_(model, int8fx.LLMInt8Config(SCHEMES[scheme]))
    assert_same_tensors(model, expected)
    assert torch.equal(model(x), expected(x))


@pytest.mark.parametrize("scheme", PACKED_ONE_BY_ONE)
def test_a_model_has_the_bits_of_convert(scheme):
    model, inputs = models.llama()
    expected = int8fx.convert(copy.deepcopy(model), SCHEMES[scheme], select=is_linear)
    quantize_(model, int8fx.LLMInt8Config(SCHEMES[scheme]))
    assert_same_tensors(model, expected)
    assert torch.equal(logits(model, inputs), logits(expected, inputs))
    assert converted(model) == converted(expected)


def test_columns_are_chosen_for_each_module_alone():
    """As documented: `convert` of the model chooses those of q, k and v together."""
    model, scheme = models.llama()[0], SCHEMES["rotated columns"]
    expected = copy.deepcopy(model)
    for module in expected.modules():
        if isinstance(module, nn.Linear):
            int8fx.convert(module, scheme)
    quantize_(model, int8fx.LLMInt8Config(scheme))
    assert_same_tensors(model, expected)


def test_the_filter_chooses():
    model = models.llama()[0]
    quantize_(model, int8fx.LLMInt8Config(), lambda module, name: name.endswith("mlp.up_proj"))
    assert set(converted(model)) == {f"model.layers.{i}.mlp.up_proj" for i in (0, 1)}


def test_the_filter_may_choose_a_module_with_others_in_it():
    model, x = nn.Sequential(nn.MultiheadAttention(64, 4), nn.Linear(64, 64)), torch.randn(5, 64)
    expected = int8fx.convert(copy.deepcopy(model), select=["0"])
    quantize_(model, int8fx.LLMInt8Config(), lambda module, name: name == "0")
    assert_same_tensors(model, expected)
    assert torch.equal(model[0](x, x, x)[0], expected[0](x, x, x)[0])
    root = mlp()
    quantize_(root, int8fx.LLMInt8Config(), lambda module, name: True)
    assert_same_tensors(root, int8fx.convert(mlp()))


def test_other_configurations_for_other_modules():
    model = mlp()
    quantize_(model, FqnToConfig(OrderedDict([("0", int8fx.LLMInt8Config()), ("2", None)])), filter_fn=None)
    assert set(converted(model)) == {"0"}
    with pytest.raises(NotImplementedError, match="does not yet support parameter quantization"):
        quantize_(mlp(), FqnToConfig(OrderedDict([("0.weight", int8fx.LLMInt8Config())])), filter_fn=None)


@pytest.mark.slow  # compiles
def test_compiled_it_is_one_graph():
    model, x = mlp(), torch.randn(5, 64)
    quantize_(model, int8fx.LLMInt8Config())
    y = torch.compile(model, fullgraph=True)(x)
    assert (y - model(x)).norm() < 1e-3 * y.norm()


def test_an_encoder_layer_keeps_its_fused_path():
    """As documented: in eval mode it reads the dequantised weights. In training mode it calls its packed layers."""
    layer, x = nn.TransformerEncoderLayer(64, 4, 128, dropout=0, batch_first=True).eval(), torch.randn(2, 3, 64)
    expected = int8fx.convert(copy.deepcopy(layer), int8fx.plain(), select=["linear1", "linear2"])
    floats = copy.deepcopy(layer)
    quantize_(layer, int8fx.LLMInt8Config(int8fx.plain()))
    floats.linear1.weight.data, floats.linear2.weight.data = layer.linear1.dequantize(), layer.linear2.dequantize()
    with torch.no_grad():
        assert torch.allclose(layer(x), floats(x), atol=1e-5)
        assert not torch.allclose(layer(x), expected(x), atol=1e-5)
        assert torch.equal(layer.train()(x), expected.train()(x))


# ---- twice, tied, on meta -------------------------------------------------------------------------------------------


def test_a_second_time_changes_nothing_and_another_scheme_is_refused():
    model, config = mlp(), int8fx.LLMInt8Config()
    quantize_(model, config, lambda module, name: name == "0")
    once = model[0].weight_codes
    quantize_(model, config)
    assert model[0].weight_codes is once
    assert_same_tensors(model, int8fx.convert(mlp()))
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"Int8Linear\(.*already converted by int8fx, to llm_int8;.*found plain"):
        quantize_(model, int8fx.LLMInt8Config("plain"))
    assert_same_tensors(model, before)


def test_a_module_with_two_names_is_packed_once():
    layer = nn.Linear(64, 64)
    model = nn.ModuleDict({"a": nn.Sequential(layer), "b": nn.Sequential(layer)})
    quantize_(model, int8fx.LLMInt8Config())
    assert model["a"][0] is model["b"][0]
    assert isinstance(layer, PackedModule)


def test_modules_that_share_a_weight_get_equal_codes_and_share_them_no_more():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight = model[0].weight
    expected = int8fx.convert(copy.deepcopy(model))
    quantize_(model, int8fx.LLMInt8Config())
    assert_same_tensors(model, expected)
    assert model[0].weight_codes is not model[1].weight_codes
    assert expected[0].weight_codes is expected[1].weight_codes


def test_on_meta_and_then_loaded():
    source, x = mlp(), torch.randn(5, 64)
    config = int8fx.LLMInt8Config(int8fx.rotated(16))
    quantize_(source, config)
    with torch.device("meta"):
        model = mlp()
    quantize_(model, config)
    assert model[0].weight_codes.is_meta
    state = source.state_dict()
    broken = state | {"2.weight_scale": state["2.weight_scale"][:3]}
    with pytest.raises(RuntimeError, match=r"2\.weight_scale"):
        model.load_state_dict(broken, assign=True)
    assert model[0].weight_codes.is_meta  # nothing was loaded
    model.load_state_dict(state, assign=True)
    assert torch.equal(model(x), source(x))


# ---- what cannot be packed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Embedding(8, 64), "rows are looked up, no matmul"),
        (nn.Conv1d(4, 4, 3), "only 1x1 convolutions"),
        (nn.LayerNorm(64), "it has no matrix"),
    ],
)
def test_what_is_no_matmul_is_left_with_a_warning(module, reason):
    model, before = nn.Sequential(module), copy.deepcopy(module.state_dict())
    with pytest.warns(UserWarning, match=rf"LLMInt8Config: {type(module).__name__}\(.* stays as it is: .*{reason}"):
        quantize_(model, int8fx.LLMInt8Config(), lambda module, name: name == "0")
    assert type(model[0]) is type(module)
    assert all(torch.equal(model[0].state_dict()[key], value) for key, value in before.items())


def test_weights_that_convert_refuses_are_refused():
    model = mlp()
    model[2].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"in Linear\(in_features=48, out_features=64.*has NaN or inf in its weight"):
        quantize_(model, int8fx.LLMInt8Config())
    assert type(model[2]) is nn.Linear
    graph = torch.fx.symbolic_trace(mlp())
    with pytest.raises(ValueError, match=r"chose a GraphModule; legal: int8fx\.convert"):
        quantize_(graph, int8fx.LLMInt8Config(), lambda module, name: name == "")


def test_int8_of_torchao_is_taken_over_or_refused():
    model = mlp()
    quantize_(model, Int8WeightOnlyConfig(set_inductor_config=False))
    expected = int8fx.convert(copy.deepcopy(model), int8fx.weight_only())
    with pytest.raises(ValueError, match=r"in Linear\(.*is quantised already, which rotated cannot take over"):
        quantize_(model, int8fx.LLMInt8Config(int8fx.rotated()))
    quantize_(model, int8fx.LLMInt8Config(int8fx.weight_only()))
    assert_same_tensors(model, expected)


# ---- transformers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", PACKED_ONE_BY_ONE)
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_quantises_on_load_and_reloads_what_it_saves(scheme, tied, tmp_path):
    model, inputs = models.llama(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "float", max_shard_size="60KB")
    config = TorchAoConfig(int8fx.LLMInt8Config(SCHEMES[scheme]))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config).eval()
    expected = int8fx.convert(model, SCHEMES[scheme])
    assert_same_tensors(loaded, expected)
    assert loaded.config.quantization_config.to_dict() == expected.config.quantization_config.to_dict()
    loaded.save_pretrained(tmp_path / "int8")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "int8").eval()
    assert_same_tensors(again, expected)
    assert torch.equal(logits(again, inputs), logits(expected, inputs))


def test_transformers_with_columns_and_modules_to_not_convert(tmp_path):
    model, inputs = models.llama()
    model.save_pretrained(tmp_path / "float")
    quant_type = int8fx.LLMInt8Config(SCHEMES["rotated columns"])
    config = TorchAoConfig(quant_type, modules_to_not_convert=["model.layers.1.mlp", "lm_head"])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "float", dtype=torch.bfloat16, quantization_config=config)
    quantize_(
        model.to(torch.bfloat16),
        quant_type,
        lambda module, name: isinstance(module, nn.Linear) and "layers.1.mlp" not in name and name != "lm_head",
    )
    assert_same_tensors(loaded, model)
    loaded.save_pretrained(tmp_path / "int8")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "int8")
    assert torch.equal(logits(again.eval(), inputs), logits(loaded.eval(), inputs))


@pytest.mark.parametrize("tied", [False, True])
def test_save_pretrained_of_a_model_that_quantize_packed(tied, tmp_path):
    """Without its guards and configuration, it would load with random weights."""
    model, inputs = models.llama(tie_word_embeddings=tied)
    quantize_(model, int8fx.LLMInt8Config())
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert converted(again) == converted(model)
    assert "lm_head" in converted(again)
    assert torch.equal(logits(again, inputs), logits(model, inputs))


@pytest.mark.parametrize("first", ["q_proj", "lm_head"])
def test_save_pretrained_of_a_model_packed_in_two_ways(first, tmp_path):
    model, inputs = models.llama()
    int8fx.convert(model, select=first)
    quantize_(model, int8fx.LLMInt8Config())
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again, inputs), logits(model, inputs))


def test_save_pretrained_of_a_model_of_which_a_part_was_converted(tmp_path):
    model, inputs = models.llama()
    int8fx.convert(model.model.layers[0])
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert converted(again) == converted(model)
    assert torch.equal(logits(again, inputs), logits(model, inputs))


def test_a_model_of_both_packages_runs_and_is_not_saved(tmp_path):
    model, inputs = models.llama()
    model.save_pretrained(tmp_path / "float")
    ao = Int8WeightOnlyConfig(set_inductor_config=False)
    both = FqnToConfig(OrderedDict([("re:.*mlp.*", ao), ("re:.*q_proj", int8fx.LLMInt8Config())]))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=TorchAoConfig(both)).eval()
    assert set(converted(loaded)) == {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)}
    y = logits(model, inputs)
    assert (logits(loaded, inputs) - y).norm() < 0.1 * y.norm()
    with pytest.raises(ValueError, match=r"quantised by torchao, and others by int8fx.*int8fx\.Int8FxConfig"):
        loaded.save_pretrained(tmp_path / "both")


def test_a_model_without_linears_is_loaded_in_float_with_a_warning(tmp_path):
    model, inputs = models.gpt2()
    model.save_pretrained(tmp_path / "float")
    config = TorchAoConfig(int8fx.LLMInt8Config())
    with pytest.warns(UserWarning, match="no layer of this model was quantised"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config).eval()
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(logits(again, inputs), logits(model, inputs))


def test_a_config_json_that_names_torchaos_method_is_refused(tmp_path):
    model, _ = models.llama()
    int8fx.convert(model).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] = TorchAoConfig(int8fx.LLMInt8Config()).to_dict() | {"quant_method": "torchao"}
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"no checkpoints of its own; legal: int8fx\.Int8FxConfig"):
        type(model).from_pretrained(tmp_path)


def test_torchaos_own_configurations_are_as_before(tmp_path):
    model, inputs = models.llama()
    model.save_pretrained(tmp_path / "float")
    config = TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config).eval()
    assert isinstance(loaded.config.quantization_config, TorchAoConfig)
    assert not int8fx.is_packed(loaded)
    loaded.save_pretrained(tmp_path / "ao")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ao").eval()
    assert torch.equal(logits(again, inputs), logits(loaded, inputs))


def test_a_float_model_is_saved_as_before(tmp_path):
    model, _ = models.llama()
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert getattr(model, "hf_quantizer", None) is None
    assert transformers.PreTrainedModel.save_pretrained.__doc__.lstrip().startswith("Save a model")
