"""`evaluate` and the command `int8fx eval`: figures that can be computed another way, on tiny models."""

from __future__ import annotations

import copy
import gzip
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.helpers import INF, generator, seeds
from support.tiny_models import save_encoder, save_lm
from torch import nn

import int8fx
from int8fx.schemes import parse_scheme
from int8fx.tools import cli, metrics
from int8fx.tools.data.models import load
from int8fx.tools.data.texts import TextError, read, windows
from int8fx.tools.evaluate import evaluate, float_copy

SCHEMES = {"llm_int8": int8fx.llm_int8(), "rotated": int8fx.rotated(16, 0.05), "plain": int8fx.llm_int8(INF)}


# ---- metrics --------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=12), st.integers(1, 5))
def test_intervals_of_means_lie_between_the_groups_and_hold_the_mean(values, size):
    groups = [torch.full((size,), v, dtype=torch.float64) for v in values]
    mean, low, high = metrics.bootstrap(groups, torch.mean)
    slack = 1e-9 * (1 + max(map(abs, values)))
    assert mean == pytest.approx(sum(values) / len(values), abs=slack)
    assert min(values) - slack <= low <= high <= max(values) + slack
    assert metrics.bootstrap(groups, torch.mean) == (mean, low, high)


def test_intervals_of_equal_groups_have_no_width():
    assert metrics.bootstrap([torch.tensor([1.0, 3.0])] * 5, torch.mean) == (2.0, 2.0, 2.0)


def test_intervals_cover_the_true_mean_as_often_as_they_say():
    g, hits, runs = generator(0), 0, 200
    for _ in range(runs):
        groups = list(torch.randn(24, 1, generator=g))
        _, low, high = metrics.bootstrap(groups, torch.mean, resamples=300)
        hits += low <= 0 <= high
    expected, spread = 0.92, math.sqrt(0.95 * 0.05 / runs)  # of 24 groups, percentile intervals are a little short
    assert abs(hits / runs - expected) < 4 * spread


def test_groups_are_drawn_whole():
    """Values that hang together do not narrow the interval, as many as there are."""
    one = [torch.tensor([float(i)]) for i in range(8)]
    many = [t.expand(100) for t in one]
    assert metrics.bootstrap(one, torch.mean)[1:] == pytest.approx(metrics.bootstrap(many, torch.mean)[1:])


@given(st.integers(2, 9), st.integers(2, 30), seeds)
def test_negative_log_likelihood_is_that_of_the_next_token(T, V, seed):
    logits = torch.randn(T, V, generator=generator(seed))
    ids = torch.randint(V, (T,), generator=generator(seed))
    p = logits.double().softmax(-1)
    expected = [-math.log(p[t, ids[t + 1]]) for t in range(T - 1)]
    assert metrics.negative_log_likelihood(logits, ids).tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)


@given(st.integers(2, 12), st.integers(1, 12), seeds)
def test_a_model_agrees_with_itself_on_neighbours(M, k, seed):
    vectors = torch.randn(M, 8, generator=generator(seed))
    nearest, shared = metrics.retrieval_agreement(vectors, 3 * vectors, k)
    assert nearest.tolist() == [1.0] * M
    assert shared.tolist() == [1.0] * M


def test_neighbours_that_changed_are_counted():
    before = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
    after = before[[0, 2, 1, 3]]
    nearest, shared = metrics.retrieval_agreement(before, after, 1)
    assert nearest.tolist() == shared.tolist() == [0.0] * 4
    assert metrics.retrieval_agreement(before, after, 3)[1].tolist() == [1.0] * 4


# ---- text -----------------------------------------------------------------------------------------------------------


