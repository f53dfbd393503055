"""A small converted model, and what the passes do to it inside Inductor next to a pass of somebody else."""

from __future__ import annotations

import torch
import torch._dynamo.config
import torch._functorch.config
from support.graphs import PRODUCTS, count_nodes, ops, random
from torch import nn
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph

import int8fx
from int8fx.graph.count import count_ops
from int8fx.passes import Report


class Foreign(CustomGraphPass):
    """A pass of someone else, which notes the int8fx ops and the matmuls that it sees."""

    def __init__(self) -> None:
        self.seen: list[tuple[dict[str, int], int]] = []

    def __call__(self, graph: Graph) -> None:
        self.seen.append((count_ops(graph), count_nodes(graph, *PRODUCTS)))

    def uuid(self) -> str:
        return "int8fx's tests"


BEFORE_OURS, AFTER_OURS = ({"dequantize": 1}, 1), ({"linear": 1}, 0)
REPORT = Report(lowered=1, shared=0, folded=0, linears=1, dequantized=0)


class Bare(nn.Module):
    """One matmul with a bare Parameter. Its graph is one kernel call: Inductor has no C++ to write."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(random(24, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.w


def converted() -> tuple[Bare, torch.Tensor, torch.Tensor]:
    """A model, an input, and what the int8 matmul gives."""
    model, x = int8fx.convert(Bare().eval()), random(5, 24)
    return model, x, ops.linear(x, *model.packed("w"))


def run(model: nn.Module, *args: torch.Tensor, **options: object) -> torch.Tensor:
    with torch.no_grad():
        return torch.compile(model, fullgraph=True, **options)(*args)


def state() -> dict:
    """All of the process's configuration that int8fx must leave alone."""
    values = {c.__name__: c.get_config_copy() for c in (config, torch._dynamo.config, torch._functorch.config)}
    del values[config.__name__]["joint_custom_pre_pass"]
    values["torch"] = (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled())
    values["random"] = torch.get_rng_state().tolist()
    return values
