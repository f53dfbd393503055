"""Memory of a converted model: bytes of its tensors, and the peak of a forward in a process of its own."""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

import int8fx

from .candidates import BFLOAT16, INT8FX
from .models import MODELS, QUICK_LAYERS, QUICK_TOKENS, TOKENS, load
from .products import Settings
from .timing import Case, Measured

IDEAL = "codes + scales + 16-bit rest"
BYTES, LIVE, PEAK = "parameters and buffers", "all tensors after a forward", "peak resident memory of a forward"


def memory(settings: Settings) -> Iterator[Case]:
    """Each model in bfloat16 and converted: bytes against `IDEAL`, peak of an eager forward against bfloat16's."""
    layers, tokens = (QUICK_LAYERS, QUICK_TOKENS) if settings.quick else (None, TOKENS)
    for name in MODELS:
        found: dict[str, dict[str, Any]] = {}
        for label in (BFLOAT16, INT8FX):
            settings.say(f"memory: {name}, {label}, in a process of its own")
            found[label] = measure(name, layers, tokens, label == INT8FX, settings.threads)
        ideal = Measured([found[INT8FX][IDEAL]]) if IDEAL in found[INT8FX] else Measured()
        title = f"{name}, {layers} layers" if layers else name
        for what in (BYTES, LIVE, PEAK):
            measured = {
                label: Measured([f[what]] if what in f else [], f.get("note", "")) for label, f in found.items()
            }
            base = BFLOAT16
            if what != PEAK:
                base, measured = IDEAL, measured | {IDEAL: ideal}
            case = what if what != PEAK else f"{PEAK}, {tokens} tokens"
            yield Case("memory", case, base, measured, subject=title, unit="B", threads=settings.threads)


def measure(name: str, layers: int | None, tokens: int, convert: bool, threads: int) -> dict[str, Any]:
    """What `main` prints, in a process of its own; ``{"note": ...}`` if that fails."""
    arguments = json.dumps([name, layers, tokens, convert, threads])
    done = subprocess.run([sys.executable, "-m", __name__, arguments], capture_output=True, text=True)
    if done.returncode != 0:
        return {"note": f"failed: {(done.stderr.strip() or 'killed').splitlines()[-1]}"[:200]}
    return json.loads(done.stdout.splitlines()[-1])


def main(name: str, layers: int | None, tokens: int, convert: bool, threads: int) -> dict[str, float]:
    """`BYTES`, `LIVE`, `PEAK` and, of a converted model, `IDEAL`: all in bytes.

    The peak is that of the forward alone: what loading and converting took is handed back to the system before.
    """
    torch.set_num_threads(threads)
    model = load(name, layers)
    found: dict[str, float] = {}
    if convert:
        found[IDEAL] = count_bytes(model.parameters(), model.buffers())
        weights = {name.removesuffix(".weight"): weight for name, weight in model.named_parameters()}
        sizes = {name: (weight.nbytes, *weight.shape) for name, weight in weights.items() if weight.dim() == 2}
        del weights
        int8fx.convert(model)
        for row in int8fx.summary(model).converted:
            nbytes, N, K = sizes[row.name]
            found[IDEAL] += N * K + 4 * N - nbytes  # a code for each weight, a float32 scale for each channel
    found[BYTES] = count_bytes(model.parameters(), model.buffers())
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    with torch.no_grad():
        model(input_ids=torch.ones(1, tokens, dtype=torch.long), use_cache=False)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    found[PEAK] = int(status["VmHWM"].split()[0]) * 1024
    gc.collect()
    # By type, not isinstance: no object's own __class__ is asked, and a tensor without data, as fakes are, is none.
    found[LIVE] = count_bytes(value for value in gc.get_objects() if type(value) in (Tensor, Parameter))
    return found


def count_bytes(*tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind ``tensors``, each once."""
    storages = {s.data_ptr(): s.nbytes() for group in tensors for t in group for s in [t.untyped_storage()]}
    return sum(storages.values())


if __name__ == "__main__":
    print(json.dumps(main(*json.loads(sys.argv[1]))))
