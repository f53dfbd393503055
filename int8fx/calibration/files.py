"""The files of a calibration: the statistics of one stage of a model each."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..schemes.calibration import Calibration

_ABSMAX, _MOMENTS = "absmax.", "moments."


class CalibrationFolder:
    """A folder with a file for each stage that is measured: ``0000.safetensors``, ``0001.safetensors`` ...

    A file has the tensors ``absmax.<layer>`` and ``moments.<layer>``, and in its metadata the rows of each layer and
    the `fingerprint` of model and data. It is written whole or not at all. If a layer is in several files, because the
    model runs it in several stages, the last one has all its rows.

    Raises:
        ValueError: the folder holds the calibration of another model or other data, or a file cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str], fingerprint: str) -> None:
        self.path, self.fingerprint = Path(path), fingerprint
        self.path.mkdir(parents=True, exist_ok=True)
        self.rows: dict[str, int] = {}
        self.absmax: dict[str, Tensor] = {}
        self._file_of: dict[str, Path] = {}
        self.stages = 0
        while self._file(self.stages).exists():
            self._read(self._file(self.stages))
            self.stages += 1

    def _file(self, stage: int) -> Path:
        return self.path / f"{stage:04d}.safetensors"

    def _read(self, file: Path) -> None:
        try:
            with safe_open(file, framework="pt") as opened:
                about = opened.metadata() or {}
                rows = json.loads(about["rows"])
                absmax = {name: opened.get_tensor(_ABSMAX + name) for name in rows}
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            raise ValueError(
                f"int8fx.calibrate: {file} cannot be read: {error}; legal: a folder that calibrate wrote, or a new one"
            ) from error
        if about.get("fingerprint") != self.fingerprint:
            raise ValueError(
                f"int8fx.calibrate: {file} was measured on another model, other data or with other arguments; legal: "
                "the same ones, or another folder"
            )
        self.rows.update(rows)
        self.absmax.update(absmax)
        self._file_of.update(dict.fromkeys(rows, file))

    def write(self, stage: int, part: Calibration) -> None:
        """Writes what was measured in ``stage``, together with what earlier stages measured of the same layers."""
        for name in part.rows.keys() & self.rows.keys():
            part.rows[name] += self.rows[name]
            part.absmax[name] = torch.maximum(part.absmax[name], self.absmax[name])
            if name in part.moments:
                part.moments[name] = part.moments[name] + self.moments[name]
        tensors = {_ABSMAX + name: tensor for name, tensor in part.absmax.items()}
        tensors.update({_MOMENTS + name: tensor for name, tensor in part.moments.items()})
        file, partial = self._file(stage), self.path / f".{stage:04d}.partial"
        about = {"rows": json.dumps(part.rows), "fingerprint": self.fingerprint}
        save_file(tensors, partial, about)
        os.replace(partial, file)
        self._read(file)
        self.stages = stage + 1

    @property
    def moments(self) -> Mapping[str, Tensor]:
        return Moments(self._file_of)


class Moments(Mapping[str, Tensor]):
    """Layer name -> its moments, read from a file whenever they are asked for."""

    def __init__(self, file_of: Mapping[str, Path]) -> None:
        self._file_of = {}
        for file in dict.fromkeys(file_of.values()):
            with safe_open(file, framework="pt") as opened:
                names = {key.removeprefix(_MOMENTS) for key in opened.keys() if key.startswith(_MOMENTS)}  # noqa: SIM118
            self._file_of.update({name: file for name, f in file_of.items() if f == file and name in names})

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._file_of[name], framework="pt") as opened:
            return opened.get_tensor(_MOMENTS + name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


def fingerprint(model: nn.Module, batches: Iterable[Any], moments: bool) -> str:
    """A checksum of the tensors of ``batches`` and of the names, shapes and some values of the model's Parameters."""
    crc = zlib.crc32(str(moments).encode())
    for name, p in model.named_parameters():
        values = p.detach().flatten()[:: max(1, p.numel() // 64)].float().cpu()
        crc = zlib.crc32(values.numpy().tobytes(), zlib.crc32(f"{name} {tuple(p.shape)} {p.dtype}".encode(), crc))
    for batch in batches:
        for part in torch.utils._pytree.tree_leaves(batch):
            if isinstance(part, Tensor):
                raw = part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
                crc = zlib.crc32(raw, zlib.crc32(f"{tuple(part.shape)} {part.dtype}".encode(), crc))
            else:
                crc = zlib.crc32(repr(part).encode(), crc)
    return f"{crc:08x}"
