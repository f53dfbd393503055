"""Checksums of the tensors in a safetensors file: a flipped bit and two swapped tensors are errors.

The metadata of the file's header has them under ``int8fx_checksums``: JSON, name of each tensor -> `checksum`.
"""

from __future__ import annotations

import ctypes
import json
import zlib
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

KEY = "int8fx_checksums"

WANTED = {KEY: ""}
"""Metadata that ask `adds_checksums` for checksums."""


def checksum(tensor: Tensor) -> str:
    """CRC-32 (``zlib.crc32``) of the bytes that safetensors stores for ``tensor``, as 8 hexadecimal digits."""
    data = tensor.detach().cpu().contiguous()
    return f"{zlib.crc32((ctypes.c_ubyte * data.nbytes).from_address(data.data_ptr())):08x}"


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The metadata of a file that holds ``tensors``."""
    return {KEY: json.dumps({name: checksum(tensors[name]) for name in sorted(tensors)})}


def adds_checksums(save_file: Callable[..., Any]) -> Callable[..., Any]:
    """``save_file(tensors, filename, metadata)``, which writes `checksums` if ``metadata`` have `WANTED`.

    A library that renames, splits and gathers tensors while it saves them has their final names and values only there.
    """

    @wraps(save_file)
    def save(tensors: Any, filename: Any, metadata: Any = None, *args: Any, **kwargs: Any) -> Any:
        if metadata is None or metadata.get(KEY) != WANTED[KEY]:
            return save_file(tensors, filename, metadata, *args, **kwargs)
        save_file(tensors, filename, {**metadata, **checksums(tensors)}, *args, **kwargs)
        _sort_metadata(filename)
        return None

    return save


def _sort_metadata(file: str | Path) -> None:
    """Orders the entries of the metadata by name, so that equal tensors give equal files. safetensors does not."""
    with open(file, "r+b") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        if len(text) == size:  # else safetensors writes other escapes, and the order stays
            opened.seek(8)
            opened.write(text)


def check_file(file: str | Path) -> None:
    """Compares each tensor of a safetensors file with its checksum, if the file has checksums.

    Tensors are read where the file is mapped into memory, and the map is closed at the end.

    Raises:
        ValueError: a tensor has another checksum or none, or the checksums cannot be read. The message names the file
            and the tensor.
    """
    with safe_open(file, framework="pt") as opened:
        text = (opened.metadata() or {}).get(KEY)
        if not text:
            return
        expected = _read(text)
        if expected is None:
            raise ValueError(_message(file, f"the entry {KEY!r} of its header cannot be read"))
        for name in sorted(opened.keys()):
            found, written = checksum(opened.get_tensor(name)), expected.get(name)
            if found != written:
                raise ValueError(_message(file, f"tensor {name!r} has the checksum {found!r}, and not {written!r}"))


def _read(text: str) -> dict[str, Any] | None:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _message(file: str | Path, found: str) -> str:
    return (
        f"int8fx: {file}: {found}; the file is damaged, or was changed after it was saved. Legal: the file as it was "
        f"saved, copied or downloaded again. If the change is meant: its tensors, saved without metadata {KEY!r}"
    )
