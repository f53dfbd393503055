"""Whether 1x1 convolutions gain from int8: time, weight bytes and error of random models with and without them.

python tests/support/convolutions.py
"""

from __future__ import annotations

import copy
import time
import warnings

import torch
import transformers
from torch import nn

import int8fx

IMAGE = {"pixel_values": torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))}
TEXT = {"input_ids": torch.arange(1, 129)[None]}
MODELS = {
    "SqueezeBert": ("Model", {"num_hidden_layers": 4}, TEXT),
    "MobileNetV2": ("Model", {}, IMAGE),
    "PoolFormer": ("Model", {}, IMAGE),
    "ResNet": ("Model", {}, IMAGE),
}


def milliseconds(model: nn.Module, inputs: dict, rounds: int = 7) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        model(**inputs)
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def main() -> None:
    warnings.filterwarnings("ignore", message="int8fx.convert")
    print(f"{'model':12} {'1x1 share':>9} {'float32 ms':>10} {'int8 ms':>8} {'weights':>8} {'error':>7}")
    for name, (head, sizes, inputs) in MODELS.items():
        torch.manual_seed(0)
        model = getattr(transformers, name + head)(getattr(transformers, name + "Config")(**sizes)).eval()
        converted = copy.deepcopy(model)
        int8fx.convert(converted, select=lambda _, module: isinstance(module, (nn.Conv1d, nn.Conv2d)))
        summary = int8fx.summary(converted)
        share = sum(row.bytes_before for row in summary.converted) / summary.bytes_before
        with torch.no_grad():
            y, z = model(**inputs)[0], converted(**inputs)[0]
            times = milliseconds(model, inputs), milliseconds(converted, inputs)
        error, size = float((y - z).norm() / y.norm()), summary.bytes_after / summary.bytes_before
        print(f"{name:12} {share:9.0%} {times[0]:10.1f} {times[1]:8.1f} {size:7.2f}x {error:7.2%}")


if __name__ == "__main__":
    main()
