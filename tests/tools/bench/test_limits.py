"""The CPU's limits: measured between other work, or a reason."""

import torch

from int8fx.tools.bench.limits import load_limits
from int8fx.tools.bench.timing import Measured, interleave


def test_limits_are_measured_between_other_work():
    limits = load_limits(buffer_bytes=1 << 20)
    assert limits.reason == ""
    assert limits.instruction in ("tdpbssd", "vpdpbusd", "vpmaddwd", "the compiler's own")
    measured = interleave({"x": [lambda: None], **limits.work(1)}, 3)
    peak, reads = limits.rates(measured, 1)
    assert list(measured) == ["x"]
    assert len(peak.values) == len(reads.values) == 3
    assert 1e8 < peak.best < 1e15
    assert 1e6 < reads.best < 1e13


def test_the_library_sums_what_it_reads():
    limits = load_limits(buffer_bytes=1 << 12)
    assert limits.library is not None
    words = torch.arange(512)
    assert limits.library.read_words(words.data_ptr(), 512, 1) == words.sum().item()


def test_limits_without_a_compiler_say_so(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "missing-compiler")
    limits = load_limits()
    assert limits.reason == "no C++ compiler: missing-compiler not found"
    assert limits.work(1) == {}
    assert limits.rates({"x": Measured([1.0])}, 1) == (Measured(note=limits.reason), Measured(note=limits.reason))
