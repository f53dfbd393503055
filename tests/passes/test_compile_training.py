"""Gradients and low precision through compiled models: eager's error, whether Inductor writes C++ or not."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support import models
from support.compiled import frames, without_cpp
from support.helpers import activation, generator, unit_roundoff
from support.models import HIDDEN
from torch import Tensor, nn

import int8fx

pytestmark = pytest.mark.usefixtures("no_graphs_from_caches")
BACKENDS = pytest.mark.parametrize("backend", [without_cpp, "inductor"], ids=["without_cpp", "inductor"])


class Adapted(nn.Module):
    """LoRA: a packed weight that is frozen and two small ones that train."""

    def __init__(self, K: int = 40, N: int = 24, rank: int = 4) -> None:
        super().__init__()
        g = generator(0)
        self.base = nn.Linear(K, N)
        self.a = nn.Parameter(torch.randn(K, rank, generator=g))
        self.b = nn.Parameter(torch.randn(rank, N, generator=g))
        with torch.no_grad():
            self.base.weight.copy_(torch.randn(N, K, generator=g))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a @ self.b


@BACKENDS
def test_gradients_of_a_compiled_lora_layer(backend):
    """No quantisation but the weight's enters a gradient: its value and its bound are known in float64."""
    model = int8fx.convert(Adapted(), select="base")
    x = activation(6, 40, outliers="column").requires_grad_()
    grad = torch.randn(6, 24, generator=generator(1))
    tensors = {"x": x, "a": model.a, "b": model.b, "bias": model.base.bias}

    def exact(of: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        w, a, b, x2, g = (of(t.detach().double()) for t in (model.base.weight, model.a, model.b, x, grad))
        return {"x": g @ w + (g @ b.T) @ a.T, "a": x2.T @ (g @ b.T), "b": (x2 @ a).T @ g, "bias": g.sum(0)}

    expected, magnitudes = exact(lambda t: t), exact(torch.abs)
    n = (24 + 2) + (4 + 2)  # the longest chain of roundings: of two matmuls and the sum of two of them
    outputs = []
    for run in (model, torch.compile(model, fullgraph=True, backend=backend)):
        model.zero_grad()
        x.grad = None
        y = run(x)
        (y * grad).sum().backward()
        outputs.append(y.detach())
        for name, t in tensors.items():
            error = (t.grad.double() - expected[name]).abs()
            assert (error <= n * unit_roundoff(torch.float32) * magnitudes[name]).all(), name
    assert frames() == 1
    [report] = int8fx.reports()
    assert report.linears == 1
    assert torch.equal(outputs[0], outputs[1])


class Block(nn.Module):
    """What `fold` takes up: a bias that is added by itself, an activation, a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.bias = nn.LayerNorm(HIDDEN), nn.Parameter(torch.ones(96))
        self.up, self.gate = (nn.Linear(HIDDEN, 96, bias=False) for _ in range(2))
        self.down = nn.Linear(96, HIDDEN, bias=False)
        g = generator(0)
        with torch.no_grad():
            for layer in (self.up, self.gate, self.down):
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=g) / 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down(F.gelu(self.gate(h)) * (self.up(h) + self.bias))


@BACKENDS
def test_training_through_folded_matmuls(backend):
    """The passes see forward and backward in one graph; what the backward needs stays."""
    model = Block()
    values, grad = activation(20, HIDDEN, outliers="some"), torch.randn(20, HIDDEN, generator=generator(1))

    def gradients(run: Callable, of: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
        x = values.to(dtype).requires_grad_()
        grads = torch.autograd.grad(run(x), (x, of.bias), grad.to(dtype))
        return torch.cat([g.double().flatten() for g in grads])

    twins = {dtype: copy.deepcopy(model).to(dtype) for dtype in (torch.float32, torch.float64)}
    exact, rounded = (gradients(twins[dtype], twins[dtype], dtype) for dtype in (torch.float64, torch.float32))
    int8fx.convert(model)
    eager = gradients(model, model)
    compiled = gradients(torch.compile(model, fullgraph=True, backend=backend), model)
    error, of_eager, of_rounding = (float((g - exact).norm()) for g in (compiled, eager, rounded))
    assert 0 < of_rounding < of_eager < float(exact.norm()) / 10
    assert error <= 1.05 * of_eager + of_rounding
    [report] = int8fx.reports()
    assert (report.linears, report.shared) == (3, 1)
    assert report.folded > 0


@pytest.mark.slow
def test_bfloat16_code_of_inductor_is_within_the_error_of_eager():
    model, inputs = models.llama(num_hidden_layers=1)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(**inputs).logits
        rounded = copy.deepcopy(model).bfloat16()(**inputs).logits
        int8fx.convert(model.bfloat16())
        eager = model(**inputs).logits
        compiled = torch.compile(model, fullgraph=True)(**inputs).logits
    error, of_eager, of_rounding = (float((y.double() - exact).norm()) for y in (compiled, eager, rounded))
    assert compiled.dtype == torch.bfloat16
    assert 0 < error <= 1.05 * of_eager + of_rounding
