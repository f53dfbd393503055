"""Ways to compile a converted model: layer by layer, and with frozen weights."""

from __future__ import annotations

import copy

import pytest
import torch
from support.conversion import SCHEMES
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor import config
from torch._inductor.utils import run_and_get_code

import int8fx
from int8fx.passes.inductor import PASSES

pytestmark = pytest.mark.slow


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(96, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_equal_layers_compiled_one_by_one_have_one_graph(scheme):
    model, x = int8fx.convert(nn.Sequential(*[Block() for _ in range(4)]), scheme), torch.randn(5, 32)
    backend = CompileCounterWithBackend("inductor")
    with torch.no_grad():
        expected = model(x)
        for block in model:
            block.compile(backend=backend)
        assert torch.allclose(model(x), expected, rtol=1e-4, atol=1e-4)
    assert backend.frame_count == 1


def test_a_layer_by_another_scheme_has_another_graph():
    plan = {f"{i}.{name}": SCHEMES["rotated" if i == 3 else "plain"] for i in range(4) for name in ("up", "down")}
    parts = [int8fx.convert(Block(), plan[f"{i}.up"]) for i in range(4)]
    model, backend = nn.Sequential(*parts), CompileCounterWithBackend("inductor")
    with torch.no_grad():
        for block in model:
            block.compile(backend=backend)
        model(torch.randn(5, 32))
    assert backend.frame_count == 2


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_frozen_weights_stay_int8(scheme):
    model, x = nn.Sequential(Block(), Block()).eval(), torch.randn(5, 32)
    int8fx.convert(model, scheme)
    with torch.no_grad(), config.patch(freezing=True):
        expected = copy.deepcopy(model)(x)
        frozen = torch.compile(model)
        y, [code] = run_and_get_code(frozen, x)
    assert torch.allclose(y, expected, rtol=1e-4, atol=1e-4)
    report = PASSES.reports[-1]
    assert report.linears == 4
    assert report.dequantized == 0
    assert "int8fx.linear" in code
    assert "dequantize" not in code
