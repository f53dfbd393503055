"""Prints a gated feed-forward block's FX graph before and after the passes.

The block spells its matmuls in three ways: ``F.linear`` with a Parameter, ``@`` with a Parameter, an ``nn.Linear``.
"""

import operator

import torch
import torch.nn.functional as F
from torch import nn
from torch._inductor.decomposition import select_decomp_table
from torch.fx import Graph, Node

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


def show(title: str, graph: Graph) -> None:
    print(f"{title}\n")
    for node in graph.nodes:
        if node.op == "call_function" and node.target is not operator.getitem:
            val = node.meta["val"]
            shapes = [list(v.shape) for v in (val if isinstance(val, tuple) else (val,))]
            print(f"    {text(node)} = {call(node)}  # {', '.join(map(str, shapes))}")
    print()


def call(node: Node) -> str:
    """A call of an operator as one writes it: arguments that are their defaults are left out."""
    arguments = node.target._schema.arguments
    given = dict(zip((a.name for a in arguments), node.args, strict=False)) | node.kwargs
    spelled: dict[str, None] = {}  # parts of one tuple are written once
    by_position = True
    for a in arguments:
        if a.name not in given or (a.has_default_value() and given[a.name] == a.default_value):
            by_position = False
        elif by_position and not a.kwarg_only:
            spelled[text(given[a.name])] = None
        else:
            spelled[f"{a.name}={text(given[a.name])}"] = None
    return f"{str(node.target).removesuffix('.default')}({', '.join(spelled)})"


def text(value: object) -> str:
    if not isinstance(value, Node):
        return repr(value)
    if value.target is operator.getitem:
        return f"*{text(value.args[0])}"
    return value.name.replace("_default", "")


torch.manual_seed(0)
model = int8fx.convert(Block(64, 192).eval())
program = torch.export.export(model, (torch.randn(1, 8, 64),)).run_decompositions(select_decomp_table())
show("Before", program.graph)
report = run_passes(program.graph)
show("After", program.graph)
print(report)
