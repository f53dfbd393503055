"""What the tests of graphs and passes share: a backend without code generation, graphs of three levels, assertions."""

from __future__ import annotations

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
from int8fx.schemes.quantize import INT8_MAX, compute_dtype, quantize_weight

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


Packed = tuple[Tensor, Tensor]
"""Codes ``[..., N, K]`` and scale ``[..., N]``: what of a packed weight a compiled function takes as arguments."""


def weight(*shape: int, seed: int = 1) -> Packed:
    return quantize_weight(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))


def exact(w: Packed) -> Tensor:
    codes, scale = w
    return codes.double() * scale.double().unsqueeze(-1)


def dequantized(w: Packed, dtype: torch.dtype = torch.float32, threshold: float | None = 6.0) -> Tensor:
    """A weight as it stands in a graph before `lower`."""
    return ops.dequantize(*w, threshold, dtype=dtype)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ---- matmuls that are exact ------------------------------------------------------------------------------------------
# Weights and inputs are small integers, scales are powers of two. With ``threshold=0.0`` every way to compute a matmul
# is exact, and so the results are equal.


def integers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).float()


def integer_weight(*shape: int, seed: int = 1) -> Packed:
    codes = torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    scale = torch.randint(-2, 2, shape[:-1], generator=torch.Generator().manual_seed(seed)).float().exp2()
    return codes, scale


def dequantized_first(f: Callable) -> Callable:
    """``f(x, w, *extra)`` as a function of (x, codes, scale, *extra)."""

    def with_dequantized(x, codes, scale, *extra):
        return f(x, ops.dequantize.default(codes, scale, 0.0, dtype=torch.float32), *extra)

    # fx.symbolic_trace does not take *args apart
    return {0: lambda x, c, s: with_dequantized(x, c, s), 1: lambda x, c, s, a: with_dequantized(x, c, s, a)}[
        f.__code__.co_argcount - 2
    ]


def lowered(f: Callable, level: str, x: Tensor, w: Packed, *extra: Tensor) -> tuple[int, torch.fx.GraphModule]:
    """The count that `lower` returned and the rewritten graph, whose answer is checked: value, shape, contiguity."""
    g = dequantized_first(f)
    gm = graph_of(g, level, x, *w, *extra)
    count = lower(gm.graph)
    gm.graph.lint()
    gm.recompile()
    found, expected = gm(x, *w, *extra), g(x, *w, *extra)  # in place changes reach dequantised weights only
    assert torch.equal(found, expected)
    assert found.dtype == expected.dtype
    assert found.is_contiguous() or not expected.is_contiguous()
    assert count == count_nodes(gm.graph, *INT8_PRODUCTS)
    return count, gm


def check_lowered(case: tuple, level: str, dequantized: int = 0) -> None:
    """``case``: ``(f, shape of x, shape of w)``. Its matmul is lowered, and ``dequantized`` dequantisations stay."""
    f, x, w = case
    count, gm = lowered(f, level, integers(*x), integer_weight(*w))
    assert count == 1
    assert count_nodes(gm.graph, ops.dequantize.default) == dequantized


def check_left(case: tuple, level: str) -> None:
    """``case``: ``(f, shape of x, shape of w, levels ...)``. Nothing of it is lowered."""
    f, x, w, *_ = case
    count, gm = lowered(f, level, integers(*x), integer_weight(*w))
    assert count == 0
    assert count_nodes(gm.graph, ops.dequantize.default) == 1


# ---- the same result, the count, the old op gone, the new op there ---------------------------------------------------


@dataclass
class Case:
    """``f(x, *weights, *extra)``, a sum of matmuls without a minus, over packed weights."""

    f: Callable[..., Tensor]
    x: Tensor
    weights: Sequence[Packed]
    extra: Sequence[Tensor] = ()
    threshold: float | None = 0.0
    rounding: torch.dtype | None = None  # the coarsest dtype on the way, if that is not x's

    def compile(self, *passes: Pass, dynamic: bool | None = None, dynamo: bool = True) -> tuple[Callable, GraphBackend]:
        """A function of x and extra tensors."""
        f, dtype, threshold = self.f, self.x.dtype, self.threshold

        def with_dequantized(x: Tensor, packed: list[Packed], extra: Sequence[Tensor]) -> Tensor:
            return f(x, *(dequantized(w, dtype, threshold) for w in packed), *extra)

        if dynamo:
            run, backend = compiled(with_dequantized, *passes, dynamic=dynamic)
        else:
            backend = GraphBackend(passes)
            run = backend.without_dynamo(with_dequantized)
        return lambda x, *extra: run(x, list(self.weights), extra), backend

    def _wide(self, change: Callable[[Tensor], Tensor] = lambda t: t, x: Tensor | None = None) -> Tensor:
        def widen(t: Tensor) -> Tensor:
            return change(t.double()) if t.is_floating_point() else t

        x = widen(self.x if x is None else x)
        return self.f(x, *(change(exact(w)) for w in self.weights), *map(widen, self.extra))

    def exact(self) -> Tensor:
        return self._wide()

    def budget(self) -> Tensor:
        """What ``f`` may be off: the rounding of x to codes, that of the sums, and a few to x's dtype.

        A code is off by half a step, and a step is the largest element below the threshold / 127.
        """
        K = max(codes.shape[-1] for codes, _ in self.weights)
        magnitude = self._wide(torch.abs)
        largest = self.x.abs().max().item() if self.x.numel() else 0.0
        step = (largest if self.threshold is None else min(largest, self.threshold)) / INT8_MAX
        no_x, steps = torch.zeros_like(self.x), torch.full_like(self.x, step)
        codes = (self._wide(torch.abs, steps) - self._wide(torch.abs, no_x)) * (1 + 2**-7) / 2  # steps in x's dtype
        u, U = unit_roundoff(compute_dtype(self.x.dtype)), unit_roundoff(self.rounding or self.x.dtype)
        return codes + ((K + 8) * u + 4 * U) * (magnitude + codes) + half_subnormal(self.x.dtype)

    def assert_right(self, y: Tensor, dtype: torch.dtype | None = None) -> None:
        expected = self.exact()
        assert y.shape == expected.shape
        assert y.dtype == (dtype or self.x.dtype)
        assert bool(((y.double() - expected).abs() <= self.budget()).all()), (y.double() - expected).abs().max()

    def check_lowered(self, count: int = 1, there: object = ops.linear.default, dynamo: bool = False) -> Graph:
        """All of its ``count`` matmuls become ``there``."""
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
        """No matmul becomes an int8 matmul."""
        run, backend = self.compile(lower, dynamo=dynamo)
        self.assert_right(run(self.x, *self.extra))
        (before,), (after,) = backend.before, backend.after
        assert backend.counts == [(0,)]
        assert str(after) == str(before)
        assert count_nodes(after, *INT8_PRODUCTS) == 0
        assert count_nodes(after, ops.dequantize.default) == 1
        return after
