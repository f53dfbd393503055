"""Checkpoints as folders: ``int8fx convert SRC DST``, and what ``int8fx inspect DST`` says about one."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..conversion.format import FORMAT, read_scheme
from ..conversion.layers import layer_name
from ..integrations.checksums import check_file
from ..integrations.stored import PARTS, open_file, read_tensor
from ..schemes.formats import FORMATS
from ..schemes.weight import CODES, COLUMNS, SUFFIXES
from ..terminal import table

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json")
_QUANTISED = ("quantize_config.json", "quant_config.json")  # what AutoGPTQ and AutoAWQ say of the weights
_LAYOUT_KEYS = {"gptq": ("checkpoint_format", "format"), "awq": ("version", "format")}  # in config.json
_LAYOUTS = {"gptq": ("gptq", "gptq_v2"), "awq": ("gemm",)}
_SHARD = 1 << 26  # bytes
_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


class CheckpointError(ValueError):
    """A folder is not what the command needs; the message names it."""


# ---- convert --------------------------------------------------------------------------------------------------------


def convert_checkpoint(
    source: Path,
    target: Path,
    config: Any = None,
    *,
    compute: str | None = None,
    dtype: Any = "auto",
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    note: Callable[[str], None] = lambda text: None,
) -> None:
    """Quantises the transformers model in ``source`` while it loads, and writes it to ``target``.

    Weights that GPTQ, AWQ or GGUF have quantised keep their codes (`integrations.gptq`, `integrations.gguf`): they are
    first written as int8fx stores them to a folder beside ``target``, tensor by tensor.

    The result is written beside ``target`` and renamed when it is complete: if the process dies, ``target`` is what it
    was. Files that hold no weights, such as the tokenizer's, are copied, and so are folders without weights.

    Args:
        source: the folder of a float, GPTQ or AWQ model, or a GGUF file.
        config: an `integrations.transformers.Int8FxConfig` for a float model; None for the default.
        compute: as in `weight_only`, for weights that are quantised; None for ``fp32``.
        dtype: of what is not packed; "auto" for that of ``source``, float32 for a GGUF file.
        overwrite: whether ``target`` may exist.
        note: called with what a user should know of the result.

    Raises:
        CheckpointError: ``source`` is no model that transformers can load, its codes cannot be taken over, or
            ``target`` exists.
    """
    method = "gguf" if source.suffix.lower() == ".gguf" else _method_of(source)
    if method is None and compute is not None:
        raise CheckpointError(
            f"{source} is a float model; legal: compute in the scheme, as in weight_only(compute=...)"
        )
    if method is not None and config is not None:
        raise CheckpointError(
            f"{source} is quantised by {method}, and keeps its codes; legal: no scheme, skip or select"
        )
    if target.exists() and not overwrite:
        raise CheckpointError(f"{target} exists; legal: another folder, or --overwrite")
    if target.exists() and not (target / "config.json").is_file():
        raise CheckpointError(f"{target} is not the folder of a model; --overwrite replaces only such folders")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as folder:
        written = Path(folder) / "new"
        if method is None:
            from ..integrations.transformers import Int8FxConfig

            config = Int8FxConfig() if config is None else config
            _save(_load(source, source, dtype, quantization_config=config), source, written, max_shard_size)
        else:
            taken = Path(folder) / "taken"
            _take_over(source, taken, method, compute or "fp32", dtype, note)
            try:
                model = _load(taken, source, dtype)
            except CheckpointError:
                raise
            except (ValueError, RuntimeError) as error:  # a weight does not fit the model, or is not packed here
                raise CheckpointError(f"{source}: {error}") from error
            _save(model, taken, written, max_shard_size)
        old = Path(folder) / "old"
        if target.exists():
            os.replace(target, old)
        try:
            os.replace(written, target)
        except BaseException:
            if old.exists():
                os.replace(old, target)
            raise


def _method_of(source: Path) -> str | None:
    """How the model in ``source`` is quantised, if its codes can be taken over; None for a float model.

    Raises:
        CheckpointError: it is quantised otherwise.
    """
    quantisation = _read_json(source / "config.json").get("quantization_config")
    if not quantisation:
        return None
    method = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation
    if method not in ("gptq", "awq"):
        raise CheckpointError(f"{source} is quantised already, by {method}; legal: a float model, gptq, awq, .gguf")
    return method


def _load(folder: Path, source: Path, dtype: Any, **options: Any) -> Any:
    """The model in ``folder``, which is ``source`` or was made from it."""
    import transformers

    names = _read_json(folder / "config.json").get("architectures") or []
    cls = getattr(transformers, names[0], None) if names else None
    if cls is None:
        raise CheckpointError(f"{source}/config.json names architectures {names}; legal: one that transformers has")
    model, loaded = cls.from_pretrained(folder, dtype=dtype, output_loading_info=True, **options)
    if folder != source:
        _check_left(source, _Tensors(_weight_files(folder)), sorted(loaded["unexpected_keys"]))
    if loaded["missing_keys"]:
        missing = ", ".join(sorted(loaded["missing_keys"])[:3])
        raise CheckpointError(f"{source} lacks tensors: {missing}; legal: a model with all of its weights")
    return model


def _check_left(source: Path, tensors: Mapping[str, Tensor], unexpected: list[str]) -> None:
    """Raises CheckpointError if the model does not take codes, or a bias of theirs that is not zero, as some have."""
    for key in unexpected:
        bias = key.endswith(".bias") and key.removesuffix("bias") + "weight" + CODES in tensors
        if key.endswith(CODES) or (bias and bool(tensors[key].any())):
            raise CheckpointError(
                f"{source} has {key.removesuffix(CODES)!r}, and the model of transformers has no place for it; legal: "
                "weights and biases of its own layers"
            )


def _save(model: Any, source: Path, target: Path, max_shard_size: str) -> None:
    """Writes ``model`` to ``target``, and copies what belongs to it of ``source``."""
    model.save_pretrained(target, max_shard_size=max_shard_size)
    _copy_others(source, target)


def _copy_others(source: Path, target: Path) -> None:
    """Copies what ``target`` lacks of ``source`` and is no weight of the model: a tokenizer, chat templates, pooling.

    Folders are copied if they have no weights. The modules of sentence-transformers, which ``modules.json`` lists, have
    folders that may have some, and are copied too. Hidden folders are not.
    """
    listed = source / "modules.json"
    modules = {Path(str(m.get("path", ""))).parts[:1] for m in _read_list(listed)} if listed.is_file() else set()
    for path in source.iterdir():
        if path.is_file() and not path.name.endswith((*_WEIGHTS, *_QUANTISED)) and not (target / path.name).exists():
            shutil.copy2(path, target / path.name)
        elif path.is_dir() and ((path.name,) in modules or _is_without_weights(path)):
            shutil.copytree(path, target / path.name, dirs_exist_ok=True)


def _take_over(source: Path, target: Path, method: str, compute: str, dtype: Any, note: Callable[[str], None]) -> None:
    """Writes the model in ``source``, quantised by ``method``, to ``target`` as an int8fx checkpoint.

    Raises:
        CheckpointError: it cannot be read, or int8fx cannot hold a value of it.
    """
    from ..integrations.transformers import Int8FxConfig

    target.mkdir()
    try:
        if method == "gguf":
            parts, settings = _read_gguf(source, target, compute, dtype, note)
        else:
            settings = _read_json(source / "config.json")
            parts = _read_groups(_Tensors(_weight_files(source)), settings["quantization_config"], method, compute)
            _copy_others(source, target)
        settings["quantization_config"] = Int8FxConfig().to_dict()
        (target / "config.json").write_text(json.dumps(settings))
        _write_tensors(parts, target)
    except CheckpointError:
        raise
    except (ValueError, SafetensorError, ImportError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{source}: {error}") from error


def _read_groups(
    tensors: Mapping[str, Tensor], quantisation: dict[str, Any], method: str, compute: str
) -> Iterator[dict[str, Tensor]]:
    """The tensors of a GPTQ or AWQ model as int8fx has them."""
    from ..integrations.gptq import read_awq, read_gptq

    layout = str(next((quantisation[k] for k in _LAYOUT_KEYS[method] if quantisation.get(k)), _LAYOUTS[method][0]))
    if quantisation.get("backend") == "llm-awq":
        layout = "llm-awq"
    if layout.lower() not in _LAYOUTS[method]:
        raise CheckpointError(f"{method} with the layout {layout!r}; legal: {', '.join(_LAYOUTS[method])}")
    if method == "awq":
        return read_awq(tensors, compute=compute)
    return read_gptq(tensors, v2=layout.lower() == "gptq_v2", compute=compute)


def _read_gguf(
    file: Path, target: Path, compute: str, dtype: Any, note: Callable[[str], None]
) -> tuple[Iterator[dict[str, Tensor]], dict[str, Any]]:
    """The tensors of a GGUF file as int8fx has them, and its configuration. Writes its tokenizer to ``target``."""
    import transformers

    from ..integrations.gguf import open_gguf, read_gguf

    reader = open_gguf(file)
    config = transformers.AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    names = config.architectures or []
    cls = getattr(transformers, names[0], None) if names else None
    with torch.device("meta"):
        model = cls(config) if cls is not None else transformers.AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    dtype = torch.float32 if dtype == "auto" else dtype
    settings = config.to_dict() | {"architectures": [type(model).__name__], "dtype": str(dtype).removeprefix("torch.")}
    try:
        transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(target)
    except Exception as error:  # of any kind: it depends on the file and on other packages
        note(f"{file} has no tokenizer that transformers can read ({type(error).__name__}: {error}); none is written")
    return read_gguf(reader, model, dtype=dtype, compute=compute, note=note), settings


class _Tensors(Mapping[str, Tensor]):
    """The tensors of files, each read when it is asked for."""

    def __init__(self, files: Iterable[Path]) -> None:
        opened = [open_file(file) for file in files]
        self._files = {key: file for file in opened for key in file.keys()}  # noqa: SIM118  not a dict

    def __getitem__(self, key: str) -> Tensor:
        return read_tensor(self._files[key], key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _weight_files(folder: Path) -> list[Path]:
    """The files of a transformers model in ``folder`` that hold its weights."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (index := folder / f"{name}.index.json").is_file():
            listed = _read_json(index).get("weight_map")
            files = set(listed.values()) if isinstance(listed, dict) else set()
            if not files or not all(isinstance(file, str) and Path(file).name == file for file in files):
                raise CheckpointError(f"{index} has no weight_map of file names; legal: as save_pretrained writes it")
            return [folder / file for file in sorted(files)]
        if (folder / name).is_file():
            return [folder / name]
    raise CheckpointError(f"{folder} has no weights; legal: model.safetensors or pytorch_model.bin, or their index")


