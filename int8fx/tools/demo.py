"""The demo: one model in float32, in bfloat16 and in int8 under two schemes."""

from __future__ import annotations

import logging
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

import int8fx

from ..conversion.summary import Summary
from ..terminal import table
from .bench.timing import Measured, interleave
from .data.models import ModelError, load
from .data.texts import windows
from .decoding import StaticDecoder, greedy
from .evaluate import Result, compare, float_copy
from .machine import machine

Calls = Mapping[str, Callable[[], object]]  # by label

FLOAT32, BFLOAT16, LLM_INT8, ROTATED = "float32", "bfloat16", "llm_int8", "rotated"
INT8 = (LLM_INT8, ROTATED)
COMPILED = (BFLOAT16, *INT8)  # not float32, the reference: compiling it takes a minute or more
LABELS = (FLOAT32, *COMPILED)
_FIDELITY = {  # `evaluate`'s metrics -> the demo's titles and formats
    "KL mean": ("KL to float32, nats", ".5f"),
    "top-1 agreement": ("top-1 as in float32", ".1%"),
    "1 - cosine": ("1 - cosine to float32", ".5f"),
}


@dataclass
class Comparison:
    """The measurements of `Demo.run`, by label.

    results: bytes, fidelity, and the eager forward (`evaluate.Result`).
    times: what was timed -> seconds a call.
    texts: what the model generated.
    """

    results: dict[str, Result]
    times: dict[str, dict[str, Measured]] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)


