"""Measures the memory that ``from_pretrained`` takes to quantise a float model, and to load the int8 one.

    python docs/loading_memory.py [--layers 12] [--hidden 2048]

Writes a random Llama in bfloat16, 1.65 GB by default, to a temporary folder. Loads it in a process of its own with
``Int8FxConfig(scheme)``, saves that, and loads it in another one. Prints, less what the process had before:

- anonymous: the peak of the process's own memory, ``RssAnon``.
- resident: the peak of ``VmRSS``. It has also pages of the memory-mapped file, which the kernel can drop.
- bound: the int8 model's bytes and 15 %, and the largest float tensor.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=2048)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder, "float"), options.layers, options.hidden)
        print(f"{'':34}{'model':>8}{'anonymous':>11}{'resident':>10}{'bound':>8}  MB")
        for scheme in ("llm_int8", "rotated"):
            target = str(Path(folder, scheme))
            report(f"{scheme}: quantised while loading", str(Path(folder, "float")), scheme, target)
            report(f"{scheme}: loaded as int8", target, None, None)


def write(folder: Path, layers: int, hidden: int) -> None:
    """A random Llama, in bfloat16."""
    import torch
    import transformers

    sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_attention_heads": hidden // 64}
    config = transformers.LlamaConfig(num_hidden_layers=layers, vocab_size=4096, dtype=torch.bfloat16, **sizes)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def report(title: str, *arguments: str | None) -> None:
    child = [sys.executable, "-c", "import sys, loading_memory; loading_memory.child()", json.dumps(arguments)]
    done = subprocess.run(child, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    if done.returncode:
        sys.exit(done.stderr)
    numbers = json.loads(done.stdout.splitlines()[-1])
    columns = zip(("model", "anonymous", "resident", "bound"), (8, 11, 10, 8), strict=True)
    print(f"{title:34}" + "".join(f"{numbers[name] / 1e6:>{width}.0f}" for name, width in columns), flush=True)


def child() -> None:
    """Loads a model while a thread watches the memory of this process, and prints the numbers as JSON."""
    source, scheme, target = json.loads(sys.argv[1])
    import transformers

    import int8fx

    config: dict[str, Any] = {} if scheme is None else {"quantization_config": int8fx.Int8FxConfig(scheme)}
    transformers.utils.logging.disable_progress_bar()
    tiny = transformers.LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    int8fx.convert(transformers.LlamaForCausalLM(tiny))  # kernels and imports count as there before
    before, peak, stop = status(), status(), threading.Event()

    def watch() -> None:
        while not stop.is_set():
            for name, value in status().items():
                peak[name] = max(peak[name], value)
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    model = transformers.AutoModelForCausalLM.from_pretrained(source, **config)
    stop.set()
    thread.join()
    size = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    largest = max(2 * p.numel() for p in model.parameters())
    if target is not None:
        model.save_pretrained(target)
    numbers = {"anonymous": peak["RssAnon"] - before["RssAnon"], "resident": peak["VmRSS"] - before["VmRSS"]}
    print(json.dumps(numbers | {"model": size, "bound": 1.15 * size + largest}))


def status() -> dict[str, int]:
    """``VmRSS`` and ``RssAnon`` of this process, in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: 1024 * int(lines[name].split()[0]) for name in ("VmRSS", "RssAnon")}


if __name__ == "__main__":
    main()
