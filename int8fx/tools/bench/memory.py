"""Memory of a converted model: bytes of its tensors, and the peak of a forward in a separate process."""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

import int8fx

from ..evaluate import count_bytes
from .candidates import BFLOAT16, INT8FX
from .models import LARGE, SMALL, load, num_layers, num_tokens, title_of
from .settings import Settings
from .timing import Case, Measured

IDEAL = "ideal: int8 weights, scales, 16-bit others"
BYTES, LIVE, PEAK = "parameters and buffers", "all tensors after a forward", "peak resident memory of a forward"


def memory(settings: Settings) -> Iterator[Case]:
    """Each model in bfloat16 and converted: bytes against `IDEAL`, peak of an eager forward against bfloat16's."""
    tokens = num_tokens(settings)
    for name in (LARGE, SMALL):
        results: dict[str, Mapping[str, Any]] = {}
        for candidate in (BFLOAT16, INT8FX):
            settings.say(f"memory: {name}, {candidate.name}, in a separate process")
            arguments = (name, num_layers(settings), tokens, candidate is INT8FX, settings.num_threads)
            results[candidate.name] = measure(*arguments)
        yield from cases(results, title_of(settings, name), tokens, settings.num_threads)


def cases(results: Mapping[str, Mapping[str, Any]], subject: str, tokens: int, threads: int) -> Iterator[Case]:
    """A case for each of `BYTES`, `LIVE` and `PEAK`, from what `measure` returned for bfloat16 and for int8fx."""
    ideal = results[INT8FX.name].get(IDEAL)
    for quantity in (BYTES, LIVE, PEAK):
        measured = {
            label: Measured([result[quantity]] if quantity in result else [], result.get("note", ""))
            for label, result in results.items()
        }
        name, base = f"{PEAK}, {tokens} tokens", BFLOAT16.name
        if quantity != PEAK:
            name, base = quantity, IDEAL
            measured[IDEAL] = Measured([] if ideal is None else [ideal])
        yield Case("memory", name, base, measured, subject=subject, unit="B", threads=threads)


def measure(name: str, layers: int | None, tokens: int, convert: bool, threads: int) -> dict[str, Any]:
    """`bytes_of` the model ``name`` cut to ``layers``, in a separate process; ``{"note": ...}`` if that fails."""
    arguments = json.dumps([name, layers, tokens, convert, threads])
    done = subprocess.run([sys.executable, "-m", __name__, arguments], capture_output=True, text=True)
    if done.returncode != 0:
        return {"note": f"failed: {(done.stderr.strip() or 'killed').splitlines()[-1]}"[:200]}
    return json.loads(done.stdout.splitlines()[-1])


def bytes_of(model: Any, tokens: int, convert: bool) -> dict[str, float]:
    """Bytes of ``model`` and of a forward of ``[1, tokens]``.

    The peak is that of the forward alone: memory of loading and converting is returned to the system before.

    Args:
        convert: whether to convert it first, in place.

    Returns:
        `BYTES`, `LIVE`, `PEAK`, and `IDEAL` of a converted model.
    """
    result: dict[str, float] = {}
    if convert:
        result[IDEAL] = count_bytes(model.parameters(), model.buffers())
        weights = {name.removesuffix(".weight"): weight for name, weight in model.named_parameters()}
        sizes = {name: (weight.nbytes, *weight.shape) for name, weight in weights.items() if weight.dim() == 2}
        del weights
        int8fx.convert(model, int8fx.llm_int8())
        for row in int8fx.summary(model).converted:
            nbytes, N, K = sizes[row.name]
            result[IDEAL] += N * K + 4 * N - nbytes  # a code for each weight, a float32 scale for each channel
    result[BYTES] = count_bytes(model.parameters(), model.buffers())
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    with torch.no_grad():
        model(input_ids=torch.ones(1, tokens, dtype=torch.long), use_cache=False)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    result[PEAK] = int(status["VmHWM"].split()[0]) * 1024
    gc.collect()
    # By type, not isinstance, which would ask every object for its __class__, and would count fake tensors.
    result[LIVE] = count_bytes(value for value in gc.get_objects() if type(value) in (Tensor, Parameter))
    return result


def main(name: str, layers: int | None, tokens: int, convert: bool, threads: int) -> None:
    """What the separate process runs: prints `bytes_of` as JSON."""
    torch.set_num_threads(threads)
    print(json.dumps(bytes_of(load(name, layers)[0], tokens, convert)))


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
