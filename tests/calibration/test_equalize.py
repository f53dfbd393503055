"""`equalize`: the function stays, conversion loses less, and what fails leaves the model as it was."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support import models
from support.helpers import correlated, generator, seeds
from torch import Tensor, nn

import int8fx
from int8fx import Calibration, calibrate, equalize
from int8fx.calibration import equalize as module

K = 48
INT4 = int8fx.weight_only("int4_clip", 16)


class Block(nn.Module):
    """A norm before attention of grouped queries, and a gated feed-forward."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(K, bias=bias)
        self.q, self.o = nn.Linear(K, K, bias=bias), nn.Linear(K, K, bias=bias)
        self.k, self.v = nn.Linear(K, K // 2, bias=bias), nn.Linear(K, K // 2, bias=bias)
        self.norm2 = nn.RMSNorm(K)
        self.gate, self.up, self.down = nn.Linear(K, 80), nn.Linear(K, 80, bias=bias), nn.Linear(80, K)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (f(y).view(*x.shape[:2], -1, K // 4).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


FOLDS = [("norm", ("q", "k", "v")), ("v", ("o",)), ("norm2", ("gate", "up")), ("up", ("down",))]


def block(seed: int = 0, bias: bool = True, dtype: torch.dtype = torch.float32) -> tuple[Block, list[Tensor]]:
    torch.manual_seed(seed)
    model = Block(bias).eval()
    with torch.no_grad():
        for norm in (model.norm, model.norm2):
            norm.weight.copy_(torch.exp(torch.randn(K)))
            norm.weight[:3] *= 20
        if bias:
            model.norm.bias.normal_()
    data = [x.view(4, 25, K).to(dtype) for x in correlated(200, K, seed).split(100)]
    return model.to(dtype), data


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm())


@given(seeds, st.booleans(), st.sampled_from(["awq", "teq"]), st.sampled_from([INT4, int8fx.llm_int8()]))
def test_the_float_model_computes_the_same(seed, bias, algorithm, scheme):
    model, data = block(seed, bias, torch.float64)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(module, "teq_scales", lambda *args: module_teq(*args, steps=5))
        y, before = model(data[0]), parameters(model)
        equalize(model, data, scheme, algorithm=algorithm)
        assert relative(model(data[0]), y) <= 1e-9
        assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())


module_teq = module.teq_scales


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_stay_and_the_function_does_to_rounding(dtype):
    model, data = block(dtype=dtype)
    y = model(data[0])
    before = {name: id(p) for name, p in model.named_parameters()}
    equalize(model, data, INT4)
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert relative(model(data[0]), y) <= torch.finfo(dtype).eps ** 0.5


@pytest.mark.parametrize("algorithm", ["awq", "teq"])
@pytest.mark.parametrize(
    "scheme",
    [INT4, int8fx.weight_only("nf4", 16, scales="hqq"), int8fx.weight_only("int4_clip", 16, rounding="gptq")],
    ids=str,
)
def test_conversion_loses_less(scheme, algorithm):
    model, data = block()
    y = model(data[0])
    calibration = calibrate(model, data, moments=True)
    plain = int8fx.convert(copy.deepcopy(model), scheme, calibration=calibration)
    scaled = equalize(model, data, scheme, algorithm=algorithm, calibration=calibration)
    int8fx.convert(model, scheme, calibration=scaled)
    assert relative(model(data[0]), y) < 0.97 * relative(plain(data[0]), y)


def test_the_calibration_is_that_of_the_scaled_model():
    """A weight that consumes and produces has been scaled twice; the caller's calibration stays."""
    model, data = block()
    calibration = calibrate(model, data, moments=True)
    given = copy.deepcopy(calibration)
    returned, measured = equalize(model, data, INT4, calibration=calibration), calibrate(model, data, moments=True)
    for name in ("q", "k", "v", "o", "gate", "up", "down"):
        assert relative(returned.moments[name], measured.moments[name]) <= 1e-4
        assert relative(returned.absmax[name], measured.absmax[name]) <= 1e-4
        assert not torch.equal(returned.moments[name], given.moments[name])
        assert torch.equal(calibration.moments[name], given.moments[name])
        assert torch.equal(calibration.absmax[name], given.absmax[name])
    assert returned.rows == given.rows


def test_moments_may_lie_in_a_folder(tmp_path):
    """And what is returned can be saved, and reads them from there."""
    model, data = block()
    twin = copy.deepcopy(model)
    expected = equalize(twin, data, INT4)
    returned = equalize(
        model, data, INT4, calibration=calibrate(model, data, moments=True, folder=tmp_path / "statistics")
    )
    assert_unchanged(model, parameters(twin))
    torch.save(returned, tmp_path / "calibration")
    for calibration in (returned, torch.load(tmp_path / "calibration", weights_only=False)):
        assert calibration.moments.keys() == expected.moments.keys()
        assert all(torch.equal(moments, expected.moments[name]) for name, moments in calibration.moments.items())


def test_the_folds_of_a_model():
    model, data = block()
    found = module._find(model, data[0], module._own_parameters(model))
    last = lambda name: name.removesuffix(".weight")  # noqa: E731
    assert [(last(f.name), tuple(last(c.weight.parameter) for c in f.consumers)) for f in found.folds] == FOLDS


def test_dead_channels_keep_their_weights():
    model, data = block()
    with torch.no_grad():
        model.norm.weight[5] = model.norm.bias[5] = 0
    before = parameters(model)
    equalize(model, data, INT4)
    for name in ("q.weight", "k.weight"):
        assert torch.equal(model.get_parameter(name)[:, 5], before[name][:, 5])
        assert not torch.equal(model.get_parameter(name), before[name])


def test_float16_stays_in_its_range():
    model, data = block()
    with torch.no_grad():
        model.norm.weight[7], model.q.weight[:, 7] = 1e-3, 6e4
        model.norm.bias[7] = 0
    model, data = model.half(), [x.half() for x in data]
    y = model(data[0])
    equalize(model, data, INT4)
    assert all(p.isfinite().all() for p in model.parameters())
    assert relative(model(data[0]), y) <= torch.finfo(torch.float16).eps ** 0.5


def test_weights_that_stay_float_are_scaled_with_the_others():
    """Where a head, which is not converted, reads what a layer reads; alone it is left."""

    class Headed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.lm_head, self.layer = nn.LayerNorm(K), nn.Linear(K, 20), nn.Linear(K, 20)

        def get_output_embeddings(self) -> nn.Module:
            return self.lm_head

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            return self.lm_head(y) * self.layer(y).tanh()

    torch.manual_seed(0)
    model, data = Headed().eval(), [correlated(100, K, 0)]
    with torch.no_grad():
        model.norm.weight.copy_(torch.exp(2 * torch.randn(K)))
    y, head = model(data[0]), model.lm_head.weight.detach().clone()
    calibration = equalize(model, data, INT4)
    assert relative(model(data[0]), y) <= 1e-5
    assert not torch.equal(model.lm_head.weight, head)
    assert relative(calibration.moments["layer"], calibrate(model, data, moments=True).moments["layer"]) <= 1e-4


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("where", ["awq_scales", "_scale_statistics", "_compare", "_apply"])
def test_an_interrupted_call_leaves_the_parameters(error, where, monkeypatch):
    model, data = block()
    before, calls, original = parameters(model), [], getattr(module, where)

    def interrupted(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == (1 if where == "_compare" else 3):
            raise error
        return original(*args)

    monkeypatch.setattr(module, where, interrupted)
    with pytest.raises(error):
        equalize(model, data, INT4)
    assert_unchanged(model, before)


def test_an_interruption_between_two_writes_leaves_the_parameters(monkeypatch):
    model, data = block()
    before, calls = parameters(model), []
    copy_ = Tensor.copy_

    def interrupted(self: Tensor, *args: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return copy_(self, *args)

    calibration, outputs = calibrate(model, data, moments=True), module._outputs

    def then_interrupt(*args: Any) -> Any:
        result = outputs(*args)
        monkeypatch.setattr(Tensor, "copy_", interrupted)
        return result

    monkeypatch.setattr(module, "_outputs", then_interrupt)
    with pytest.raises(KeyboardInterrupt):
        equalize(model, data, INT4, calibration=calibration)
    assert len(calls) > 4
    assert_unchanged(model, before)


def test_outputs_that_change_are_refused_and_restored(monkeypatch):
    """As where the model reads a Parameter in a way that the trace does not show."""
    model, data = block()
    before = parameters(model)
    apply = module._apply

    def wrong(fold: Any, s: Tensor, *args: Any) -> None:
        apply(fold, s, *args)
        model.get_parameter(fold.name).data.mul_(1.5)

    monkeypatch.setattr(module, "_apply", wrong)
    with pytest.raises(ValueError, match=r"int8fx\.equalize: output of the first batch changes by .* as it was"):
        equalize(model, data, INT4)
    assert_unchanged(model, before)


def test_scales_that_a_dtype_does_not_hold_are_named_and_nothing_is_changed():
    model, data = block()
    with torch.no_grad():
        model.down.weight.fill_(1e8)
    before = parameters(model)
    with pytest.raises(ValueError, match=r"int8fx\.equalize: layers 'down': .* legal: another scale_dtype"):
        equalize(model, data, int8fx.weight_only("int4_clip", 16, scale_dtype="float16"))
    assert_unchanged(model, before)


def converted() -> nn.Module:
    return int8fx.convert(block()[0], select="q")


def untraceable() -> nn.Module:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(K, K), nn.Linear(K, K)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)) if x.sum().item() > 0 else x

    return Odd().eval()


def made_in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return block()[0]


class BaseTunerLayer:
    """As PEFT calls the class of its layers."""


class Adapted(nn.Linear, BaseTunerLayer):
    pass


def adapted() -> nn.Module:
    model = block()[0]
    model.q.__class__ = Adapted
    return model


REFUSED: dict[str, tuple[Callable[[], nn.Module], dict, str]] = {
    "rotated": (lambda: block()[0], {"scheme": int8fx.rotated()}, r"rotated rotates .* legal: weight_only"),
    "columns": (lambda: block()[0], {"scheme": int8fx.llm_int8(columns=0.1)}, r"columns=0\.1\) rotates .* unquantised"),
    "algorithm": (lambda: block()[0], {"algorithm": "gptq"}, "algorithm is 'gptq'; legal: awq, teq"),
    "no batches": (lambda: block()[0], {"data": []}, "no batches"),
    "converted": (converted, {}, "layer 'q' is converted already; legal: float weights"),
    "adapters": (adapted, {}, "layer 'q' has adapters; legal: merge them, or add them afterwards"),
    "training": (lambda: block()[0].train(), {}, r"is in training mode; legal: model\.eval"),
    "one module in training": (lambda: (m := block()[0], m.norm.train())[0], {}, "module 'norm' is in training mode"),
    "no moments": (lambda: block()[0], {"calibration": Calibration()}, "no moments; legal: int8fx.calibrate"),
    "moments": (
        lambda: block()[0], {"calibration": Calibration(moments=dict.fromkeys("qkv", torch.full((K, K), torch.nan)))},
        r"the moments \[48, 48\] of layer 'q' are of another shape, not finite",
    ),
    "moments of another model": (
        lambda: block()[0], {"calibration": Calibration(moments=dict.fromkeys("qkv", torch.eye(9)))},
        r"the moments \[9, 9\] of layer 'q' .* legal: x\.T @ x of its inputs, \[48, 48\]",
    ),
    "made in inference mode": (made_in_inference_mode, {}, r"cannot trace the model \(R.*inference tensor"),
    "untraceable": (untraceable, {}, r"torch\.export\.export cannot trace the model \("),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused_by_name(name):
    make, arguments, message = REFUSED[name]
    model = make()
    before = parameters(model)
    with pytest.raises(ValueError, match=message):
        equalize(model, **{"data": block()[1], "scheme": INT4} | arguments)
    assert_unchanged(model, before)


@pytest.mark.parametrize("arguments", [{"scheme": None}, {"calibration": {}}, {"model": "a model"}])
def test_arguments_of_the_wrong_kind_are_refused(arguments):
    model, data = block()
    with pytest.raises(TypeError, match=r"int8fx\.equalize: .*legal"):
        equalize(**{"model": model, "data": data, "scheme": INT4} | arguments)


def test_tied_weights_are_left():
    model, data = block()
    model.unused = nn.Linear(80, K).eval()  # the first batch does not reach it
    model.unused.weight = model.down.weight
    before = parameters(model)
    equalize(model, data, INT4)
    assert torch.equal(model.down.weight, before["down.weight"])
    assert not torch.equal(model.o.weight, before["o.weight"])


def test_memory_that_two_parameters_share_counts_as_tied():
    model, data = block()
    both = torch.cat([model.o.weight.data, model.q.weight.data])
    model.o.weight, model.q.weight = (nn.Parameter(t) for t in both.split(K))
    before = parameters(model)
    equalize(model, data, INT4)
    for name in ("o", "q", "k"):
        assert torch.equal(model.get_parameter(f"{name}.weight"), before[f"{name}.weight"])
    assert not torch.equal(model.down.weight, before["down.weight"])


def test_layers_without_moments_are_left():
    model, data = block()
    calibration = calibrate(model, data, moments=True)
    del calibration.moments["k"]
    before = parameters(model)
    equalize(model, data, INT4, calibration=calibration)
    assert torch.equal(model.q.weight, before["q.weight"])
    assert not torch.equal(model.down.weight, before["down.weight"])


def test_a_warning_says_why_there_is_nothing_to_scale():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(K, 64), nn.GELU(), nn.Linear(64, K)).eval()
    with pytest.warns(
        UserWarning, match=r"int8fx\.equalize: nothing to scale\. The largest layer is 0: its input comes from "
    ):
        calibration = equalize(model, [torch.randn(10, K)], INT4)
    assert calibration.moments.keys() == {"0", "2"}


@pytest.mark.parametrize("batch", [lambda x: x, lambda x: (x,), lambda x: {"x": x}])
def test_batches_take_every_form(batch):
    model, data = block()
    before = parameters(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        equalize(model, [batch(x) for x in data], INT4)
    assert not torch.equal(model.down.weight, before["down.weight"])


def test_a_bar_is_shown_if_asked_for(capsys):
    model, data = block()
    equalize(model, data, INT4, calibration=calibrate(model, data, moments=True), progress=True)
    assert capsys.readouterr().err.endswith("4/4\n")


def test_a_language_model_with_a_cache():
    """Its logits are the same, generation with the cache too."""
    model, inputs = models.llama()
    inputs.pop("use_cache")
    expected, text = model(**inputs).logits, model.generate(**inputs, max_new_tokens=5, do_sample=False)
    calibration = calibrate(model, [inputs], moments=True)
    plain = int8fx.convert(copy.deepcopy(model), INT4, calibration=calibration)
    scaled = equalize(model, [inputs], INT4, calibration=calibration)
    assert relative(model(**inputs).logits, expected) <= 1e-4
    assert torch.equal(model.generate(**inputs, max_new_tokens=5, do_sample=False), text)
    int8fx.convert(model, INT4, calibration=scaled)
    assert relative(model(**inputs).logits, expected) < relative(plain(**inputs).logits, expected)


def test_a_plan_may_follow():
    model, data = block()
    calibration = equalize(model, data, INT4)
    plan = int8fx.plan(model, data, max_kl=1e9, schemes=[INT4], calibration=calibration)
    int8fx.convert(model, plan)
    assert model(data[0]).isfinite().all()


def test_random_scales_are_undone():
    """A channel that is large for no reason is made small: AWQ's point."""
    model, data = block()
    hidden = copy.deepcopy(model)
    with torch.no_grad():
        s = torch.exp(2 * torch.randn(K // 2, generator=generator(0)))
        hidden.v.weight.mul_(s[:, None])
        hidden.v.bias.mul_(s)
        hidden.o.weight.view(K, 2, 2, K // 4).div_(s.view(2, 1, K // 4))
    y, losses = hidden(data[0]), []
    assert relative(model(data[0]), y) <= 1e-5
    for twin in (hidden, copy.deepcopy(hidden)):
        calibration = calibrate(twin, data, moments=True) if losses else equalize(twin, data, INT4)
        losses.append(relative(int8fx.convert(twin, INT4, calibration=calibration)(data[0]), y))
    assert losses[0] < 0.9 * losses[1]
