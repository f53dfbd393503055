"""Where are the outliers? A small transformer with two planted ones: found, kept in 16 bits, and the error they cost.

``python examples/inspect_outliers.py picture.png`` draws them as well (needs matplotlib). For a real model:
``int8fx inspect --model smollm2 --png picture.png``; ``docs/numerics.md`` shows what it prints and draws.
"""

import sys

import torch
from torch import nn

import int8fx
from int8fx.tools.inspection import inspect

torch.manual_seed(0)
layer = nn.TransformerEncoderLayer(d_model=256, nhead=4, dim_feedforward=512, batch_first=True)
model = nn.TransformerEncoder(layer, num_layers=2).eval()
with torch.no_grad():
    for block in model.layers:  # as in real models: two channels of the norms are larger than the others
        block.norm1.weight[[17, 99]] *= 30
        block.norm2.weight[[17, 99]] *= 30

calibration_data, data = [torch.randn(4, 32, 256)], [torch.randn(4, 32, 256)]
schemes = {"LLM.int8()": int8fx.llm_int8(), "rotated": int8fx.rotated(), "rotated, none": int8fx.rotated(columns=None)}

calibration = int8fx.calibrate(model, calibration_data)
found = inspect(model, data, schemes, calibration=calibration)
print(found)

down = next(report for report in found.layers if report.name == "layers.0.linear1")
print(f"\n{down.name} keeps columns {down.kept['rotated']}: {' and '.join(down.where)} of the state dict")
assert {17, 99} <= set(down.kept["rotated"])
assert down.error["rotated"] < down.error["LLM.int8()"]

if len(sys.argv) > 1:
    from int8fx.tools.plots import draw_inspection

    draw_inspection(found, sys.argv[1])
