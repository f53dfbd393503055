"""Which plots are drawn from which cases."""

import pytest
from support.bench import case

from int8fx.tools.bench import plots
from int8fx.tools.bench.timing import Measured


def test_plots_are_drawn(tmp_path):
    names = ["against M"] * 2 + ["against threads, M = 1"] * 2
    scaling = [case("scaling", M) for M in (1, 2, 1, 2)]
    for one, name in zip(scaling, names, strict=True):
        one.name = name
    drawn = plots.draw([case("products"), case("products", 16), *scaling], tmp_path, "a machine")
    assert sorted(path.name for path in drawn) == ["roofline.png", "scaling.png", "time_against_m.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


def test_nothing_is_drawn_without_data(tmp_path):
    assert plots.draw([case("models", None)], tmp_path, "") == []
    unlimited = case("products", peak=Measured(note="no compiler"))
    assert [path.name for path in plots.draw([unlimited], tmp_path, "")] == ["time_against_m.png"]


def test_intensity_is_operations_per_byte():
    M, N, K = 3, 96, 64
    assert plots.intensity(case("products", M)) == pytest.approx(2 * M * N * K / (N * K + 2 * M * K + 2 * M * N))
