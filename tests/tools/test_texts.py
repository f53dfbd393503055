"""Windows of text: full, disjoint, from every source; errors that name the source."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import torch
from support.tiny_models import save_lm

from int8fx.tools.data.models import load
from int8fx.tools.data.texts import TextError, read, windows


@pytest.fixture
def tokenizer(tmp_path):
    return load(str(save_lm(tmp_path / "model")))[1]


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_windows_are_full_and_come_from_every_source(tokenizer, tmp_path):
    sources = [write(tmp_path / c, "".join(chr(ord(c) + i % 13) for i in range(2000))) for c in "aA"]
    measured, calibrating = windows(tokenizer, sources, 5, 40, 3)
    assert measured.shape == (5, 40)
    assert calibrating.shape == (3, 40)
    assert [tokenizer.decode(ids).islower() for ids in measured] == [True, True, True, False, False]
    assert [tokenizer.decode(ids).islower() for ids in calibrating] == [True, True, False]
    assert torch.equal(measured, windows(tokenizer, sources, 5, 40, 3)[0])


def test_only_the_last_tenth_calibrates(tokenizer, tmp_path):
    source = write(tmp_path / "a", "a" * 1800 + "z" * 200)
    measured, calibrating = windows(tokenizer, [source], 45, 40, 5)
    assert {tokenizer.decode(ids) for ids in measured} == {"a" * 40}
    assert {tokenizer.decode(ids) for ids in calibrating} == {"z" * 40}
    empty = windows(tokenizer, [source], 2, 40, 0)[1]
    assert (empty.shape, empty.dtype) == ((0, 40), torch.int64)


def test_texts_that_cannot_be_read_or_are_too_short_are_named(tokenizer, tmp_path):
    (tmp_path / "short").write_text("a" * 100)
    with pytest.raises(TextError, match=r"short' is too short for 3 windows of 40 tokens"):
        windows(tokenizer, [str(tmp_path / "short")], 3, 40, 0)
    with pytest.raises(TextError, match=r"cannot read the text .*none'"):
        windows(tokenizer, [str(tmp_path / "none")], 3, 40, 0)
    (tmp_path / "broken.gz").write_bytes(b"no gzip")
    with pytest.raises(TextError, match=r"cannot read the text .*broken\.gz'"):
        windows(tokenizer, [str(tmp_path / "broken.gz")], 3, 40, 0)


def test_compressed_texts_are_read(tmp_path):
    (tmp_path / "text.gz").write_bytes(gzip.compress("ä text".encode()))
    assert read(str(tmp_path / "text.gz")) == "ä text"
