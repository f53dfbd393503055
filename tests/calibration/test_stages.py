"""`calibrate(folder=...)`: the same statistics, block by block, and where it goes on after it was stopped."""

from __future__ import annotations

import threading
from collections import UserDict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.helpers import generator
from torch import Tensor, nn

import int8fx
from int8fx import calibrate
from int8fx.calibration.stages import blocks_of, stages

K = 12


class Model(nn.Module):
    """Linears before, in, and after blocks; a batch of more than 3 rows leaves before the last block."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(K, K), nn.Linear(K, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(K, K), nn.Tanh()) for _ in range(blocks))
        self.order: list[tuple[int, int]] = []

    def forward(self, x: Tensor) -> Tensor:
        batch = len(x)
        x = self.first(x)
        for i, block in enumerate(self.blocks):
            if i == 2 and batch > 3:
                break
            x = block(x)
            self.order.append((i, batch))
        return self.last(x)


def model_and_data(*rows: int) -> tuple[Model, list[Tensor]]:
    torch.manual_seed(0)
    return Model().eval(), [torch.randn(m, K, generator=generator(i)) for i, m in enumerate(rows)]


def assert_same(a: int8fx.Calibration, b: int8fx.Calibration) -> None:
    assert a.rows == b.rows
    assert set(a.moments) == set(b.moments)
    for name, absmax in a.absmax.items():
        assert torch.equal(absmax, b.absmax[name])
        assert not a.moments or torch.allclose(a.moments[name], b.moments[name], rtol=1e-5)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.booleans())
def test_statistics_are_those_of_a_calibration_in_memory(tmp_path_factory, rows, moments):
    model, data = model_and_data(*rows, 1)
    folder = tmp_path_factory.mktemp("calibration")
    in_stages = calibrate(model, data, moments=moments, folder=folder, progress=False)
    assert_same(calibrate(model, data, moments=moments, progress=False), in_stages)
    assert_same(in_stages, calibrate(model, data, moments=moments, folder=folder, progress=False))


def test_all_batches_pass_a_block_before_any_enters_the_next(tmp_path):
    model, data = model_and_data(1, 5, 2)
    calibrate(model, data, folder=tmp_path, progress=False)
    assert model.order == [(0, 1), (0, 5), (0, 2), (1, 1), (1, 5), (1, 2), (2, 1), (2, 2)]
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_it_goes_on_after_the_last_block_that_was_written(tmp_path, monkeypatch, error):
    model, data = model_and_data(1, 3, 2)
    before, expected = threading.active_count(), calibrate(model, data, moments=True, progress=False)
    forward, calls = nn.Tanh.forward, []

    def failing(self, x):
        calls.append(1)
        if len(calls) == 5:
            raise error("stop")
        return forward(self, x)

    with monkeypatch.context() as patch:
        patch.setattr(nn.Tanh, "forward", failing)
        with pytest.raises(error, match="stop"):
            calibrate(model, data, moments=True, folder=tmp_path, progress=False)
    assert threading.active_count() == before
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert sorted(f.name for f in tmp_path.iterdir()) == ["0000.pt", "0001.pt"]
    times = {f: f.stat().st_mtime_ns for f in tmp_path.iterdir()}
    assert_same(expected, calibrate(model, data, moments=True, folder=tmp_path, progress=False))
    assert {f: f.stat().st_mtime_ns for f in times} == times


def test_a_folder_of_something_else_is_refused(tmp_path):
    model, data = model_and_data(1, 2)
    calibrate(model, data, folder=tmp_path / "a", progress=False)
    for other in ([*data, data[0]], [data[0] + 1, data[1]]):
        with pytest.raises(ValueError, match=r"0000\.pt was measured on another model, other data"):
            calibrate(model, other, folder=tmp_path / "a", progress=False)
    with torch.no_grad():
        model.first.weight[0, 0] += 1
    with pytest.raises(ValueError, match="another model"):
        calibrate(model, data, folder=tmp_path / "a", progress=False)
    with pytest.raises(ValueError, match="another model"):
        calibrate(model.train(), data, folder=tmp_path / "a", progress=False)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "0000.pt").write_bytes(b"no such file")
    with pytest.raises(ValueError, match=r"0000\.pt cannot be read: .*; legal: a folder that calibrate wrote"):
        calibrate(model, data, folder=tmp_path / "b", progress=False)


class Two(nn.Module):
    """Takes two tensors by name."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("shift", torch.zeros(4))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.a(a + self.shift) + self.b(b)


