"""A packed module: its dequantised weights, and everything torch does to modules."""

import copy
import gc
import pickle
import re
import subprocess
import sys
import textwrap
import weakref

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from support import models
from support.conversion import COPIES, EVERYTHING, SCHEMES, codes_of, copied, floats_to, outputs, packed_modules, saved
from support.helpers import DTYPES, activation, assert_within_budget, generator
from torch import Tensor, nn

import int8fx
from int8fx.conversion.forwards import linear_forward
from int8fx.conversion.packed import PackedModule, Reading, float_class, pack_modules, packed_class, tensors_of
from int8fx.schemes.quantize import dequantize, quantize_weight
from int8fx.schemes.weight import CODES, COLUMNS, Epilogue, Int8Weight, PackedTensors

LLM_INT8 = int8fx.llm_int8()


def linear(K: int = 40, N: int = 24, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Linear:
    module = nn.Linear(K, N, dtype=dtype)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator(seed)))
    return module


def packed(scheme: str = "llm_int8", **kwargs) -> nn.Linear:
    return int8fx.convert(linear(**kwargs), SCHEMES[scheme])


def buffers(model: nn.Module) -> dict[str, Tensor]:
    """Copies of what is stored of the packed weights of ``model``, by name."""
    return {
        f"{path}.{key}": tensor.clone()
        for path, module in model.named_modules()
        for name in getattr(module, "packed_weights", ())
        for key, tensor in tensors_of(module, name).named(name).items()
    }


def assert_same_buffers(model: nn.Module, expected: dict[str, Tensor]) -> None:
    tensors = buffers(model)
    assert tensors.keys() == expected.keys()
    for key, tensor in expected.items():
        assert tensors[key].dtype == tensor.dtype, key
        assert torch.equal(tensors[key], tensor), key


def run(model: nn.Module, inputs: dict) -> Tensor:
    """All outputs of ``model``, flat."""
    return torch.cat([y.flatten() for y in outputs(model, inputs).values()])


def converted(name: str, scheme: str = "llm_int8", seed: int = 0) -> tuple[nn.Module, dict]:
    """A converted model of `models.ALL`, with everything selected that can be."""
    model, inputs = models.ALL[name](seed=seed)
    return int8fx.convert(model, SCHEMES[scheme], **EVERYTHING), inputs


ALL = [(name, scheme) for name in models.ALL for scheme in SCHEMES if scheme == "llm_int8" or name == "mixtral"]
ALL.append(("tied_lm", "rotated columns"))
of_all = pytest.mark.parametrize(("name", "scheme"), ALL)


# ---- what is stored, what is read -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_holds_codes_and_scales_and_reads_as_the_dequantised_weight(dtype):
    module = linear(dtype=dtype)
    weight, bias = module.weight.detach().clone(), module.bias
    assert int8fx.convert(module) is module
    codes, scale = quantize_weight(weight)
    assert [name for name, _ in module.named_parameters()] == ["bias", "weight_codes"]
    assert module.bias is bias
    assert not module.weight_codes.requires_grad
    assert torch.equal(module.weight_codes, codes)
    assert torch.equal(module._buffers["weight_scale"], scale)
    assert module._buffers["weight_scale"].dtype == torch.float32
    assert module.weight.dtype == dtype
    assert torch.equal(module.weight, dequantize(Int8Weight(codes, scale), dtype))
    assert torch.equal(module.dequantize(), module.weight)
    assert list(module.state_dict()) == ["bias", "weight_codes", "weight_scale", "weight_format"]


def test_layouts_and_kernel_dims_read_in_the_module_s_own_shape():
    module = nn.Module()
    module.kn, module.conv = nn.Parameter(torch.randn(3, 5, 7)), nn.Parameter(torch.randn(4, 6, 1, 1))
    shapes = {name: p.shape for name, p in module.named_parameters()}
    kn, conv = quantize_weight(module.kn.detach().transpose(-1, -2)), quantize_weight(module.conv.detach()[:, :, 0, 0])
    weights = {
        "kn": (PackedTensors(*kn), Reading("KN", torch.float32, LLM_INT8)),
        "conv": (PackedTensors(*conv), Reading("NK", torch.bfloat16, LLM_INT8, kernel_dims=2)),
    }
    pack_modules([(module, weights, None)])
    assert {name: getattr(module, name).shape for name in shapes} == shapes
    assert torch.equal(module.kn, dequantize(Int8Weight(*kn)).transpose(-1, -2))
    assert torch.equal(module.conv, dequantize(Int8Weight(*conv), torch.bfloat16)[:, :, None, None])
    with pytest.raises(KeyError):
        module.dequantize("weight")


