"""``plan``: a scheme or 16 bits for each layer, according to the loss that each scheme would cause."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..conversion.layers import Layer
from ..conversion.recipes import Kind
from ..ops import linear
from ..schemes import Rotated, Scheme
from ..schemes.calibration import Calibration
from ..schemes.weight import Int8Weight
from ..terminal import show_progress, table
from .calibrate import calibrate, run_batch
from .variants import Variants, convertible

SCHEMES = (Rotated(columns=0.0), Rotated(), Rotated(columns=0.05))


@dataclass(frozen=True)
class Option:
    """One choice for a layer: a scheme, or None for 16 bits; the bytes of its weight, and the KL that it costs."""

    scheme: Scheme | None
    bytes: int
    kl: float

    def __str__(self) -> str:
        return "16 bits" if self.scheme is None else str(self.scheme)


@dataclass
class Plan:
    """The result of `plan`, for ``int8fx.convert(model, plan)``; prints as a table.

    chosen: layer name -> the `Option` of this plan.
    options: layer name -> all of its options.
    calibration: the statistics from which unquantised columns are chosen.
    """

    chosen: dict[str, Option]
    options: dict[str, list[Option]] = field(repr=False)
    calibration: Calibration = field(repr=False)

    @property
    def schemes(self) -> dict[str, Scheme]:
        """Layer name -> scheme. Layers that stay in 16 bits are not in it."""
        return {name: option.scheme for name, option in self.chosen.items() if option.scheme is not None}

    @property
    def smallest(self) -> int:
        """The bytes of the smallest plan for these layers."""
        return sum(min(option.bytes for option in options) for options in self.options.values())

    @property
    def kl(self) -> float:
        """The estimate for the model: the sum over its layers."""
        return sum(option.kl for option in self.chosen.values())

    @property
    def bytes(self) -> int:
        """The bytes of these layers' weights in a model of 16 bits."""
        return sum(option.bytes for option in self.chosen.values())

    def within(self, *, budget_bytes: int | None = None, max_kl: float | None = None) -> Plan:
        """The plan for another budget, from the same measurements. Arguments and errors are those of `plan`."""
        return _choose(self.options, budget_bytes, max_kl, self.calibration)

    def __str__(self) -> str:
        rows = [["layer", "scheme", "KB", "KL"]]
        for name, option in self.chosen.items():
            rows.append([name, str(option), f"{option.bytes / 1e3:,.0f}", f"{option.kl:.2e}"])
        return f"{table(rows, left=2)}\n{self.summary()}"

    def summary(self) -> str:
        """How many layers have which scheme, bytes and estimated loss, in a line."""
        counts = Counter(str(option) for option in self.chosen.values())
        layers = ", ".join(f"{count} x {scheme}" for scheme, count in counts.most_common())
        return f"{layers}; {self.bytes:,} bytes, estimated KL {self.kl:.3g}"


