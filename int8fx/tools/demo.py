"""The demo: one model in float32, in bfloat16 and in int8, side by side."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import cycle
from statistics import mean, median
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

import int8fx

from ..passes import PASSES
from . import metrics
from .data.models import ModelError, load
from .evaluate import count_bytes
from .machine import machine

FLOAT32, BFLOAT16, INT8 = "float32", "bfloat16", "int8fx"
COMPILED = (BFLOAT16, INT8)  # float32 is there for fidelity; compiling it as well takes a minute or more


@dataclass
class Result:
    """What was measured of one model.

    nbytes: of its parameters and buffers, tied ones once.
    seconds: what was timed -> one entry per round.
    fidelity: metric -> its mean over each window of text; empty for float32, the reference.
    text: what it generated.
    """

    nbytes: int
    seconds: dict[str, list[float]] = field(default_factory=dict)
    fidelity: dict[str, list[float]] = field(default_factory=dict)
    text: str = ""


class Demo:
    """One run over the model ``name``: `run` prints what it does, and a table at the end.

    The models take turns, round by round, so that all of them meet the same state of the machine. ``quick`` reads
    shorter windows, takes fewer rounds and, of a language model, compiles the decode step only.
    """

    def __init__(self, name: str, threshold: float, prompt: str, tokens: int, quick: bool) -> None:
        self.name, self.threshold, self.prompt, self.tokens, self.quick = name, threshold, prompt, tokens, quick
        self.budget = 1.0 if quick else 10.0  # seconds of rounds, beyond the first two
        self.console = Console(highlight=False, markup=False)
        self.begin = time.perf_counter()

    def run(self) -> dict[str, Result]:
        """The results of float32, bfloat16 and int8fx.

        Raises:
            ModelError: the model cannot be had, or ``torch.compile`` refuses it.
        """
        self.console.print(machine(), soft_wrap=True)
        self.load()
        config = self.models[FLOAT32].config
        width = min(
            512 if self.kind == "lm" and not self.quick else 128, getattr(config, "max_position_embeddings", 512)
        )
        windows = real_text(self.tokenizer, 1 if self.kind == "lm" else 4, width, 2)
        try:
            with torch.no_grad(), self.console.status("working", refresh_per_second=2):
                self.forwards(windows)
                if self.kind == "lm":
                    self.decodes()
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = str(error).strip().split("\n")[0]
            raise ModelError(f"torch.compile(fullgraph=True) fails on {self.name!r}: {reason}") from error
        self.report(windows[0].numel())
        return self.results

    def say(self, text: str) -> None:
        self.console.print(f"{time.perf_counter() - self.begin:5.0f} s  {text}", soft_wrap=True)

    def load(self) -> None:
        self.models: dict[str, Any] = {}
        for label in (FLOAT32, BFLOAT16, INT8):
            dtype = torch.float32 if label == FLOAT32 else torch.bfloat16
            self.say(
                f"loading {self.name} in {str(dtype).removeprefix('torch.')}"
                + (" to convert it to int8" if label == INT8 else "")
            )
            self.models[label], self.tokenizer, self.kind = load(self.name, dtype)
            if self.kind == "speech":
                raise ModelError(f"{self.name!r} writes speech; the demo takes language models and text encoders")
        int8fx.convert(self.models[INT8], int8fx.llm_int8(self.threshold))
        summary = int8fx.summary(self.models[INT8])
        left = "; ".join(f"{n} x {reason}" for reason, n in Counter(row.reason for row in summary.left).items())
        self.say(f"int8: {len(summary.converted)} of {len(summary.rows)} weights; left as they were: {left or 'none'}")
        self.results = {label: Result(count_bytes(model)) for label, model in self.models.items()}

    def forwards(self, windows: list[Tensor]) -> None:
        """Forwards over windows of text: eager ones of every model, compared with float32's, then compiled ones."""

        def outputs(forward: Callable[..., Any]) -> Iterator[Tensor]:
            for window in cycle(windows):
                if self.kind == "lm":
                    yield forward(input_ids=window, use_cache=False).logits
                else:
                    yield forward(input_ids=window).last_hidden_state.mean(1)

        self.say(
            f"eager: reading {len(windows)} x {windows[0].numel()} tokens of Python's documentation with each model"
        )
        work = {label: outputs(model) for label, model in self.models.items()}
        for i, found in enumerate(self.interleave("forward, eager", work)):
            for label in COMPILED if i < len(windows) else ():
                self.compare(label, found[FLOAT32], found[label])
        if self.quick and self.kind == "lm":
            return
        work = {label: outputs(self.compiled(label)) for label in COMPILED}
        self.first_steps("forward", work)
        for _ in self.interleave("forward, compiled", work):
            pass

    def compare(self, label: str, reference: Tensor, y: Tensor) -> None:
        if self.kind == "lm":
            found = {
                "KL to float32, nats": metrics.kl_divergence(reference, y),
                "top-1 as in float32": metrics.top1_agreement(reference, y),
            }
        else:
            found = {"1 - cosine to float32": metrics.cosine_distance(reference, y)}
        for metric, values in found.items():
            self.results[label].fidelity.setdefault(metric, []).append(values.double().mean().item())

    def decodes(self) -> None:
        """Greedy generation with a static cache, a token at a time: eager, then compiled, which is the text to show."""
        prompt = self.tokenizer(self.prompt, return_tensors="pt").input_ids

        self.say("eager: generating token by token with each model")
        work = {label: greedy(model, model, prompt, self.tokens) for label, model in self.models.items()}
        for steps in work.values():
            next(steps)
        for _ in self.interleave("decode, eager", work):
            pass

        work = {label: greedy(self.models[label], self.compiled(label), prompt, self.tokens) for label in COMPILED}
        rounds = [{label: next(steps) for label, steps in work.items()}, self.first_steps("decode step", work)]
        self.say(f"compiled: generating {self.tokens} tokens with each model")
        rounds += self.interleave("decode, compiled", work, seconds=float("inf"))
        for label in COMPILED:
            ids = [tokens[label] for tokens in rounds]
            if self.tokenizer.eos_token_id in ids:
                ids = ids[: ids.index(self.tokenizer.eos_token_id)]
            self.results[label].text = self.tokenizer.decode(ids)

    def compiled(self, label: str) -> Callable[..., Any]:
        return torch.compile(self.models[label], fullgraph=True, dynamic=False)

    def first_steps(self, what: str, work: dict[str, Iterator[Any]]) -> dict[str, Any]:
        """One step of each, which compiles it."""
        found, known = {}, len(PASSES.reports)
        for label, steps in work.items():
            self.say(f"compiling the {what} of {label} (takes a minute or two when torch's compile cache is cold)")
            found[label] = next(steps)
        report = PASSES.reports[-1] if len(PASSES.reports) > known else None
        rewrite = "rewritten in an earlier run: torch's compile cache had it"
        if report is not None:
            rewrite = (
                f"rewritten to {report.linears} int8 products, {report.shared} quantisations shared, "
                f"{report.folded} operations folded in"
            )
        self.say(f"compiled whole, without a graph break; int8fx's graph was {rewrite}")
        return found

    def interleave(
        self, what: str, work: dict[str, Iterator[Any]], seconds: float | None = None
    ) -> Iterator[dict[str, Any]]:
        """Rounds of one timed step each, at least two, until ``seconds`` have passed or the steps end."""
        seconds = self.budget if seconds is None else seconds
        begin, rounds = time.perf_counter(), 0
        while rounds < 2 or time.perf_counter() - begin < seconds:
            found = {}
            for label, steps in work.items():
                start = time.perf_counter()
                try:
                    found[label] = next(steps)
                except StopIteration:
                    return
                self.results[label].seconds.setdefault(what, []).append(time.perf_counter() - start)
            rounds += 1
            yield found

    def report(self, tokens: int) -> None:
        base, ours = self.results[BFLOAT16], self.results[INT8]
        decode = ", a decode step is 1" if self.kind == "lm" else ""
        table = Table(title=f"{self.name}: a forward is {tokens} tokens{decode}", box=box.SIMPLE)
        table.add_column(no_wrap=True)
        for label in (*self.results, f"{INT8} / {BFLOAT16}"):
            table.add_column(label, justify="right")
        megabytes = [f"{r.nbytes / 1e6:,.1f}" for r in self.results.values()]
        table.add_row("memory, MB", *megabytes, f"{ours.nbytes / base.nbytes:.2f}")
        for what, times in ours.seconds.items():
            row = [f"{min(r.seconds[what]) * 1e3:,.1f}" if what in r.seconds else "" for r in self.results.values()]
            table.add_row(f"{what}, ms", *row, f"{min(times) / min(base.seconds[what]):.2f}")
        for metric in ours.fidelity:
            form = ".1%" if metric.startswith("top-1") else ".5f"
            row = [f"{mean(self.results[label].fidelity[metric]):{form}}" for label in COMPILED]
            table.add_row(metric, "", *row, "")
        noise = max(median(times) / min(times) for r in self.results.values() for times in r.seconds.values())
        self.console.print()
        self.console.print(table)
        self.say(f"times are the best of interleaved rounds; medians are up to {noise:.1f} times as long")
        for label in COMPILED if ours.text else ():
            self.console.print(f"\n{label}: {self.prompt} ->{self.results[label].text}")


def greedy(model: Any, step: Callable[..., Any], prompt: Tensor, tokens: int) -> Iterator[int]:
    """The ``tokens`` likeliest tokens after ``prompt [1, P]``: one from ``model(prompt)``, the rest from ``step``.

    ``step`` is ``model`` or its compiled form; it reads one token at a time beside a static cache.
    """
    from transformers import StaticCache

    cache: Any = StaticCache(config=model.config, max_cache_len=prompt.shape[1] + tokens)
    forward: Callable[..., Any] = model
    token = prompt
    for _ in range(tokens):
        token = forward(input_ids=token, past_key_values=cache).logits[:, -1:].argmax(-1)
        yield token.item()
        forward = step


def real_text(tokenizer: Any, batch: int, width: int, count: int) -> list[Tensor]:
    """``count`` tensors ``[batch, width]`` of tokens from Python's own documentation, the same ones each time."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[key] for key in sorted(topics))
    stride = len(text) // (batch * count)
    pieces = [text[i * stride :][: 16 * width] for i in range(batch * count)]
    ids = tokenizer(pieces, truncation=True, max_length=width, return_tensors="pt").input_ids
    return list(ids.view(count, batch, width))
