"""Whole language models: every case runs, on copies, in the forms that need no compiler."""

from dataclasses import replace

import pytest
import torch
from support import tiny_models
from transformers import LlamaForCausalLM

from int8fx import is_packed
from int8fx.tools.bench import models, products
from int8fx.tools.bench.candidates import BFLOAT16_EAGER, BITSANDBYTES, FOR_MODELS, INT8FX, Candidate
from int8fx.tools.bench.models import HEAD_8, HEAD_16
from int8fx.tools.bench.settings import Settings
from int8fx.tools.bench.timing import Measured
from int8fx.tools.machine import missing

EAGER_INT8FX = replace(INT8FX, compiles_models=False)


@pytest.fixture
def tiny_lm():
    return LlamaForCausalLM(tiny_models.lm_config(tie_word_embeddings=False)).bfloat16().eval()


def test_every_case_runs(tiny_lm):
    absent = Candidate("absent", lambda model: model, needs=("no_such_package",))
    contenders = (EAGER_INT8FX, BFLOAT16_EAGER, absent)
    cases = list(models.compare(Settings(quick=True, rounds=2), tiny_lm, "tiny", contenders))
    with_logits = [f"forward, {HEAD_16}", f"forward, {HEAD_8}"]
    steps = [f"decode, batch 1, {HEAD_16}", f"decode, batch 1, {HEAD_8}"]
    generation = f"generate(), {models.NEW_TOKENS} tokens, eager"
    assert [case.name for case in cases] == [f"forward, {models.QUICK_TOKENS} tokens", *with_logits, *steps, generation]
    for case in cases:
        assert (case.subject, case.base) == ("tiny", INT8FX.name)
        assert case.measured.pop("absent") == Measured(note="not installed: no_such_package")
        limited = case.name in (*with_logits, generation)
        assert list(case.measured) == ([INT8FX.name] if limited else [INT8FX.name, BFLOAT16_EAGER.name])
        assert all(len(m.values) == 2 and not m.note for m in case.measured.values())


def test_a_decode_step_begins_again_when_the_cache_is_full(tiny_lm):
    max_tokens = models.PROMPT + 3
    with torch.no_grad():
        step = models.decode_step(models.convert_copy(tiny_lm, EAGER_INT8FX), 2, max_tokens)
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
    assert is_packed(layer) == is_packed(converted.heads[HEAD_8]) == (candidate is INT8FX)
    assert (type(layer).__name__ == "Linear8bitLt") == (candidate is BITSANDBYTES)
    assert not is_packed(converted.heads[HEAD_16])


def test_random_models_have_the_outliers_of_trained_ones():
    model = models.load(models.SMALL, 1)
    inputs = []
    model.model.layers[0].mlp.gate_proj.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        model(input_ids=torch.randint(0, 49152, (1, 64)))
    outliers = (inputs[0].flatten(0, -2).abs() >= 6).any(0)
    assert outliers.sum() == products.OUTLIERS