def test_the_class_is_a_subclass_made_once():
    first, second = packed(seed=1), packed(seed=2)
    assert isinstance(first, nn.Linear)
    assert isinstance(first, PackedModule)
    assert type(first) is type(second) is packed_class(nn.Linear, ("weight",), linear_forward)
    assert type(first).__name__ == "Int8Linear"
    assert type(first).__module__ == "torch.nn.modules.linear"
    assert type(first).__doc__ == nn.Linear.__doc__
    assert repr(first) == "Int8Linear(in_features=40, out_features=24, bias=True, weight: int8 (24, 40))"
    assert float_class(first) is nn.Linear


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_packs_all_modules_or_none(failing, monkeypatch):
    modules = [linear(seed=i) for i in range(3)]
    modules[1].note = "a note"
    before = [(type(m), dict(vars(m))) for m in modules]
    x = torch.randn(3, 40)
    y = [m(x) for m in modules]
    reading = Reading("NK", torch.float32, LLM_INT8)
    weights = [{"weight": (PackedTensors(*quantize_weight(m.weight.detach())), reading)} for m in modules]
    to_pack = [(m, w, linear_forward) for m, w in zip(modules, weights, strict=True)]
    classes = iter([int if i == failing else packed_class(nn.Linear, ("weight",), linear_forward) for i in range(3)])
    with monkeypatch.context() as patch:  # int is no class that a module could take
        patch.setattr("int8fx.conversion.packed.packed_class", lambda *_: next(classes))
        with pytest.raises(TypeError, match="__class__"):
            pack_modules(to_pack)
    for module, (cls, attributes) in zip(modules, before, strict=True):
        assert type(module) is cls
        assert vars(module).keys() == attributes.keys()
        assert all(vars(module)[k] is v for k, v in attributes.items())
    assert all(torch.equal(m(x), z) for m, z in zip(modules, y, strict=True))
    pack_modules(to_pack)
    assert all(isinstance(m, PackedModule) for m in modules)


def test_float_weights_are_freed():
    module = linear()
    weight = weakref.ref(module.weight)
    int8fx.convert(module)
    gc.collect()
    assert weight() is None


def test_assignment_takes_the_packed_weight_of_another_module_only():
    module = packed()
    expected = buffers(module)
    for wrong in (torch.zeros(24, 40), nn.Parameter(torch.zeros(24, 40)), torch.zeros(24, 40, dtype=torch.int8), None):
        with pytest.raises(TypeError, match=r"int8fx: 'weight' is packed, and Int8Linear.weight takes no new tensor"):
            module.weight = wrong
    for wrong in (packed(N=40, K=24).weight, module.weight[1:], module.weight.to(torch.float64)):
        with pytest.raises(TypeError, match="takes no new tensor"):
            module.weight = wrong
    assert_same_buffers(module, expected)
    module.bias = None
    module.extra = 3


@pytest.mark.parametrize("scheme", ["llm_int8", "rotated columns"])
def test_assigning_a_packed_weight_ties_it(scheme):
    module, other = packed(), packed(scheme, seed=9)
    module.weight = other.weight
    assert all(a is b for a, b in zip(tensors_of(module, "weight"), tensors_of(other, "weight"), strict=True))
    assert module.packed_weights["weight"].scheme == other.packed_weights["weight"].scheme
    with torch.no_grad():
        other.weight.mul_(2)
    module.bias, x = other.bias, torch.randn(3, 40)
    assert torch.equal(module(x), other(x))
    assert torch.equal(copied(module, "pickle")(x), other(x))