def _write_tensors(parts: Iterable[dict[str, Tensor]], folder: Path) -> None:
    """Writes safetensors files of about `_SHARD` bytes and their index, with no more than one file in memory.

    Of the names of a tied weight, the first has the codes or the float weight, and each the other parts.
    """
    weight_map: dict[str, str] = {}
    shard: dict[str, Tensor] = {}

    def flush() -> None:
        if shard:
            file = f"model-{len(set(weight_map.values())) + 1:05}.safetensors"
            save_file(shard, folder / file, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(shard, file))
            shard.clear()

    for part in parts:
        seen: set[int] = set()
        for key, tensor in part.items():
            if id(tensor) not in seen:
                shard[key] = tensor.contiguous()
            elif key.endswith(PARTS[1:]):
                shard[key] = tensor.clone()
            seen.add(id(tensor))
        if sum(tensor.nbytes for tensor in shard.values()) >= _SHARD:
            flush()
    flush()
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


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
    """One packed weight of a checkpoint.

    shape: ``[..., N, K]``; of 4 bits, K + 1 if K is odd, as files do not say.
    columns: the input columns that are not quantised.
    """

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
            scheme = read_scheme(small[weight + FORMAT])
        except ValueError as error:
            raise CheckpointError(f"{weight + FORMAT}: {error}") from error
        columns = tuple(small[weight + COLUMNS].tolist()) if weight + COLUMNS in small else ()
        size = sum(sizes.get(weight + suffix, 0) for suffix in SUFFIXES)
        *channels, code_columns = shapes[key]
        shape = (*channels, code_columns * 8 // FORMATS[scheme.grouping.format].bits)
        packed.append(PackedEntry(layer_name(weight), str(scheme), shape, size, columns))
    config = folder / "config.json"
    quantisation = (_read_json(config) if config.is_file() else {}).get("quantization_config") or {}
    kind = "int8fx" if packed else str(quantisation.get("quant_method", "float"))
    weights = {key.removesuffix(CODES) for key in shapes if key.endswith(CODES)}
    parts = {weight + suffix for weight in weights for suffix in (*SUFFIXES, FORMAT, "")}
    parameters = sum(math.prod(shape) for key, shape in shapes.items() if key not in parts)
    parameters += sum(math.prod(entry.shape) for entry in packed)
    return Contents(kind, len(files), sum(file.stat().st_size for file in files), parameters, tuple(packed))
