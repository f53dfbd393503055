"""Tables and the progress bar."""

from __future__ import annotations

import pytest

from int8fx.terminal import show_progress, table

ROWS = [("layer", "KB"), ("q", "1,024"), ("down_proj", "3")]


def test_columns_are_aligned_left_or_right():
    assert table(ROWS).split("\n") == ["layer      KB", "q          1,024", "down_proj  3"]
    assert table(ROWS, left=1).split("\n") == ["layer         KB", "q          1,024", "down_proj      3"]
    assert table([("a", "b"), ("", "")]) == "a  b\n"


def test_rows_of_different_lengths_are_a_mistake():
    with pytest.raises(ValueError, match="zip"):
        table([("a", "b"), ("c",)])


def test_a_bar_is_redrawn_and_ends_its_line(capsys):
    for done in range(3):
        show_progress("reading", done, 2)
    first, half, full = capsys.readouterr().err.split("\r")[1:]
    assert first == f"reading [{'.' * 32}] 0/2"
    assert half == f"reading [{'#' * 16}{'.' * 16}] 1/2"
    assert full == f"reading [{'#' * 32}] 2/2\n"
