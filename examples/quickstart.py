"""Converts a small transformer to int8, compiles it, and compares its outputs and its bytes with float32."""

import torch
from torch import nn

import int8fx

torch.manual_seed(0)
layer = nn.TransformerEncoderLayer(d_model=256, nhead=4, dim_feedforward=1024, batch_first=True)
model = nn.TransformerEncoder(layer, num_layers=4).eval()
x = torch.randn(2, 64, 256)


def megabytes(model: nn.Module) -> float:
    return sum(t.nbytes for t in model.state_dict().values()) / 1e6


with torch.no_grad():
    y, before = model(x), megabytes(model)

    model = int8fx.convert(model)  # the weights are int8 from here on
    compiled = torch.compile(model, fullgraph=True)

    difference = (compiled(x) - y).norm() / y.norm()

print(int8fx.summary(model))
print(f"{before:.1f} MB float32 -> {megabytes(model):.1f} MB, relative difference of the outputs {difference:.4f}")
assert difference < 0.05
