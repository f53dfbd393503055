"""A compiled decode step, one to four rows, quantises x only for matmuls that read the codes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.graphs import GraphBackend, compiled, ops, random
from support.interpreter import cpu_tensors_on
from torch import nn

import int8fx
from int8fx.graph.count import count_ops
from int8fx.ops import fallback
from int8fx.ops.rows import WEIGHT_ONLY_ROWS_CPU
from int8fx.passes import run_passes


class Layer(nn.Module):
    """A decoder layer: q, k, v, o and a gated MLP."""

    def __init__(self, hidden: int = 32, ffn: int = 48) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(hidden, hidden, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(hidden, ffn, bias=False) for _ in range(2))
        self.down = nn.Linear(ffn, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.rms_norm(x, x.shape[-1:])
        x = x + self.o(F.scaled_dot_product_attention(self.q(h), self.k(h), self.v(h)))
        h = F.rms_norm(x, x.shape[-1:])
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def compiled_layer(scheme: int8fx.Scheme, dynamic: bool = False) -> tuple[Callable, GraphBackend]:
    model = int8fx.convert(Layer().eval(), scheme)
    return compiled(torch.no_grad()(model), lambda graph: run_passes(graph).shared, dynamic=dynamic)


@pytest.mark.parametrize("rows", [1, 2, 4, 5])
@pytest.mark.parametrize("scheme", [int8fx.llm_int8(), int8fx.rotated(block=16)], ids=["llm_int8", "rotated"])
def test_a_decode_step_quantises_only_what_its_matmuls_read(scheme, rows):
    run, backend = compiled_layer(scheme)
    run(random(1, rows, 32))
    (after,) = backend.after
    if scheme.rotation == 1 and rows <= WEIGHT_ONLY_ROWS_CPU:
        assert count_ops(after) == {"linear": 7}
    else:
        assert count_ops(after) == {"quantize_rowwise": 2, "linear_quantized": 5, "linear": 2}


def test_a_graph_for_any_number_of_rows_quantises_when_it_runs_if_somebody_reads_it(monkeypatch):
    """The ops run on torch's operators, whose calls can be counted."""
    calls = []
    quantize = fallback.quantize_rowwise
    monkeypatch.setattr(fallback, "quantize_rowwise", lambda *args: calls.append(args) or quantize(*args))
    run, backend = compiled_layer(int8fx.llm_int8(), dynamic=True)
    run(random(1, 9, 32))
    with cpu_tensors_on(fallback):
        by_rows = {}
        for rows in (8, 4, 2):
            calls.clear()
            run(random(1, rows, 32))
            by_rows[rows] = len(calls)
    (after,) = backend.after
    quantizations = after.find_nodes(op="call_function", target=ops.quantize_rowwise.default)
    assert [node.kwargs for node in quantizations] == [{"for_linear": True}] * 2
    assert by_rows == {8: 2 + 2, 4: 0, 2: 0}  # q, k, v and gate, up share theirs; o and down make one each
