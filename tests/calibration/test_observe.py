"""`observe`: the rows that each spelling of a matmul gives to its weight."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.helpers import generator
from torch import Tensor, nn

from int8fx.calibration.calibrate import calibrate
from int8fx.calibration.observe import observe

K, N = 12, 8


class Bare(nn.Module):
    """A Parameter ``w [N, K]`` and a function that multiplies by it."""

    def __init__(self, matmul: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(N, K, generator=generator(0)))
        self.matmul = matmul

    def forward(self, x: Tensor) -> Tensor:
        return self.matmul(x, self.w)


def rows_of(model: nn.Module, *inputs: Tensor) -> dict[str, list[Tensor]]:
    rows: dict[str, list[Tensor]] = {}
    with torch.no_grad(), observe(model, lambda name, x: rows.setdefault(name, []).append(x.clone())):
        model(*inputs)
    return rows


MATMULS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "F.linear": F.linear,
    "@": lambda x, w: x @ w.T,
    "einsum": lambda x, w: torch.einsum("bk,nk->bn", x, w),
    "weight on the left": lambda x, w: (w @ x.T).T,
    "addmm": lambda x, w: torch.addmm(torch.zeros(N), x, w.T),
    "bmm": lambda x, w: torch.bmm(x[None], w.T[None])[0],
    "a slice of the weight": lambda x, w: x @ w[2:5].T,
}


@pytest.mark.parametrize("name", MATMULS)
def test_every_spelling_gives_the_rows_of_x(name):
    x = torch.randn(5, K, generator=generator(1))
    (rows,) = rows_of(Bare(MATMULS[name]), x)["w"]
    assert torch.equal(rows, x)


def test_a_vector_is_one_row():
    x = torch.randn(K, generator=generator(1))
    assert torch.equal(rows_of(Bare(lambda x, w: w @ x), x)["w"][0], x[None])


def test_a_row_of_a_convolution_is_a_position():
    x = torch.randn(2, K, 3, 4, generator=generator(1))
    (rows,) = rows_of(nn.Sequential(nn.Conv2d(K, N, 1)), x)["0"]
    assert torch.equal(rows, x.permute(0, 2, 3, 1).reshape(-1, K))


def test_matmuls_without_a_weight_and_elementwise_uses_are_not_observed():
    assert rows_of(Bare(lambda x, w: (x @ x.T) * w.sum()), torch.randn(5, K)) == {}


def test_layers_that_share_a_weight_see_the_inputs_of_each():
    model = nn.Sequential(nn.Linear(K, K, bias=False), nn.Linear(K, K, bias=False))
    model[1].weight = model[0].weight
    x = torch.randn(3, K, generator=generator(1))
    rows = rows_of(model, x)
    (name,) = rows.keys() - {"1"}
    assert torch.equal(torch.stack(rows[name])[0], x)
    assert len(rows[name]) == 2


def test_after_the_context_nothing_is_observed():
    model, x, names = nn.Linear(K, N), torch.randn(3, K), []
    with observe(model, lambda name, _: names.append(name)):
        model(x)
    model(x)
    assert names == ["weight"]


def test_inference_mode_hides_no_matmul():
    model, batches = nn.Sequential(nn.Linear(K, N), nn.ReLU(), nn.Linear(N, 4)), [torch.randn(5, K) for _ in range(2)]
    expected = calibrate(model, batches)
    with torch.inference_mode():
        calibration = calibrate(model, batches)
    assert calibration.rows == expected.rows
    assert all(torch.equal(absmax, expected.absmax[name]) for name, absmax in calibration.absmax.items())


def test_weights_in_one_storage_are_told_apart():
    """As where a framework keeps all Parameters in one flat tensor."""
    flat = torch.randn(3, N, K, generator=generator(0))
    model = nn.ModuleList(nn.Linear(K, N, bias=False) for _ in range(3))
    for layer, weight in zip(model, flat, strict=True):
        layer.weight = nn.Parameter(weight)
    seen: list[str] = []
    with torch.no_grad(), observe(model, lambda name, _: seen.append(name)):
        for i in (1, 2, 0):
            model[i](torch.ones(2, K))
    assert seen == ["1", "2", "0"]
