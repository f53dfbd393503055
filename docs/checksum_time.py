"""Measures what the checksums of an int8 file cost when it is saved and loaded.

    python docs/checksum_time.py [--layers 16] [--hidden 2048] [--rounds 3]

Saves a random Llama as int8, 1.1 GB by default, to a temporary folder. Prints the seconds of the comparison alone, and
of ``save_pretrained`` and ``from_pretrained`` with and without checksums, the least of all rounds.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import modeling_utils

import int8fx
from int8fx.integrations.checksums import check_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    hidden = options.hidden
    sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_attention_heads": hidden // 64}
    config = transformers.LlamaConfig(num_hidden_layers=options.layers, vocab_size=4096, **sizes)
    model = int8fx.convert(transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16))
    with_checksums = modeling_utils.safe_save_file
    writers = {"with": with_checksums, "without": with_checksums.__wrapped__}
    times: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.rounds):
            for name, writer in writers.items():
                modeling_utils.safe_save_file = writer
                least(times, f"save {name} checksums", model.save_pretrained, Path(folder, name))
        file = Path(folder, "with", "model.safetensors")
        for _ in range(options.rounds):
            least(times, "compare", check_file, file)
            for name in writers:
                least(times, f"load {name} checksums", type(model).from_pretrained, Path(folder, name))
        print(f"a file of {file.stat().st_size / 1e9:.2f} GB")
    for what, seconds in times.items():
        print(f"{what:24}{seconds:6.2f} s")


def least(times: dict[str, float], name: str, call: Callable[..., Any], file: Path) -> None:
    start = time.perf_counter()
    call(file)
    times[name] = min(times.get(name, float("inf")), time.perf_counter() - start)


if __name__ == "__main__":
    main()
