"""The warning that most of a model stays as it is."""

import re
import warnings

import pytest
import torch
from support import models
from torch import nn

import int8fx


def warned(model: nn.Module, **arguments) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        int8fx.convert(model, **arguments)
    return [str(w.message) for w in caught if issubclass(w.category, UserWarning) and "int8fx" in str(w.message)]


def model_of(*layers: nn.Module) -> nn.Module:
    """The layers, and a linear layer with 100 weights."""
    return nn.ModuleList([nn.Linear(10, 10), *layers])


LEFT = {
    "convolutions": model_of(nn.Conv2d(4, 4, 3), nn.Conv1d(4, 5, 2)),
    "bilinear": model_of(nn.Bilinear(3, 3, 12)),
    "in all": model_of(nn.Conv2d(4, 4, 2), nn.Bilinear(3, 3, 5)),
}


@pytest.mark.parametrize("what", LEFT)
def test_a_model_that_mostly_stays(what):
    (warning,) = warned(LEFT[what])
    left = int8fx.summary(LEFT[what]).left
    largest = max(left, key=lambda row: row.bytes_before)
    total = sum(row.bytes_before for row in int8fx.summary(LEFT[what]).rows)
    share = 100 * sum(row.bytes_before for row in left) / total
    assert share > 50
    assert warning == (
        f"int8fx.convert: {share:.0f} % of the weight bytes beside embeddings and heads stay as they are. The largest "
        f"is {largest.name} {list(largest.shape)}: {largest.reason}. int8fx.summary(model) lists all"
    )


FINE = {
    "half": model_of(nn.Bilinear(5, 5, 4)),
    "embeddings": model_of(nn.Embedding(100, 10)),
    "frozen layers and an adapter": model_of(nn.Linear(10, 30)),
    "a module twice": nn.ModuleList([nn.Linear(10, 10), *[nn.Bilinear(5, 5, 3)] * 2]),
}
FINE["frozen layers and an adapter"][0].requires_grad_(False)


@pytest.mark.parametrize("what", FINE)
def test_a_model_that_mostly_does_not(what):
    assert warned(FINE[what]) == []


def test_heads_do_not_count():
    model = nn.ModuleDict({"linear": nn.Linear(10, 10), "lm_head": nn.Linear(10, 100), "score": nn.Linear(10, 100)})
    assert warned(model) == []


def test_who_selects_or_skips_is_not_told():
    def model():
        return model_of(nn.Conv2d(4, 4, 3))

    assert warned(model(), select="0") == []
    assert warned(model(), skip="1") == []
    (warning,) = warned(model(), skip="0")
    assert "no layer was converted" in warning


def test_graphs_are_told_too():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.linear = nn.Conv1d(4, 4, 3), nn.Linear(4, 4)

        def forward(self, x):
            return self.linear(self.conv(x))

    (warning,) = warned(torch.export.export(Both(), (torch.randn(2, 4, 6),)))
    assert re.search(r"75 % .* The largest is conv \[4, 4, 3\]: not the weight of a matmul", warning)


@pytest.mark.parametrize("name", models.ALL)
def test_models_are_mostly_converted(name):
    assert warned(models.ALL[name]()[0]) == []
