"""`evaluate` and the command `int8fx eval`: their figures against the converted model's, on tiny models."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from support.tiny_models import save_encoder, save_lm
from torch import nn

import int8fx
from int8fx.tools import cli, metrics
from int8fx.tools.data.models import load
from int8fx.tools.data.texts import windows
from int8fx.tools.evaluate import count_bytes, evaluate, float_copy

SCHEMES = {"llm_int8": int8fx.llm_int8(), "rotated": int8fx.rotated(16, 0.05), "plain": int8fx.plain()}


def samples(windows: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": ids} for ids in windows.split(1)]


def test_figures_of_a_language_model_are_those_of_the_converted_model(tmp_path):
    model, tokenizer, kind = load(str(save_lm(tmp_path)))
    measured, calibrating = windows(tokenizer, ["pydoc"], 3, 32, 2)
    before = copy.deepcopy(model.state_dict())
    evaluation = evaluate(model, kind, samples(measured), SCHEMES, calibration=samples(calibrating))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert list(evaluation.results) == list(SCHEMES)
    twin = int8fx.convert(float_copy(model), SCHEMES["llm_int8"])
    with torch.no_grad():
        pairs = [(model(input_ids=w).logits[0], twin(input_ids=w).logits[0], w[0]) for w in measured.split(1)]
    kl = torch.cat([metrics.kl_divergence(a, b) for a, b, _ in pairs])
    nll = [torch.cat([metrics.negative_log_likelihood(p[i], p[2]) for p in pairs]).mean().item() for i in range(2)]
    figures = evaluation.results["llm_int8"].metrics
    assert figures["KL mean"].value == pytest.approx(kl.mean().item(), rel=1e-5, abs=1e-8)
    assert figures["KL max"].value == pytest.approx(kl.max().item(), rel=1e-5, abs=1e-8)
    assert figures["perplexity"].value == pytest.approx(math.exp(nll[1]), rel=1e-5)
    assert figures["NLL difference"].value == pytest.approx(nll[1] - nll[0], abs=1e-6)
    assert evaluation.reference.metrics["perplexity"].value == pytest.approx(math.exp(nll[0]), rel=1e-5)
    for result in evaluation.results.values():
        assert result.converted == 7
        assert result.bytes < evaluation.reference.bytes
        assert all(e.low <= e.value <= e.high for e in result.metrics.values())


def test_equalised_figures_are_those_of_the_equalised_model(tmp_path):
    model, tokenizer, kind = load(str(save_lm(tmp_path)))
    measured, calibrating = (samples(ids) for ids in windows(tokenizer, ["pydoc"], 2, 32, 2))
    before = copy.deepcopy(model.state_dict())
    schemes = {"int4": int8fx.weight_only("int4_clip", 16), "rotated": int8fx.rotated(16, 0.05)}
    evaluation = evaluate(model, kind, measured, schemes, calibration=calibrating, equalize_by=["awq", "teq"])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert list(evaluation.results) == ["int4", "rotated", "awq + int4", "teq + int4"]
    twin = copy.deepcopy(model)
    statistics = int8fx.equalize(twin, calibrating, schemes["int4"], algorithm="awq")
    int8fx.convert(twin, schemes["int4"], calibration=statistics)
    with torch.no_grad():
        kl = [metrics.kl_divergence(model(**sample).logits[0], twin(**sample).logits[0]) for sample in measured]
    figures = {label: result.metrics["KL mean"].value for label, result in evaluation.results.items()}
    assert figures["awq + int4"] == pytest.approx(torch.cat(kl).mean().item(), rel=1e-4)
    assert figures["awq + int4"] != figures["int4"]


@pytest.mark.parametrize(("count", "scheme"), [(0, int8fx.weight_only()), (1, int8fx.rotated(16))])
def test_equalising_needs_data_and_a_scheme_that_it_takes(tmp_path, count, scheme):
    model, tokenizer, kind = load(str(save_lm(tmp_path)))
    measured, _ = (samples(ids) for ids in windows(tokenizer, ["pydoc"], 2, 32, 2))
    with pytest.raises(ValueError, match=r"equalize_by is awq with .* legal: 1 or more, of each"):
        evaluate(model, kind, measured, {"scheme": scheme}, calibration=measured[:count], equalize_by=["awq"])


def test_figures_of_an_encoder_are_those_of_the_converted_model(tmp_path):
    model, tokenizer, kind = load(str(save_encoder(tmp_path)))
    measured, _ = windows(tokenizer, ["pydoc"], 3, 32, 0)
    evaluation = evaluate(model, kind, samples(measured), {"plain": int8fx.plain()})
    twin = int8fx.convert(float_copy(model), int8fx.plain())
    with torch.no_grad():
        vectors = [m(input_ids=measured).last_hidden_state.mean(1) for m in (model, twin)]
    distance = metrics.cosine_distance(*vectors)
    figures = evaluation.results["plain"].metrics
    assert figures["1 - cosine"].value == pytest.approx(distance.mean().item(), rel=1e-3)
    assert figures["1 - cosine max"].value == pytest.approx(distance.max().item(), rel=1e-3)
    assert figures["nearest same"].value == metrics.retrieval_agreement(*vectors)[0].mean().item()
    assert evaluation.reference.metrics == {}


def test_the_calibration_windows_choose_the_columns(tmp_path):
    """The figures are those of a model that was converted with a calibration, and not those of one without."""
    model, tokenizer, kind = load(str(save_lm(tmp_path)))
    measured, calibrating = windows(tokenizer, ["pydoc"], 2, 32, 2)
    scheme = int8fx.rotated(16, 0.05)

    def kl(twin: nn.Module) -> float:
        pairs = [(model(input_ids=w).logits[0], twin(input_ids=w).logits[0]) for w in measured.split(1)]
        return torch.cat([metrics.kl_divergence(a, b) for a, b in pairs]).mean().item()

    calibration = int8fx.calibrate(model, samples(calibrating), progress=False)
    evaluation = evaluate(model, kind, samples(measured), {"rotated": scheme}, calibration=samples(calibrating))
    value = evaluation.results["rotated"].metrics["KL mean"].value
    with torch.no_grad():
        calibrated = kl(int8fx.convert(float_copy(model), scheme, calibration=calibration))
        by_weights = kl(int8fx.convert(float_copy(model), scheme))
    assert value == pytest.approx(calibrated, rel=1e-5)
    assert value != pytest.approx(by_weights, rel=1e-5)


def test_tied_weights_count_once(tmp_path):
    model = load(str(save_lm(tmp_path)))[0]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tensors = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}
    assert count_bytes(model.parameters(), model.buffers()) == sum(tensors.values())
    x = torch.zeros(10)
    assert count_bytes([x, x[2:]], [x.view(2, 5)]) == 40


def test_float_copies_share_parameters_and_nothing_else():
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    twin = float_copy(model)
    assert twin[0].weight is model[0].weight
    int8fx.convert(twin)
    assert not int8fx.is_packed(model[0])
    assert model[0].weight.dtype == torch.float32


@pytest.mark.parametrize(("kind", "count", "schemes"), [("tts", 3, SCHEMES), ("lm", 1, SCHEMES), ("lm", 3, {})])
def test_what_cannot_be_evaluated_is_refused(kind, count, schemes):
    with pytest.raises(ValueError, match=r"int8fx\.tools\.evaluate: kind .*; legal: lm, encoder, two samples"):
        evaluate(nn.Linear(3, 3), kind, samples(torch.zeros(count, 4, dtype=torch.long)), schemes)


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [save_lm, save_encoder])
def test_the_command_prints_a_table_and_writes_files(save, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    files = [tmp_path / "evaluation.json", tmp_path / "evaluation.png"]
    schemes = ["plain", "rotated(block=16, columns=0.05)", "rotated(columns=0)"]
    arguments = [part for scheme in schemes for part in ("--scheme", scheme)]
    sizes = ["--windows", "4", "--width", "32", "--calibration", "2"]
    outputs = ["--json", str(files[0]), "--png", str(files[1])]
    assert cli.main(["eval", "--model", str(save(tmp_path / "model")), *sizes, *arguments, *outputs]) == 0
    output = capsys.readouterr().out
    written = json.loads(files[0].read_text())
    first = "KL mean" if save is save_lm else "1 - cosine"
    for scheme in schemes:
        assert len([line for line in output.split("\n") if line.startswith(scheme)]) == 1
        assert written["results"][scheme]["metrics"][first]["value"] > 0
    assert written["about"]["command"].startswith("int8fx eval --model")
    assert files[1].read_bytes().startswith(b"\x89PNG")


def test_the_command_compares_plans(tmp_path, capsys):
    path, model = tmp_path / "evaluation.json", str(save_lm(tmp_path / "model"))
    sizes = ["--windows", "2", "--width", "32", "--calibration", "2"]
    plans = ["--plan", "1", "--plan", "1.5", "--plan", "3"]
    assert (
        cli.main(["eval", "--model", model, *sizes, "--scheme", "rotated(columns=0)", *plans, "--json", str(path)]) == 0
    )
    output, results = capsys.readouterr().out.split("\n"), json.loads(path.read_text())["results"]
    assert output[0].startswith("plan 1: 7 x rotated(columns=0.0); ")
    assert "7 x 16 bits" in output[2]
    kl = [
        results[label]["metrics"]["KL mean"]["value"]
        for label in ("rotated(columns=0)", "plan 1", "plan 1.5", "plan 3")
    ]
    assert kl[0] == kl[1] > kl[2] > kl[3] == 0
    assert results["plan 3"]["converted"] == 0


def test_plans_choose_among_schemes_of_4_and_8_bits(tmp_path, capsys):
    model, among = str(save_lm(tmp_path)), ["--among", "weight_only('int4_clip', 32)", "--among", "llm_int8"]
    sizes = ["--windows", "2", "--width", "32", "--calibration", "2", "--scheme", "plain"]
    assert cli.main(["eval", "--model", model, *sizes, "--plan", "1", "--plan", "1.4", *among]) == 0
    first, second = capsys.readouterr().out.split("\n")[:2]
    assert first.startswith("plan 1: 7 x weight_only(dtype='int4_clip', group_size=32); ")
    assert "x weight_only(" in second
    assert "x llm_int8" in second


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--among", "plain"], "--among has no --plan"),
        (["--plan", "2", "--among", "int4"], "legal: llm_int8(threshold=6, columns=0), rotated(...)"),
        (["--plan", "0.9"], "--plan is 0.9 with 8 windows to calibrate; legal: 1 or more, of each"),
        (["--plan", "nan"], "--plan is nan with"),
        (["--plan", "inf"], "--plan is inf with"),
        (["--plan", "1.1", "--calibration", "0"], "--plan is 1.1 with 0 windows to calibrate"),
        (["--scheme", "int4"], "legal: llm_int8(threshold=6, columns=0), rotated(...)"),
        (["--scheme", "rotated(block=3)"], "block must be a power of two"),
        (["--windows", "1"], "--windows is 1; legal: 2 or more"),
        (["--calibration", "-1"], "--calibration is -1; legal: 0 or more"),
        (["--json", "no/such/folder/x.json"], "x.json cannot be written: there is no folder no/such/folder"),
        (["--png", "."], ". cannot be written: it is a folder"),
    ],
)
def test_wrong_arguments_are_explained(arguments, said, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["eval", *arguments])
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


def test_what_eval_needs_is_named(monkeypatch, capsys):
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "matplotlib" else object())
    assert cli.main(["eval", "--png", "x.png"]) == 1
    assert capsys.readouterr().err == 'int8fx eval needs matplotlib: pip install "int8fx[eval]"\n'


def test_models_and_texts_that_cannot_be_had_end_in_a_line(tmp_path, capsys):
    assert cli.main(["eval", "--model", str(tmp_path / "none")]) == 1
    assert capsys.readouterr().err.startswith("int8fx eval: cannot load")
    text = ["--width", "32", "--text", str(tmp_path / "none")]
    assert cli.main(["eval", "--model", str(save_lm(tmp_path / "model")), *text]) == 1
    assert "int8fx eval: cannot read the text" in capsys.readouterr().err


def test_what_int8fx_refuses_ends_in_a_line(tmp_path, capsys):
    model, sizes = str(save_lm(tmp_path / "model")), ["--windows", "2", "--width", "32"]
    gptq = ["--scheme", "rotated(rounding='gptq')", "--calibration", "0"]
    for command in ("eval", "inspect"):
        assert cli.main([command, "--model", model, *sizes, *gptq]) == 1
        last = capsys.readouterr().err.strip().split("\n")[-1]
        assert last.startswith("int8fx.convert: rotated(rounding='gptq') needs moments of the inputs of layer ")
    assert cli.main(["eval", "--model", model, "--width", "97"]) == 1
    assert "--width is 97; " in capsys.readouterr().err