class Batch(UserDict):
    """A mapping that is no dict, as tokenizers return."""


def test_names_buffers_and_every_value_of_a_batch_count(tmp_path):
    model, a, b = Two().eval(), torch.randn(600, 4), torch.randn(600, 4)
    calibrate(model, [Batch(a=a, b=b)], folder=tmp_path, progress=False)
    calibrate(model, [Batch(a=a, b=b)], folder=tmp_path, progress=False)
    changed = a.clone()
    changed[300] += 1  # in the middle, which a text of the tensor leaves out
    for other in (Batch(a=b, b=a), Batch(b=a, a=b), Batch(a=changed, b=b)):
        with pytest.raises(ValueError, match="another model, other data"):
            calibrate(model, [other], folder=tmp_path, progress=False)
    model.shift += 1
    with pytest.raises(ValueError, match="another model"):
        calibrate(model, [Batch(a=a, b=b)], folder=tmp_path, progress=False)


def test_damaged_moments_are_refused_by_name(tmp_path):
    model, data = model_and_data(3)
    moments = calibrate(model, data, moments=True, folder=tmp_path, progress=False).moments
    name = next(iter(moments))
    raw = moments[name].numpy().tobytes()
    for file in tmp_path.iterdir():
        content = file.read_bytes()
        if raw in content:
            at = content.index(raw) + len(raw) // 2
            file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    with pytest.raises(ValueError, match=rf"moments of layer '{name}' are damaged; legal: a new folder"):
        moments[name]


def test_inputs_that_are_not_finite_are_named_and_end_all_threads(tmp_path):
    model, data = model_and_data(1, 2)
    before = threading.active_count()
    data[1][0, 0] = torch.inf
    with pytest.raises(ValueError, match="layer 'first' gets NaN or inf"):
        calibrate(model, data, folder=tmp_path, progress=False)
    assert threading.active_count() == before


def test_a_block_that_runs_twice_has_the_rows_of_both(tmp_path):
    model, data = model_and_data(2, 3)
    model.blocks = nn.ModuleList([model.blocks[0], model.blocks[0]])
    in_stages = calibrate(model, data, moments=True, folder=tmp_path, progress=False)
    assert in_stages.rows["blocks.0.0"] == 10
    assert_same(calibrate(model, data, moments=True, progress=False), in_stages)


def test_a_conversion_reads_the_moments_from_the_folder(tmp_path):
    model, data = model_and_data(3, 2, 3)
    scheme = int8fx.weight_only("int4_clip", 4, rounding="gptq")
    twin, _ = model_and_data()
    int8fx.convert(model, scheme, calibration=calibrate(model, data, moments=True, folder=tmp_path), select="blocks.*")
    int8fx.convert(twin, scheme, calibration=calibrate(twin, data, moments=True), select="blocks.*")
    assert torch.equal(model(data[0]), twin(data[0]))


def test_grad_mode_and_autocast_are_those_of_the_caller():
    seen = []

    def call() -> None:
        seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))

    with torch.no_grad(), torch.autocast("cpu", dtype=torch.float16):
        assert list(stages(nn.Linear(1, 1), [call])) == [0]
    assert seen == [(False, True, torch.float16)]


def test_blocks_are_the_outermost_lists():
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))

    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Experts(), nn.ReLU(), Experts()])

    model = Nested()
    assert blocks_of(model) == [model.layers[0], model.layers[2]]
    assert blocks_of(nn.Linear(2, 2)) == []
    assert blocks_of(nn.Sequential(model, nn.ReLU())) == [model]
