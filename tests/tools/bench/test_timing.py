"""Interleaved rounds, and what is computed from their times."""

import math
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from int8fx.tools.bench import timing
from int8fx.tools.bench.timing import Case, Measured, interleave, on_threads, rounds_for, threads_note

LONGER_THAN_A_SLICE = 1.2 * timing.SLICE


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    """Then one untimed call precedes the timed ones."""
    monkeypatch.setattr(timing, "PAUSE", 0)


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
    compiled, timed, rounds = [0, 1, 2, 3, 4], [0], [1, 2, 3, 4, 0, 1]  # in a round, an untimed call and a timed one
    assert order == [*compiled, *timed, *rounds]


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


@given(
    cpus=st.lists(st.floats(0, 8), min_size=1),
    seconds=st.sampled_from([timing.PARALLEL / 10, timing.PARALLEL, 1.0]),
    threads=st.integers(1, 4),
)
def test_every_round_is_within_the_legal_cpus_or_counted_in_the_note(cpus, seconds, threads):
    note = threads_note(Measured([seconds] * len(cpus), cpus=cpus), threads)
    least = (1 + threads) / 2 if threads > 1 and seconds >= timing.PARALLEL else 0
    odd = sum(not least <= used <= 1.1 * threads for used in cpus)
    assert note.endswith(f"instead of {threads} in {odd} of {len(cpus)} rounds") if odd else note == ""


def test_rounds_on_the_wrong_number_of_threads_are_named():
    def note(*cpus, threads=2, seconds=0.01):
        return threads_note(Measured([seconds] * len(cpus), cpus=list(cpus)), threads)

    assert note(1.0, 1.9, 0.9) == "used 0.9 to 1.0 CPUs instead of 2 in 2 of 3 rounds"
    assert note(3.9, 2.0, 2.0) == "used 3.9 CPUs instead of 2 in 1 of 3 rounds"
    assert note(2.0, 1.95, 1.6) == ""
    assert note(2.0, 1.95, 1.6, threads=1) == "used 1.6 to 2.0 CPUs instead of 1 in 3 of 3 rounds"
    assert note(1.0, seconds=timing.PARALLEL / 2) == ""
    assert note(0.4, threads=1) == ""  # a busy machine
    assert threads_note(Measured(note="not installed"), 2) == ""


def test_a_candidate_on_one_thread_is_marked():
    def computes():
        end = time.process_time() + LONGER_THAN_A_SLICE
        while time.process_time() < end:
            pass

    measured = interleave({"one thread": [computes], "short": [lambda: None]}, 2, threads=2)
    assert measured["one thread"].note.endswith("instead of 2 in 2 of 2 rounds")
    assert measured["short"].note == ""
    assert interleave({"one thread": [computes]}, 2)["one thread"].note == ""  # the number is not said


def test_a_candidate_that_changes_the_threads_is_marked_and_does_not_change_others():
    before = torch.get_num_threads()
    seen: list[int] = []
    work = {"sets": [lambda: torch.set_num_threads(5)], "other": [lambda: seen.append(torch.get_num_threads())]}
    measured = interleave(work, 3, threads=3)
    assert measured["sets"].note == "set torch to 5 threads instead of 3"
    assert measured["other"].note == ""
    assert set(seen) == {3}
    assert torch.get_num_threads() == before


def test_threads_are_restored_after_an_error():
    before = torch.get_num_threads()

    @on_threads(before + 1)
    def fails():
        assert torch.get_num_threads() == before + 1
        torch.set_num_threads(before + 2)
        raise RuntimeError("no kernel")

    with pytest.raises(RuntimeError, match="no kernel"):
        fails()
    assert torch.get_num_threads() == before


def test_first_results_are_handed_out():
    results = {}
    interleave({"a": [lambda: 1, lambda: 2], "b": [lambda: 3]}, 1, first=results.__setitem__)
    assert results == {"a": 1, "b": 3}
