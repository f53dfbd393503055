"""Converts and compiles a model on a GPU, where Triton kernels run the matmuls. Without a GPU it runs on the CPU.

`int8fx bench --device cuda` checks the kernels against the reference on your GPU, then times them.
"""

import torch
from torch import nn

import int8fx

device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.bfloat16
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(512, 2048), nn.GELU(), nn.Linear(2048, 512)).to(device, dtype).eval()
x = torch.randn(4, 512, device=device, dtype=dtype)

with torch.no_grad():
    exact = model(x)
    model = int8fx.convert(model, int8fx.rotated())  # a row's result does not depend on the other rows
    if device == "cuda":
        model = torch.compile(model, mode="reduce-overhead", fullgraph=True)  # shapes are static: CUDA graphs work
    y = model(x)

difference = (y - exact).norm() / exact.norm()
print(f"on {device}: relative difference of the outputs {difference:.4f}")
assert difference < 0.05
