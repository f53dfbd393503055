"""`calibrate`: what it records of a model's inputs, and what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from support.helpers import generator
from torch import Tensor, nn

import int8fx
from int8fx.calibration.calibrate import calibrate

K = 60


class Block(nn.Module):
    """Matmuls of one input (q, k, v), a gated feed-forward, and a bare Parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(K, K, bias=i == 0) for i in range(3))
        self.gate, self.up, self.down = nn.Linear(K, 100), nn.Linear(K, 100, bias=False), nn.Linear(100, K)
        self.w = nn.Parameter(torch.randn(K, 20) / 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.tanh(self.q(x)) * self.k(x) + self.v(x)
        return (x + self.down(F.relu(self.gate(x)) * self.up(x))) @ self.w


def block() -> Block:
    torch.manual_seed(0)
    return Block().eval()


def batch(*shape: int, seed: int = 1) -> Tensor:
    x = torch.randn(*shape, K, generator=generator(seed))
    x[..., 7] *= 30
    return x


def test_the_input_of_every_matmul_is_recorded():
    model, batches = block(), [batch(2, 5), batch(3, 4, seed=2)]
    calibration = calibrate(model, batches, progress=False)
    x = torch.cat([b.reshape(-1, K) for b in batches])
    assert set(calibration.absmax) == {"q", "k", "v", "gate", "up", "down", "w"}
    assert torch.equal(calibration.absmax["q"], x.abs().amax(0))
    assert torch.equal(calibration.absmax["q"], calibration.absmax["v"])
    assert set(calibration.rows.values()) == {len(x)}
    assert calibration.moments == {}


class InPlace(nn.Module):
    """A residual that is written in place: its layers read other values in the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(K, K) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        for layer in self.layers:
            x += F.relu(layer(x), inplace=True)
        return x


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_residual_that_is_written_in_place_is_measured_as_each_layer_reads_it(mode):
    torch.manual_seed(0)
    model, x = InPlace().eval().requires_grad_(False), batch(7)
    seen: dict[str, Tensor] = {}
    for name, layer in model.layers.named_children():
        layer.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(f"layers.{name}", args[0].clone()))
    with mode():
        calibration = calibrate(model, [x], moments=True)
    for name, read in seen.items():
        assert torch.equal(calibration.absmax[name], read.abs().amax(0))
        torch.testing.assert_close(calibration.moments[name], read.T @ read)


def test_moments_are_sums_over_all_rows():
    batches = [batch(2, 5), batch(3, 4, seed=2)]
    moments = calibrate(block(), batches, moments=True).moments
    x = torch.cat([b.reshape(-1, K) for b in batches]).double()
    bound = len(x) * torch.finfo(torch.float32).eps * (x.abs().T @ x.abs())  # of sums of len(x) products in float32
    assert ((moments["q"] - x.T @ x).abs() <= bound).all()
    assert moments["down"].shape == (100, 100)


@pytest.mark.parametrize(
    ("batches", "rows"),
    [
        (lambda x: (x, (x,), {"x": x}), 18),
        (lambda x: iter([x]), 6),
    ],
)
def test_batches_take_every_form(batches, rows):
    assert calibrate(block(), batches(batch(2, 3))).rows["q"] == rows


def test_a_bar_is_shown_if_asked_for(capsys):
    calibrate(block(), [batch(2)] * 3, progress=True)
    err = capsys.readouterr().err
    assert err.endswith("3/3\n")
    assert "calibrating" in err
    calibrate(block(), [batch(2)], progress=False)
    assert capsys.readouterr().err == ""


def test_calibration_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no batches"):
        calibrate(block(), [])
    model = int8fx.convert(block())
    with pytest.raises(ValueError, match="no matmul with a weight of the model"):
        calibrate(model, [batch(2)])


def test_inputs_that_are_not_finite_are_named():
    x = batch(2)
    x[0, 3] = torch.inf
    with pytest.raises(ValueError, match=r"int8fx\.calibrate: layer 'q' gets NaN or inf"):
        calibrate(block(), [x])
    with pytest.raises(ValueError, match=r"moments of layer 'q' overflow float32, its inputs reach 3e\+20"):
        calibrate(block(), [torch.full((2, K), 3e20)], moments=True)


@pytest.mark.parametrize("fast", [True, False])
def test_the_model_and_torch_stay_as_they_were(fast):
    model, x = nn.TransformerEncoderLayer(K, 4, 80, batch_first=True).eval(), batch(2, 5)
    before = copy.deepcopy(model.state_dict())
    torch.backends.mha.set_fastpath_enabled(fast)
    try:
        calibrate(model, [x])
        assert torch.backends.mha.get_fastpath_enabled() == fast
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
