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
            damaged = [name for name, t in absmax.items() if _checksum(t) != stored["checksums"]["absmax"][name]]
        except (pickle.UnpicklingError, RuntimeError, KeyError, TypeError, AttributeError, EOFError, OSError) as error:
            raise ValueError(
                f"int8fx.calibrate: {file} cannot be read: {error}; legal: a folder that calibrate wrote, or a new one"
            ) from error
        if damaged:
            raise ValueError(
                f"int8fx.calibrate: {file}: absmax of layer {damaged[0]!r} is damaged; legal: a new folder"
            )
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
        tensors = {"absmax": part.absmax, "moments": dict(part.moments)}
        checksums = {key: {name: _checksum(t) for name, t in named.items()} for key, named in tensors.items()}
        torch.save({"rows": part.rows, **tensors, "checksums": checksums, "fingerprint": self.fingerprint}, partial)
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
        file = self._file_of[name]
        stored = _open(file)
        moments = stored["moments"][name].clone()
        if _checksum(moments) != stored["checksums"]["moments"][name]:
            raise ValueError(f"int8fx.calibrate: {file}: moments of layer {name!r} are damaged; legal: a new folder")
        return moments

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


def _open(file: Path) -> dict[str, Any]:
    """The contents of a file; tensors are read when they are used."""
    return torch.load(file, mmap=True, weights_only=True)


def fingerprint(model: nn.Module, batches: Iterable[Any], moments: bool) -> str:
    """A checksum of ``batches``, of the model's mode and configuration, and of the names, shapes and some values of its
    Parameters and buffers."""
    crc = zlib.crc32(f"{moments} {model.training} {getattr(model, 'config', None)}".encode())
    for name, p in (*model.named_parameters(), *model.named_buffers()):
        values = p.detach().flatten()[:: max(1, p.numel() // 64)].double().cpu()
        crc = zlib.crc32(values.numpy().tobytes(), zlib.crc32(f"{name} {tuple(p.shape)} {p.dtype}".encode(), crc))
    for batch in batches:
        leaves, form = torch.utils._pytree.tree_flatten(dict(batch) if isinstance(batch, Mapping) else batch)
        crc = zlib.crc32(str(form).encode(), crc)
        for part in leaves:
            if isinstance(part, Tensor):
                raw = part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
                crc = zlib.crc32(raw, zlib.crc32(f"{tuple(part.shape)} {part.dtype}".encode(), crc))
            else:
                crc = zlib.crc32(pickle.dumps(part), crc)
    return f"{crc:08x}"


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.detach().cpu().contiguous().numpy().tobytes())
