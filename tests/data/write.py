"""Writes a small checkpoint and what its model computes: ``python tests/data/write.py tests/data/version2``."""

import json
import sys

import torch
from safetensors.torch import save_file
from torch import nn

import int8fx


def main(path: str) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(40, 24), "norm": nn.LayerNorm(24), "b": nn.Linear(24, 8, bias=False)})
    int8fx.convert(model, int8fx.rotated(16, columns=0.05))
    x = torch.linspace(-1, 1, 80).view(2, 40)
    with torch.no_grad():
        y = model["b"](model["norm"](model["a"](x)))
    save_file(model.state_dict(), path + ".safetensors")
    with open(path + ".json", "w") as file:
        json.dump(y.tolist(), file)


if __name__ == "__main__":
    main(sys.argv[1])