def test_windows_are_full_apart_and_from_every_source(tmp_path):
    tokenizer = load(str(save_lm(tmp_path / "model")))[1]
    (tmp_path / "a").write_text("".join(chr(97 + i % 13) for i in range(2000)))
    (tmp_path / "b").write_text("".join(chr(65 + i % 13) for i in range(2000)))
    measured, apart = windows(tokenizer, [str(tmp_path / "a"), str(tmp_path / "b")], 5, 40, 3)
    assert measured.shape == (5, 40)
    assert apart.shape == (3, 40)
    texts = [tokenizer.decode(ids) for ids in measured]
    assert [t.islower() for t in texts] == [True, True, True, False, False]
    again, _ = windows(tokenizer, [str(tmp_path / "a"), str(tmp_path / "b")], 5, 40, 3)
    assert torch.equal(measured, again)


def test_texts_that_cannot_be_read_or_are_too_short_are_named(tmp_path):
    tokenizer = load(str(save_lm(tmp_path / "model")))[1]
    (tmp_path / "short").write_text("a" * 100)
    with pytest.raises(TextError, match=r"short' is too short for 3 windows of 40 tokens"):
        windows(tokenizer, [str(tmp_path / "short")], 3, 40, 0)
    with pytest.raises(TextError, match=r"cannot read the text .*none'"):
        windows(tokenizer, [str(tmp_path / "none")], 3, 40, 0)
    (tmp_path / "broken.gz").write_bytes(b"no gzip")
    with pytest.raises(TextError, match=r"cannot read the text .*broken\.gz'"):
        windows(tokenizer, [str(tmp_path / "broken.gz")], 3, 40, 0)


def test_compressed_texts_are_read(tmp_path):
    (tmp_path / "text.gz").write_bytes(gzip.compress("ä text".encode()))
    assert read(str(tmp_path / "text.gz")) == "ä text"


# ---- evaluate -------------------------------------------------------------------------------------------------------


