"""The checks of the Triton kernels, in Triton's interpreter."""

import math

import pytest
import torch
from int8fx.triton_kernels import tiles
from rich.console import Console
from support import interpreter  # noqa: F401  # computes what hardware computes

from int8fx.ops import gpu
from int8fx.tools.bench import check

pytestmark = pytest.mark.slow

ROWS, SIZES = (1, 3, 65), ((17, 70),)


@pytest.fixture(autouse=True)
def _one_tile(monkeypatch):
    """A small tile for any shape: the interpreter takes its time for large ones."""
    monkeypatch.setattr(tiles, "for_int8_matmul", lambda *args: (tiles.Tile(32, 32, 64, 4, 2),))


@pytest.mark.parametrize("dtype", check.DTYPES)
def test_the_kernels_agree_with_the_reference(dtype):
    done = list(check.checks("cpu", (dtype,), ROWS, SIZES))
    of_case = 14 + len(check.GROUPINGS) + len(tiles.int8_matmul_tiles(dtype, "sm_80", epilogue=False))
    assert len(done) == len(ROWS) * of_case
    assert len({one.name for one in done}) == len(done)
    assert [(one.name, one.worst) for one in done if not one.right] == []


def test_a_kernel_that_is_wrong_is_named(monkeypatch):
    """One element in a hundred, off by one part in a hundred; a code off by one; NaN."""
    linear, quantize = gpu.linear, gpu.quantize_rowwise

    def wrong_linear(x, weight, epilogue):
        y = linear(x, weight, epilogue)
        y.view(-1)[::100] *= 1.01 if weight.columns is None else math.nan
        return y

    def wrong_quantize(*args):
        codes, x_scale, mask = quantize(*args)
        codes[0, 0] += 1
        return codes, x_scale, mask

    monkeypatch.setattr(gpu, "linear", wrong_linear)
    monkeypatch.setattr(gpu, "quantize_rowwise", wrong_quantize)
    wrong = [one for one in check.checks("cpu", (torch.bfloat16,), (65,), SIZES) if not one.right]
    kernels = {one.name.split(":")[0] for one in wrong}
    assert kernels >= {"quantize_rowwise, threshold 6", "linear, weights only", "linear, threshold 6, columns"}
    assert all(one.worst > 1 for one in wrong)


def test_wrong_kernels_are_printed(monkeypatch, capsys):
    made_up = [check.Check("linear, somewhere", 3.0), check.Check("linear, elsewhere", 0.5)]
    monkeypatch.setattr(check, "checks", lambda device: iter(made_up))
    assert not check.show(Console(width=150), "cpu")
    output = capsys.readouterr().out
    assert "wrong: linear, somewhere: 3 times the error that is legal" in output
    assert "1 of 2 checks of the kernels agree with the reference" in output