def plan(
    model: nn.Module,
    data: Iterable[Any],
    *,
    budget_bytes: int | None = None,
    max_kl: float | None = None,
    schemes: Iterable[Scheme] = SCHEMES,
    samples: int = 2,
    calibration: Calibration | None = None,
    progress: bool = False,
) -> Plan:
    """Chooses a scheme or 16 bits for each linear layer, within a limit for the bytes or for the loss.

    The loss of an option is estimated to second order, from the error ``delta[m]`` that it causes in the layer's output
    and the gradient ``g[m]`` of the log-likelihood of tokens that are drawn from the model's output::

        KL(model || changed) = 1/2 * E[sum_m((g[m] . delta[m]) ** 2)] per token

    This is the Fisher information of the output distribution (Kunstner et al. 2019, arXiv 1905.12558, section 2), with
    the errors of different rows taken as independent. The losses of layers are added, as in Dong et al. 2020 (arXiv
    1911.03852). An output without ``logits`` counts as the mean of unit normals, so its loss is half the squared
    distance. The choice is greedy. It starts with the smallest option of every layer. It then makes the upgrade
    that lowers the KL most per byte, until the limit is met or spent.

    Args:
        model: float, in eval mode; it is not changed. Gradients pass through it, so it needs memory as in training.
        data: batches, as `calibrate` takes them; a few hundred tokens are enough.
        budget_bytes: a limit for the bytes of these layers' weights, counted as in a model of 16 bits.
        max_kl: a limit for the estimated KL per token. Give one of the two limits.
        schemes: the options of a layer, in addition to 16 bits.
        samples: how often outputs are drawn for each batch.
        calibration: the statistics from which unquantised columns are chosen; by default `calibrate` of ``data``.
        progress: whether to show a bar on stderr.

    Raises:
        ValueError: not exactly one limit is given, it cannot be met (the message gives the smallest that can),
            samples < 1, no batch reached a layer, or a loss is not finite.
    """
    _check(budget_bytes, max_kl)
    if samples < 1:
        raise ValueError(f"int8fx.plan: samples is {samples}; legal: 1 or more")
    schemes = list(schemes)
    layers = {name: layer for name, layer in convertible(model).items() if layer.recipe.kind is Kind.LINEAR}
    batches = list(data)
    if calibration is None:
        calibration = calibrate(
            model, batches, moments=any(scheme.needs_moments for scheme in schemes), progress=progress
        )
    options = _measure(model, batches, layers, schemes, calibration, samples, progress)
    if not options:
        raise ValueError("int8fx.plan: no linear layer of the model in these batches; legal: data that it runs on")
    return _choose(options, budget_bytes, max_kl, calibration)


# ---- measuring ------------------------------------------------------------------------------------------------------


def _measure(
    model: nn.Module,
    batches: list[Any],
    layers: dict[str, Layer],
    schemes: list[Scheme],
    calibration: Calibration,
    samples: int,
    progress: bool,
) -> dict[str, list[Option]]:
    """The options of each layer that a batch reached; the last of them is 16 bits."""
    variants = Variants(schemes, calibration, layers.values())
    by_module = {id(layer.module): layer for layer in layers.values()}
    weights: dict[str, list[Int8Weight]] = {}
    losses: dict[str, list[float]] = {}
    generator = torch.Generator().manual_seed(0)
    calls: list[tuple[Layer, Tensor, Tensor]] = []

    def hook(module: nn.Module, inputs: tuple, named: dict[str, Any], y: Tensor) -> Tensor:
        """Keeps x and y as they are now. The model goes on with a copy of y, which it may write to."""
        x = inputs[0] if inputs else named["input"]
        y = y if y.requires_grad else y.detach().requires_grad_()
        calls.append((by_module[id(module)], x.detach().clone(), y))
        return y.clone()

    handles = [layer.module.register_forward_hook(hook, with_kwargs=True) for layer in by_module.values()]
    rows = 0
    try:
        for i, batch in enumerate(batches):
            if progress:
                show_progress("measuring", i, len(batches))
            with torch.enable_grad():
                y, is_logits = _output(run_batch(model, batch))
                if not calls:
                    continue
                scores = [_score(y, is_logits, generator) for _ in range(samples)]
                outputs = [output for _, _, output in calls]
                grads = [torch.autograd.grad(s, outputs, retain_graph=True, allow_unused=True) for s in scores]
            rows += y.shape[:-1].numel()
            for (layer, x, _), *g in zip(calls, *grads, strict=True):
                if layer.name not in weights:
                    weights[layer.name] = variants.of(layer)
                    losses[layer.name] = [0.0] * len(schemes)
                for j, delta in enumerate(_errors(layer, weights[layer.name], x)):
                    dots = ((t.float() * delta).sum(-1).double() for t in g if t is not None)
                    losses[layer.name][j] += sum(float(dot.square().sum()) / 2 for dot in dots)
            calls.clear()
    finally:
        for handle in handles:
            handle.remove()
    if progress:
        show_progress("measuring", len(batches), len(batches))
    options = {}
    for name in (name for name in layers if name in losses):
        sizes = [_bytes(weight) for weight in weights[name]]
        kl = [loss / (samples * rows) for loss in losses[name]]
        if not all(map(math.isfinite, kl)):
            raise ValueError(
                f"int8fx.plan: layer {name!r} has a loss of NaN or inf; legal: data that gives finite outputs"
            )
        options[name] = [Option(*o) for o in zip(schemes, sizes, kl, strict=True)]
        options[name].append(Option(None, 2 * layers[name].weight.numel(), 0.0))
    return options