class Demo:
    """One run over the model ``name``: `run` prints each step, and a table at the end.

    The models take turns in every measurement, so the machine's state is the same for all. ``quick`` reads shorter
    windows and takes fewer rounds. Of a language model it compiles the decode step only.
    """

    def __init__(self, name: str, threshold: float, prompt: str, tokens: int, quick: bool) -> None:
        self.name, self.threshold, self.prompt, self.tokens, self.quick = name, threshold, prompt, tokens, quick
        self.rounds = 3 if quick else 10
        self.compiled: tuple[str, ...] = COMPILED
        self.begin = time.perf_counter()

    def run(self) -> Comparison:
        """Runs the demo.

        Raises:
            ModelError: the model cannot be loaded, or ``torch.compile`` refuses it.
        """
        print(machine(), flush=True)
        try:
            with torch.no_grad(), _quiet():
                return self._run()
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = str(error).strip().split("\n")[0]
            raise ModelError(f"torch.compile(fullgraph=True) fails on {self.name!r}: {reason}") from error

    def _run(self) -> Comparison:
        self._say(f"loading {self.name} in float32 and in bfloat16")
        reference, tokenizer, kind = load(self.name)
        bfloat16 = load(self.name, torch.bfloat16)[0]
        samples, calibration = self._windows(tokenizer, kind, reference.config)
        self._say(f"converting to int8; {ROTATED} chooses its 16-bit columns from {len(calibration)} windows of text")
        models = {
            BFLOAT16: bfloat16,
            LLM_INT8: int8fx.convert(float_copy(bfloat16), int8fx.llm_int8(self.threshold)),
            ROTATED: int8fx.convert(
                float_copy(bfloat16),
                int8fx.rotated(),
                calibration=int8fx.calibrate(reference, calibration, progress=False),
            ),
        }
        self._say(_converted(int8fx.summary(models[LLM_INT8])))
        width = samples[0].shape[1]
        self._say(f"eager: {len(samples)} x {width} tokens of Python's documentation with each model")
        first, others = compare(reference, models, kind, [{"input_ids": ids} for ids in samples])
        comparison = Comparison({FLOAT32: first, **others})
        compiled = {label: torch.compile(models[label], fullgraph=True, dynamic=False) for label in self.compiled}
        if not self.quick or kind != "lm":
            cache = {"use_cache": False} if kind == "lm" else {}
            forwards = {label: partial(model, input_ids=samples[0], **cache) for label, model in compiled.items()}
            self._compile("forward", forwards)
            comparison.times["forward, compiled"] = self._time(forwards)
        if kind == "lm":
            self._decode(tokenizer, {FLOAT32: reference, **models}, compiled, comparison)
        self._report(comparison, width)
        return comparison

    def _windows(self, tokenizer: Any, kind: str, config: Any) -> tuple[list[Tensor], list[Tensor]]:
        """Windows of text, to measure on and to calibrate on."""
        width = 512 if kind == "lm" and not self.quick else 128
        width = min(width, getattr(config, "max_position_embeddings", width))
        measured, calibrating = windows(tokenizer, ["pydoc"], 2 if kind == "lm" else 8, width, 2)
        return list(measured.split(1)), list(calibrating.split(1))

    def _decode(
        self, tokenizer: Any, models: dict[str, Any], compiled: dict[str, Callable[..., Any]], comparison: Comparison
    ) -> None:
        """Times steps of one token with a static cache: eager, then compiled. The compiled models generate a text."""
        prompt = tokenizer(self.prompt, return_tensors="pt").input_ids
        token = torch.full((1, 1), int(prompt[0, -1]))  # a slice of the prompt has other strides: one more compilation

        def decoders(steps: dict[str, Callable[..., Any]]) -> dict[str, StaticDecoder]:
            return {label: StaticDecoder(models[label], step, prompt, self.tokens) for label, step in steps.items()}

        self._say("eager: decoding token by token with each model")
        eager = {label: partial(decoder, token) for label, decoder in decoders(models).items()}
        comparison.times["decode, eager"] = self._time(eager)
        by_label = decoders(compiled)
        steps = {label: partial(decoder, token) for label, decoder in by_label.items()}
        self._compile("decode step", steps)
        comparison.times["decode, compiled"] = self._time(steps)
        self._say(f"compiled: generating {self.tokens} tokens with each model")
        for label, decoder in by_label.items():
            ids = greedy(decoder)
            end = ids.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else len(ids)
            comparison.texts[label] = tokenizer.decode(ids[:end])

    def _compile(self, what: str, calls: Calls) -> None:
        """Calls each once, which compiles it."""
        for label, call in calls.items():
            self._say(f"compiling the {what} of {label}: minutes at first, seconds from torch's compile cache")
            before = len(int8fx.reports())
            call()
            for report in int8fx.reports()[before:]:
                self._say(
                    f"{label}: {report.linears} int8 linears, {report.shared} quantisations shared, {report.folded} "
                    "operations fused"
                )
        self._say("compiled without a graph break")

    def _time(self, calls: Calls) -> dict[str, Measured]:
        return interleave({label: [call] for label, call in calls.items()}, self.rounds)

    def _say(self, text: str) -> None:
        print(f"{time.perf_counter() - self.begin:5.0f} s  {text}", flush=True)

    def _report(self, comparison: Comparison, width: int) -> None:
        results = comparison.results
        rows = [["", *LABELS, *(f"{label} / {BFLOAT16}" for label in INT8)]]
        rows.append(_row("memory, MB", {label: result.bytes / 1e6 for label, result in results.items()}))
        rows.append(_row("forward, eager, ms", {label: 1e3 * result.seconds for label, result in results.items()}))
        for what, times in comparison.times.items():
            rows.append(_row(f"{what}, ms", {label: 1e3 * measured.best for label, measured in times.items()}))
        for metric, (title, form) in _FIDELITY.items():
            if metric in results[BFLOAT16].metrics:
                values = {label: results[label].metrics[metric].value for label in COMPILED}
                rows.append(_row(title, values, form, ratios=False))
        noise = max(
            measured.median / measured.best for times in comparison.times.values() for measured in times.values()
        )
        decode = ", a decode step is 1" if comparison.texts else ""
        print(f"\n{self.name}: a forward is {width} tokens{decode}\n\n{table(rows, left=1)}")
        print(f"\nTimes are the best of interleaved rounds; medians are up to {noise:.1f} times as long.")
        for label, text in comparison.texts.items():
            print(f"\n{label}: {self.prompt} ->{text}")


def _row(title: str, values: dict[str, float], form: str = ",.1f", ratios: bool = True) -> list[str]:
    """A row of the table: a value of each model, then the ratios of the int8 ones to bfloat16."""
    cells = [f"{values[label]:{form}}" if label in values else "" for label in LABELS]
    for label in INT8:
        has_ratio = ratios and label in values and BFLOAT16 in values
        cells.append(f"{values[label] / values[BFLOAT16]:.2f}" if has_ratio else "")
    return [title, *cells]


def _converted(summary: Summary) -> str:
    reasons = Counter(row.reason for row in summary.left)
    left = "; ".join(f"{count} x {reason}" for reason, count in reasons.items())
    return f"int8: {len(summary.converted)} of {len(summary.rows)} weights; not converted: {left or 'none'}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings and progress bars of transformers and of packages that it loads; errors are shown."""
    from transformers.utils import logging as transformers_logging

    disabled, bars = logging.root.manager.disable, transformers_logging.is_progress_bar_enabled()
    logging.disable(max(disabled, logging.WARNING))
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        if bars:
            transformers_logging.enable_progress_bar()
