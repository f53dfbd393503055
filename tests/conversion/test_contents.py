"""Codes that are copied without their scales: the next call of the layer says so, and says nothing else."""

import copy
import gc
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import models
from support.conversion import SCHEMES, outputs
from torch import Tensor, nn
from torch.__future__ import set_swap_module_params_on_conversion
from torch._dynamo.testing import CompileCounter
from torch._subclasses import FakeTensorMode
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.optim.swa_utils import AveragedModel
from torch.utils import swap_tensors

import int8fx
from int8fx.conversion import contents
from int8fx.conversion.contents import digest

WRITTEN = r"int8fx: the codes and the scale of {} do not belong together.*legal: load_state_dict"


def converted(seed: int, scheme: str = "llm_int8", N: int = 24, K: int = 40) -> nn.Sequential:
    torch.manual_seed(seed)
    return int8fx.convert(nn.Sequential(nn.Linear(K, N), nn.Linear(N, K)), SCHEMES[scheme])


@torch.no_grad()
def copy_parameters(model: nn.Module, other: nn.Module) -> None:
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        p.copy_(q)


@torch.no_grad()
def copy_all(model: nn.Module, other: nn.Module) -> None:
    copy_parameters(model, other)
    theirs = dict(other.named_buffers(remove_duplicate=False))
    for name, buffer in model.named_buffers(remove_duplicate=False):
        buffer.copy_(theirs[name])


# ---- digests ---------------------------------------------------------------------------------------------------------


@given(st.integers(0, 9000), st.integers(0, 2**31), st.data())
def test_a_digest_depends_on_every_byte_and_on_nothing_else(size, seed, data):
    generator = torch.Generator().manual_seed(seed)
    t = torch.randint(-128, 128, (size,), dtype=torch.int8, generator=generator)
    shift = data.draw(st.integers(1, 8))
    assert digest(torch.cat([t.new_ones(shift), t])[shift:]) == digest(t)
    assert digest(torch.stack([t, t], 1)[:, 0]) == digest(t)
    if size:
        other = t.clone()
        other[data.draw(st.integers(0, size - 1))] += data.draw(st.integers(1, 255))
        assert digest(other) != digest(t)


def test_a_digest_tells_the_order_of_rows_of_4096_bytes():
    t = torch.randint(-128, 128, (3, 4096), dtype=torch.int8)
    assert len({digest(t[list(order)]) for order in ([0, 1, 2], [1, 0, 2], [0, 2, 1], [2, 1, 0])}) == 4


# ---- codes without scales --------------------------------------------------------------------------------------------

COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "itself": lambda m: m,
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "meta and back": lambda m: loaded(copy.deepcopy(m).to("meta").to_empty(device="cpu"), m),
    "loaded": lambda m: loaded(converted(7, "llm_int8"), m),
    "bfloat16": lambda m: copy.deepcopy(m).bfloat16().float(),
    "AveragedModel": lambda m: AveragedModel(m).module,
}


def loaded(model: nn.Module, other: nn.Module) -> nn.Module:
    model.load_state_dict(other.state_dict())
    return model


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_of_parameters_alone_is_an_error_that_names_the_layer(how, called):
    model, other, x = COPIES[how](converted(0)), converted(1), torch.randn(3, 40)
    if called:
        model(x)
    copy_parameters(model, other)
    for _ in range(2):  # it stays one
        with pytest.raises(ValueError, match=WRITTEN.format("'0'")):
            model(x)
    with pytest.raises(ValueError, match=WRITTEN.format("'0'")):
        model[0].dequantize()
    with pytest.raises(ValueError, match=WRITTEN.format("'0'")), torch.no_grad():
        model[0].weight[0] = 0
    copy_all(model, other)
    assert torch.equal(model(x), other(x))


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_of_everything_is_none(how, called):
    model, other, x = COPIES[how](converted(0)), converted(1), torch.randn(3, 40)
    if called:
        model(x)
    copy_all(model, other)
    assert torch.equal(model(x), other(x))
    copy_parameters(model, other)  # equal ones
    assert torch.equal(model(x), other(x))


@given(st.sampled_from(sorted(SCHEMES)), st.integers(1, 9), st.integers(2, 70), st.data())
def test_every_way_to_write_both_is_accepted(scheme, N, K, data):
    model, other = (converted(seed, scheme, N, K) for seed in (0, 1))
    x, ways = torch.randn(2, K), ["copy", "load", "assign", "average", "data", "row", "call", "move"]
    for way in data.draw(st.lists(st.sampled_from(ways), max_size=4)):
        if way == "copy":
            copy_all(model, other)
        elif way in ("load", "assign"):
            model.load_state_dict(other.state_dict(), assign=way == "assign")
        elif way == "average":
            AveragedModel(model).update_parameters(other)
        elif way == "data":
            model[0].weight.data = torch.randn(N, K)
        elif way == "row":
            model[1].weight.data[0, 0] = 0
        elif way == "move":
            model.double().float()
        else:
            model(x)
    expected = x @ model[0].weight.T + model[0].bias
    assert model(x).isfinite().all()
    assert (model[0](x) - expected).norm() <= 0.1 * expected.norm() + 1e-6
    copy_parameters(model, copy.deepcopy(model))
    model(x)


