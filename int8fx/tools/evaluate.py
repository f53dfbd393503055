"""``evaluate``: the outputs of a model under several schemes, compared with its own in float, with intervals."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.calibrate import calibrate, show_progress
from ..calibration.plan import Plan
from ..conversion.convert import convert
from ..conversion.layers import packed_layers
from ..schemes import Scheme, need_moments
from ..terminal import table
from . import metrics


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
    seconds: of the fastest read of a sample.
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
    data: str
    reference: Result
    results: dict[str, Result]
    about: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        names = list(next(iter(self.results.values())).metrics)
        rows = [["scheme", *names, "MB", "s"]]
        for label, result in {"float": self.reference, **self.results}.items():
            cells = [_cell(name, result.metrics[name]) if name in result.metrics else "" for name in names]
            rows.append([label, *cells, f"{result.bytes / 1e6:.1f}", f"{result.seconds:.2f}"])
        head = f"{self.model}: {self.data}; mean [95 % interval over them]"
        return "\n".join([head, table(rows)])

    def to_json(self) -> str:
        return json.dumps(self, default=vars, indent=1)


def _cell(name: str, e: Estimate) -> str:
    if any(word in name for word in ("agreement", "same", "changed")):
        return f"{e.value:.1%} [{e.low:.1%}, {e.high:.1%}]"
    return f"{e.value:.3g} [{e.low:.3g}, {e.high:.3g}]"


def evaluate(
    model: nn.Module,
    kind: str,
    samples: Sequence[Mapping[str, Any]],
    schemes: Mapping[str, Scheme | Plan],
    *,
    calibration: Sequence[Mapping[str, Any]] = (),
    decode: Callable[[Tensor], str] = str,
    name: str = "model",
    progress: bool = False,
) -> Evaluation:
    """Reads ``samples``, one per call, with ``model`` and with a copy of it for each scheme; compares their outputs.

    Language models: ``KL(float || scheme)`` per token in nats (mean, 99th percentile, maximum), how often the likeliest
    token is the same, perplexity, and the difference of the negative log-likelihood per token, paired. Encoders: 1 -
    cosine of the mean of the last hidden states, and how often a sample finds the same other samples by it. Speech
    models: the KL and the likeliest token, per frame (CTC) or for the tokens in ``labels``, and the share of words that
    the scheme writes differently (`metrics.word_errors`). Every figure has a bootstrap interval over samples.

    Args:
        model: of transformers, float; it stays as it is.
        kind: ``lm``, ``encoder`` or ``speech``.
        samples: keyword arguments for the model, tensors ``[1, ...]``: ``input_ids`` of texts; for speech what
            `audio.clips` gives.
        schemes: label -> scheme, or a `Plan` for this model.
        calibration: samples that static columns are chosen by; none for their choice without data.
        decode: ``[T]`` token ids to the words of a speech model.
        name: of the model, for the table.
        progress: whether to show a bar on stderr.

    Raises:
        ValueError: there are fewer than two samples, no schemes, or another kind.
    """
    kinds: dict[str, Callable[[], Any]] = {"lm": _LanguageModel, "encoder": _Encoder, "speech": lambda: _Speech(decode)}
    if kind not in kinds or len(samples) < 2 or not schemes:
        found = f"kind {kind!r}, {len(samples)} samples, {len(schemes)} schemes"
        raise ValueError(
            f"int8fx.tools.evaluate: {found}; legal: {', '.join(kinds)}, two samples or more, one scheme or more"
        )
    moments = need_moments(schemes.values())
    static = any(isinstance(scheme, Scheme) and scheme.static_columns(1) for scheme in schemes.values())
    known = (
        calibrate(model, calibration, moments=moments, progress=progress)
        if calibration and (static or moments)
        else None
    )
    models = {}
    for label, scheme in schemes.items():
        twin = float_copy(model)
        models[label] = scheme.convert(twin) if isinstance(scheme, Plan) else convert(twin, scheme, calibration=known)
    reference = Result(count_bytes(model), 0)
    results = {label: Result(count_bytes(m), sum(1 for _ in packed_layers(m))) for label, m in models.items()}
    compare = kinds[kind]()
    steps, done = (len(models) + 1) * len(samples), 0

    def read(m: nn.Module, sample: Mapping[str, Any], result: Result) -> Any:
        nonlocal done
        begin = time.perf_counter()
        y = compare.outputs(m, sample)
        result.seconds = min(result.seconds, time.perf_counter() - begin)
        done += 1
        if progress:
            show_progress("reading", done, steps)
        return y

    with torch.no_grad():
        for sample in samples:
            expected = read(model, sample, reference)
            compare.see(None, sample, expected, expected)
            for label, m in models.items():
                compare.see(label, sample, expected, read(m, sample, results[label]))
    reference.metrics = dict(compare.estimates(None))
    for label, result in results.items():
        result.metrics = dict(compare.estimates(label))
    return Evaluation(name, kind, _describe(kind, samples), reference, results)


def _describe(kind: str, samples: Sequence[Mapping[str, Any]]) -> str:
    if kind == "speech":
        return f"{len(samples)} clips of speech"
    return f"{len(samples)} windows of {samples[0]['input_ids'].shape[1]} tokens"


class _LanguageModel:
    """Values per token, by scheme and window; the reference is scheme None."""

    def __init__(self) -> None:
        self.kl: dict[str | None, list[Tensor]] = {}
        self.top1: dict[str | None, list[Tensor]] = {}
        self.nll: dict[str | None, list[Tensor]] = {}

    def outputs(self, model: Any, sample: Mapping[str, Any]) -> Tensor:
        return model(**sample, use_cache=False).logits[0]

    def see(self, label: str | None, sample: Mapping[str, Any], expected: Tensor, found: Tensor) -> None:
        self.nll.setdefault(label, []).append(metrics.negative_log_likelihood(found, sample["input_ids"][0]))
        if label is not None:
            self.kl.setdefault(label, []).append(metrics.kl_divergence(expected, found))
            self.top1.setdefault(label, []).append(metrics.top1_agreement(expected, found).double())

    def estimates(self, label: str | None) -> Iterator[tuple[str, Estimate]]:
        if label is not None:
            yield from _logit_estimates(self.kl[label], self.top1[label])
        nll = self.nll[label]
        yield "perplexity", _estimate(nll, lambda v: v.mean().exp())
        if label is not None:
            differences = [ours - theirs for ours, theirs in zip(nll, self.nll[None], strict=True)]
            yield "NLL difference", _estimate(differences, torch.mean)


class _Encoder:
    """Pooled outputs, by scheme."""

    def __init__(self) -> None:
        self.vectors: dict[str | None, list[Tensor]] = {}

    def outputs(self, model: Any, sample: Mapping[str, Any]) -> Tensor:
        return model(**sample).last_hidden_state.mean(1)

    def see(self, label: str | None, sample: Mapping[str, Any], expected: Tensor, found: Tensor) -> None:
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


class _Speech:
    """Values per frame or token, and words, by scheme and clip."""

    def __init__(self, decode: Callable[[Tensor], str]) -> None:
        self.decode = decode
        self.kl: dict[str, list[Tensor]] = {}
        self.top1: dict[str, list[Tensor]] = {}
        self.words: dict[str, list[Tensor]] = {}

    def outputs(self, model: Any, sample: Mapping[str, Any]) -> tuple[Tensor, list[str]]:
        logits = model(**sample).logits
        ids = model.generate(sample[model.main_input_name]) if "labels" in sample else logits.argmax(-1)
        return logits[0], self.decode(ids[0]).split()

    def see(
        self,
        label: str | None,
        sample: Mapping[str, Any],
        expected: tuple[Tensor, list[str]],
        found: tuple[Tensor, list[str]],
    ) -> None:
        if label is not None:
            self.kl.setdefault(label, []).append(metrics.kl_divergence(expected[0], found[0]))
            self.top1.setdefault(label, []).append(metrics.top1_agreement(expected[0], found[0]).double())
            changed = metrics.word_errors(expected[1], found[1])
            self.words.setdefault(label, []).append(torch.tensor([[changed, len(expected[1])]]).double())

    def estimates(self, label: str | None) -> Iterator[tuple[str, Estimate]]:
        if label is not None:
            yield from _logit_estimates(self.kl[label], self.top1[label])
            yield "words changed", _estimate(self.words[label], lambda v: v[:, 0].sum() / v[:, 1].sum().clamp_min(1))


def _logit_estimates(kl: list[Tensor], top1: list[Tensor]) -> Iterator[tuple[str, Estimate]]:
    yield "KL mean", _estimate(kl, torch.mean)
    yield "KL p99", _estimate(kl, lambda v: v.quantile(0.99))
    yield "KL max", _estimate(kl, torch.amax)
    yield "top-1 agreement", _estimate(top1, torch.mean)


def _estimate(groups: list[Tensor], statistic: Callable[[Tensor], Tensor]) -> Estimate:
    return Estimate(*metrics.bootstrap(groups, statistic))


def float_copy(model: nn.Module) -> nn.Module:
    """A copy to convert: its modules are its own, its Parameters are ``model``'s."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def count_bytes(model: nn.Module) -> int:
    """Bytes of ``model``'s parameters and buffers; what is tied counts once."""
    return sum(t.nbytes for t in chain(model.parameters(), model.buffers()))
