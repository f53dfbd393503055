"""Bytes of a converted model, and those of a separate process."""

import pytest
import torch
from rich.console import Console
from support import tiny_models
from transformers import LlamaForCausalLM

from int8fx.tools.bench import memory, models, report
from int8fx.tools.bench.candidates import BFLOAT16, INT8FX


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_bytes_of_a_converted_model(tied):
    """Counted by hand; the peak is only there."""
    model = LlamaForCausalLM(tiny_models.lm_config(tie_word_embeddings=tied)).bfloat16().eval()
    linears = [m.weight.shape for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    unique = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    expected = sum(unique.values()) - sum(N * K - 4 * N for N, K in linears)
    result = memory.bytes_of(model, 8, convert=True)
    assert result[memory.IDEAL] == expected
    assert result[memory.BYTES] <= 1.02 * expected
    assert result[memory.PEAK] > 0


def test_bytes_are_compared_with_the_ideal_and_the_peak_with_bfloat16(capsys):
    plain = {memory.BYTES: 60.0, memory.LIVE: 65.0, memory.PEAK: 90.0}
    converted = {memory.BYTES: 30.0, memory.LIVE: 35.0, memory.PEAK: 45.0, memory.IDEAL: 25.0}
    cases = list(memory.cases({BFLOAT16.name: plain, INT8FX.name: converted}, "tiny", 8, 1))
    assert [case.name for case in cases] == [memory.BYTES, memory.LIVE, f"{memory.PEAK}, 8 tokens"]
    assert [case.ratio(INT8FX.name) for case in cases] == [1.2, 1.4, 0.5]
    report.show(Console(width=200), cases)
    assert "1.200x" in capsys.readouterr().out


def test_a_process_that_failed_is_noted():
    failed = {"note": "failed: MemoryError"}
    for case in memory.cases({BFLOAT16.name: {memory.BYTES: 60.0}, INT8FX.name: failed}, "tiny", 8, 1):
        assert case.measured[INT8FX.name].note == "failed: MemoryError"
        assert not case.measured[INT8FX.name].values


@pytest.mark.slow
def test_a_process_reports_its_memory():
    result = memory.measure(models.SMALL, 1, 8, True, 1)
    assert set(result) == {memory.IDEAL, memory.BYTES, memory.LIVE, memory.PEAK}
    assert result[memory.BYTES] < result[memory.PEAK]
