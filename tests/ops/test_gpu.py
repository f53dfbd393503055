"""The ops on the Triton kernels, in the interpreter: which kernels run, and that results are right."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from int8fx.triton_kernels import fused_linear, int8_matmul, outliers, quantize_rowwise, weight_only
from support import interpreter
from support.graphs import compiled
from support.helpers import (
    Problem,
    activation,
    assert_within_bound,
    assert_within_budget,
    generator,
    problem,
    problems,
    seeds,
    weight_in_groups,
)
from support.triton import DTYPES, EXAMPLES, FEWER_EXAMPLES, dtypes, experts
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

import int8fx
from int8fx import ops
from int8fx.ops import fallback
from int8fx.ops.rows import Form, form
from int8fx.passes import count_ops, fold, lower, share
from int8fx.schemes import reference
from int8fx.schemes.formats import Grouping
from int8fx.schemes.weight import Epilogue

activation_names = st.sampled_from(list(reference.ACTIVATIONS))
binaries = st.sampled_from(list(reference.BINARIES))


@pytest.fixture(autouse=True, scope="module")
def on_triton():
    with interpreter.cpu_tensors_on_triton():
        yield


# ---- results ---------------------------------------------------------------------------------------------------------


def assert_right(y: torch.Tensor, p: Problem, rows: int) -> None:
    """``y`` is as exact as the form that serves ``rows`` rows must be."""
    weight = p.weight
    chosen = form(rows, "cuda", weight.threshold, weight.block, weight.columns is not None, weight.is_plain)
    if (
        p.x.dtype != torch.float64 and chosen is Form.FUSED
    ):  # scales per block: within the bound, not element by element
        assert_within_bound(y, *p)
        return
    if p.x.dtype != torch.float64 and chosen is Form.WEIGHT_ONLY:
        p = replace(p, weight=weight._replace(threshold=0.0))
    assert_within_budget(y, *p)


@EXAMPLES
@given(problems(batched=None), activation_names, binaries, seeds)
def test_linear(p, name, binary, seed):
    rows = p.x.shape[-2] if p.weight.codes.dim() == 3 else p.x[..., :1].numel()
    if rows > 1 or p.weight.block != 1:
        other = None
        if binary != "none":
            other = torch.randn(*p.x.shape[:-1], p.weight.codes.shape[-2], generator=generator(seed)).to(p.x.dtype)
        p = p.with_epilogue(activation=name, other=other, binary=binary)
    assert_right(ops.linear(*p.args), p, rows)


@FEWER_EXAMPLES
@given(problems())
def test_quantising_first_and_multiplying_later_is_linear(p):
    quantized = ops.quantize_rowwise(*p.quantize_args)
    y = ops.linear_quantized(p.x, *quantized, *p.weight, *p.epilogue)
    torch.testing.assert_close(y, ops.linear(*p.args), rtol=0, atol=0, equal_nan=True)


@FEWER_EXAMPLES
@given(problems(values=("normal", "zero_rows", "denormal", "huge")))
def test_quantize_rowwise_is_the_references(p):
    for a, b in zip(ops.quantize_rowwise(*p.quantize_args), fallback.quantize_rowwise(*p.quantize_args), strict=True):
        assert torch.equal(a, b)


GROUPED = {
    "llm_int8": {"threshold": 6.0},
    "weight only": {"threshold": 0.0},
    "columns": {"threshold": 6.0, "columns": torch.tensor([50, 3])},
    "rotated": {"block": 32},
    "rotated columns": {"block": 32, "columns": torch.tensor([50, 3])},
}


@FEWER_EXAMPLES
@given(
    st.sampled_from(list(GROUPED)),
    st.lists(st.integers(0, 20), min_size=1, max_size=4),
    st.integers(0, 3),
    dtypes,
    st.booleans(),
    seeds,
)
def test_grouped_linear(scheme, sizes, rows_after, dtype, has_bias, seed):
    E, N, K, offsets = len(sizes), 11, 100, torch.tensor(sizes).cumsum(0)
    x = activation(sum(sizes) + rows_after, K, outliers="some", dtype=dtype, seed=seed)
    weight = experts(E, N, K, seed, **GROUPED[scheme])
    bias = torch.randn(E, N, generator=generator(seed)) if has_bias else None
    y = ops.grouped_linear(x, offsets, *weight, bias)
    begin = 0
    for e, end in enumerate(offsets.tolist()):
        part = Problem(x[begin:end], weight.of_expert(e), Epilogue(bias).of_expert(e))
        if "rotated" in scheme:
            assert torch.equal(y[begin:end], ops.linear(*part.args))
        elif end > begin:
            assert_right(y[begin:end], part, len(x))
        begin = end
    assert (y[begin:] == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rotated_row_has_the_same_bits_in_every_batch(dtype):
    """Other schemes run other kernels after 1 and after 32 rows; 128 rows gather unquantised columns."""
    p = problem(130, 100, 19, dtype=dtype, block=64, columns=5, bias=False)
    y = ops.linear(*p.args)
    for M in (1, 16, 17, 65):
        assert torch.equal(ops.linear(*p.with_x(p.x[:M]).args), y[:M])
    assert torch.equal(ops.linear(*p.with_x(p.x[97:]).args), y[97:])


# ---- which kernels run -----------------------------------------------------------------------------------------------

LAUNCHERS = {
    "outlier_mask": outliers,
    "quantize_rowwise": quantize_rowwise,
    "extract_outliers": outliers,
    "int8_matmul": int8_matmul,
    "fused_linear": fused_linear,
    "weight_only": weight_only,
}
QUANTISING = ("outlier_mask", "quantize_rowwise")


@pytest.fixture
def calls(monkeypatch):
    """The names of the launchers that were called, in order."""
    names = []
    for name, module in LAUNCHERS.items():
        launcher = getattr(module, name)

        def spy(*args, name=name, launcher=launcher, **kwargs):
            names.append(name)
            return launcher(*args, **kwargs)

        monkeypatch.setattr(module, name, spy)
    return names


FOUR = ["outlier_mask", "quantize_rowwise", "extract_outliers", "int8_matmul"]
TWO = ["quantize_rowwise", "int8_matmul"]


@pytest.mark.parametrize(
    ("M", "scheme", "expected"),
    [
        (1, {}, ["fused_linear"]),
        (1, {"threshold": None}, ["fused_linear"]),
        (2, {}, ["weight_only"]),
        (32, {"threshold": None}, ["weight_only"]),
        (33, {}, FOUR),
        (33, {"threshold": None}, TWO),
        (1, {"threshold": 0.0}, ["weight_only"]),
        (65, {"threshold": 0.0}, ["weight_only"]),
        (2, {"dtype": torch.float64}, []),
        (65, {"dtype": torch.float64, "block": 64}, []),
        (1, {"columns": 2}, FOUR),
        (2, {"columns": 2, "threshold": None}, TWO),
        (33, {"columns": 2}, FOUR),
        (1, {"block": 64}, TWO),
        (16, {"block": 64, "columns": 2}, TWO),
        (65, {"block": 64, "columns": 2}, TWO),
    ],
)
def test_the_table_of_kernels(M, scheme, expected, calls):
    p = problem(M, 64, 16, **{"dtype": torch.bfloat16, **scheme})
    ops.linear(*p.args)
    assert calls == expected
    calls.clear()
    lead = {name: getattr(p.weight, name) for name in ("codes", "scale", "columns_weight")}
    weight = p.weight._replace(**{name: None if t is None else t[None] for name, t in lead.items()})
    ops.grouped_linear(p.x, torch.tensor([M]), *weight)
    assert calls == expected
    quantized = ops.quantize_rowwise(*p.quantize_args)
    calls.clear()
    ops.linear_quantized(p.x, *quantized, *p.weight, *p.epilogue)
    assert calls == [name for name in expected if name not in QUANTISING]


GROUPINGS = {
    "int4": Grouping("int4_clip", 32, asymmetric=True, scale_dtype=torch.float16),
    "nf4": Grouping("nf4", 64, double_quant=True),
    "fp4 in rows": Grouping("fp4_e2m1"),
    "int8": Grouping("int8", 7),
}


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("threshold", [0.0, None, 6.0])
@pytest.mark.parametrize("M", [1, 2, 33, 130])
def test_weights_in_groups_and_of_other_formats_are_multiplied_by_x_as_it_is(M, threshold, grouping, calls):
    x = activation(M, 65, outliers="some", dtype=torch.bfloat16)
    p = Problem(x, weight_in_groups(16, 65, GROUPINGS[grouping], threshold=threshold))
    y = ops.linear(*p.args)
    assert_within_budget(y, x, p.weight._replace(threshold=0.0), slices=8)
    in_one = p.weight.of_channels(lambda tensor: tensor[None])
    assert torch.equal(ops.grouped_linear(x, torch.tensor([M]), *in_one), y)
    assert torch.equal(ops.linear(x[None], *in_one)[0], y)
    assert calls == ["weight_only"] * 3
    for for_linear in (False, True):
        quantized = ops.quantize_rowwise(*p.quantize_args, for_linear=for_linear)
        calls.clear()
        assert torch.equal(ops.linear_quantized(x, *quantized, *p.weight), y)
        assert calls == ["weight_only"]


@pytest.mark.parametrize(
    "fields", [{"columns": 2, "threshold": None}, {"block": 16}, {"threshold": 0.0, "dtype": torch.float64}]
)
def test_torchs_operators_serve_weights_in_groups_that_no_kernel_takes(fields, calls):
    dtype = fields.pop("dtype", torch.bfloat16)
    p = Problem(activation(5, 65, dtype=dtype), weight_in_groups(16, 65, GROUPINGS["int4"], **fields))
    assert_within_budget(ops.linear(*p.args), *p)
    assert calls == []


def test_siblings_find_outliers_once(calls):
    p = problem(65, 32, 16)
    quantized = ops.quantize_rowwise(*p.quantize_args)
    for _ in range(3):
        ops.linear_quantized(p.x, *quantized, *p.weight, *p.epilogue)
    assert calls == [*QUANTISING, *["extract_outliers", "int8_matmul"] * 3]


# ---- what torch sees -------------------------------------------------------------------------------------------------


def samples(dtype=torch.float16):
    """``(op, args)`` of every op that has Triton kernels, for every scheme."""
    for grouping in (Grouping("int4_clip", 8, True), Grouping("nf4", 8, double_quant=True)):
        x = activation(5, 13, dtype=dtype).requires_grad_()
        weight = weight_in_groups(7, 13, grouping, threshold=0.0)
        yield "linear", (x, *weight, torch.randn(7))
        yield "linear_quantized", (x, *ops.quantize_rowwise(x.detach(), 0.0), *weight)
        yield "grouped_linear", (x, torch.tensor([2, 4]), *weight_in_groups(7, 13, grouping, experts=2, threshold=0.0))
    for scheme in ({}, {"columns": 2}, {"block": 8}, {"block": 8, "columns": 2}):
        p = problem(5, 13, 7, dtype=dtype, **scheme)
        x = p.x.requires_grad_()
        quantized = ops.quantize_rowwise(*p.quantize_args)
        yield "linear", p.args
        yield "linear", (x, *p.weight, p.bias, "gelu", torch.randn(5, 7).to(dtype), "mul")
        yield "linear_quantized", (x, *quantized, *p.weight, *p.epilogue)
        yield "quantize_rowwise", p.quantize_args
        columns = {} if p.weight.columns is None else {"columns": p.weight.columns}
        weight = experts(2, 7, 13, threshold=p.weight.threshold, block=p.weight.block, **columns)
        yield "linear", (torch.stack([x.detach(), x.detach()]).requires_grad_(), *weight)
        yield "grouped_linear", (x, torch.tensor([2, 4]), *weight, torch.randn(2, 7))


SAMPLES = [(name, i) for i, (name, _) in enumerate(samples())]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "i"), SAMPLES)
def test_opcheck(name, i):
    _, args = list(samples())[i]
    without_grad = {"test_utils": ("test_schema", "test_faketensor")} if "gelu" in args else {}
    args = tree_map_only(torch.Tensor, torch.Tensor.detach, args) if "gelu" in args else args
    torch.library.opcheck(getattr(torch.ops.int8fx, name).default, args, **without_grad)


@pytest.mark.parametrize(("name", "i"), SAMPLES)
def test_fakes_on_cuda(name, i):
    def on_cuda(t):
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")

    _, args = list(samples())[i]
    with FakeTensorMode():
        result = getattr(torch.ops.int8fx, name).default(*tree_map_only(torch.Tensor, on_cuda, args))
    assert {y.device.type for y in tree_leaves(result)} == {"cuda"}


@pytest.mark.parametrize(
    ("rows", "threshold", "block", "group_size", "saved"),
    [
        (1, 6.0, 1, None, 0),
        (32, 6.0, 1, None, 0),
        (33, 6.0, 1, None, 1),
        (33, 0.0, 1, None, 0),
        (1, None, 64, None, 1),
        (33, None, 1, 32, 0),
        (33, None, 64, 32, 1),
    ],
)
def test_layers_on_cuda_that_quantise_nothing_share_nothing(rows, threshold, block, group_size, saved):
    graph = torch.fx.Graph()
    with FakeTensorMode():
        x = torch.empty(rows, 64, device="cuda")
        scale = torch.empty(8, *([] if group_size is None else [2]), device="cuda")
        weight = torch.empty(8, 64, dtype=torch.int8, device="cuda"), scale
        nodes = [graph.placeholder(name) for name in ("x", "w", "scale")]
        for node, value in zip(nodes, (x, *weight), strict=True):
            node.meta["val"] = value
        fields = threshold, block, None, None, None, group_size
        layers = [graph.call_function(ops.linear.default, (*nodes, *fields)) for _ in range(2)]
        for layer in layers:
            layer.meta["val"] = torch.empty(rows, 8, device="cuda")
        graph.output(tuple(layers))
        assert share(graph) == saved
    assert count_ops(graph).get("quantize_rowwise", 0) == saved


# ---- models ----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """q, k and v of one input, and a gated feed-forward: `share` and `fold` have something to do."""

    def __init__(self, K: int = 60) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(K, K, bias=i == 0) for i in range(3))
        self.gate, self.up, self.down = nn.Linear(K, 100), nn.Linear(K, 100, bias=False), nn.Linear(100, K)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + torch.tanh(self.q(x)) * self.k(x) + self.v(x)
        return x + self.down(nn.functional.relu(self.gate(x)) * self.up(x))


MODEL_SCHEMES = {
    "llm_int8": int8fx.llm_int8(),
    "columns": int8fx.llm_int8(columns=0.05),
    "rotated": int8fx.rotated(16, 0.0),
    "rotated columns": int8fx.rotated(16, 0.05),
    "weight_only": int8fx.weight_only(),
    "int4": int8fx.weight_only("int4_fullrange", 32, scale_dtype="float16", compute="int8"),
    "nf4": int8fx.weight_only("nf4", 16, double_quant=True),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "dtype"), [("rotated columns", torch.float32), *((name, torch.bfloat16) for name in MODEL_SCHEMES)]
)
def test_a_model_is_lowered_shared_folded_and_as_exact_as_on_the_cpu(scheme, dtype):
    torch.manual_seed(0)
    model = Block().to(dtype).eval()
    x = torch.randn(9, 5, 60, generator=generator(1))
    x[..., 7] *= 30
    x = x.to(dtype)
    exact = copy.deepcopy(model).float()(x.float())
    int8fx.convert(model, MODEL_SCHEMES[scheme], calibration=int8fx.calibrate(model, [x]))
    run, backend = compiled(model, lower, share, fold)
    with torch.no_grad():
        y = run(x)
        with interpreter.cpu_tensors_on(fallback):
            on_cpu = run(x)
    (graph,) = backend.after
    counts = count_ops(graph)
    assert counts["linear"] + counts.get("linear_quantized", 0) == 6
    assert "dequantize" not in counts
    assert (y - exact).norm() <= 1.05 * (on_cpu - exact).norm()
