"""``evaluate``: a model's outputs under several schemes, compared with its float outputs, with intervals."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.calibrate import calibrate
from ..calibration.equalize import can_equalize, equalize
from ..calibration.plan import Plan
from ..conversion.convert import convert
from ..conversion.layers import packed_layers
from ..schemes import Scheme
from ..terminal import show_progress, table
from . import metrics


@dataclass(frozen=True)
class Estimate:
    """A statistic over all windows with the bounds of its 95 % interval (`metrics.bootstrap`)."""

    value: float
    low: float
    high: float


@dataclass
class Result:
    """The measurements of one model.

    bytes: of its parameters and buffers; tied ones are counted once.
    converted: how many of its weights are int8.
    seconds: time of the fastest forward of one sample.
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
        title = f"{self.model}: {self.data}; mean [95 % interval over them]"
        return "\n".join([title, table(rows)])


def _cell(name: str, e: Estimate) -> str:
    if "agreement" in name or "same" in name:
        return f"{e.value:.1%} [{e.low:.1%}, {e.high:.1%}]"
    return f"{e.value:.3g} [{e.low:.3g}, {e.high:.3g}]"


def evaluate(
    model: nn.Module,
    kind: str,
    samples: Sequence[Mapping[str, Any]],
    schemes: Mapping[str, Scheme | Plan],
    *,
    calibration: Sequence[Mapping[str, Any]] = (),
    equalize_by: Sequence[str] = (),
    name: str = "model",
    progress: bool = False,
) -> Evaluation:
    """Compares the outputs of ``model`` on ``samples`` with those of a converted copy for each scheme.

    Language models: ``KL(float || scheme)`` per token in nats (mean, 99th percentile, maximum), how often the likeliest
    token is the same, perplexity, and the paired difference of the negative log-likelihood per token. Encoders: 1 -
    cosine of the mean of the last hidden states, and how often a sample has the same nearest samples by it. Every
    figure has a bootstrap interval over samples.

    Args:
        model: a float model of transformers; it is not changed.
        kind: ``lm`` or ``encoder``.
        samples: keyword arguments for the model, one sample per call: ``input_ids [1, T]``.
        schemes: label -> scheme, or a `Plan` for this model.
        calibration: samples from which unquantised columns are chosen; if empty, they are chosen from the weights.
        equalize_by: algorithms of `equalize`. Each scheme that it takes is also measured on a copy that is equalised by
            each of them, with the label ``algorithm + scheme's label``.
        name: the model's name, for the table.
        progress: whether to show a bar on stderr.

    Raises:
        ValueError: there are fewer than two samples, no schemes, or another kind; or there is ``equalize_by`` without
            calibration or without a scheme that `equalize` takes.
    """
    if kind not in _KINDS or len(samples) < 2 or not schemes:
        raise ValueError(
            f"int8fx.tools.evaluate: kind {kind!r}, {len(samples)} samples, {len(schemes)} schemes; legal: "
            f"{', '.join(_KINDS)}, two samples or more, one scheme or more"
        )
    single = [scheme for scheme in schemes.values() if isinstance(scheme, Scheme)]
    equalized: dict[str, Scheme] = {}
    if equalize_by:
        equalized = {s: scheme for s, scheme in schemes.items() if isinstance(scheme, Scheme) and can_equalize(scheme)}
    if equalize_by and not (calibration and equalized):
        raise ValueError(
            f"int8fx.tools.evaluate: equalize_by is {', '.join(equalize_by)} with {len(calibration)} samples to "
            f"calibrate and {len(equalized)} schemes that int8fx.equalize takes; legal: 1 or more, of each"
        )
    statistics = None
    if calibration and (equalized or any(scheme.needs_columns or scheme.needs_moments for scheme in single)):
        moments = bool(equalized) or any(scheme.needs_moments for scheme in single)
        statistics = calibrate(model, calibration, moments=moments, progress=progress)
    models = {}
    for label, scheme in schemes.items():
        models[label] = float_copy(model)
        if isinstance(scheme, Scheme):
            convert(models[label], scheme, calibration=statistics)
        elif scheme.schemes:  # else the plan leaves all layers in 16 bits
            convert(models[label], scheme)
    for label, scheme in equalized.items():
        for algorithm in equalize_by:
            scaled = models[f"{algorithm} + {label}"] = copy.deepcopy(model)
            after = equalize(
                scaled, calibration, scheme, algorithm=algorithm, calibration=statistics, progress=progress
            )
            convert(scaled, scheme, calibration=after)
    reference, results = compare(model, models, kind, samples, progress=progress)
    data = f"{len(samples)} windows of {samples[0]['input_ids'].shape[1]} tokens"
    return Evaluation(name, kind, data, reference, results)


