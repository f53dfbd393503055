"""`inspect` and the command `int8fx inspect`: planted outliers are found, errors are those of the converted layer."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from support.helpers import generator
from support.tiny_models import save_lm
from torch import nn

import int8fx
from int8fx.calibration.calibrate import calibrate
from int8fx.conversion.format import FORMAT
from int8fx.tools import cli
from int8fx.tools.inspection import inspect

SCHEMES = {"llm_int8": int8fx.llm_int8(), "rotated": int8fx.rotated(16, 0.05), "plain": int8fx.rotated(columns=0)}
K = 60


def model_and_batches() -> tuple[nn.Module, list[torch.Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(K, 40), nn.ReLU(), nn.Linear(40, 8, bias=False))
    batches = [torch.randn(5, K, generator=generator(i)).clamp(-4, 4) for i in range(2)]
    for x in batches:
        x[:, 7] = 30.0
    batches[0][2, 50] = -100.0
    return model, batches


def test_planted_outliers_are_found_with_their_share_and_size():
    model, batches = model_and_batches()
    first, second = inspect(model, batches, SCHEMES).layers
    assert (first.name, first.shape, first.rows) == ("0", (40, K), 10)
    assert [(o.column, o.share, o.absmax) for o in first.outliers] == [(7, 1.0, 30.0), (50, 0.1, 100.0)]
    assert first.absmax[7] == 30
    assert second.shape == (8, 40)
    assert inspect(model, batches, SCHEMES, threshold=1000.0).layers[0].outliers == []


def test_unquantised_columns_are_those_of_the_converted_model():
    model, batches = model_and_batches()
    before = copy.deepcopy(model.state_dict())
    calibration = calibrate(model, batches)
    inspection = inspect(model, batches, SCHEMES, calibration=calibration)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    for label, scheme in SCHEMES.items():
        twin = int8fx.convert(copy.deepcopy(model), scheme, calibration=calibration)
        state = twin.state_dict()
        for layer in inspection.layers:
            columns, weights = layer.buffers
            assert layer.columns.get(label) == (state[columns].tolist() if columns in state else None)
            assert (weights in state) == (label in layer.columns)
            buffers = [t for k, t in state.items() if k.startswith(f"{layer.name}.weight") and FORMAT not in k]
            assert layer.bytes[label] == sum(t.nbytes for t in buffers)
            assert layer.bytes["float"] == model.get_submodule(layer.name).weight.nbytes
    assert set(inspection.layers[0].columns["rotated"]) >= {7, 50}


def test_errors_are_those_of_the_matmuls_alone():
    model, batches = model_and_batches()
    calibration = calibrate(model, batches)
    inspection = inspect(model, batches, SCHEMES, calibration=calibration)
    with torch.no_grad():
        inputs = [batches, [model[1](model[0](x)) for x in batches]]
        for label, scheme in SCHEMES.items():
            twin = int8fx.convert(copy.deepcopy(model), scheme, calibration=calibration)
            for i, layer in enumerate(inspection.layers):
                float_layer, int8_layer = (copy.deepcopy(m[2 * i]) for m in (model, twin))
                float_layer.bias = int8_layer.bias = None
                exact = torch.cat([x.double() @ float_layer.weight.double().T for x in inputs[i]])
                y = torch.cat([int8_layer(x) for x in inputs[i]])
                assert layer.error[label] == pytest.approx(((y - exact).norm() / exact.norm()).item(), rel=1e-5)


def test_layers_that_no_batch_reaches_are_left_out():
    model, batches = model_and_batches()
    model.unused = nn.Linear(3, 3)
    assert len(inspect(model[:3], batches, SCHEMES).layers) == 2
    with pytest.raises(ValueError, match="no batches"):
        inspect(model, [], SCHEMES)
    with pytest.raises(ValueError, match="no layer of the model in these batches"):
        inspect(nn.ReLU(), batches, SCHEMES)


def test_the_command_prints_a_table_and_writes_files(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    files = [tmp_path / "inspection.json", tmp_path / "inspection.png"]
    sizes = ["--windows", "2", "--width", "32", "--calibration", "2", "--threshold", "2"]
    schemes = ["--scheme", "llm_int8", "--scheme", "rotated(16)", "--scheme", "rotated(16, rounding='gptq')"]
    outputs = ["--json", str(files[0]), "--png", str(files[1])]
    assert cli.main(["inspect", "--model", str(save_lm(tmp_path / "model")), *sizes, *schemes, *outputs]) == 0
    output, written = capsys.readouterr().out, json.loads(files[0].read_text())
    assert [layer["name"] for layer in written["layers"]] == [
        line.split()[0] for line in output.split("\n") if line.startswith("model.layers.")
    ]
    assert len(written["layers"]) == 7
    assert all(0 < layer["error"]["rotated(16)"] < 0.05 for layer in written["layers"])
    assert files[1].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("threshold", [0.0, 6.0, 1e3, float("inf")])
def test_pictures_of_all_columns_and_of_none(threshold, tmp_path):
    pytest.importorskip("matplotlib")
    from int8fx.tools.plots import draw_inspection

    model, batches = model_and_batches()
    draw_inspection(inspect(model, batches, SCHEMES, threshold=threshold), tmp_path / "inspection.png")
    assert (tmp_path / "inspection.png").read_bytes().startswith(b"\x89PNG")


def test_other_thresholds_are_explained(capsys):
    with pytest.raises(SystemExit):
        cli.main(["inspect", "--threshold", "nan"])
    assert "--threshold is nan; legal: 0 or more" in capsys.readouterr().err
