"""Which of a few tiles is the fastest on this device: timed once per shape, then remembered on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from hashlib import sha256

import torch
import triton
from triton.runtime.cache import get_cache_manager

from .configs import Config

CLEARLY = 0.95
"""What part of the guess's time another candidate must take to be taken: less is noise."""

_fastest: dict[str, int] = {}


def fastest(kernel: str, shape: tuple, candidates: tuple[Config, ...], run: Callable[[Config], object]) -> Config:
    """The candidate whose ``run`` takes the least time; the first where none is clearly faster or nothing can be timed.

    Timed on the first call with a shape (M counts up to the next power of two), remembered in this process and in
    Triton's cache directory. While a CUDA graph is captured nothing may be timed: then the first candidate, the table's
    own guess, is taken and nothing is remembered. The interpreter is never timed.

    Args:
        kernel, shape: name and sizes that decide the choice, the device's name among them.
        candidates: the same for the same shape.
        run: launches the kernel with a tile; must have no effect but its output.
    """
    if len(candidates) == 1 or not torch.cuda.is_available():
        return candidates[0]
    key = sha256(repr((kernel, shape, candidates, triton.__version__)).encode()).hexdigest()
    if key not in _fastest:
        cache = get_cache_manager(key)
        stored = cache.get_file("fastest.json")
        if stored is not None:
            with open(stored) as file:
                _fastest[key] = json.load(file)
        elif torch.cuda.is_current_stream_capturing():
            return candidates[0]
        else:
            times = [_time(lambda c=c: run(c)) for c in candidates]
            best = times.index(min(times))
            _fastest[key] = best if times[best] < CLEARLY * times[0] else 0
            cache.put(json.dumps(_fastest[key]), "fastest.json", binary=False)
    return candidates[_fastest[key]]


def _time(run: Callable[[], object]) -> float:
    return triton.testing.do_bench(run, warmup=5, rep=20, return_mode="median")
