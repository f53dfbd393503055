"""The description of the machine that a measurement reports."""

import torch

from int8fx import __version__
from int8fx.tools import machine


def test_the_line_names_threads_versions_and_kernels():
    line, *more = machine.machine().splitlines()
    assert f"{torch.get_num_threads()} threads, torch {torch.__version__}, transformers " in line
    assert line.endswith(f"int8fx {__version__}")
    assert more[-1].startswith("int8 matmuls: C++ for ")


def test_the_columns_of_a_csv_are_filled():
    columns = machine.describe(2)
    assert list(columns) == ["date", "machine", "isa", "threads", "python", "versions"]
    assert all(columns.values())
    assert columns["threads"] == "2"
    assert f"torch {torch.__version__}" in columns["versions"]


def test_missing_packages_are_named():
    assert machine.missing("torch") == ""
    assert machine.missing("torch", "no_such_package", "nor_this") == "not installed: no_such_package, nor_this"


def test_the_last_level_cache_is_larger_than_a_first_level_one():
    assert machine.last_level_cache() >= 1 << 18
