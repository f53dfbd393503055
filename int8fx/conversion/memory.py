"""Resident memory: what the float weights took goes back to the system once they are quantised."""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path

from torch import Tensor

_MADV_PAGEOUT = 21  # Linux's <asm-generic/mman-common.h>


def trim_heap() -> None:
    """Gives freed memory that the C library keeps back to the system, if it is glibc (``man 3 malloc_trim``)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def drop_file_pages(tensor: Tensor) -> None:
    """Takes ``tensor`` out of this process's resident memory if it is a part of a memory-mapped file.

    Its values stay: pages that are read again come from the file (``man 2 madvise``, MADV_PAGEOUT). On other systems
    than Linux nothing happens: there the system drops pages only when memory is short.
    """
    maps = Path("/proc/self/maps")
    if tensor.device.type != "cpu" or not tensor.nbytes or not maps.exists():
        return
    start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    for line in maps.read_text().splitlines():
        region, _, _, _, inode, *_ = line.split()
        first, last = (int(address, 16) for address in region.split("-"))
        if first <= start < last:
            if inode != "0":
                start -= start % mmap.PAGESIZE
                ctypes.CDLL(None).madvise(
                    ctypes.c_void_p(start), ctypes.c_size_t(min(end, last) - start), _MADV_PAGEOUT
                )
            return
