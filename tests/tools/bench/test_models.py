"""Whole language models: every case runs, on copies, in the forms that need no compiler."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from support import tiny_models
from transformers import BertConfig, BertModel, LlamaForCausalLM

from int8fx import is_packed
from int8fx.tools.bench import models, products
from int8fx.tools.bench.candidates import (
    BFLOAT16_EAGER,
    BITSANDBYTES,
    FLOAT32,
    FOR_ENCODERS,
    FOR_MODELS,
    INT8FX,
    ONNXRUNTIME_ENCODER,
    ROTATED,
    Candidate,
)
from int8fx.tools.bench.models import HEAD_8, HEAD_16, Subject
from int8fx.tools.bench.settings import Settings
from int8fx.tools.bench.timing import Measured
from int8fx.tools.machine import missing

EAGER_INT8FX, EAGER_FLOAT32 = (replace(candidate, compiles_models=False) for candidate in (INT8FX, FLOAT32))


@pytest.fixture
def tiny_lm():
    return LlamaForCausalLM(tiny_models.lm_config(tie_word_embeddings=False)).bfloat16().eval()


@pytest.fixture
def tiny_encoder():
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertModel(BertConfig(vocab_size=100, **sizes)).bfloat16().eval()


def test_every_case_runs(tiny_lm):
    absent = Candidate("absent", lambda model: model, needs=("no_such_package",))
    contenders = (EAGER_INT8FX, BFLOAT16_EAGER, absent)
    settings = Settings(quick=True, rounds=2)
    subject = Subject("tiny", tiny_lm, models.read(settings, tiny_lm, None))
    cases = list(models.compare(settings, subject, contenders))
    with_logits = [f"forward, {HEAD_16}", f"forward, {HEAD_8}"]
    steps = [f"decode, batch 1, {HEAD_16}", f"decode, batch 1, {HEAD_8}"]
    generation = f"generate(), {models.NEW_TOKENS} tokens, eager"
    assert [case.name for case in cases] == [f"forward, {models.QUICK_TOKENS} tokens", *with_logits, *steps, generation]
    for case in cases:
        assert (case.subject, case.base) == ("tiny", INT8FX.name)
        assert case.measured.pop("absent") == Measured(note="not installed: no_such_package")
        limited = case.name in (*with_logits, generation)
        assert list(case.measured) == ([INT8FX.name] if limited else [INT8FX.name, BFLOAT16_EAGER.name])
        assert all(len(m.values) == 2 and not m.note.startswith("failed") for m in case.measured.values())


def test_decoding_notes_who_is_not_installed(tiny_lm, monkeypatch):
    settings = Settings(rounds=2)
    subject = Subject("tiny", tiny_lm, models.read(Settings(quick=True), tiny_lm, None))
    monkeypatch.setattr(models, "make", lambda *_: subject)
    monkeypatch.setattr(models, "FOR_DECODING", (EAGER_INT8FX, EAGER_FLOAT32))
    monkeypatch.setattr(models, "missing", lambda *names: f"not installed: {', '.join(names)}")
    one, eight = models.decoding(settings)
    assert [one.name, eight.name] == [f"decode, batch {batch}, {HEAD_8}" for batch in (1, 8)]
    for case in (one, eight):
        assert (case.suite, case.base) == ("decoding", INT8FX.name)
        assert all(len(case.measured[name].values) == 2 for name in (INT8FX.name, FLOAT32.name))
        assert case.measured[INT8FX.name].cosine > 0.99
        assert case.measured["llama.cpp Q4_0"] == Measured(note="not installed: llama_cpp")


def test_every_output_is_compared_with_that_of_float32(tiny_lm, tiny_encoder):
    settings = Settings(quick=True, rounds=1)
    names = []
    for model in (tiny_lm, tiny_encoder):
        subject = Subject("tiny", model, models.read(settings, model, None))
        for case in models.compare(settings, subject, (EAGER_INT8FX, EAGER_FLOAT32)):
            names.append(case.name)
            cosines = [m.cosine for m in case.measured.values()]
            if case.name.startswith("generate"):
                assert all(map(math.isnan, cosines))
            else:
                assert 0.99 < cosines[0] < 1
                assert cosines[1] == pytest.approx(1)
    assert names[-1] == "forward, 2 x 22 tokens"


def test_a_decode_step_begins_again_when_the_cache_is_full(tiny_lm):
    max_tokens = models.PROMPT + 3
    with torch.no_grad():
        ids = torch.randint(0, tiny_lm.config.vocab_size, (2, max_tokens + 1))
        step = models.DecodeStep(models.convert_copy(tiny_lm, EAGER_INT8FX), ids, max_tokens)
        first, second = ([step() for _ in range(3)] for _ in range(2))
    assert first[0].shape == (2, 1, 64)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("candidate", FOR_MODELS, ids=lambda candidate: candidate.name)
def test_candidates_convert_copies(candidate, tiny_lm):
    if reason := missing(*candidate.needs):
        pytest.skip(reason)
    before = {name: (p.data_ptr(), p.dtype) for name, p in tiny_lm.named_parameters()}
    converted = models.convert_copy(tiny_lm, candidate)
    assert (converted.heads[HEAD_16] is converted.heads[HEAD_8]) == (not candidate.int8)
    assert {name: (p.data_ptr(), p.dtype) for name, p in tiny_lm.named_parameters()} == before
    layer = converted.decoder.layers[0].mlp.down_proj
    assert is_packed(layer) == is_packed(converted.heads[HEAD_8]) == (candidate in (INT8FX, ROTATED))
    assert (type(layer).__name__ == "Linear8bitLt") == (candidate is BITSANDBYTES)
    assert not is_packed(converted.heads[HEAD_16])
    assert converted.heads[HEAD_16].weight.dtype == candidate.dtype


@pytest.mark.parametrize("candidate", FOR_ENCODERS, ids=lambda candidate: candidate.name)
def test_candidates_compute_the_encoder(candidate, tiny_encoder):
    if reason := missing(*candidate.needs):
        pytest.skip(reason)
    ids = torch.randint(0, 100, (3, 9))
    with torch.no_grad():
        expected = copy.deepcopy(tiny_encoder).double()(input_ids=ids).last_hidden_state
        y = models.convert_copy(tiny_encoder, candidate).decoder(input_ids=ids).last_hidden_state.double()
    error = (y - expected).norm() / expected.norm()
    assert error < (0.2 if candidate is ONNXRUNTIME_ENCODER else 0.05)


def test_random_models_have_the_outliers_of_trained_ones():
    model, _ = models.load(models.SMALL, 1)
    inputs = []
    model.model.layers[0].mlp.gate_proj.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        model(input_ids=torch.randint(0, 49152, (1, 64)))
    outliers = (inputs[0].flatten(0, -2).abs() >= 6).any(0)
    assert outliers.sum() == products.OUTLIERS


@pytest.mark.slow
def test_planted_outliers_are_in_every_linear_layer():
    model, _ = models.load(models.OUTLYING, 2)
    shares = {}
    for name, module in model.model.named_modules():
        if isinstance(module, torch.nn.Linear):

            def observe(module, args, name=name):
                shares[name] = (args[0].flatten(0, -2).abs() >= 6).any(0).double().mean().item()

            module.register_forward_pre_hook(observe)
    with torch.no_grad():
        model(input_ids=torch.randint(0, 1000, (1, 512)))
    assert len(shares) == 14
    assert all(share == pytest.approx(models.SHARE, abs=0.005) for share in shares.values()), shares