def samples(windows: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": ids} for ids in windows.split(1)]


def test_figures_of_a_language_model_are_those_of_the_converted_model(tmp_path):
    model, tokenizer, kind = load(str(save_lm(tmp_path)))
    read, apart = windows(tokenizer, ["pydoc"], 3, 32, 2)
    before = copy.deepcopy(model.state_dict())
    found = evaluate(model, kind, samples(read), SCHEMES, calibration=samples(apart))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert list(found.results) == list(SCHEMES)
    twin = int8fx.convert(float_copy(model), SCHEMES["llm_int8"])
    with torch.no_grad():
        pairs = [(model(input_ids=w).logits[0], twin(input_ids=w).logits[0], w[0]) for w in read.split(1)]
    kl = torch.cat([metrics.kl_divergence(a, b) for a, b, _ in pairs])
    nll = [torch.cat([metrics.negative_log_likelihood(p[i], p[2]) for p in pairs]).mean().item() for i in range(2)]
    measured = found.results["llm_int8"].metrics
    assert measured["KL mean"].value == pytest.approx(kl.mean().item(), rel=1e-5, abs=1e-8)
    assert measured["KL max"].value == pytest.approx(kl.max().item(), rel=1e-5, abs=1e-8)
    assert measured["perplexity"].value == pytest.approx(math.exp(nll[1]), rel=1e-5)
    assert measured["NLL difference"].value == pytest.approx(nll[1] - nll[0], abs=1e-6)
    assert found.reference.metrics["perplexity"].value == pytest.approx(math.exp(nll[0]), rel=1e-5)
    for result in found.results.values():
        assert result.converted == 7
        assert result.bytes < found.reference.bytes
        assert all(e.low <= e.value <= e.high for e in result.metrics.values())


def test_float_copies_share_parameters_and_nothing_else():
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    twin = float_copy(model)
    assert twin[0].weight is model[0].weight
    int8fx.convert(twin)
    assert not int8fx.is_packed(model[0])
    assert model[0].weight.dtype == torch.float32


@pytest.mark.parametrize(("kind", "count", "schemes"), [("tts", 3, SCHEMES), ("lm", 1, SCHEMES), ("lm", 3, {})])
def test_what_cannot_be_evaluated_is_refused(kind, count, schemes):
    with pytest.raises(ValueError, match=r"int8fx\.evaluate: kind .*; legal: lm, encoder, speech, two samples"):
        evaluate(nn.Linear(3, 3), kind, samples(torch.zeros(count, 4, dtype=torch.long)), schemes)


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [save_lm, save_encoder])
def test_the_command_prints_a_table_and_writes_files(save, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    files = [tmp_path / "found.json", tmp_path / "found.png"]
    schemes = ["llm_int8(inf)", "rotated(block=16, budget=0.05)", "rotated(budget=0)"]
    arguments = [part for scheme in schemes for part in ("--scheme", scheme)]
    sizes = ["--windows", "4", "--width", "32", "--calibration", "2"]
    outputs = ["--json", str(files[0]), "--png", str(files[1])]
    assert cli.main(["eval", "--model", str(save(tmp_path / "model")), *sizes, *arguments, *outputs]) == 0
    output = capsys.readouterr().out
    found = json.loads(files[0].read_text())
    first = "KL mean" if save is save_lm else "1 - cosine"
    for scheme in schemes:
        assert len([line for line in output.split("\n") if line.startswith(scheme)]) == 1
        assert found["results"][scheme]["metrics"][first]["value"] >= 0
    assert found["about"]["command"].startswith("int8fx eval --model")
    assert files[1].read_bytes().startswith(b"\x89PNG")


def test_the_command_compares_plans(tmp_path, capsys):
    path, model = tmp_path / "found.json", str(save_lm(tmp_path / "model"))
    sizes = ["--windows", "2", "--width", "32", "--calibration", "2"]
    plans = ["--plan", "1", "--plan", "1.5", "--plan", "3"]
    assert (
        cli.main(["eval", "--model", model, *sizes, "--scheme", "rotated(budget=0)", *plans, "--json", str(path)]) == 0
    )
    output, found = capsys.readouterr().out.split("\n"), json.loads(path.read_text())["results"]
    assert output[0].startswith("plan 1: 7 x Rotated(block=64, budget=0.0")
    assert "7 x 16 bits" in output[2]
    kl = [
        found[label]["metrics"]["KL mean"]["value"] for label in ("rotated(budget=0)", "plan 1", "plan 1.5", "plan 3")
    ]
    assert kl[0] == kl[1] > kl[2] > kl[3] == 0
    assert found["plan 3"]["converted"] == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--plan", "0.9"], "--plan is 0.9 with 8 windows to calibrate; legal: 1 or more, of each"),
        (["--plan", "nan"], "--plan is nan with"),
        (["--plan", "inf"], "--plan is inf with"),
        (["--plan", "1.1", "--calibration", "0"], "--plan is 1.1 with 0 windows to calibrate"),
        (["--scheme", "int4"], "legal: llm_int8(threshold=6, keep=0), rotated(...)"),
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
        assert (
            capsys.readouterr().err.strip().split("\n")[-1].startswith("int8fx.convert: rounding='gptq' knows nothing")
        )
    assert cli.main(["eval", "--model", model, "--width", "97"]) == 1
    assert "--width is 97; " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "scheme"),
    [
        ("llm_int8", int8fx.llm_int8()),
        (" llm_int8( inf )", int8fx.llm_int8(INF)),
        ("llm_int8(3, keep=0.01)", int8fx.llm_int8(3, 0.01)),
        ("rotated", int8fx.rotated()),
        ("rotated(32, columns='dynamic')", int8fx.rotated(32, columns="dynamic")),
        ("rotated(columns=None)", int8fx.rotated(columns=None)),
    ],
)
def test_schemes_are_written_as_in_python(text, scheme):
    assert parse_scheme(text) == scheme


@pytest.mark.parametrize("text", ["", "rotated(", "rotated(size=3)", "open('x')", "rotated(__import__('os'))", "a.b()"])
def test_other_texts_are_no_schemes(text):
    with pytest.raises(ValueError, match="legal: llm_int8"):
        parse_scheme(text)