# ---- other tensors in their place ------------------------------------------------------------------------------------


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_functional_call_with_codes_of_another_model(scheme, called):
    model, other, x = converted(0, scheme), converted(1, scheme), torch.randn(3, 40)
    y, its = model(x), other(x) if called else None
    for _ in range(2):
        with pytest.raises(ValueError, match=WRITTEN.format("'0'")):
            functional_call(model, dict(other.named_parameters()), x)
        assert torch.equal(model(x), y)
        assert torch.equal(functional_call(model, dict(model.named_parameters()), x), y)
        for _ in range(2):
            given = functional_call(model, tensors(other), x)
        assert torch.equal(given, other(x))
        assert its is None or torch.equal(given, its)


def test_functional_call_with_scales_of_another_model():
    model, other, x = converted(0), converted(1), torch.randn(3, 40)
    y = model(x)
    with pytest.raises(ValueError, match=WRITTEN.format("'0'")):
        functional_call(model, dict(other.named_buffers()), x)
    assert torch.equal(functional_call(model, dict(model.named_buffers()), x), y)


def test_functional_call_with_all_tensors_of_models_that_are_known_reads_no_codes(digests):
    model, other, x = converted(0), converted(1), torch.randn(3, 40)
    model(x), other(x)
    digests.clear()
    for _ in range(3):
        functional_call(model, tensors(other), x)
        model(x)
    assert not digests


@pytest.mark.parametrize("called", [False, True])
def test_swap_tensors_of_codes(called):
    model, other, x = converted(0), converted(1), torch.randn(3, 40)
    expected = converted(0)(x)
    if called:
        model(x), other(x)
    swap_tensors(model[0].weight_codes, other[0].weight_codes)
    for m in (model, other):
        with pytest.raises(ValueError, match=WRITTEN.format("'0'")):
            m(x)
    swap_tensors(model[0].weight_codes, other[0].weight_codes)
    assert torch.equal(model(x), expected)
    swap_tensors(model[0].weight_codes, nn.Parameter(model[0].weight_codes.clone(), requires_grad=False))
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("way", ["data", "data of a copy", "Parameter", "Parameter at one address"])
def test_codes_of_another_model_as_data_or_as_the_parameter(way, called):
    model, other, x = converted(0), converted(1), torch.randn(3, 40)
    if called:
        model(x), other(x)
    layer, its = model[0], other[0].weight_codes
    if way == "Parameter":
        layer._parameters["weight_codes"] = its
    elif way == "Parameter at one address":  # as where memory was freed and allocated anew
        before = layer.weight_codes
        layer._parameters["weight_codes"] = nn.Parameter(before.data, requires_grad=False)
        before.data.copy_(its)
    else:
        layer.weight_codes.data = its.data if way == "data" else its.clone()
    for _ in range(2):
        with pytest.raises(ValueError, match=WRITTEN.format("'0'")):
            model(x)


def test_load_state_dict_by_swap_tensors():
    model, other, x = converted(0), converted(1), torch.randn(3, 40)
    model(x)
    set_swap_module_params_on_conversion(True)
    try:
        model.load_state_dict(other.state_dict())
        assert torch.equal(model(x), other(x))
        assert torch.equal(model.double().float()(x), other(x))
    finally:
        set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize("use_buffers", [False, True])
def test_an_average_of_models_that_were_converted_separately(use_buffers):
    """Its codes are an average too. With ``use_buffers`` so are its scales, and nothing says whose they are."""
    model, other, x = converted(0), converted(1), torch.randn(3, 40)
    averaged = AveragedModel(model, use_buffers=use_buffers)
    averaged.update_parameters(model)
    assert torch.equal(averaged(x), model(x))
    averaged.update_parameters(other)
    if use_buffers:
        averaged(x)
    else:
        with pytest.raises(ValueError, match=WRITTEN.format("'0'")):
            averaged(x)
    averaged = AveragedModel(model)
    averaged.update_parameters(other)
    assert torch.equal(averaged(x), other(x))


