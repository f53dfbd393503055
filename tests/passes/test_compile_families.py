"""What a user sees when a model is compiled: one graph, no recompiles, eager's error.

Every family of models runs in a process of its own, in which its compiled call is the first thing that happens.
"""

from __future__ import annotations

import pytest
from support.compiled import FAMILIES, LENGTHS, PLANTED, VARIANTS, measured

from int8fx.passes import Report

pytestmark = [pytest.mark.slow, pytest.mark.parametrize("family", FAMILIES)]


def test_the_first_call_of_a_process_compiles_to_one_full_graph(family):
    assert measured(family).frames[0] == 1
    assert measured(family).captured[0] == FAMILIES[family].captured


def test_passes_rewrite_every_matmul(family):
    found, expected = measured(family), FAMILIES[family]
    assert found.rewritten[0] == expected.rewritten
    linears = sum(n for op, n in expected.rewritten.items() if op != "quantize_rowwise")
    assert found.reports == [Report(expected.lowered, expected.shared, expected.folded, linears, dequantized=0)]


def test_outliers_that_appear_move_and_vanish_do_not_recompile(family):
    assert list(measured(family).outliers.values()) == [[], [PLANTED[0]], [PLANTED[1]], []]
    assert measured(family).frames == [1, 1, 1, 1]


def test_more_lengths_recompile_once_at_most(family):
    frames = measured(family).frames_by_length
    assert len(frames) == len(set(LENGTHS))
    assert frames[0] == 1
    assert frames[-1] <= 2


def test_dynamic_shapes_are_rewritten_alike(family):
    assert measured(family).captured == [FAMILIES[family].captured] * measured(family).frames_by_length[-1]
    assert measured(family).rewritten == [FAMILIES[family].rewritten] * measured(family).frames_by_length[-1]


@pytest.mark.parametrize("variant", VARIANTS)
def test_compiled_output_is_within_the_error_of_the_eager_one(family, variant):
    """Against float64. What a different order of operations may add is measured: it is what float32 itself is off by.

    Matmuls that eager mode makes with dequantised weights are more exact than LLM.int8(), which `lower` makes of them.
    """
    error = measured(family).errors[variant]
    allowed = error.get("scheme", error["eager"])
    assert 0 < error["float32"] < error["eager"]
    assert error["compiled"] <= 1.05 * allowed + error["float32"]
