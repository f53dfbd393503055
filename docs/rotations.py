"""Compares rotations on a real model, over windows of text and over orders of the input columns.

    python docs/rotations.py --model smollm2 --text pydoc --text jargon.txt.gz
    OMP_NUM_THREADS=1 python docs/rotations.py --speed

A rotation mixes columns that stand in the same block, so its loss depends on which do. A draw is a copy of the model in
which the input columns of every converted layer are in another random order: in float32 it computes the same. Each
scheme converts each draw and runs on each window. Losses are KL(float32 || int8) per token, for encoders 1 - cosine of
the mean hidden states. Intervals are 95 % bootstrap intervals over both, windows and draws, and ratios are paired. The
median is over the windows of all draws: one token can have a loss of a thousand others.

``--speed`` times the quantisation of x with each rotation and with none: the least time of ``--rounds`` in which all
take turns.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from torch import Tensor, nn

import int8fx
from int8fx.conversion.layers import packed_layers
from int8fx.schemes import parse_scheme
from int8fx.terminal import show_progress, table
from int8fx.tools import metrics
from int8fx.tools.data.models import load
from int8fx.tools.data.texts import windows
from int8fx.tools.evaluate import float_copy
from int8fx.tools.machine import machine

SCHEMES = ("rotated(64, hadamard='sylvester')", "rotated(64)", "rotated(256)", "rotated(256, hadamard='sylvester')")
RESAMPLES = 2000


class Reordered(nn.Module):
    """``linear`` of x, whose columns and those of the weight are taken in the order ``order [K]``."""

    def __init__(self, linear: nn.Linear, order: Tensor) -> None:
        super().__init__()
        self.order = order
        self.linear = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None)
        self.linear.weight, self.linear.bias = nn.Parameter(linear.weight.detach()[:, order]), linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x[..., self.order])


def reordered(model: nn.Module, names: list[str], seed: int) -> nn.Module:
    """A copy of ``model`` with the layers ``names`` `Reordered`, in one order for each K; seed 0 changes nothing."""
    model, orders = float_copy(model), {}
    for name in names if seed else ():
        linear: Any = model.get_submodule(name)
        generator = torch.Generator().manual_seed(seed)
        order = orders.setdefault(linear.in_features, torch.randperm(linear.in_features, generator=generator))
        model.set_submodule(name, Reordered(linear, order))
    return model


def outputs(model: Any, kind: str, sample: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        if kind == "lm":
            return model(**sample, use_cache=False).logits[0]
        return model(**sample).last_hidden_state.mean(1)


def loss(kind: str, expected: Tensor, y: Tensor) -> float:
    values = metrics.kl_divergence(expected, y) if kind == "lm" else metrics.cosine_distance(expected, y)
    return float(values.double().mean())


def measure(args: argparse.Namespace) -> Tensor:
    """Losses ``[schemes, draws, windows]``."""
    model, tokenizer, kind = load(args.model)
    measured, calibrating = windows(tokenizer, args.text, args.windows, args.width, args.calibration)
    samples, calibration = ([{"input_ids": row[None]} for row in ids] for ids in (measured, calibrating))
    expected = [outputs(model, kind, sample) for sample in samples]
    names = [layer.name for layer in packed_layers(int8fx.convert(float_copy(model), parse_scheme(args.scheme[0])))]
    losses = torch.zeros(len(args.scheme), args.draws, len(samples), dtype=torch.float64)
    for draw in range(args.draws):
        copy = reordered(model, names, args.seed + draw)
        statistics = int8fx.calibrate(copy, calibration, progress=False) if calibration else None
        for s, text in enumerate(args.scheme):
            converted = int8fx.convert(float_copy(copy), parse_scheme(text), calibration=statistics, progress=False)
            for w, sample in enumerate(samples):
                losses[s, draw, w] = loss(kind, expected[w], outputs(converted, kind, sample))
            show_progress("measuring", draw * len(args.scheme) + s + 1, args.draws * len(args.scheme))
    return losses


def report(schemes: list[str], losses: Tensor) -> str:
    """A table: the mean loss of each scheme, and its ratio to that of the first."""
    _, draws, count = losses.shape
    generator = torch.Generator().manual_seed(0)
    means = torch.stack(
        [
            losses[:, torch.randint(draws, (draws,), generator=generator)][
                :, :, torch.randint(count, (count,), generator=generator)
            ].mean((1, 2))
            for _ in range(RESAMPLES)
        ]
    )
    bounds = torch.tensor([0.025, 0.975], dtype=torch.float64)
    medians = (losses / losses[:1]).flatten(1).median(1).values
    rows = [["scheme", "loss", "ratio of means", "median ratio", "ratio of each draw"]]
    for text, mean, low_high, ratio, ratio_bounds, median, by_draw in zip(
        schemes,
        losses.mean((1, 2)),
        means.quantile(bounds, 0).T,
        losses.mean((1, 2)) / losses[0].mean(),
        (means / means[:, :1]).quantile(bounds, 0).T,
        medians,
        losses.mean(2) / losses[0].mean(1),
        strict=True,
    ):
        loss, ratio_text = (f"{v:.3g} [{b[0]:.3g}, {b[1]:.3g}]" for v, b in ((mean, low_high), (ratio, ratio_bounds)))
        rows.append([text, loss, ratio_text, f"{median:.2f}", " ".join(f"{r:.2f}" for r in by_draw)])
    return table(rows)


def speed(schemes: list[str], rounds: int) -> str:
    """A table: the time of ``int8fx::quantize_rowwise`` of bfloat16 x, in ns per value."""
    blocks = {"not rotated": 1, **{text: parse_scheme(text).rotation for text in schemes}}
    rows = [["x", *blocks]]
    for M, K in ((128, 4096), (128, 896), (128, 576), (1, 4096)):
        x, least = torch.randn(M, K, dtype=torch.bfloat16), dict.fromkeys(blocks, float("inf"))
        for _ in range(rounds):
            for label, block in blocks.items():
                begin = time.perf_counter()
                torch.ops.int8fx.quantize_rowwise(x, None, block)
                least[label] = min(least[label], time.perf_counter() - begin)
        rows.append([f"[{M}, {K}]", *(f"{1e9 * seconds / x.numel():.3f}" for seconds in least.values())])
    return table(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", action="append", help="pydoc or a file; again for more")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--calibration", type=int, default=8, help="windows; 0: columns are chosen without data")
    parser.add_argument("--draws", type=int, default=6, help="orders of the columns")
    parser.add_argument("--seed", type=int, default=0, help="of the first order; 0: the columns as they are")
    parser.add_argument("--scheme", action="append", help="the first is what the others are compared with")
    parser.add_argument("--speed", action="store_true", help="time the rotations instead")
    parser.add_argument("--rounds", type=int, default=100)
    args = parser.parse_args()
    args.text, args.scheme = args.text or ["pydoc"], args.scheme or list(SCHEMES)
    if args.speed:
        print(f"{machine()}\n{speed(args.scheme, args.rounds)}")
        return
    print(f"{machine()}\n{args.model}: {args.windows} windows of {args.width}, {args.draws} draws")
    print(report(args.scheme, measure(args)))


if __name__ == "__main__":
    main()