@pytest.mark.parametrize("suffix", ["", "_codes", "_scale", "_format", "_columns", "_columns_weight"])
def test_a_packed_weight_cannot_be_deleted(suffix):
    module = packed("rotated columns")
    x = torch.randn(2, 40)
    y = module(x)
    with pytest.raises(TypeError, match="'weight' is packed and cannot be deleted"):
        delattr(module, f"weight{suffix}")
    assert torch.equal(module(x), y)
    del module.bias


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("key", ["weight_scale", "weight_format"])
def test_a_lost_buffer_is_named_with_its_layer(key, called):
    module, x = packed(), torch.randn(2, 40)
    if called:
        module(x)
    del module._buffers[key]
    for use in (lambda: module(x), module.dequantize, lambda: module.weight + 1):
        with pytest.raises(RuntimeError, match=f"int8fx: layer 'weight' has lost its buffer '{key}'"):
            use()
    assert "int8 (24, 40)" in repr(module)


def test_floats_in_place_of_codes_are_an_error_that_names_the_layer():
    module, x = packed(), torch.randn(2, 40)
    module(x)
    vector = nn.utils.parameters_to_vector(module.parameters())
    nn.utils.vector_to_parameters(vector, module.parameters())
    with pytest.raises(TypeError, match=r"weight_codes of layer 'weight' is torch.float32 now; legal: torch.int8"):
        module(x)
    module = packed()
    trained = [p for p in module.parameters() if p.requires_grad]
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(trained) + 1, trained)
    torch.testing.assert_close(module(x), packed()(x) + 1)


# ---- state dicts ----------------------------------------------------------------------------------------------------


@of_all
@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_round_trip(name, scheme, assign):
    model, inputs = converted(name, scheme)
    y = run(model, inputs)
    other, _ = converted(name, scheme, seed=9)
    assert not torch.equal(run(other, inputs), y)
    state = saved(model.state_dict())
    assert any(v.dtype == torch.int8 or k.endswith(CODES) for k, v in state.items())
    result = other.load_state_dict(state, assign=assign)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert_same_buffers(other, buffers(model))
    assert torch.equal(run(other, inputs), y)


@of_all
def test_safetensors_round_trip(name, scheme, tmp_path):
    model, inputs = converted(name, scheme)
    other, _ = converted(name, scheme, seed=9)
    save_model(model, str(tmp_path / "model.safetensors"))  # knows about tied tensors
    missing, unexpected = load_model(other, tmp_path / "model.safetensors")
    assert not missing
    assert not unexpected
    assert_same_buffers(other, buffers(model))
    assert torch.equal(run(other, inputs), run(model, inputs))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_safetensors_of_the_state_dict(scheme, tmp_path):
    model, inputs = converted("llama", scheme)
    save_file(model.state_dict(), tmp_path / "state.safetensors", metadata={"format": "pt"})  # refuses shared memory
    other, _ = converted("llama", scheme, seed=9)
    other.load_state_dict(load_file(tmp_path / "state.safetensors"))
    assert torch.equal(run(other, inputs), run(model, inputs))


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "transformer", "bare_products", "tied_lm"])
@pytest.mark.parametrize("strict", [False, True])
def test_float_checkpoint_into_a_converted_model_is_refused_by_name(name, strict):
    floats = models.ALL[name](seed=9)[0].state_dict()
    model, inputs = converted(name)
    expected, y = buffers(model), run(model, inputs)
    rows = int8fx.summary(model).converted
    with pytest.raises(RuntimeError, match=r"packed and takes int8 codes, found torch\.float32") as error:
        model.load_state_dict(floats, strict=strict)
    for row in rows:
        key = row.name if row.name in floats else f"{row.name}.weight"
        module = model.get_submodule(key.rpartition(".")[0])
        assert any(
            f'"{key.rpartition(".")[0] + "." * ("." in key)}{n}"' in str(error.value) for n in module.packed_weights
        )
    assert_same_buffers(model, expected)
    assert run(model, inputs).shape == y.shape


def test_converted_checkpoint_into_a_float_model_is_refused():
    model, _ = converted("llama")
    other = models.llama(seed=9)[0]
    with pytest.raises(RuntimeError, match=r'Missing key.*q_proj.weight"'):
        other.load_state_dict(model.state_dict())


def test_wrong_shapes_and_missing_scales_are_refused():
    module = packed()
    state = module.state_dict()
    with pytest.raises(RuntimeError, match=r'"weight_codes" has shape \(24, 40\); legal: \(24, 41\)'):
        packed(K=41).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r'"weight_codes" has shape \(24, 40\); legal: \(24, 41\)'):
        packed(K=41).load_state_dict(state, assign=True)
    with pytest.raises(RuntimeError, match=r'"weight_codes" has shape'):
        packed("llm_int8 columns", K=60).load_state_dict(packed("llm_int8 columns").state_dict())
    state.pop("weight_scale")
    with pytest.raises(RuntimeError, match=r"a part of it is missing: weight_scale"):
        packed().load_state_dict(state)