def _output(output: Any) -> tuple[Tensor, bool]:
    """The tensor of a model's output, and whether it is logits."""
    if hasattr(output, "logits"):
        return output.logits, True
    while not isinstance(output, Tensor):
        output = next(iter(output.values())) if hasattr(output, "values") else output[0]
    return output, False


def _score(y: Tensor, is_logits: bool, generator: torch.Generator) -> Tensor:
    """The terms of ``log p`` that depend on y, for an output drawn from the distribution that y stands for."""
    if not is_logits:
        return (y * torch.randn(y.shape, generator=generator).to(y)).sum()
    logs = y.float().log_softmax(-1).flatten(0, -2)
    drawn = torch.multinomial(logs.detach().exp().cpu(), 1, generator=generator).to(y.device)
    return logs.gather(1, drawn).sum()


@torch.no_grad()
def _errors(layer: Layer, weights: list[Int8Weight], x: Tensor) -> Iterator[Tensor]:
    """The error of each of ``weights`` in the layer's matmul with x, float32."""
    x = x.float()
    exact = x @ layer.oriented().float().T
    for weight in weights:
        yield linear(x, *weight) - exact


def _bytes(weight: Int8Weight) -> int:
    """Bytes of a weight in a model of 16 bits: those of its tensors, and 2 for each float weight of a column."""
    tensors = ((name, t) for name, t in weight._asdict().items() if isinstance(t, Tensor))
    return sum(2 * t.numel() if name == "columns_weight" else t.nbytes for name, t in tensors)


# ---- choosing -------------------------------------------------------------------------------------------------------


def _check(budget_bytes: int | None, max_kl: float | None) -> None:
    if (budget_bytes is None) == (max_kl is None):
        raise ValueError("int8fx.plan: give budget_bytes or max_kl, one of them")
    if budget_bytes is not None and not budget_bytes >= 0:
        raise ValueError(f"int8fx.plan: budget_bytes is {budget_bytes}; legal: 0 or more")
    if max_kl is not None and not max_kl >= 0:
        raise ValueError(f"int8fx.plan: max_kl is {max_kl}; legal: 0 or more")


def _choose(
    options: dict[str, list[Option]], budget_bytes: int | None, max_kl: float | None, calibration: Calibration
) -> Plan:
    _check(budget_bytes, max_kl)
    chosen, upgrades = {}, []
    for name, choices in options.items():
        path = _hull(choices)
        chosen[name] = path[0]
        upgrades += [(_gain(a, b), name, b) for a, b in pairwise(path)]
    plan = Plan(chosen, options, calibration)
    if budget_bytes is not None and plan.smallest > budget_bytes:
        raise ValueError(f"int8fx.plan: budget_bytes is {budget_bytes:,}; legal: {plan.smallest:,} or more")
    full: set[str] = set()  # layers with an upgrade that was too large: upgrades come in order, so none follows
    for _, name, option in sorted(upgrades, key=lambda upgrade: -upgrade[0]):
        if max_kl is not None and plan.kl <= max_kl:
            break
        if budget_bytes is not None and plan.bytes - chosen[name].bytes + option.bytes > budget_bytes:
            full.add(name)
        if name not in full:
            chosen[name] = option
    return plan


def _hull(options: list[Option]) -> list[Option]:
    """The lower convex hull of ``options`` from the smallest on: each upgrade gains less per byte than the last one."""
    path: list[Option] = []
    for option in sorted(options, key=lambda o: (o.bytes, o.kl)):
        if path and option.kl >= path[-1].kl:
            continue
        while len(path) > 1 and _gain(path[-2], option) >= _gain(path[-2], path[-1]):
            path.pop()
        path.append(option)
    return path


def _gain(a: Option, b: Option) -> float:
    """How much KL the upgrade from ``a`` to ``b`` saves per byte."""
    return (a.kl - b.kl) / (b.bytes - a.bytes)
