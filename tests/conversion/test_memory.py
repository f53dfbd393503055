"""Pages of memory-mapped weights leave resident memory once the weights are quantised."""

import sys

import pytest
import torch
from torch import nn

import int8fx
from int8fx.conversion.memory import drop_file_pages

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="madvise's MADV_PAGEOUT is Linux's")
SIZE = 16 << 20


def mapped(folder):
    (folder / "file").write_bytes(bytes(range(256)) * (SIZE // 256))
    return torch.from_file(str(folder / "file"), size=SIZE, dtype=torch.uint8)


def resident() -> int:
    """Bytes of files in the resident memory of this process."""
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssFile")) << 10


def test_pages_of_a_mapped_file_are_dropped_and_read_again(tmp_path):
    weight, other = mapped(tmp_path), torch.arange(SIZE // 8)
    before, total = resident(), weight.sum()
    read = resident()
    assert read - before > 0.9 * SIZE
    for tensor in (other, weight[:0], weight[: SIZE // 2]):
        drop_file_pages(tensor)
    assert 0.4 * SIZE < read - resident() < 0.6 * SIZE
    assert weight.sum() == total
    assert torch.equal(other, torch.arange(SIZE // 8))


def test_convert_drops_the_pages_of_float_weights(tmp_path):
    torch.save({"weight": torch.randn(1024, SIZE // 4096)}, tmp_path / "saved.pt")
    stored = torch.load(tmp_path / "saved.pt", mmap=True)
    model = nn.Linear(SIZE // 4096, 1024, bias=False, device="meta")
    model.load_state_dict(stored, assign=True)
    int8fx.convert(nn.Linear(8, 8))  # loads the kernels, which are a file too
    total = model.weight.sum()
    before = resident()
    int8fx.convert(model)
    assert before - resident() > 0.9 * SIZE
    assert stored["weight"].sum() == total