WRONG_COLUMNS = {
    "beyond K": (lambda c: c + 64, "column {K} is out of range; legal: different columns, from 0 to {last}"),
    "negative": (lambda c: c - 1, "column -1 is out of range; legal: different columns, from 0 to {last}"),
    "twice": (lambda c: c.new_zeros(len(c)), "column 0 is there twice; legal: different columns, from 0 to {last}"),
    "floats": (lambda c: c.float(), r"takes the numbers of columns as torch\.int64, found torch\.float32"),
}


@pytest.mark.parametrize("what", WRONG_COLUMNS)
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("how", [None, *COPIES])
def test_wrong_columns_are_refused_by_name_and_the_model_is_left(what, assign, how):
    """At load, on every device: a kernel for GPUs would read what lies after the weight."""
    wrong, message = WRONG_COLUMNS[what]
    model, inputs = converted("llama", "llm_int8 columns")
    model = model if how is None else copied(model, how)
    y, expected = run(model, inputs), buffers(model)
    widths = {"model.layers.1.mlp.down_proj.weight_columns": 136, "model.layers.1.self_attn.v_proj.weight_columns": 64}
    state = {k: -v if v.is_floating_point() else v for k, v in model.state_dict().items()}
    for name, K in widths.items():
        state[name] = wrong(torch.arange(len(state[name])) + (K - 64 if what == "beyond K" else 0))
    with pytest.raises(RuntimeError) as error:
        model.load_state_dict(state, strict=False, assign=assign)
    for name, K in widths.items():
        assert re.search(f'"{name}":? {message.format(K=K, last=K - 1)}', str(error.value))
    assert_same_buffers(model, expected)
    assert torch.equal(run(model, inputs), y)  # nor were other tensors loaded


def test_columns_are_checked_in_every_part_of_a_model_that_is_loaded_alone():
    model, _ = converted("llama", "llm_int8 columns")
    for part in (model.model, model.model.layers[0], model.model.layers[0].mlp.up_proj):
        state = {k: v + 136 if k.endswith(COLUMNS) else v for k, v in part.state_dict().items()}
        expected = buffers(part)
        with pytest.raises(RuntimeError, match="is out of range"):
            part.load_state_dict(state)
        assert_same_buffers(part, expected)


def test_a_state_dict_with_a_positional_prefix_holds_copies_of_columns_too():
    model, state = packed("llm_int8 columns"), {}
    with pytest.warns(FutureWarning, match="Positional args"):
        assert model.state_dict(state, "layer.") is state
    assert state["layer.weight_codes"].data_ptr() == model.weight_codes.data_ptr()
    assert state["layer.weight_columns"].data_ptr() != model._buffers["weight_columns"].data_ptr()
    assert torch.equal(state["layer.weight_columns"], model._buffers["weight_columns"])


def test_a_state_dict_without_data_can_be_assigned():
    model = packed("llm_int8 columns")
    model.load_state_dict({k: v.to("meta") for k, v in model.state_dict().items()}, assign=True)
    assert {t.device.type for t in model._buffers.values()} == {"meta"}


def test_is_packed_answers_for_a_whole_model():
    inner = packed()
    for model in (inner, nn.Sequential(nn.Sequential(inner), nn.ReLU())):
        assert int8fx.is_packed(model)
        program = torch.export.export(model, (torch.randn(2, 40),))
        assert int8fx.is_packed(program)
        assert int8fx.is_packed(program.module())
    graph = int8fx.convert(torch.fx.symbolic_trace(models.mlp()[0]))
    assert int8fx.is_packed(graph)
    assert int8fx.is_packed(nn.ModuleDict({"inner": graph}))
    model, inputs = models.mlp()
    floats = (linear(), nn.Sequential(linear()), torch.fx.symbolic_trace(model), torch.export.export(model, (), inputs))
    for model in floats:
        assert not int8fx.is_packed(model)