def test_scales_of_few_channels_may_be_equal():
    """Two layers of one channel and one absmax, whose tensors come in unseen, as DDP broadcasts them."""
    one, two = (int8fx.convert(nn.Linear(40, 1, bias=False)) for _ in range(2))
    codes = [torch.randint(-127, 128, (1, 40), dtype=torch.int8) for _ in range(2)]
    for layer, c in zip((one, two), codes, strict=True):
        layer.weight_codes.data.copy_(c)
        layer.weight_codes.add_(0)
        layer.weight_scale.fill_(0.5)
        assert torch.equal(layer.dequantize(), c * 0.5)


def test_what_is_known_of_a_model_goes_with_it():
    model, other, x = converted(0), converted(1), torch.randn(3, 40)
    pair = copy.deepcopy(other)
    scale = other[0].weight_scale.clone()
    del other
    copy_parameters(model, pair)
    model[1].weight_scale.copy_(pair[1].weight_scale)
    model[0].weight_scale.copy_(scale)
    assert torch.equal(model(x), pair(x))
    sizes = len(contents._Pair.known), len(contents._Scale.known)
    for seed in range(2, 5):
        converted(seed)(x)
    gc.collect()
    assert (len(contents._Pair.known), len(contents._Scale.known)) <= sizes


def test_pickles_of_codes_hold_no_class_of_int8fx():
    model, file = converted(0), io.BytesIO()
    model(torch.randn(3, 40))
    torch.save([p for p in model.parameters() if not p.is_floating_point()], file)
    file.seek(0)
    for p, q in zip(torch.load(file, weights_only=True), model, strict=True):
        assert torch.equal(p, q.weight_codes)
    assert b"int8fx.conversion" not in file.getvalue()


def test_a_copy_stays_right_while_its_original_changes():
    """With codes of its own and the scale that both have."""
    layer, x = converted(0)[0], torch.randn(3, 40)
    y, before = layer(x), copy.deepcopy(layer)
    scale = layer.weight_scale.clone()
    with torch.no_grad():
        layer.weight[0, layer.weight[0].abs().argmin()] *= -1
    assert torch.equal(layer.weight_scale, scale)
    assert torch.equal(before(x), y)


# ---- writes into a part of ``module.weight`` -------------------------------------------------------------------------


@given(st.sampled_from(sorted(SCHEMES)), st.integers(1, 9), st.sampled_from([2, 33, 4096, 5000]), st.data())
def test_a_write_into_a_part_reads_that_part_and_hides_no_other_write(scheme, N, K, data):
    layer, x = int8fx.convert(nn.Linear(K, N), SCHEMES[scheme]), torch.randn(2, K)
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, N))
        with torch.no_grad():
            layer.weight[start : data.draw(st.integers(start, N))] *= data.draw(st.sampled_from([-1, 0, 0.3, 5]))
    found = layer._contents["weight"].digests
    assert found == (digest(layer.weight_codes), digest(layer.weight_scale))
    y = layer(x)
    layer.weight_codes.data.copy_(layer.weight_codes.clone())
    assert torch.equal(layer(x), y)
    before = layer.weight_codes.clone()
    layer.weight[0, 0] = layer.weight[0].abs().max()
    layer.weight_codes.sub_(1)
    with pytest.raises(ValueError, match=WRITTEN.format(".*")):
        layer(x)
    assert before.shape == layer.weight_codes.shape


def test_a_write_into_rows_reads_no_others(digests):
    layer = int8fx.convert(nn.Linear(4096, 64))
    digests.clear()
    with torch.no_grad():
        layer.weight[3] = 1
    layer(torch.randn(1, 4096))
    assert not digests


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "transformer", "tied_lm"])
def test_weights_of_every_kind_of_module(name):
    (model, inputs), (other, _) = models.ALL[name](seed=0), models.ALL[name](seed=1)
    for m in (model, other):
        int8fx.convert(m, select=lambda *_: True)
    copy_parameters(model, other)
    with pytest.raises(ValueError, match=WRITTEN.format("'.*'")):
        outputs(model, inputs)
    copy_all(model, other)
    for key, y in outputs(model, inputs).items():
        assert torch.equal(y, outputs(other, inputs)[key])


@pytest.mark.parametrize("first", ["tie", "convert"])
@pytest.mark.parametrize("how", ["itself", "deepcopy", "pickle"])
def test_a_write_through_one_tied_weight_is_accepted_by_the_other(how, first):
    pair, x = nn.ModuleList([nn.Linear(40, 24, bias=False) for _ in range(2)]), torch.randn(3, 40)
    if first == "convert":
        int8fx.convert(pair)
    pair[1].weight = pair[0].weight
    if first == "tie":
        int8fx.convert(pair)
    one, two = COPIES[how](pair)
    assert torch.equal(one(x), two(x))
    scale = two.weight_scale.clone()
    with torch.no_grad():
        one.weight[0, one.weight[0].abs().argmin()] *= -1
    assert torch.equal(two.weight_scale, scale)
    assert torch.equal(two(x), one(x))
    with torch.no_grad():
        one.weight_codes.neg_()
    for module in (one, two):
        with pytest.raises(ValueError, match=WRITTEN.format(".*")):
            module(x)
        assert "int8 (24, 40)" in repr(module)


