"""`Statistics` add up what they get."""

import pytest
import torch
from support.helpers import generator

from int8fx.schemes.calibration import Calibration, Statistics


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_parts_add_up_to_the_whole(dtype):
    x = torch.randint(-8, 9, (20, 6), generator=generator(1)).to(dtype)  # sums of integers are exact
    statistics = Statistics(moments=True)
    for part in x.split(7):
        statistics.add("layer", part)
    calibration = statistics.calibration
    assert torch.equal(calibration.absmax["layer"], x.abs().amax(0).float())
    assert calibration.rows == {"layer": 20}
    assert torch.equal(calibration.moments["layer"], x.float().T @ x.float())


def test_without_moments_there_are_none_and_without_rows_nothing_is_seen():
    statistics = Statistics()
    statistics.add("seen", torch.ones(2, 3))
    Statistics(moments=True).add("unseen", torch.ones(0, 3))
    statistics.add("unseen", torch.ones(0, 3))
    assert list(statistics.calibration.absmax) == list(statistics.calibration.rows) == ["seen"]
    assert statistics.calibration.moments == {}


def test_the_same_x_is_measured_once_and_counts_for_each_layer():
    """And not after it was written: q, k and v read one x, and the next layer another one in the same memory."""
    x, statistics = torch.randn(5, 3, generator=generator(1)), Statistics(moments=True)
    for name in ("q", "k"):
        statistics.add(name, x)
    expected = x.T @ x
    x.mul_(2)
    statistics.add("k", x)
    statistics.add("o", x[:, :2])
    moments = statistics.calibration.moments
    assert torch.equal(moments["q"], expected)
    assert torch.allclose(moments["k"], 5 * expected)
    assert torch.allclose(moments["o"], 4 * expected[:2, :2])
    assert statistics.calibration.rows == {"q": 5, "k": 10, "o": 5}


def test_two_calibrations_share_nothing(tmp_path):
    first, second = Statistics(), Statistics()
    first.add("layer", torch.ones(2, 3))
    assert second.calibration == Calibration()
    torch.save(first.calibration.absmax, tmp_path / "absmax.pt")
    assert torch.equal(torch.load(tmp_path / "absmax.pt")["layer"], torch.ones(3))