def test_equal_columns_are_tied_until_others_are_loaded():
    x = activation(20, 64, outliers="column")

    def attention(data: Tensor) -> nn.Module:
        torch.manual_seed(0)
        model = nn.ModuleDict({name: nn.Linear(64, 8) for name in "qkv"})
        model.forward = lambda x: sum(layer(x) for layer in model.values())
        return int8fx.convert(model, SCHEMES["rotated columns"], calibration=int8fx.calibrate(model, [data]))

    def columns(model: nn.Module, name: str) -> Tensor:
        return model[name]._buffers["weight" + COLUMNS]

    model, other = attention(x), attention(x.roll(5, -1))
    for moved in (model, copy.deepcopy(model), copy.deepcopy(model).to(torch.bfloat16)):
        assert columns(moved, "q") is columns(moved, "k") is columns(moved, "v")
    state = model.state_dict()
    assert len({state[f"{name}.weight{COLUMNS}"].data_ptr() for name in "qkv"}) == 3
    state |= {key: value for key, value in other.state_dict().items() if key.startswith("q.")}
    assert not torch.equal(columns(other, "q"), columns(model, "k"))
    k = model["k"](x)
    model.load_state_dict(state)
    assert torch.equal(columns(model, "q"), columns(other, "q"))
    assert columns(model, "k") is columns(model, "v")
    assert torch.equal(model["k"](x), k)
    assert torch.equal(model["q"](x), other["q"](x))


# ---- copies ---------------------------------------------------------------------------------------------------------


@of_all
@pytest.mark.parametrize("how", COPIES)
def test_copies_of_whole_models(name, scheme, how):
    model, inputs = converted(name, scheme)
    y, expected = run(model, inputs), buffers(model)
    other = copied(model, how)
    types = {n: type(m) for n, m in model.named_modules()}
    assert {n: type(m) for n, m in other.named_modules()} == types
    assert_same_buffers(other, expected)
    assert torch.equal(run(other, inputs), y)
    for module in packed_modules(other):  # the copy has codes of its own
        for parameter in module.packed_weights:
            codes_of(module, parameter)[0].zero_()
    assert_same_buffers(model, expected)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_pickle_protocol(protocol):
    module = packed()
    other = pickle.loads(pickle.dumps(module, protocol))
    assert type(other) is type(module)
    assert_same_buffers(other, buffers(module))


