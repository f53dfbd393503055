"""The suites of single linear layers: their cases and candidates."""

from dataclasses import replace

import pytest
import torch

from int8fx.ops import native
from int8fx.tools.bench import products
from int8fx.tools.bench.candidates import BFLOAT16, FLOAT32, INT8FX, Candidate
from int8fx.tools.bench.settings import Settings
from int8fx.tools.bench.suites import SUITES
from int8fx.tools.bench.timing import Measured

N, K = 96, 128
SETTINGS = Settings(rounds=2, shapes=((N, K),), rows=(8, 16))  # more rows than need cold weights


def test_cold_weights_do_not_fit_the_cache():
    assert products.weights_beyond_cache(4096, 4096, 32 << 20) == 3
    assert products.weights_beyond_cache(576, 576, 32 << 20) * 576 * 576 >= 1.5 * (32 << 20)
    assert products.weights_beyond_cache(11008, 4096, 1 << 20) == 2
    assert products.weights_beyond_cache(4096, 4096, 480 << 20, memory=24 << 30) == 24


def test_every_candidate_is_in_every_case():
    def fails(layer):
        raise RuntimeError("cannot build")

    absent, bad = Candidate("absent", fails, needs=("no_such_package",)), Candidate("bad", fails)
    contenders = (INT8FX, FLOAT32, absent, BFLOAT16, bad)
    cases = list(products.compare(SETTINGS, "products", N, K, (2, 8), contenders, cold_rows=0))
    assert [(case.M, case.N, case.K) for case in cases] == [(2, N, K), (8, N, K)]
    for case in cases:
        assert list(case.measured) == [INT8FX.name, FLOAT32.name, "absent", BFLOAT16.name, "bad"]
        assert case.measured["absent"] == Measured(note="not installed: no_such_package")
        assert case.measured["bad"].note == "failed: RuntimeError: cannot build"
        assert all(len(case.measured[c.name].values) == 2 for c in (INT8FX, FLOAT32, BFLOAT16))
        assert case.base == INT8FX.name


@pytest.mark.parametrize(
    ("suite", "base", "count"),
    [
        pytest.param("outliers", "plain", 10, marks=pytest.mark.slow),  # it compiles
        ("schemes", "llm_int8", 4),
        ("weights", "weight_only(compute='int8')", 12),
        ("overhead", "F.linear", 4),
    ],
)
def test_suites_run(suite, base, count):
    cases = list(SUITES[suite].on_cpu(SETTINGS))
    assert [case.M for case in cases] == ([1, 16] if suite == "overhead" else [8, 16])
    for case in cases:
        assert (case.suite, case.base) == (suite, base)
        assert len(case.measured) == count
        for measured in case.measured.values():
            assert measured.values or measured.note.startswith("not installed")
            assert not measured.note.startswith("failed")


def test_the_suite_without_kernels_does_not_run_with_kernels(monkeypatch):
    lines: list[str] = []
    settings = replace(SETTINGS, say=lines.append)
    monkeypatch.setattr(native, "load", lambda: True)
    assert list(products.fallback(settings)) == []
    assert "compiled kernels are loaded; legal: CXX=none" in lines[0]
    monkeypatch.setattr(native, "load", lambda: False)
    for case in products.fallback(settings):
        assert (case.suite, case.base, len(case.measured)) == ("fallback", "float32", 3)
        assert all(measured.values and not measured.note.startswith("failed") for measured in case.measured.values())


@pytest.mark.slow
def test_scaling_varies_one_size_at_a_time():
    lines: list[str] = []
    cases = products.scaling(Settings(quick=True, rounds=1, threads=1, say=lines.append))
    first, second = next(cases), next(cases)
    cases.close()
    assert [(case.name, case.M, case.N, case.K) for case in (first, second)] == [
        ("against M", 1, 1024, 1024),
        ("against M", 2, 1024, 1024),
    ]
    assert list(first.measured) == [INT8FX.name]
    assert lines[1] == "scaling against M: [1024, 1024], M = 2, 1 threads"


def test_settings_choose_sizes_rounds_and_threads():
    full, quick = (((1, 2),), (3,)), (((4, 5),), (6,))
    assert Settings().sizes(full, quick) == full
    assert Settings(quick=True).sizes(full, quick) == quick
    assert Settings(quick=True, rows=(7,)).sizes(full, quick) == (((4, 5),), (7,))
    assert [s.max_rounds for s in (Settings(), Settings(quick=True), Settings(quick=True, rounds=8))] == [10, 3, 8]
    assert (Settings().num_threads, Settings(threads=3).num_threads) == (torch.get_num_threads(), 3)
