"""``int8fx.summary``: every weight, its scheme or why it was not converted, bytes and parameters."""

import copy

import pytest
import torch
from support import models
from support.conversion import SCHEMES
from torch import nn

import int8fx
from int8fx.conversion.format import FORMAT
from int8fx.conversion.summary import Row, Summary


def by_name(model) -> dict[str, Row]:
    rows = {row.name: row for row in int8fx.summary(model).rows}
    assert len(rows) == len(int8fx.summary(model).rows)
    return rows


def small() -> nn.Module:
    model = nn.ModuleDict({
        "embed": nn.Embedding(10, 8), "up": nn.Linear(8, 6), "conv": nn.Conv2d(8, 4, 1), "norm": nn.LayerNorm(8),
        "wide": nn.Conv2d(8, 4, 3), "lm_head": nn.Linear(8, 10, bias=False),
    })  # fmt: skip
    return model.to(torch.bfloat16)


def test_rows_of_a_converted_model():
    model = small()
    int8fx.convert(model)
    assert int8fx.summary(model).rows == (
        Row("up", "Linear", (6, 8), "llm_int8", "", 96, 48 + 24),
        Row("embed", "Embedding", (10, 8), "", "an embedding: rows are looked up, no matmul", 160, 160),
        Row("conv", "Conv2d", (4, 8, 1, 1), "", "a 1x1 convolution: converted if selected", 64, 64),
        Row("wide", "Conv2d", (4, 8, 3, 3), "",
            "a convolution; only 1x1 convolutions without groups or padding are matmuls", 576, 576),
        Row("lm_head", "Linear", (10, 8), "", "the output embeddings: left in 16 bits unless selected", 160, 160),
    )  # fmt: skip


def test_rows_of_a_float_model_are_a_forecast():
    model = small()
    forecast = by_name(model)
    int8fx.convert(model)
    rows = by_name(model)
    assert forecast.keys() == rows.keys()
    for name, row in rows.items():
        before = forecast[name]
        assert (before.kind, before.bytes_before, before.bytes_after) == (row.kind, row.bytes_before, row.bytes_after)
        assert not before.converted
        assert before.reason == ("float (not converted yet)" if row.converted else row.reason)


def test_reasons_after_a_selection():
    model = small()
    int8fx.convert(model, select=["up", "lm_head"], skip="lm_head")
    assert {n: r.reason for n, r in by_name(model).items()} == {
        "up": "", "embed": "an embedding: rows are looked up, no matmul", "conv": "not selected", "lm_head": "skipped",
        "wide": "a convolution; only 1x1 convolutions without groups or padding are matmuls",
    }  # fmt: skip
    int8fx.convert(model, select="conv")
    rows = by_name(model)
    assert {n for n, r in rows.items() if r.converted} == {"up", "conv"}
    assert rows["conv"].shape == (4, 8)
    assert rows["lm_head"].reason == "not selected"


@pytest.mark.parametrize("name", models.ALL)
@pytest.mark.parametrize("select", [None, lambda name, module: True])
@pytest.mark.parametrize("scheme", ["llm_int8", "rotated"])
def test_bytes_and_parameters_are_those_of_the_tensors(name, select, scheme):
    model, _ = models.ALL[name]()
    floats = {id(p): p.nbytes for p in model.parameters() if p.dim() >= 2}
    small_ones = sum(p.nbytes for p in model.parameters() if p.dim() < 2)
    float_buffers, parameters = sum(b.nbytes for b in model.buffers()), sum(p.numel() for p in model.parameters())
    assert (int8fx.summary(model).parameters, int8fx.summary(model).int8_parameters) == (parameters, 0)
    int8fx.convert(model, SCHEMES[scheme], select=select)
    summary = int8fx.summary(model)
    assert summary.bytes_before == sum(floats.values())
    formats = sum(b.nbytes for name, b in model.named_buffers() if name.endswith(FORMAT))
    after = sum(t.nbytes for t in (*model.parameters(), *model.buffers())) - formats
    assert summary.bytes_after == after - small_ones - float_buffers
    assert len(summary.converted) + len(summary.left) == len(summary.rows)
    assert all(row.converted == (row.reason == "") == bool(row.scheme) for row in summary.rows)
    assert summary.parameters == parameters
    assert summary.int8_parameters == sum(p.numel() for p in model.parameters() if p.dtype == torch.int8)


