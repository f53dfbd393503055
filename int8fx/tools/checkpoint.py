"""Checkpoints as folders: ``int8fx convert SRC DST``, and what ``int8fx inspect DST`` says about one."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..conversion.format import FORMAT, read_scheme
from ..conversion.layers import layer_name
from ..integrations.checksums import check_file
from ..schemes.weight import CODES, COLUMNS, SUFFIXES
from ..terminal import table

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json")
_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


class CheckpointError(ValueError):
    """A folder is not what the command needs; the message names it."""


# ---- convert --------------------------------------------------------------------------------------------------------


def convert_checkpoint(
    source: Path, target: Path, config: Any, *, max_shard_size: str = "5GB", overwrite: bool = False
) -> None:
    """Quantises the transformers model in ``source`` while it loads, and writes it to ``target``.

    The folder is written beside ``target`` and renamed when it is complete: if the process dies, ``target`` is what it
    was. Files that hold no weights, such as the tokenizer's, are copied, and so are folders without weights.

    Args:
        config: an `integrations.transformers.Int8FxConfig`.
        overwrite: whether ``target`` may exist.

    Raises:
        CheckpointError: ``source`` is no model that transformers can load, or ``target`` exists.
    """
    import transformers

    settings = _read_json(source / "config.json")
    if settings.get("quantization_config"):
        method = settings["quantization_config"].get("quant_method")
        raise CheckpointError(f"{source} is quantised already, by {method}; legal: a float model")
    names = settings.get("architectures") or []
    cls = getattr(transformers, names[0], None) if names else None
    if cls is None:
        raise CheckpointError(f"{source}/config.json names architectures {names}; legal: one that transformers has")
    if target.exists() and not overwrite:
        raise CheckpointError(f"{target} exists; legal: another folder, or --overwrite")
    if target.exists() and not (target / "config.json").is_file():
        raise CheckpointError(f"{target} is not the folder of a model; --overwrite replaces only such folders")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as folder:
        written = Path(folder) / "new"
        model, loaded = cls.from_pretrained(source, quantization_config=config, dtype="auto", output_loading_info=True)
        if loaded["missing_keys"]:
            missing = ", ".join(sorted(loaded["missing_keys"])[:3])
            raise CheckpointError(f"{source} lacks tensors: {missing}; legal: a model with all of its weights")
        model.save_pretrained(written, max_shard_size=max_shard_size)
        _copy_others(source, written)
        old = Path(folder) / "old"
        if target.exists():
            os.replace(target, old)
        try:
            os.replace(written, target)
        except BaseException:
            if old.exists():
                os.replace(old, target)
            raise


def _copy_others(source: Path, target: Path) -> None:
    """Copies what ``target`` lacks of ``source`` and is no weight of the model: a tokenizer, chat templates, pooling.

    Folders are copied if they have no weights. The modules of sentence-transformers, which ``modules.json`` lists, have
    folders that may have some, and are copied too. Hidden folders are not.
    """
    listed = source / "modules.json"
    modules = {Path(str(m.get("path", ""))).parts[:1] for m in _read_list(listed)} if listed.is_file() else set()
    for path in source.iterdir():
        if path.is_file() and not path.name.endswith(_WEIGHTS) and not (target / path.name).exists():
            shutil.copy2(path, target / path.name)
        elif path.is_dir() and ((path.name,) in modules or _is_without_weights(path)):
            shutil.copytree(path, target / path.name, dirs_exist_ok=True)


def _is_without_weights(folder: Path) -> bool:
    return not folder.name.startswith(".") and not any(path.name.endswith(_WEIGHTS) for path in folder.rglob("*"))


def _read_list(path: Path) -> list[dict[str, Any]]:
    content = _parse_json(path)
    if not isinstance(content, list) or not all(isinstance(entry, dict) for entry in content):
        raise CheckpointError(f"{path} is no list of objects; legal: as sentence-transformers writes it")
    return content


def _parse_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; legal: the folder of a transformers model") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    content = _parse_json(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds {type(content).__name__}; legal: a JSON object")
    return content


# ---- inspect --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PackedEntry:
    """One packed weight of a checkpoint. columns: the input columns that are not quantised."""

    layer: str
    scheme: str
    shape: tuple[int, ...]
    bytes: int
    columns: tuple[int, ...]


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds; prints as a table.

    kind: ``int8fx``, the ``quant_method`` of another package, or ``float``.
    """

    kind: str
    files: int
    bytes: int
    parameters: int
    packed: tuple[PackedEntry, ...]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    def __str__(self) -> str:
        int8 = sum(math.prod(entry.shape) for entry in self.packed)
        summary = (
            f"{self.kind}: {len(self.packed)} packed weights, {int8:,} of {self.parameters:,} parameters, "
            f"{self.bytes:,} bytes in {self.files} files"
        )
        if not self.packed:
            return summary
        rows = [("layer", "scheme", "shape", "bytes", "unquantised columns")]
        rows += [
            (e.layer, e.scheme, "x".join(map(str, e.shape)), f"{e.bytes:,}", _first(e.columns)) for e in self.packed
        ]
        return "\n".join([table(rows, left=3), summary])


def _first(columns: tuple[int, ...], count: int = 6) -> str:
    shown = ", ".join(map(str, columns[:count]))
    return f"{shown}, ... ({len(columns)})" if len(columns) > count else shown or "-"


def read_contents(folder: Path) -> Contents:
    """What the safetensors files of ``folder`` hold. Reads every tensor if there are checksums, and else no weight.

    Raises:
        CheckpointError: there are none, or one is damaged.
    """
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else [folder]
    if not files or not all(file.is_file() for file in files):
        raise CheckpointError(f"{folder} has no safetensors files; legal: a checkpoint's folder or file")
    shapes: dict[str, tuple[int, ...]] = {}
    sizes: dict[str, int] = {}
    small: dict[str, Any] = {}
    for file in files:
        try:
            check_file(file)
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118  not a dict
                    piece = opened.get_slice(key)
                    shapes[key] = tuple(piece.get_shape())
                    sizes[key] = math.prod(shapes[key]) * _BYTES.get(piece.get_dtype(), 1)
                    if key.endswith((FORMAT, COLUMNS)):
                        small[key] = opened.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: {error}") from error
        except ValueError as error:  # of a checksum; it names the file
            raise CheckpointError(str(error)) from error
    packed = []
    for key in [key for key in shapes if key.endswith(CODES) and key.removesuffix(CODES) + FORMAT in small]:
        weight = key.removesuffix(CODES)
        try:
            scheme = str(read_scheme(small[weight + FORMAT]))
        except ValueError as error:
            raise CheckpointError(f"{weight + FORMAT}: {error}") from error
        columns = tuple(small[weight + COLUMNS].tolist()) if weight + COLUMNS in small else ()
        size = sum(sizes.get(weight + suffix, 0) for suffix in SUFFIXES)
        packed.append(PackedEntry(layer_name(weight), scheme, shapes[key], size, columns))
    config = folder / "config.json"
    quantisation = (_read_json(config) if config.is_file() else {}).get("quantization_config") or {}
    kind = "int8fx" if packed else str(quantisation.get("quant_method", "float"))
    left_out = {weight for key in shapes if key.endswith(CODES) for weight in [key.removesuffix(CODES)]}
    parts = {weight + suffix for weight in left_out for suffix in (*SUFFIXES[1:], FORMAT, "")}
    parameters = sum(math.prod(shape) for key, shape in shapes.items() if key not in parts)
    return Contents(kind, len(files), sum(file.stat().st_size for file in files), parameters, tuple(packed))
