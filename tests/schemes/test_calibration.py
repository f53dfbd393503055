"""`Calibration` adds up what it sees."""

import pytest
import torch
from support.helpers import generator

from int8fx.schemes.calibration import Calibration


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_parts_add_up_to_the_whole(dtype):
    x = torch.randint(-8, 9, (20, 6), generator=generator(1)).to(dtype)  # sums of integers are exact
    calibration = Calibration()
    for part in x.split(7):
        calibration.see("layer", part, moments=True)
    assert torch.equal(calibration.absmax["layer"], x.abs().amax(0).float())
    assert calibration.rows == {"layer": 20}
    assert torch.equal(calibration.moments["layer"], x.float().T @ x.float())


def test_without_moments_there_are_none_and_without_rows_nothing_is_seen():
    calibration = Calibration()
    calibration.see("seen", torch.ones(2, 3))
    calibration.see("unseen", torch.ones(0, 3), moments=True)
    assert list(calibration.absmax) == list(calibration.rows) == ["seen"]
    assert calibration.moments == {}


def test_two_calibrations_share_nothing(tmp_path):
    first, second = Calibration(), Calibration()
    first.see("layer", torch.ones(2, 3))
    assert second == Calibration()
    torch.save(first.absmax, tmp_path / "absmax.pt")
    assert torch.equal(torch.load(tmp_path / "absmax.pt")["layer"], torch.ones(3))