def test_tied_weights_count_once():
    model, _ = models.tied_lm()
    int8fx.convert(model, select=lambda name, module: True)
    rows = by_name(model)
    assert rows["embed"].bytes_before == 96 * 64 * 4
    assert rows["embed"].bytes_after == 96 * 64 + 96 * 4
    assert (rows["lm_head"].bytes_before, rows["lm_head"].bytes_after) == (0, 0)
    float_rows = by_name(models.tied_lm()[0])
    assert sum(r.bytes_before for r in float_rows.values()) == sum(r.bytes_before for r in rows.values())


def test_text():
    model = nn.ModuleDict({"up": nn.Linear(8, 6), "embed": nn.Embedding(1000, 8)})
    int8fx.convert(model, int8fx.rotated(columns=0))
    assert str(int8fx.summary(model)) == (
        "layer  module     shape   scheme, or why not                           bytes before   after\n"
        "up     Linear     6x8     rotated(columns=0.0)                                  192      72\n"
        "embed  Embedding  1000x8  an embedding: rows are looked up, no matmul        32,000  32,000\n"
        "1 of 2 weights converted, 48 of 8,054 parameters; weights: 32,192 -> 32,072 bytes"
    )


def test_every_layer_names_its_scheme():
    model = nn.ModuleDict({"a": nn.Linear(8, 6), "b": nn.Linear(8, 6), "c": nn.Linear(8, 6)})
    for name, scheme in {"a": int8fx.weight_only(), "b": int8fx.rotated(32), "c": int8fx.llm_int8(3.0, 0.5)}.items():
        int8fx.convert(model, scheme, select=name)
    schemes = {row.name: row.scheme for row in int8fx.summary(model).rows}
    assert schemes == {"a": "weight_only", "b": "rotated(block=32)", "c": "llm_int8(threshold=3.0, columns=0.5)"}


def test_unquantised_columns_count():
    model = nn.Sequential(nn.Linear(60, 24, bias=False))
    int8fx.convert(model, int8fx.rotated(columns=0.05))
    (row,) = int8fx.summary(model).rows
    assert row.bytes_after == 24 * 60 + 24 * 4 + 3 * 8 + 24 * 3 * 4


def test_a_model_without_weights():
    summary = int8fx.summary(nn.ReLU())
    assert summary == Summary(())
    assert str(summary).endswith("0 of 0 weights converted, 0 of 0 parameters; weights: 0 -> 0 bytes")


def test_the_model_is_left_alone():
    model, _ = models.mixtral()
    before = {n: (type(m), dict(vars(m))) for n, m in model.named_modules()}
    int8fx.summary(model)
    assert {n: (type(m), dict(vars(m))) for n, m in model.named_modules()} == before


def test_meta_and_lazy_models():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 4))
    assert by_name(model)["0"].bytes_before == 128
    assert int8fx.summary(nn.Sequential(nn.LazyLinear(4))) == Summary(())


def test_other_objects_are_refused():
    with pytest.raises(TypeError, match=r"found dict; legal: nn\.Module, torch\.fx\.GraphModule, torch\.export"):
        int8fx.summary({})


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.w, self.gain = nn.Linear(8, 6), nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(1, 4))

    def forward(self, x):
        return self.up(x) @ self.w * self.gain


@pytest.mark.parametrize("kind", ["symbolic", "exported", "unlifted"])
def test_graphs(kind):
    model, x = Two().bfloat16(), torch.randn(2, 8).bfloat16()
    program = torch.fx.symbolic_trace(model) if kind == "symbolic" else torch.export.export(model, (x,))
    program = program.module() if kind == "unlifted" else program
    forecast = by_name(program)
    assert {n: r.reason for n, r in forecast.items()} == {
        "up": "float (not converted yet)", "w": "float (not converted yet)", "gain": "not the weight of a matmul",
    }  # fmt: skip
    int8fx.convert(program)
    for converted in (program, copy.deepcopy(program)):
        rows = by_name(converted)
        assert (int8fx.summary(converted).parameters, int8fx.summary(converted).int8_parameters) == (82, 72)
        assert {n for n, r in rows.items() if r.converted} == {"up", "w"}
        assert {n: (r.shape, r.bytes_before, r.bytes_after) for n, r in rows.items()} == {
            "up": ((6, 8), 96, 72), "w": ((4, 6), 48, 40), "gain": ((1, 4), 8, 8),
        }  # fmt: skip
        assert rows["gain"].reason == "not the weight of a matmul"
    assert {n: r.bytes_after for n, r in forecast.items()} == {n: r.bytes_after for n, r in by_name(program).items()}
