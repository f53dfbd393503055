"""Interleaved rounds, and what is computed from their times."""

import math
import time

import pytest

from int8fx.tools.bench import timing
from int8fx.tools.bench.timing import Case, Measured, interleave, rounds_for, thread_warning

LONGER_THAN_A_SLICE = 1.2 * timing.SLICE


def test_rounds_are_interleaved_and_begin_in_turn():
    order: list[str] = []

    def calls(label):
        def run():
            order.append(label)
            time.sleep(LONGER_THAN_A_SLICE)

        return [run]

    measured = interleave({label: calls(label) for label in "abc"}, 3)
    # twice each before the rounds; in a round an untimed call and a timed one
    assert "".join(order) == "aabbcc" + "aabbcc" + "bbccaa" + "ccaabb"
    assert [len(m.values) for m in measured.values()] == [3, 3, 3]
    assert [len(m.cpus) for m in measured.values()] == [3, 3, 3]


def test_calls_take_turns_so_that_weights_are_cold():
    order: list[int] = []

    def run(i):
        order.append(i)
        time.sleep(LONGER_THAN_A_SLICE)

    interleave({"a": [lambda i=i: run(i) for i in range(5)]}, 3)
    assert order == [0, 1, 2, 3, 4, 0, 1, 2]


def test_values_are_seconds_a_call():
    calls: list[float] = []

    def run():
        calls.append(time.perf_counter())
        time.sleep(timing.SLICE / 5)

    measured = interleave({"a": [run]}, 3)["a"]
    values = measured.values
    assert 2 + 3 * 2 < len(calls) <= 2 + 3 * (1 + 5)  # several in a slice
    assert all(value >= timing.SLICE / 5 for value in values)
    assert sum(values) * (len(calls) - 5) / 3 <= time.perf_counter() - calls[2]
    assert all(0 <= cpus < 0.9 for cpus in measured.cpus)  # asleep


def test_a_candidate_that_fails_is_noted_and_the_others_go_on():
    def fails():
        raise RuntimeError("no kernel\nand a long explanation")

    measured = interleave({"bad": [fails], "good": [lambda: None]}, 2)
    assert measured["bad"] == Measured(note="failed: RuntimeError: no kernel")
    assert len(measured["good"].values) == 2
    assert len(timing.failure(ValueError("x" * 1000))) == 200


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.5, (10, "")),
        (2.0, (10, "")),
        (3.0, (2, "2 of 10 rounds: 3.0 s a call")),
        (40.0, (1, "1 of 10 rounds: 40.0 s a call")),
    ],
)
def test_a_slow_candidate_gets_fewer_rounds_and_a_note(seconds, expected):
    assert rounds_for(seconds, 10) == expected
    assert rounds_for(seconds, 1) == (1, "")


def test_the_second_call_of_a_slow_candidate_is_its_first_round(monkeypatch):
    monkeypatch.setattr(timing, "SLOW", timing.SLICE)
    calls: list[int] = []

    def run():
        calls.append(0)
        time.sleep(LONGER_THAN_A_SLICE)

    measured = interleave({"slow": [run]}, 10)["slow"]
    assert len(measured.values) == 2
    assert measured.note.startswith("2 of 10 rounds")
    assert len(calls) == 2 + 2  # the second round follows an untimed call


def test_ratios_and_shares_are_the_formulas():
    measured = {"a": Measured([2.0, 4.0, 3.0]), "b": Measured([4.0, 12.0, 6.0]), "none": Measured(note="not installed")}
    peak, reads = Measured([10.0, 420.0]), Measured([35.0, 7.0])
    case = Case("products", "x", "a", measured, M=3, N=5, K=7, peak=peak, reads=reads)
    assert case.ratio("b") == 2.0
    assert case.median_ratio("b") == 2.0
    assert case.share_of_peak("a") == pytest.approx(2 * 3 * 5 * 7 / 2.0 / 420.0)
    assert case.share_of_reads("b") == pytest.approx(5 * 7 / 4.0 / 35.0)
    assert case.floor() == max(5 * 7 / 35.0, 2 * 3 * 5 * 7 / 420.0)
    assert math.isnan(case.ratio("none"))
    assert math.isnan(case.ratio("unheard of"))
    assert math.isnan(Case("models", "x", "a", measured).share_of_peak("a"))
    assert math.isnan(Case("products", "x", "a", measured, M=3, N=5, K=7).floor())


def test_rounds_on_the_wrong_number_of_threads_are_named():
    def measured(*cpus, seconds=0.01):
        return Measured([seconds] * len(cpus), cpus=list(cpus))

    work = {
        "one thread": measured(1.0, 1.9, 0.9),
        "two threads": measured(2.0, 1.95, 1.6),
        "four threads": measured(3.9, 2.0, 2.0),
        "short": measured(1.0, 1.0, seconds=1e-5),
        "not timed": Measured(note="not installed"),
    }
    assert thread_warning(work, 2) == (
        "warning: CPUs used with 2 threads (legal: 1.5 to 2.2): one thread 0.9 to 1.0 in 2 of 3 rounds; "
        "four threads 3.9 to 3.9 in 1 of 3 rounds"
    )
    assert "two threads 1.6 to 2.0 in 3 of 3 rounds" in thread_warning(work, 1)
    assert thread_warning({"two threads": work["two threads"], "short": work["short"]}, 2) == ""
    assert thread_warning({"busy machine": measured(0.4)}, 1) == ""
