"""``plan``: a scheme for each layer, or 16 bits, by what the model loses through it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..conversion.convert import convert
from ..conversion.layers import Layer
from ..conversion.layers import plan as plan_layers
from ..conversion.quantizer import Quantizer as Pack
from ..conversion.recipes import Kind
from ..ops import linear
from ..schemes import Rotated, Scheme
from ..terminal import table
from .calibrate import Calibration, calibrate, run_batch, show_progress

SCHEMES = (Rotated(columns=0.0), Rotated(), Rotated(columns=0.05))


@dataclass(frozen=True)
class Option:
    """One thing that can be done with a layer: a scheme, or None for 16 bits; its bytes, and the KL that it costs."""

    scheme: Scheme | None
    bytes: int
    kl: float


@dataclass
class Plan:
    """What `plan` chose; prints as a table.

    chosen: layer name -> `Option`.
    kl: the estimate for the whole model: the sum over its layers.
    bytes: of the weights of these layers, as they are in a model of 16 bits.
    smallest: the bytes of the smallest plan.
    options: layer name -> what it could have had.
    """

    chosen: dict[str, Option]
    options: dict[str, list[Option]] = field(repr=False)
    calibration: Calibration = field(repr=False)

    @property
    def smallest(self) -> int:
        return sum(min(option.bytes for option in own) for own in self.options.values())

    @property
    def kl(self) -> float:
        return sum(option.kl for option in self.chosen.values())

    @property
    def bytes(self) -> int:
        return sum(option.bytes for option in self.chosen.values())

    def within(self, *, budget_bytes: int | None = None, max_kl: float | None = None) -> Plan:
        """The plan for another budget, by the same measurements; arguments and errors are those of `plan`."""
        return _choose(self.options, budget_bytes, max_kl, self.calibration)

    def convert(self, model: nn.Module) -> nn.Module:
        """`int8fx.convert` of each layer to its scheme, in place; layers without a plan stay as they are."""
        for scheme in dict.fromkeys(option.scheme for option in self.chosen.values()):
            if scheme is not None:
                names = {name for name, option in self.chosen.items() if option.scheme == scheme}
                convert(model, scheme, select=lambda name, _, names=names: name in names, calibration=self.calibration)
        return model

    def __str__(self) -> str:
        rows = [["layer", "scheme", "KB", "KL"]]
        for name, option in self.chosen.items():
            rows.append([name, _name(option), f"{option.bytes / 1e3:,.0f}", f"{option.kl:.2e}"])
        return f"{table(rows)}\n{self.summary()}"

    def summary(self) -> str:
        """How many layers have what, bytes and estimated loss, in a line."""
        counts = Counter(_name(option) for option in self.chosen.values())
        layers = ", ".join(f"{count} x {name}" for name, count in counts.most_common())
        return f"{layers}; {self.bytes:,} bytes, estimated KL {self.kl:.3g}"


def _name(option: Option) -> str:
    return "16 bits" if option.scheme is None else repr(option.scheme)


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
    """Chooses a scheme, or 16 bits, for each linear layer: the least loss within ``budget_bytes``, or the least bytes.

    The loss of a layer's option is estimated to second order, from the error ``delta[m]`` that it makes in the layer's
    output and the gradient ``g[m]`` of the log-likelihood of tokens that the model itself draws::

        KL(model || changed) = 1/2 * E[sum_m((g[m] . delta[m]) ** 2)] per token

    which is the Fisher information of the output distribution (Kunstner et al. 2019, arXiv 1905.12558, section 2) with
    the errors of different rows taken as independent; layers' losses are added, as Dong et al. 2020 (arXiv 1911.03852)
    do. Where the model's output is no ``logits``, it is read as the mean of unit normals: half the squared distance.
    From each layer's cheapest option on, the step with the most KL per byte is taken next.

    Args:
        model: float, in eval mode; it stays as it is. Gradients pass through it: it needs memory as in training.
        data: batches, as `calibrate` takes them; a few hundred tokens are enough.
        budget_bytes: what the weights of these layers may take, counted as in a model of 16 bits.
        max_kl: the estimated KL per token that the plan may cost. One of the two must be given.
        schemes: what a layer can have, beside 16 bits.
        samples: how often outputs are drawn for each batch.
        calibration: what static columns are chosen by; by default what `calibrate` finds in ``data``.
        progress: whether to show a bar on stderr.

    Raises:
        ValueError: not one of the budgets is given, it cannot be met (the message says what can), there are no samples,
            no layer was seen, or a loss is not finite.
    """
    _check(budget_bytes, max_kl)
    if samples < 1:
        raise ValueError(f"int8fx.plan: samples is {samples}; legal: 1 or more")
    schemes = list(schemes)
    layers = {
        layer.name: layer for layer in plan_layers(model) if layer.reason is None and layer.recipe.kind is Kind.LINEAR
    }
    batches = list(data)
    if calibration is None:
        moments = any(scheme.needs_moments for scheme in schemes)
        calibration = calibrate(model, batches, moments=moments, progress=progress)
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
    """The options of each layer that took part; 16 bits is the last of them."""
    packs = [Pack(scheme, calibration) for scheme in schemes]
    for pack in packs:
        pack.check(layers.values())
    owners = {id(layer.module): layer for layer in layers.values()}
    packed: dict[str, list[tuple[Tensor, ...]]] = {}
    losses: dict[str, list[float]] = {}
    generator = torch.Generator().manual_seed(0)
    calls: list[tuple[Layer, Tensor, Tensor]] = []

    def hook(module: nn.Module, inputs: tuple, y: Tensor) -> None:
        calls.append((owners[id(module)], inputs[0].detach(), y if y.requires_grad else y.requires_grad_()))

    handles = [layer.module.register_forward_hook(hook) for layer in owners.values()]
    rows = 0
    try:
        for i, batch in enumerate(batches):
            if progress:
                show_progress("measuring", i, len(batches))
            with torch.enable_grad():
                y, tokens = _output(run_batch(model, batch))
                if not calls:
                    continue
                scores = [_score(y, tokens, generator) for _ in range(samples)]
                outputs = [output for _, _, output in calls]
                grads = [torch.autograd.grad(s, outputs, retain_graph=True, allow_unused=True) for s in scores]
            rows += y.shape[:-1].numel()
            for (layer, x, _), *g in zip(calls, *grads, strict=True):
                if layer.name not in packed:
                    packed[layer.name], losses[layer.name] = [pack([layer]) for pack in packs], [0.0] * len(packs)
                for j, delta in enumerate(_errors(layer, packs, packed[layer.name], x)):
                    products = ((t.float() * delta).sum(-1).double() for t in g if t is not None)
                    losses[layer.name][j] += sum(float(p.square().sum()) / 2 for p in products)
            calls.clear()
    finally:
        for handle in handles:
            handle.remove()
    if progress:
        show_progress("measuring", len(batches), len(batches))
    options = {}
    for name in (name for name in layers if name in losses):
        size = [sum(_bytes16(t) for t in buffers if t is not None) for buffers in packed[name]]
        kl = [loss / (samples * rows) for loss in losses[name]]
        if not all(map(math.isfinite, kl)):
            raise ValueError(
                f"int8fx.plan: layer {name!r} has a loss of NaN or inf; legal: data that gives finite outputs"
            )
        options[name] = [Option(*o) for o in zip(schemes, size, kl, strict=True)]
        options[name].append(Option(None, _bytes16(layers[name].weight), 0.0))
    return options


def _output(output: Any) -> tuple[Tensor, bool]:
    """The tensor that a model gives, and whether it is logits."""
    if hasattr(output, "logits"):
        return output.logits, True
    while not isinstance(output, Tensor):
        output = next(iter(output.values())) if hasattr(output, "values") else output[0]
    return output, False


def _score(y: Tensor, tokens: bool, generator: torch.Generator) -> Tensor:
    """``log p`` of an output that is drawn from the model's own distribution, as far as it depends on y."""
    if not tokens:
        return (y * torch.randn(y.shape, generator=generator).to(y)).sum()
    logs = y.float().log_softmax(-1).flatten(0, -2)
    drawn = torch.multinomial(logs.detach().exp().cpu(), 1, generator=generator).to(y.device)
    return logs.gather(1, drawn).sum()