@pytest.mark.slow
def test_a_pickled_model_opens_in_a_fresh_process(tmp_path):
    model, inputs = converted("llama")
    inputs.pop("use_cache")
    torch.save(model, tmp_path / "model.pt")
    torch.save({"inputs": inputs, "y": outputs(model, inputs)["logits"]}, tmp_path / "expected.pt")
    script = """
        import sys, torch
        model = torch.load(sys.argv[1] + "/model.pt", weights_only=False)
        expected = torch.load(sys.argv[1] + "/expected.pt")
        with torch.no_grad():
            y = model(**expected["inputs"])[0]
        assert torch.equal(y, expected["y"])
        import int8fx
        assert int8fx.is_packed(model)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(tmp_path)], check=True, timeout=120)


def test_shallow_copy_shares_buffers():
    module = packed()
    other = copy.copy(module)
    assert type(other) is type(module)
    assert other.weight_codes is module.weight_codes


# ---- casts and moves ------------------------------------------------------------------------------------------------

CASTS = {
    "half": (lambda m: m.half(), torch.float16),
    "bfloat16": (lambda m: m.bfloat16(), torch.bfloat16),
    "double": (lambda m: m.double(), torch.float64),
    "float": (lambda m: m.bfloat16().float(), torch.float32),
    "to": (lambda m: m.to(torch.float16), torch.float16),
    "to device and dtype": (lambda m: m.to("cpu", torch.bfloat16), torch.bfloat16),
    "type": (lambda m: m.type(torch.float16), torch.float16),
    "share_memory": (lambda m: m.share_memory(), torch.float32),
    "cpu": (lambda m: m.cpu(), torch.float32),
    "move": (lambda m: m._apply(torch.clone), torch.float32),  # what a move to another device does: new memory
    "channels_last": (lambda m: m.to(memory_format=torch.channels_last), torch.float32),
    "train": (lambda m: m.train(), torch.float32),
    "eval": (lambda m: m.eval(), torch.float32),
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("scheme", ["llm_int8", "rotated columns"])
def test_casts_leave_codes_and_scales_alone(cast, scheme):
    function, dtype = CASTS[cast]
    module = packed(scheme)
    expected = buffers(module)
    held = tensors_of(module, "weight")
    form = module.weight_format.clone()
    assert function(module) is module
    assert_same_buffers(module, expected)
    assert module.weight_format.dtype == torch.uint8
    assert torch.equal(module.weight_format, form)
    assert all(
        a is b for a, b in zip(tensors_of(module, "weight"), held, strict=True)
    )  # ties and optimisers hold on to tensors
    assert module.weight.dtype == module.bias.dtype == dtype
    assert not any(b.requires_grad for b in module.buffers())
    x = activation(5, 40, outliers="column").to(dtype)
    assert_within_budget(module(x).detach(), x, module.packed(), Epilogue(module.bias.detach()))


@of_all
def test_whole_models_run_in_another_dtype(name, scheme):
    model, inputs = converted(name, scheme)
    expected = buffers(model)
    model.to(torch.bfloat16)
    assert_same_buffers(model, expected)
    y_float = run(model.float(), inputs)
    model.to(torch.bfloat16)
    y = run(model, floats_to(inputs, torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert (y.float() - y_float).norm() < 0.1 * y_float.norm()


def test_meta_and_back():
    module = packed()
    state, expected = module.state_dict(), buffers(module)
    dtypes = {k: t.dtype for k, t in state.items()}
    x = torch.randn(3, 40)
    y = module(x)
    module.to("meta")
    assert {b.device.type for b in module.buffers()} == {"meta"}
    assert {k: t.dtype for k, t in module.state_dict().items()} == dtypes
    assert module(x.to("meta")).shape == (3, 24)
    module.to_empty(device="cpu")
    assert {b.device.type for b in module.buffers()} == {"cpu"}
    assert {k: t.dtype for k, t in module.state_dict().items()} == dtypes
    module.load_state_dict(state)
    assert_same_buffers(module, expected)
    assert torch.equal(module(x), y)


def test_buffers_stay_where_they_were_if_a_cast_fails():
    module = packed()
    expected = buffers(module)

    def broken(t):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        module._apply(broken)
    assert_same_buffers(module, expected)


def ties(model: nn.Module, key_of=id) -> set[frozenset[str]]:
    """Groups of names (of codes, scales and Parameters) that are one tensor."""
    by_id: dict[int, set[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for key, tensor in (*module._buffers.items(), *module._parameters.items()):
            if tensor is not None:
                by_id.setdefault(key_of(tensor), set()).add(f"{path}.{key}")
    return {frozenset(names) for names in by_id.values() if len(names) > 1}


TIES = {
    frozenset({"embed.weight_codes", "lm_head.weight_codes"}),
    frozenset({"embed.weight_scale", "lm_head.weight_scale"}),
    frozenset({"up.weight_codes", "up_again.weight_codes"}),
    frozenset({"up.weight_scale", "up_again.weight_scale"}),
}


@pytest.mark.parametrize("change", [*CASTS, "deepcopy", "pickle", "load", "assign"])
def test_tied_weights_stay_tied(change):
    model, inputs = converted("tied_lm")
    assert ties(model) == TIES
    expected = buffers(model)
    if change in CASTS:
        CASTS[change][0](model)
    elif change == "deepcopy":
        model = copy.deepcopy(model)
    elif change == "pickle":
        model = pickle.loads(pickle.dumps(model))
    elif change == "load":
        model.load_state_dict(model.state_dict())
    else:
        model.load_state_dict(model.state_dict(), assign=True)
    # state_dict() holds views: with assign, as for torch's own Parameters, it is the memory that is shared
    assert ties(model, Tensor.data_ptr if change == "assign" else id) == TIES
    assert_same_buffers(model, expected)
    assert run(model, inputs).isfinite().all()


# ---- other things that torch does to modules ------------------------------------------------------------------------


@of_all
def test_replicas_as_data_parallel_makes_them(name, scheme):
    model, inputs = converted(name, scheme)
    y, expected = run(model, inputs), buffers(model)
    replica = replicate(model)
    assert torch.equal(run(replica, inputs), y)
    first = next(m for m in replica.modules() if isinstance(m, PackedModule))
    codes_of(first, next(iter(first.packed_weights)))[0].zero_()
    assert_same_buffers(model, expected)  # the replica's tensors are its own


def replicate(model: nn.Module) -> nn.Module:
    """``torch.nn.parallel.replicate`` for one device, by its own calls: shells, children, copies of tensors."""
    modules = list(model.modules())
    shells = {m: m._replicate_for_data_parallel() for m in modules}
    copies: dict[int, Tensor] = {}
    for module, shell in shells.items():
        for key, child in module._modules.items():
            shell._modules[key] = None if child is None else shells[child]
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None:
                setattr(shell, key, None)
            else:
                setattr(shell, key, copies.setdefault(id(tensor), tensor.detach().clone()))
    return shells[model]


def test_functional_call():
    model, inputs = converted("llama")
    other, _ = converted("llama", seed=9)
    expected = buffers(other)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        y = torch.func.functional_call(other, tensors, kwargs=inputs)
    assert torch.equal(y.logits, outputs(model, inputs)["logits"])
    assert_same_buffers(other, expected)


def test_an_optimizer_over_all_parameters_trains_what_stayed_in_16_bits():
    model, inputs = models.llama()
    int8fx.convert(model)
    expected, before = buffers(model), {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    optimizer.step()
    assert_same_buffers(model, expected)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != p.requires_grad, name
    trained = model.num_parameters(only_trainable=True)
    assert 0 < trained == sum(p.numel() for p in before.values() if p.dtype == torch.float32) < model.num_parameters()


def set_one_by_one(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """As accelerate's ``set_module_tensor_to_device`` does."""
    for key, tensor in tensors.items():
        path, _, name = key.rpartition(".")
        module = model.get_submodule(path)
        if name in module._parameters:
            module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
        elif name in module._buffers:
            module._buffers[name] = tensor