def test_a_model_that_averages_itself_runs():
    """As with LoRA over a frozen model, at every step."""
    model, x = converted(0), torch.randn(3, 40)
    averaged = AveragedModel(model, use_buffers=False)
    for _ in range(4):
        averaged.update_parameters(model)
        assert torch.equal(averaged(x), model(x))


# ---- what it costs, and where it cannot look -------------------------------------------------------------------------


@pytest.fixture
def digests(monkeypatch) -> list[Tensor]:
    """The codes whose digests are computed."""
    seen: list[Tensor] = []
    monkeypatch.setattr(contents, "digest", lambda t: (seen.append(t) if t.dtype == torch.int8 else None) or digest(t))
    return seen


def test_calls_compute_no_digest_unless_codes_were_written(digests):
    model, x = converted(0), torch.randn(3, 40)
    assert len(digests) == 2
    for _ in range(3):
        model(x)
    model.eval().bfloat16().float().cpu()(x)
    model.requires_grad_(False)
    assert len(digests) == 2
    copy_parameters(model, copy.deepcopy(model))
    model(x), model(x)
    assert len(digests) == 4


def test_codes_that_are_replaced_are_read(digests):
    """As accelerate's hooks do that offload, at each call."""
    model, x = converted(0), torch.randn(3, 40)
    y, layer = model(x), model[0]
    digests.clear()
    for i in range(5):
        layer._parameters["weight_codes"] = nn.Parameter(layer.weight_codes.clone(), requires_grad=False)
        assert torch.equal(model(x), y)
        assert torch.equal(model(x), y)
        assert len(digests) == i + 1


def test_inference_tensors_are_not_counted():
    """They have no version."""
    with torch.inference_mode():
        model, x = loaded_by_assignment(converted(0)), torch.randn(3, 40)
        assert model[0].weight_codes.is_inference()
        y = model(x)
    with torch.no_grad():
        assert torch.equal(model(x), y)


def loaded_by_assignment(model: nn.Module) -> nn.Module:
    model.load_state_dict({k: t.clone() for k, t in model.state_dict().items()}, assign=True)
    return model


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp"])
def test_under_torch_func(transform):
    model, other, x = converted(0), converted(1), torch.randn(3, 40)
    run = {
        "vmap": lambda: torch.vmap(model)(x),
        "grad": lambda: torch.func.grad(lambda x: model(x).sum())(x),
        "jvp": lambda: torch.func.jvp(model, (x,), (x,))[0],
    }[transform]
    copy_parameters(model, model)
    run()
    copy_parameters(model, other)
    with pytest.raises(ValueError, match=WRITTEN.format("'0'")):
        run()


def test_a_model_is_checked_when_it_is_compiled():
    model, other, x = converted(0), converted(1), torch.randn(3, 40)
    copy_parameters(model, model)
    y = torch.compile(model, backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(y, model(x))
    copy_parameters(model, other)
    torch.compiler.reset()
    with pytest.raises(Exception, match=WRITTEN.format("'0'")):
        torch.compile(model, backend="eager", fullgraph=True)(x)


def test_versions_are_no_guards():
    """A compiled model does not notice a copy, and is not compiled anew by one."""
    model, x, counts = converted(0), torch.randn(3, 40), CompileCounter()
    compiled = torch.compile(model, backend=counts, fullgraph=True)
    for _ in range(3):
        compiled(x)
        copy_parameters(model, model)
        model.load_state_dict(model.state_dict())
    assert counts.frame_count == 1


def test_a_model_on_meta_and_an_exported_one():
    model, x = converted(0), torch.randn(3, 40)
    assert converted(0).to("meta")(x.to("meta")).shape == (3, 40)
    copy_parameters(model, model)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))
    copy_parameters(model, model)
    torch.testing.assert_close(torch.jit.trace(model, x)(x), model(x))


def faked(model: nn.Module, x: Tensor) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        model(x)


RECORDED = {
    "jit.trace": lambda model, x: torch.jit.trace(model, x, check_trace=False),
    "make_fx": lambda model, x: make_fx(model)(x),
    "fake": faked,
}


@pytest.mark.parametrize("how", RECORDED)
def test_checks_wait_while_operators_are_recorded(how):
    """Not accepted unseen."""
    model, other, x = converted(0), converted(1), torch.randn(3, 40)
    model(x)
    copy_parameters(model, model)
    RECORDED[how](model, x)
    copy_parameters(model, other)
    RECORDED[how](model, x)
    with pytest.raises(ValueError, match=WRITTEN.format("'0'")):
        model(x)