def compare(
    model: nn.Module,
    models: Mapping[str, nn.Module],
    kind: str,
    samples: Sequence[Mapping[str, Any]],
    *,
    progress: bool = False,
) -> tuple[Result, dict[str, Result]]:
    """Runs ``model`` and each of ``models`` on each sample in turn, and compares their outputs.

    Args:
        model: the reference.
        models: label -> a model with outputs of the same shape.
        kind, samples, progress: as in `evaluate`.

    Returns:
        The results of the reference, and of each label.
    """
    metric = _KINDS[kind]()
    reference = Result(count_bytes(model.parameters(), model.buffers()), 0)
    results = {
        label: Result(count_bytes(m.parameters(), m.buffers()), sum(1 for _ in packed_layers(m)))
        for label, m in models.items()
    }
    steps, done = (len(models) + 1) * len(samples), 0

    def outputs(m: nn.Module, sample: Mapping[str, Any], result: Result) -> Tensor:
        nonlocal done
        begin = time.perf_counter()
        y = metric.outputs(m, sample)
        result.seconds = min(result.seconds, time.perf_counter() - begin)
        done += 1
        if progress:
            show_progress("reading", done, steps)
        return y

    with torch.no_grad():
        for sample in samples:
            expected = outputs(model, sample, reference)
            metric.add(None, sample, expected, expected)
            for label, m in models.items():
                metric.add(label, sample, expected, outputs(m, sample, results[label]))
    reference.metrics = dict(metric.estimates(None))
    for label, result in results.items():
        result.metrics = dict(metric.estimates(label))
    return reference, results


class _LanguageModel:
    """Values per token, by label and sample; the label of the reference is None."""

    def __init__(self) -> None:
        self.kl: dict[str | None, list[Tensor]] = {}
        self.top1: dict[str | None, list[Tensor]] = {}
        self.nll: dict[str | None, list[Tensor]] = {}

    def outputs(self, model: Any, sample: Mapping[str, Any]) -> Tensor:
        return model(**sample, use_cache=False).logits[0]

    def add(self, label: str | None, sample: Mapping[str, Any], expected: Tensor, logits: Tensor) -> None:
        self.nll.setdefault(label, []).append(metrics.negative_log_likelihood(logits, sample["input_ids"][0]))
        if label is not None:
            self.kl.setdefault(label, []).append(metrics.kl_divergence(expected, logits))
            self.top1.setdefault(label, []).append(metrics.top1_agreement(expected, logits).double())

    def estimates(self, label: str | None) -> Iterator[tuple[str, Estimate]]:
        if label is not None:
            yield "KL mean", _estimate(self.kl[label], torch.mean)
            yield "KL p99", _estimate(self.kl[label], lambda v: v.quantile(0.99))
            yield "KL max", _estimate(self.kl[label], torch.amax)
            yield "top-1 agreement", _estimate(self.top1[label], torch.mean)
        nll = self.nll[label]
        yield "perplexity", _estimate(nll, lambda v: v.mean().exp())
        if label is not None:
            differences = [value - reference for value, reference in zip(nll, self.nll[None], strict=True)]
            yield "NLL difference", _estimate(differences, torch.mean)


class _Encoder:
    """Means of the last hidden states, by label and sample; the label of the reference is None."""

    def __init__(self) -> None:
        self.vectors: dict[str | None, list[Tensor]] = {}

    def outputs(self, model: Any, sample: Mapping[str, Any]) -> Tensor:
        return model(**sample).last_hidden_state.mean(1)

    def add(self, label: str | None, sample: Mapping[str, Any], expected: Tensor, vector: Tensor) -> None:
        self.vectors.setdefault(label, []).append(vector)

    def estimates(self, label: str | None) -> Iterator[tuple[str, Estimate]]:
        if label is None:
            return
        expected, vectors = (torch.cat(self.vectors[name]) for name in (None, label))
        nearest, shared = metrics.retrieval_agreement(expected, vectors)
        distances = metrics.cosine_distance(expected, vectors)
        yield "1 - cosine", _estimate(list(distances.split(1)), torch.mean)
        yield "1 - cosine max", _estimate(list(distances.split(1)), torch.amax)
        yield "nearest same", _estimate(list(nearest.split(1)), torch.mean)
        yield "10 nearest same", _estimate(list(shared.split(1)), torch.mean)


_KINDS: dict[str, type[_LanguageModel] | type[_Encoder]] = {"lm": _LanguageModel, "encoder": _Encoder}


def _estimate(groups: list[Tensor], statistic: Callable[[Tensor], Tensor]) -> Estimate:
    return Estimate(*metrics.bootstrap(groups, statistic))


def float_copy(model: nn.Module) -> nn.Module:
    """A copy of ``model``'s modules, to convert; it shares the Parameters."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def count_bytes(*tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of ``tensors``; a shared storage is counted once."""
    storages = [tensor.untyped_storage() for group in tensors for tensor in group]
    return sum({(storage.device, storage.data_ptr()): storage.nbytes() for storage in storages}.values())
