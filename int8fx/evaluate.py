"""``evaluate``: the outputs of a model under several schemes, compared with its own in float, with intervals."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from . import metrics
from .calibrate import calibrate, show_progress
from .convert import convert
from .schemes import Scheme
from .tables import table


@dataclass(frozen=True)
class Estimate:
    """A statistic over all windows with the bounds of its 95 % interval (`metrics.bootstrap`)."""

    value: float
    low: float
    high: float


@dataclass
class Result:
    """What one scheme did.

    bytes: of the converted model's parameters and buffers, tied ones once.
    converted: how many weights are int8.
    seconds: of the fastest read of a window.
    metrics: name -> `Estimate`.
    """

    bytes: int
    converted: int
    seconds: float = float("inf")
    metrics: dict[str, Estimate] = field(default_factory=dict)


@dataclass
class Evaluation:
    """The results of `evaluate`; prints as a table."""

    model: str
    kind: str
    windows: int
    width: int
    reference: Result
    results: dict[str, Result]
    about: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        names = list(next(iter(self.results.values())).metrics)
        rows = [["scheme", *names, "MB", "s"]]
        for label, result in {"float": self.reference, **self.results}.items():
            cells = [_cell(name, result.metrics[name]) if name in result.metrics else "" for name in names]
            rows.append([label, *cells, f"{result.bytes / 1e6:.1f}", f"{result.seconds:.2f}"])
        head = f"{self.model}: {self.windows} windows of {self.width} tokens; mean [95 % interval over windows]"
        return "\n".join([head, table(rows)])

    def to_json(self) -> str:
        return json.dumps(self, default=vars, indent=1)


def _cell(name: str, e: Estimate) -> str:
    if "agreement" in name or "same" in name:
        return f"{e.value:.1%} [{e.low:.1%}, {e.high:.1%}]"
    return f"{e.value:.3g} [{e.low:.3g}, {e.high:.3g}]"


def evaluate(
    model: nn.Module,
    kind: str,
    windows: Tensor,
    schemes: dict[str, Scheme],
    *,
    calibration: Tensor | None = None,
    name: str = "model",
    progress: bool = False,
) -> Evaluation:
    """Reads ``windows``, one per call, with ``model`` and with a copy of it for each scheme; compares their outputs.

    Language models: ``KL(float || scheme)`` per token in nats (mean, 99th percentile, maximum), how often the likeliest
    token is the same, perplexity, and the difference of the negative log-likelihood per token, paired. Encoders: 1 -
    cosine of the mean of the last hidden states, and how often a window finds the same other windows by it. Every
    figure has a bootstrap interval over windows.

    Args:
        model: of transformers, float; it stays as it is.
        kind: ``lm`` or ``encoder``.
        windows: ``[W, T]`` token ids.
        schemes: label -> scheme.
        calibration: ``[C, T]`` token ids that static columns are chosen by; None for their choice without data.
        name: of the model, for the table.
        progress: whether to show a bar on stderr.

    Raises:
        ValueError: there are fewer than two windows, no schemes, or another kind.
    """
    if kind not in ("lm", "encoder") or len(windows) < 2 or not schemes:
        found = f"kind {kind!r}, {len(windows)} windows, {len(schemes)} schemes"
        raise ValueError(f"int8fx.evaluate: {found}; legal: lm or encoder, two windows or more, one scheme or more")
    static = any(scheme.static_columns(1) for scheme in schemes.values())
    data = [] if calibration is None else list(calibration.split(1))
    known = calibrate(model, data, progress=progress) if static and data else None
    models = {label: convert(float_copy(model), scheme, calibration=known) for label, scheme in schemes.items()}
    reference = Result(count_bytes(model), 0)
    results = {label: Result(count_bytes(m), count_packed(m)) for label, m in models.items()}
    compare = _LanguageModel() if kind == "lm" else _Encoder()
    steps, done = (len(models) + 1) * len(windows), 0

    def read(m: nn.Module, ids: Tensor, result: Result) -> Tensor:
        nonlocal done
        begin = time.perf_counter()
        y = compare.outputs(m, ids)
        result.seconds = min(result.seconds, time.perf_counter() - begin)
        done += 1
        if progress:
            show_progress("reading", done, steps)
        return y

    with torch.no_grad():
        for ids in windows.split(1):
            expected = read(model, ids, reference)
            compare.see(None, ids, expected, expected)
            for label, m in models.items():
                compare.see(label, ids, expected, read(m, ids, results[label]))
    reference.metrics = dict(compare.estimates(None))
    for label, result in results.items():
        result.metrics = dict(compare.estimates(label))
    return Evaluation(name, kind, len(windows), windows.shape[1], reference, results)


class _LanguageModel:
    """Values per token, by scheme and window; the reference is scheme None."""

    def __init__(self) -> None:
        self.kl: dict[str | None, list[Tensor]] = {}
        self.top1: dict[str | None, list[Tensor]] = {}
        self.nll: dict[str | None, list[Tensor]] = {}

    def outputs(self, model: Any, ids: Tensor) -> Tensor:
        return model(input_ids=ids, use_cache=False).logits

    def see(self, label: str | None, ids: Tensor, expected: Tensor, found: Tensor) -> None:
        for i in range(len(ids)):  # window by window: float32 logits of a large vocabulary take much memory
            nll = metrics.negative_log_likelihood(found[i], ids[i])
            self.nll.setdefault(label, []).append(nll)
            if label is not None:
                self.kl.setdefault(label, []).append(metrics.kl_divergence(expected[i], found[i]))
                self.top1.setdefault(label, []).append(metrics.top1_agreement(expected[i], found[i]).double())

    def estimates(self, label: str | None) -> Iterator[tuple[str, Estimate]]:
        if label is not None:
            kl = self.kl[label]
            yield "KL mean", _estimate(kl, torch.mean)
            yield "KL p99", _estimate(kl, lambda v: v.quantile(0.99))
            yield "KL max", _estimate(kl, torch.amax)
            yield "top-1 agreement", _estimate(self.top1[label], torch.mean)
        nll = self.nll[label]
        yield "perplexity", _estimate(nll, lambda v: v.mean().exp())
        if label is not None:
            differences = [ours - theirs for ours, theirs in zip(nll, self.nll[None], strict=True)]
            yield "NLL difference", _estimate(differences, torch.mean)


class _Encoder:
    """Pooled outputs, by scheme."""

    def __init__(self) -> None:
        self.vectors: dict[str | None, list[Tensor]] = {}

    def outputs(self, model: Any, ids: Tensor) -> Tensor:
        return model(input_ids=ids).last_hidden_state.mean(1)

    def see(self, label: str | None, ids: Tensor, expected: Tensor, found: Tensor) -> None:
        self.vectors.setdefault(label, []).append(found)

    def estimates(self, label: str | None) -> Iterator[tuple[str, Estimate]]:
        if label is None:
            return
        expected, found = (torch.cat(self.vectors[name]) for name in (None, label))
        nearest, shared = metrics.retrieval_agreement(expected, found)
        distances = metrics.cosine_distance(expected, found)
        yield "1 - cosine", _estimate(list(distances.split(1)), torch.mean)
        yield "1 - cosine max", _estimate(list(distances.split(1)), torch.amax)
        yield "nearest same", _estimate(list(nearest.split(1)), torch.mean)
        yield "10 nearest same", _estimate(list(shared.split(1)), torch.mean)


def _estimate(groups: list[Tensor], statistic: Callable[[Tensor], Tensor]) -> Estimate:
    return Estimate(*metrics.bootstrap(groups, statistic))


def float_copy(model: nn.Module) -> nn.Module:
    """A copy to convert: its modules are its own, its Parameters are ``model``'s."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def count_bytes(model: nn.Module) -> int:
    """Bytes of ``model``'s parameters and buffers; what is tied counts once."""
    return sum(t.nbytes for t in chain(model.parameters(), model.buffers()))


def count_packed(model: nn.Module) -> int:
    from .convert import packed_layers

    return sum(1 for _ in packed_layers(model))
