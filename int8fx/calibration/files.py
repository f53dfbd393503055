"""The files of a calibration: the statistics of one stage of a model each."""

from __future__ import annotations

import os
import pickle
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..schemes.calibration import Calibration


class CalibrationFolder:
    """A folder with a file for each stage that is measured: ``0000.pt``, ``0001.pt`` ...

    A file of ``torch.save`` has the fields of a `Calibration`, and the `fingerprint` of model and data. It is written
    whole or not at all. If a layer is in several files, because the model runs it in several stages, the last one has
    all its rows.

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
        return self.path / f"{stage:04d}.pt"

    def _read(self, file: Path) -> None:
        try:
            stored = _open(file)
            rows, absmax, moments, found = (stored[key] for key in ("rows", "absmax", "moments", "fingerprint"))
        except (pickle.UnpicklingError, RuntimeError, KeyError, TypeError, EOFError, OSError) as error:
            raise ValueError(
                f"int8fx.calibrate: {file} cannot be read: {error}; legal: a folder that calibrate wrote, or a new one"
            ) from error
        if found != self.fingerprint:
            raise ValueError(
                f"int8fx.calibrate: {file} was measured on another model, other data or with other arguments; legal: "
                "the same ones, or another folder"
            )
        self.rows.update(rows)
        self.absmax.update(absmax)
        self._file_of.update(dict.fromkeys(moments, file))

    def write(self, stage: int, part: Calibration) -> None:
        """Writes what was measured in ``stage``, together with what earlier stages measured of the same layers."""
        for name in part.rows.keys() & self.rows.keys():
            part.rows[name] += self.rows[name]
            part.absmax[name] = torch.maximum(part.absmax[name], self.absmax[name])
            if name in part.moments:
                part.moments = {**part.moments, name: part.moments[name] + self.moments[name]}
        file, partial = self._file(stage), self.path / f".{stage:04d}.partial"
        fields = {"rows": part.rows, "absmax": part.absmax, "moments": dict(part.moments)}
        torch.save({**fields, "fingerprint": self.fingerprint}, partial)
        os.replace(partial, file)
        self._read(file)
        self.stages = stage + 1

    @property
    def moments(self) -> Mapping[str, Tensor]:
        return Moments(dict(self._file_of))


class Moments(Mapping[str, Tensor]):
    """Layer name -> its moments, read from a file whenever they are asked for."""

    def __init__(self, file_of: Mapping[str, Path]) -> None:
        self._file_of = file_of

    def __getitem__(self, name: str) -> Tensor:
        return _open(self._file_of[name])["moments"][name].clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


def _open(file: Path) -> dict[str, Any]:
    """The contents of a file; tensors are read when they are used."""
    return torch.load(file, mmap=True, weights_only=True)


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
