"""Tables and CSV."""

import csv

import pytest
from rich.console import Console
from support.bench import case

from int8fx.tools.bench import report
from int8fx.tools.bench.suites import SUITES
from int8fx.tools.bench.timing import Measured
from int8fx.tools.machine import describe


def test_csv_has_a_row_for_each_candidate(tmp_path):
    report.write_csv(tmp_path / "bench.csv", [case("products"), case("models", None)], describe(2))
    with open(tmp_path / "bench.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    assert tuple(rows[0]) == report.COLUMNS
    int8, absent, slow = rows[:3]
    assert all(int8[name] for name in ("date", "machine", "isa", "threads", "versions", "python"))
    assert (int8["best"], int8["median"], int8["ratio"], int8["rounds"]) == ("0.5", "0.6", "1", "2")
    assert (int8["M"], int8["N"], int8["K"], int8["peak_ops"]) == ("4", "96", "64", "2e+06")
    assert float(int8["share_of_peak"]) == pytest.approx(2 * 4 * 96 * 64 / 0.5 / 2e6)
    assert (absent["best"], absent["ratio"], absent["note"]) == ("", "", "not installed: bitsandbytes")
    assert (slow["ratio"], slow["note"]) == ("5", "1 of 2 rounds: 2.5 s a call")
    assert rows[3]["M"] == rows[3]["share_of_peak"] == ""
    assert (int8["cpus"], int8["cosine"], slow["cpus"], slow["cosine"]) == ("1.5", "0.99", "", "")


def test_tables_name_who_is_missing_and_who_is_slow(capsys):
    console = Console(width=130, highlight=False, markup=False)
    report.show(console, [case("products"), case("products", 16, reads=Measured(note="no compiler"))])
    output = capsys.readouterr().out
    assert "bitsandbytes: not installed: bitsandbytes\n" in output
    assert "slow: 1 of 2 rounds: 2.5 s a call" in output
    assert "the read bandwidth: no compiler (M = 16)" in output
    assert "2500  5.00x*" in output
    assert "of it, int8fx" in output  # the bandwidth


def test_shares_of_the_peak_and_cosines_stand_below_the_times(capsys):
    console = Console(width=130, highlight=False, markup=False)
    report.show(console, [case("outliers"), case("models", None)])
    outliers, models = capsys.readouterr().out.split(SUITES["models"].title)
    shares = [f"{2 * 4 * 96 * 64 / seconds / 2e6:.0%} of peak" for seconds in (0.5, 2.5)]
    assert all(share in outliers for share in shares)
    assert "cosine 0.99000" in models
    assert "of peak" not in models


def test_a_limit_on_another_number_of_threads_is_noted(capsys):
    peak = Measured([1e6], "used 1.0 CPUs instead of 2 in 1 of 1 rounds")
    report.show(Console(width=130, highlight=False, markup=False), [case("products", peak=peak)])
    assert "* the int8 peak: used 1.0 CPUs instead of 2 in 1 of 1 rounds\n" in capsys.readouterr().out


@pytest.mark.parametrize("suite", list(SUITES))
def test_every_suite_has_a_table(suite, capsys):
    report.show(Console(width=130), [case(suite)])
    title, *table = capsys.readouterr().out.strip().splitlines()
    assert title == SUITES[suite].title
    assert any(text in line for line in table for text in ("500 ", "5e+05 ", "1.000x"))  # 0.5 s, or 0.5 bytes


def test_floors_are_shares_of_what_the_limits_allow(capsys):
    reads = 1e5  # bytes a second: 2 * M = 2 operations a byte take less than reading it
    Console(width=130).print(report.floors([case("products", 1, reads=Measured([reads])), case("products", 16)]))
    output = capsys.readouterr().out
    floor = 96 * 64 / reads
    (line,) = [line for line in output.splitlines() if "[96, 64], M = 1 " in line]
    assert line.split()[-4:] == [f"{floor * 1e6:.3g}", f"{floor / 0.5:.0%}", "-", f"{floor / 2.5:.0%}"]
    (line,) = [line for line in output.splitlines() if "[96, 64], M = 16 " in line]
    floor = 2 * 16 * 96 * 64 / 2e6
    assert line.split()[-4:] == [f"{floor * 1e6:.3g}", f"{floor / 0.5:.0%}", "-", f"{floor / 2.5:.0%}"]