@torch.no_grad()
def _errors(layer: Layer, packs: list[Pack], packed: list[tuple[Tensor, ...]], x: Tensor) -> Iterator[Tensor]:
    """What each scheme adds to the layer's product with x, float32."""
    x = x.float()
    exact = x @ layer.oriented().float().T
    for pack, tensors in zip(packs, packed, strict=True):
        yield linear(x, *pack.reading(layer).weight(tensors)) - exact


def _bytes16(tensor: Tensor) -> int:
    """Bytes of a tensor in a model of 16 bits; scales stay float32, codes and columns what they are."""
    return tensor.numel() * (2 if tensor.is_floating_point() and tensor.dim() > 1 else tensor.itemsize)


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
    chosen, steps = {}, []
    for name, own in options.items():
        path = _hull(own)
        chosen[name] = path[0]
        steps += [(_gain(a, b), name, b) for a, b in pairwise(path)]
    found = Plan(chosen, options, calibration)
    if budget_bytes is not None and found.smallest > budget_bytes:
        raise ValueError(f"int8fx.plan: budget_bytes is {budget_bytes:,}; legal: {found.smallest:,} or more")
    full: set[str] = set()  # layers whose next step was too large: their later ones would skip it
    for _, name, option in sorted(steps, key=lambda step: -step[0]):
        if max_kl is not None and found.kl <= max_kl:
            break
        if budget_bytes is not None and found.bytes - chosen[name].bytes + option.bytes > budget_bytes:
            full.add(name)
        if name not in full:
            chosen[name] = option
    return found


def _hull(options: list[Option]) -> list[Option]:
    """From the smallest option on, those that are worth it: each step gains less per byte than the one before."""
    path: list[Option] = []
    for option in sorted(options, key=lambda o: (o.bytes, o.kl)):
        if path and option.kl >= path[-1].kl:
            continue
        while len(path) > 1 and _gain(path[-2], option) >= _gain(path[-2], path[-1]):
            path.pop()
        path.append(option)
    return path


def _gain(a: Option, b: Option) -> float:
    return (a.kl - b.kl) / (b.bytes - a.bytes)
