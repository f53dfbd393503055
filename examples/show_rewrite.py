"""Prints a gated feed-forward block's FX graph before and after the passes.

The block spells its products in three ways: ``F.linear`` with a Parameter, ``@`` with a Parameter, an ``nn.Linear``.
"""

import operator

import torch
import torch.nn.functional as F
from torch import nn
from torch._inductor.decomposition import select_decomp_table

import int8fx
from int8fx.passes import run_passes


class Block(nn.Module):
    def __init__(self, hidden: int, ffn: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.randn(ffn, hidden) / hidden**0.5)  # [N, K]
        self.up = nn.Parameter(torch.randn(hidden, ffn) / hidden**0.5)  # [K, N]
        self.down = nn.Linear(ffn, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.silu(F.linear(x, self.gate)) * (x @ self.up))


def show(title: str, graph: torch.fx.Graph) -> None:
    print(f"{title}\n")
    for node in graph.nodes:
        if node.op == "call_function" and node.target is not operator.getitem:
            val = node.meta["val"]
            shape = list(val.shape) if isinstance(val, torch.Tensor) else [list(v.shape) for v in val]
            args = ", ".join("None" if a is None else str(a) for a in node.args)
            print(f"    {node.name} = {str(node.target).removesuffix('.default')}({args})  # {shape}")
    print()


torch.manual_seed(0)
model = int8fx.convert(Block(64, 192).eval())
program = torch.export.export(model, (torch.randn(1, 8, 64),)).run_decompositions(select_decomp_table())
show("Before", program.graph)
report = run_passes(program.graph)
show("After", program.graph)
print(report)
