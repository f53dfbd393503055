"""Finds two outlier channels that were planted in a small transformer, and shows what each scheme does with them.

``python examples/inspect_outliers.py picture.png`` also draws them (needs matplotlib). For a real model, run
``int8fx inspect --model smollm2 --png picture.png``; ``docs/numerics.md`` shows the output and the picture.
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
    for block in model.layers:  # two channels of the norms are larger than the others, as in trained models
        block.norm1.weight[[17, 99]] *= 30
        block.norm2.weight[[17, 99]] *= 30

calibration_data, data = [torch.randn(4, 32, 256)], [torch.randn(4, 32, 256)]
schemes = [int8fx.llm_int8(), int8fx.rotated(), int8fx.rotated(columns=0)]

calibration = int8fx.calibrate(model, calibration_data)
inspection = inspect(model, data, {str(scheme): scheme for scheme in schemes}, calibration=calibration)
print(inspection)

layer = next(layer for layer in inspection.layers if layer.name == "layers.0.linear1")
print(f"\n{layer.name}: {' and '.join(layer.buffers)} of the state dict hold columns {layer.columns['rotated']}")
assert {17, 99} <= set(layer.columns["rotated"])
assert layer.error["rotated"] < layer.error["llm_int8"]

if len(sys.argv) > 1:
    from int8fx.tools.plots import draw_inspection

    draw_inspection(inspection, sys.argv[1])
