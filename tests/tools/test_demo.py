"""The demo on tiny models, and once on the real one."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
from support.tiny_models import save_encoder, save_lm
from transformers.utils import logging as transformers_logging

from int8fx.tools import cli, demo
from int8fx.tools.data.models import load
from int8fx.tools.decoding import StaticDecoder, greedy
from int8fx.tools.demo import BFLOAT16, COMPILED, FLOAT32, LLM_INT8, ROTATED, Demo

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _dynamo(monkeypatch):
    """Every test compiles afresh; pytest's log capture does not collect torch's structured trace, which is large."""
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)
    yield
    torch._dynamo.reset()


def lines(output: str, start: str) -> list[str]:
    return [line.strip() for line in output.split("\n") if line.strip().startswith(start)]


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_a_language_model_from_a_directory(tmp_path, capsys):
    path = str(save_lm(tmp_path))
    capsys.readouterr()
    comparison = Demo(path, 6.0, "int8 matmuls", tokens=6, quick=False).run()
    captured = capsys.readouterr()
    results, times = comparison.results, comparison.times
    assert list(results) == [FLOAT32, BFLOAT16, LLM_INT8, ROTATED]
    assert results[LLM_INT8].bytes < results[ROTATED].bytes < results[BFLOAT16].bytes < results[FLOAT32].bytes
    assert [r.converted for r in results.values()] == [0, 0, 7, 7]
    assert all(0 < results[label].metrics["KL mean"].value < 0.1 for label in COMPILED)
    assert {what: set(measured) for what, measured in times.items()} == {
        "forward, compiled": set(COMPILED),
        "decode, eager": set(results),
        "decode, compiled": set(COMPILED),
    }
    assert all(m.values and min(m.values) > 0 for measured in times.values() for m in measured.values())
    assert captured.out.count("compiled without a graph break") == 2
    assert "7 of 9 weights" in captured.out
    assert captured.err == ""
    timed = ("forward, eager", *times)
    for title in ("memory, MB", *(f"{what}, ms" for what in timed), "KL to float32, nats", "top-1 as in float32"):
        assert len(lines(captured.out, title)) == 1, title
    sizes = [result.bytes for result in results.values()]
    cells = [f"{size / 1e6:.1f}" for size in sizes] + [f"{size / sizes[1]:.2f}" for size in sizes[2:]]
    assert lines(captured.out, "memory, MB")[0].split()[2:] == cells
    for label in COMPILED:
        assert comparison.texts[label]
        assert lines(captured.out, f"{label}: int8 matmuls ->")


def test_an_encoder_from_a_directory(tmp_path, capsys):
    assert cli.main(["demo", "--model", str(save_encoder(tmp_path)), "--quick"]) == 0
    output = capsys.readouterr().out
    assert lines(output, "1 - cosine to float32")
    assert lines(output, "forward, compiled, ms")
    assert not lines(output, "decode")


def test_a_model_that_does_not_compile_is_named(tmp_path, monkeypatch, capsys):
    def breaks(*args, **kwargs):
        raise torch._dynamo.exc.Unsupported("data-dependent branching\n  and a long explanation")

    monkeypatch.setattr(torch, "compile", lambda model, **options: breaks)
    path = str(save_lm(tmp_path))
    assert cli.main(["demo", "--model", path, "--quick", "--tokens", "4"]) == 1
    said = f"int8fx demo: torch.compile(fullgraph=True) fails on {path!r}: data-dependent branching"
    assert said in capsys.readouterr().err.split("\n")


def test_the_real_model(capsys):
    """SmolLM2-135M from its wheel, with the network or a warm cache. Compiling takes most of the time."""
    run = Demo("smollm2", 6.0, "The capital of France is", tokens=4, quick=True)
    run.rounds, run.compiled = 1, (LLM_INT8,)
    comparison = run.run()
    output, results = capsys.readouterr().out, comparison.results
    assert "210 of 212 weights" in output
    assert "compiled without a graph break" in output
    assert results[FLOAT32].bytes / results[BFLOAT16].bytes == pytest.approx(2, abs=0.001)
    assert results[LLM_INT8].bytes / results[BFLOAT16].bytes == pytest.approx(0.607, abs=0.005)
    assert results[ROTATED].bytes / results[BFLOAT16].bytes == pytest.approx(0.616, abs=0.005)
    kl = {label: results[label].metrics["KL mean"].value for label in COMPILED}
    assert 0.001 < kl[LLM_INT8] < 0.1
    assert kl[ROTATED] < kl[LLM_INT8]
    assert all(results[label].metrics["top-1 agreement"].value > 0.8 for label in COMPILED)
    assert "Paris" in comparison.texts[LLM_INT8]


# ---- parts -----------------------------------------------------------------------------------------------------------


def test_greedy_is_what_generate_does_also_the_second_time(tmp_path):
    model, tokenizer, _ = load(str(save_lm(tmp_path)))
    prompt = tokenizer("int8", return_tensors="pt").input_ids
    with torch.no_grad():
        decoder = StaticDecoder(model, model, prompt, 10)
        expected = model.generate(prompt, max_new_tokens=10, do_sample=False, eos_token_id=None)
        for _ in range(2):
            assert greedy(decoder) == expected[0, prompt.shape[1] :].tolist()


def test_a_full_cache_begins_anew(tmp_path):
    model, tokenizer, _ = load(str(save_lm(tmp_path)))
    prompt = tokenizer("int8", return_tensors="pt").input_ids
    with torch.no_grad():
        decoder = StaticDecoder(model, model, prompt, 3)
        logits = [decoder(torch.tensor([[7]])).logits for _ in range(6)]
    assert torch.equal(torch.stack(logits[:3]), torch.stack(logits[3:]))
    assert not torch.equal(logits[0], logits[1])


def test_the_demo_silences_transformers_and_warnings_only_while_it_runs():
    transformers_logging.enable_progress_bar()
    logger = logging.getLogger("transformers.some.module")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with demo._quiet():
            assert not transformers_logging.is_progress_bar_enabled()
            assert not logger.isEnabledFor(logging.WARNING)
            assert logger.isEnabledFor(logging.ERROR)
            warnings.warn("inside", stacklevel=1)
        assert not caught
        assert transformers_logging.is_progress_bar_enabled()
        assert logger.isEnabledFor(logging.WARNING)
        warnings.warn("after", stacklevel=1)
        assert [str(w.message) for w in caught] == ["after"]