def called_with(model: nn.Module, tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    return torch.func.functional_call(model, tensors, (x,))


def called_after(model: nn.Module, tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    set_one_by_one(model, tensors)
    return model(x)


def compiled_after(model: nn.Module, tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    set_one_by_one(model, tensors)
    torch.compiler.reset()
    return torch.compile(model, backend="eager", fullgraph=True)(x)


def graded_with(model: nn.Module, tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    return torch.func.grad(lambda x: called_with(model, tensors, x).sum())(x)


WITH_OTHER_TENSORS = [called_with, called_after, compiled_after, graded_with]


@pytest.mark.parametrize("run", WITH_OTHER_TENSORS)
@pytest.mark.parametrize("theirs", [*SCHEMES, "rotated(32)"])
def test_tensors_that_are_set_without_load_state_dict_are_of_the_scheme_or_refused(theirs, run):
    schemes = {**SCHEMES, "rotated(32)": int8fx.rotated(32, columns=0.0)}
    other, x = int8fx.convert(linear(seed=9), schemes[theirs]), torch.randn(3, 40)
    for ours in SCHEMES:
        model = packed(ours)
        if ours == theirs:
            y = graded_with(other, {}, x) if run is graded_with else other(x)
            assert torch.equal(run(model, other.state_dict(), x), y)
        else:
            with pytest.raises(Exception, match=r"int8fx: 'weight' (is quantised by|has \d+ unquantised columns)"):
                run(model, other.state_dict(), x)


def test_a_format_that_is_no_text_names_the_layer():
    module = packed()
    module._buffers["weight_format"] = torch.zeros(5, dtype=torch.uint8)
    with pytest.raises(ValueError, match="int8fx: the format of 'weight': found a text that is not int8fx's"):
        module(torch.randn(2, 40))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_write_between_forward_and_backward_is_an_error(scheme):
    """As for a float weight: the gradient would be that of the new one."""
    module, x = packed(scheme), torch.randn(3, 40, requires_grad=True)
    y = module(x)
    y.sum().backward(retain_graph=True)
    with torch.no_grad():
        module.weight[3] *= 2
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_gradients_reach_the_input_and_the_bias():
    module = packed(dtype=torch.float64)
    x = activation(6, 40, dtype=torch.float64).requires_grad_()
    y = module(x)
    g = torch.randn(y.shape, dtype=y.dtype, generator=generator(3))
    y.backward(g)
    assert torch.equal(x.grad, g @ module.weight)
    assert torch.equal(module.bias.grad, g.sum(0))
    assert not any(b.requires_grad for b in module.buffers())
