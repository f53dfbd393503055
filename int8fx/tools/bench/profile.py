"""Where the time of a compiled forward goes: by kind of kernel, as torch's profiler sees it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from fnmatch import fnmatch

import torch
from torch import Tensor

from .candidates import BFLOAT16, INT8FX
from .models import FORMS, QUICK_TOKENS, TOKENS, Form, contend, each_model
from .products import Settings
from .timing import SLOW, Case, Measured

KINDS = {  # kind -> what its kernels are called, each in the first kind that has its name
    "quantisation": ("int8fx::quantize_rowwise",),
    "products": ("int8fx::*", "aten::mm", "aten::addmm", "aten::bmm", "mkldnn::*", "aten::mkldnn*", "aten::linear"),
    "attention": ("aten::_scaled_dot_product*",),
    "norms": ("*cpp_fused*rsqrt*",),
    "fused by Inductor": ("*cpp_fused*",),
    "the rest": ("*",),
}
WHOLE = "all"
PROFILED = (INT8FX, BFLOAT16)
ROUNDS = 3  # one of what is slow


def kind_of(kernel: str) -> str:
    """The kind of `KINDS` that a kernel belongs to."""
    return next(kind for kind, patterns in KINDS.items() if any(fnmatch(kernel, pattern) for pattern in patterns))


def profile(settings: Settings) -> Iterator[Case]:
    """Each model's decoder, compiled: seconds of one forward by kind of kernel.

    A norm that Inductor fused with what stands before or after it (a residual add, a cast) counts as a norm.
    """
    tokens = QUICK_TOKENS if settings.quick else TOKENS
    for title, model in each_model(settings, "profile"):
        if isinstance(model, Case):
            yield model
            continue
        found: dict[str, list[Counter[str]]] = {}
        for form in FORMS:
            if form.name in PROFILED:
                settings.say(f"profile: {title}: {form.name}")
                found[form.name] = forwards_by_kind(model, form, tokens)
        for kind in (*KINDS, WHOLE):
            measured = {label: Measured([counter[kind] / 1e9 for counter in of]) for label, of in found.items()}
            yield Case("profile", kind, INT8FX, measured, subject=f"{title}, {tokens} tokens", threads=settings.threads)


def forwards_by_kind(model: torch.nn.Module, form: Form, tokens: int) -> list[Counter[str]]:
    """For each round, nanoseconds by kind, `WHOLE` their sum."""
    from torch._inductor import config

    contender = contend(model, form)
    torch._dynamo.reset()
    decoder = contender.compile(contender.decoder)
    ids = torch.randint(0, contender.decoder.config.vocab_size, (1, tokens))
    with torch.no_grad(), config.patch({"cpp.enable_kernel_profile": True}):  # so that fused kernels have names

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
    found: Counter[str] = Counter()
    for event in profiler.key_averages():
        nanoseconds = round(event.self_cpu_time_total * 1e3)
        found[kind_of(event.key)] += nanoseconds
        found[WHOLE] += nanoseconds
    return found
