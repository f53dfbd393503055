"""What tests of graphs share: a backend without code generation, graphs of three levels, assertions on rewrites."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from functorch.compile import make_boxed_func
from support.helpers import half_subnormal, unit_roundoff
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import aot_function
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.joint_graph import canonicalize_aten_ir_passes
from torch.fx import Graph, GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from int8fx.graph.emit import read_weight
from int8fx.passes import lower
from int8fx.schemes.quantize import compute_dtype, quantize_weight

aten = torch.ops.aten
ops = torch.ops.int8fx
PRODUCTS = (
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten._grouped_mm.default,
)
INT8_PRODUCTS = (ops.linear.default, ops.linear_quantized.default, ops.grouped_linear.default)


Pass = Callable[[Graph], int]


def count_nodes(graph: Graph, *targets: object) -> int:
    return sum(len(graph.find_nodes(op="call_function", target=target)) for target in targets)


# ---- where passes run ------------------------------------------------------------------------------------------------


@dataclass
class GraphBackend:
    """Inductor without code generation: AOTAutograd with its decompositions, then ``passes``, then the graph as it is.

    As in Inductor, the passes see the graph of inference or, for training, the joint graph before it is partitioned.

    before, after: one graph for every compilation.
    counts: what the passes returned, for every compilation.
    """

    passes: Sequence[Pass]
    before: list[Graph] = field(default_factory=list)
    after: list[Graph] = field(default_factory=list)
    counts: list[tuple[int, ...]] = field(default_factory=list)

    def _rewrite(self, gm: GraphModule) -> None:
        canonicalize_aten_ir_passes(gm)
        before = Graph()
        before.output(before.graph_copy(gm.graph, {}))
        self.before.append(before)
        self.counts.append(tuple(rewrite(gm.graph) for rewrite in self.passes))
        gm.graph.lint()
        gm.recompile()
        self.after.append(gm.graph)

    def _inference(self, gm: GraphModule, _: list) -> Callable:
        self._rewrite(gm)
        return make_boxed_func(gm.forward)

    def _partition(self, gm: GraphModule, joint_inputs: list, **kwargs: object) -> tuple:
        self._rewrite(gm)
        return min_cut_rematerialization_partition(gm, joint_inputs, **kwargs)

    def _options(self) -> dict:
        return {
            "fw_compiler": lambda gm, _: make_boxed_func(gm.forward),
            "inference_compiler": self._inference,
            "partition_fn": self._partition,
            "decompositions": select_decomp_table(),
            "keep_inference_input_mutations": True,
        }

    def __call__(self, gm: GraphModule, example_inputs: list) -> Callable:
        return aot_autograd(**self._options())(gm, example_inputs)

    def without_dynamo(self, f: Callable) -> Callable:
        """``f``, whose tensors are all arguments, for inference; in half the time."""
        return torch.no_grad()(aot_function(f, **self._options()))


def compiled(f: Callable, *passes: Pass, dynamic: bool | None = None) -> tuple[Callable, GraphBackend]:
    torch._dynamo.reset()
    backend = GraphBackend(passes)
    return torch.compile(f, backend=backend, fullgraph=True, dynamic=dynamic), backend


LEVELS = ("torch", "export", "aten")


def graph_of(f: Callable, level: str, *args: Tensor) -> GraphModule:
    """The graph of ``f(*args)``, not functional, of one of the `LEVELS`.

    torch: of torch functions and methods, without shapes but for those of dequantised weights (``convert`` of a
    GraphModule). export: of aten operations as they were called. aten: with composite operations decomposed.
    """
    if level != "torch":
        return make_fx(f, tracing_mode="fake", pre_dispatch=level == "export")(*args)
    gm = torch.fx.symbolic_trace(f)
    values = dict(zip(gm.graph.find_nodes(op="placeholder"), args, strict=True))
    for node in gm.graph.find_nodes(op="call_function", target=ops.dequantize.default):
        node.meta["val"] = torch.empty(values[node.args[0]].shape, dtype=node.kwargs["dtype"], device="meta")
    return gm


# ---- weights ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Packed:
    """A packed weight: codes ``[..., N, K]`` and scale ``[..., N]``."""

    codes: Tensor
    scale: Tensor

    def __iter__(self):
        return iter((self.codes, self.scale))

    def exact(self) -> Tensor:
        return self.codes.double() * self.scale.double().unsqueeze(-1)


def weight(*shape: int, seed: int = 1) -> Packed:
    return Packed(*quantize_weight(torch.randn(shape, generator=torch.Generator().manual_seed(seed))))


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ---- the same result, the count, the old op gone, the new op there ---------------------------------------------------


@dataclass
class Case:
    """``f(x, *weights, *extra)``, a sum of products without a minus, over packed weights."""

    f: Callable[..., Tensor]
    x: Tensor
    weights: Sequence[Packed]
    extra: Sequence[Tensor] = ()
    threshold: float | None = 0.0
    rounding: torch.dtype | None = None  # the coarsest dtype on the way, if that is not x's

    def compile(self, *passes: Pass, dynamic: bool | None = None, dynamo: bool = True) -> tuple[Callable, GraphBackend]:
        """A function of x and extra tensors."""
        f, dtype, threshold = self.f, self.x.dtype, self.threshold

        def with_dequantized(x: Tensor, packed: list[tuple[Tensor, Tensor]], extra: Sequence[Tensor]) -> Tensor:
            return f(x, *(ops.dequantize(*w, threshold, dtype=dtype) for w in packed), *extra)

        if dynamo:
            run, backend = compiled(with_dequantized, *passes, dynamic=dynamic)
        else:
            backend = GraphBackend(passes)
            run = backend.without_dynamo(with_dequantized)
        packed = [tuple(w) for w in self.weights]
        return lambda x, *extra: run(x, packed, extra), backend

    def _wide(self, change: Callable[[Tensor], Tensor] = lambda t: t, x: Tensor | None = None) -> Tensor:
        def widen(t: Tensor) -> Tensor:
            return change(t.double()) if t.is_floating_point() else t

        x = widen(self.x if x is None else x)
        return self.f(x, *(change(w.exact()) for w in self.weights), *map(widen, self.extra))

    def exact(self) -> Tensor:
        return self._wide()

    def budget(self) -> Tensor:
        """What ``f`` may be off: the rounding of x to codes, that of the sums, and a few to x's dtype.

        A code is off by half a step, and a step is the largest element below the threshold / 127.
        """
        K = max(w.codes.shape[-1] for w in self.weights)
        magnitude = self._wide(torch.abs)
        step = min(
            self.x.abs().max().item() if self.x.numel() else 0.0, math.inf if self.threshold is None else self.threshold
        )
        step /= 127
        no_x, steps = torch.zeros_like(self.x), torch.full_like(self.x, step)
        codes = (self._wide(torch.abs, steps) - self._wide(torch.abs, no_x)) * (1 + 2**-7) / 2  # steps in x's dtype
        u, U = unit_roundoff(compute_dtype(self.x.dtype)), unit_roundoff(self.rounding or self.x.dtype)
        return codes + ((K + 8) * u + 4 * U) * (magnitude + codes) + half_subnormal(self.x.dtype)

    def assert_right(self, y: Tensor, dtype: torch.dtype | None = None) -> None:
        exact = self.exact()
        assert y.shape == exact.shape
        assert y.dtype == (dtype or self.x.dtype)
        assert bool(((y.double() - exact).abs() <= self.budget()).all()), (y.double() - exact).abs().max()

    def check_lowered(self, count: int = 1, there: object = ops.linear.default, dynamo: bool = False) -> Graph:
        """All of its ``count`` products become ``there``."""
        run, backend = self.compile(lower, dynamo=dynamo)
        self.assert_right(run(self.x, *self.extra))
        (before,), (after,) = backend.before, backend.after
        assert backend.counts == [(count,)]
        assert count_nodes(before, *PRODUCTS) == count
        assert count_nodes(after, *PRODUCTS, ops.dequantize.default) == 0
        assert count_nodes(after, there) == count_nodes(after, *INT8_PRODUCTS) == count
        for node in after.find_nodes(op="call_function", target=there):
            assert read_weight(node).threshold == self.threshold
        return after

    def check_left(self, dynamo: bool = False) -> Graph:
        """No product becomes an int8 product."""
        run, backend = self.compile(lower, dynamo=dynamo)
        self.assert_right(run(self.x, *self.extra))
        (before,), (after,) = backend.before, backend.after
        assert backend.counts == [(0,)]
        assert str(after) == str(before)
        assert count_nodes(after, *INT8_PRODUCTS) == 0
        assert count_nodes(after, ops.dequantize.default) == 1
        return after
