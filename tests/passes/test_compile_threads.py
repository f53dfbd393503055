"""One compiled model serves several threads."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from support.compiled import frames
from support.helpers import activation, generator
from support.models import HIDDEN
from torch import Tensor, nn

import int8fx
from int8fx.schemes.quantize import outlier_mask


class Mixed(nn.Module):
    """A Linear, a bare Parameter that only the passes make an int8 matmul, and code between them."""

    def __init__(self) -> None:
        super().__init__()
        g = generator(0)
        self.up, self.down = nn.Linear(HIDDEN, 96), nn.Parameter(torch.randn(96, HIDDEN, generator=g) / 8)
        with torch.no_grad():
            self.up.weight.copy_(torch.randn(96, HIDDEN, generator=g) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(F.gelu(self.up(x)) @ self.down)


@pytest.mark.slow
@pytest.mark.parametrize("start", ["cold", "warm"])
def test_eight_threads_get_the_bits_that_one_gets(start, empty_cache):
    """One compiled model, called by eight threads at once, each with its own outliers; cold: these calls compile it."""
    model = int8fx.convert(Mixed().eval())
    xs = [activation(24, HIDDEN, outliers="column", seed=seed) for seed in range(8)]
    compiled = torch.compile(model, fullgraph=True, backend="int8fx")
    if start == "warm":
        with torch.no_grad():
            compiled(xs[0])
    barrier = threading.Barrier(8)

    def work(x: Tensor) -> list[Tensor]:
        barrier.wait()
        with torch.no_grad():
            return [compiled(x) for _ in range(20)]

    with ThreadPoolExecutor(8) as pool:
        by_thread = list(pool.map(work, xs))
    graphs = frames()  # Dynamo has every thread compile that comes before the first is done
    with torch.no_grad():
        expected = [compiled(x) for x in xs]
    assert frames() == graphs
    assert graphs == 1 or start == "cold"
    assert {(report.lowered, report.linears, report.dequantized) for report in int8fx.reports()} == {(1, 2, 0)}
    assert len({tuple(outlier_mask(x, 6.0).tolist()) for x in xs}) > 1
    for ys, y in zip(by_thread, expected, strict=True):
        assert all(torch.equal(y, again) for again in ys)
