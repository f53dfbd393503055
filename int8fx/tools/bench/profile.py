"""The time of a compiled forward by kind of kernel, according to torch's profiler."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from fnmatch import fnmatch

import torch
from torch import Tensor

from .candidates import BFLOAT16, INT8FX, Candidate
from .models import LMS, convert_copy, make, num_tokens
from .settings import Settings
from .timing import SLOW, Case, Measured

KINDS = {  # kind -> patterns of its kernels' names; a kernel belongs to the first kind that matches
    "quantisation": ("int8fx::quantize_rowwise",),
    "linears": ("int8fx::*", "aten::mm", "aten::addmm", "aten::bmm", "mkldnn::*", "aten::mkldnn*", "aten::linear"),
    "attention": ("aten::_scaled_dot_product*",),
    "norms": ("*cpp_fused*rsqrt*",),
    "fused by Inductor": ("*cpp_fused*",),
    "other kernels": ("*",),
}
TOTAL = "all"
PROFILED = (INT8FX, BFLOAT16)
ROUNDS = 3  # 1 if a forward is slow


def kind_of(kernel: str) -> str:
    """The kind of `KINDS` that a kernel belongs to, by its name."""
    return next(kind for kind, patterns in KINDS.items() if any(fnmatch(kernel, pattern) for pattern in patterns))


def profile(settings: Settings) -> Iterator[Case]:
    """Each model's decoder, compiled: seconds of one forward by kind of kernel.

    A norm that Inductor fused with its neighbours (a skip connection, a cast) counts as a norm.
    """
    for name in LMS:
        subject = make(settings, "profile", name)
        if isinstance(subject, Case):
            yield subject
            continue
        title, ids = subject.title, subject.ids[:1, : num_tokens(settings)].contiguous()
        by_kind: dict[str, list[Counter[str]]] = {}
        for candidate in PROFILED:
            settings.say(f"profile: {title}: {candidate.name}")
            by_kind[candidate.name] = forwards_by_kind(subject.model, candidate, ids)
        yield from cases(by_kind, f"{title}, {num_tokens(settings)} tokens", settings.num_threads)


def cases(by_kind: dict[str, list[Counter[str]]], subject: str, threads: int) -> Iterator[Case]:
    """A case for each kind and for `TOTAL`, from each candidate's nanoseconds by kind in each round."""
    for kind in (*KINDS, TOTAL):
        measured = {label: Measured([counter[kind] / 1e9 for counter in rounds]) for label, rounds in by_kind.items()}
        yield Case("profile", kind, INT8FX.name, measured, subject=subject, threads=threads)


def forwards_by_kind(model: torch.nn.Module, candidate: Candidate, ids: Tensor) -> list[Counter[str]]:
    """For each round, nanoseconds of a forward of ``ids`` by kind of `KINDS`, and their sum by `TOTAL`."""
    from torch._inductor import config

    converted = convert_copy(model, candidate)
    torch._dynamo.reset()
    decoder = converted.compile(converted.decoder)
    with torch.no_grad(), config.patch({"cpp.enable_kernel_profile": True}):  # gives fused kernels names

        def forward() -> Tensor:
            return decoder(input_ids=ids, use_cache=False).last_hidden_state

        forward()
        begin = time.perf_counter()
        forward()
        slow = time.perf_counter() - begin > SLOW
        return [_by_kind(forward) for _ in range(1 if slow else ROUNDS)]


def _by_kind(call: Callable[[], object]) -> Counter[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        call()
    nanoseconds: Counter[str] = Counter()
    for event in profiler.key_averages():
        nanoseconds[kind_of(event.key)] += round(event.self_cpu_time_total * 1e3)
    nanoseconds[TOTAL] = sum(nanoseconds.values())
    return nanoseconds
