"""The ops on the Triton kernels: dispatch in the interpreter, and whole models on CUDA tensors that do not exist."""

import math
import re
from collections import Counter

import pytest
import torch
from hypothesis import Phase, given, settings
from int8fx.triton_kernels import configs, fused_linear, int8_matmul, outliers, quantize_rowwise, tuning, weight_only
from support import interpreter, models
from support.graphs import GraphBackend
from support.helpers import DTYPES, INF, assert_within_bound, assert_within_budget, problem, problems
from support.paper_gpu import triton_code
from test_ops import CASES, LIBRARY, SAMPLES, overload
from torch._subclasses import FakeTensorMode
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

import int8fx
from int8fx import ops
from int8fx.ops import gpu
from int8fx.ops.gpu import EXACT_ROWS
from int8fx.passes import count_ops, fold, lower, share
from int8fx.schemes import reference
from int8fx.schemes.quantize import NO_THRESHOLD


@pytest.fixture
def on_triton():
    with interpreter.cpu_tensors_on_triton():
        yield


# ---- dispatch --------------------------------------------------------------------------------------------------------


WITHOUT_ROTATION = {"linear": 8, "linear_quantized": 10, "quantize_rowwise": 2, "grouped_linear": 6, "dequantize": 99}
PLAIN = [case for case in CASES if len(case.values[1]) <= WITHOUT_ROTATION[case.values[0]]]


@pytest.mark.parametrize(("name", "args"), PLAIN)
def test_ops_on_triton_agree_with_the_reference(name, args, on_triton):
    args = tree_map_only(torch.Tensor, torch.Tensor.detach, args)
    found = overload(name)(*args)
    if name == "quantize_rowwise":
        x, threshold = args
        x = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
        mask = reference.outlier_mask(x, threshold)
        for a, b in zip(found, (*reference.quantize_rowwise(x, mask), mask), strict=True):
            assert torch.equal(a, b)
    elif name == "linear":
        x, weight, scale, bias, threshold, *rest = args
        if not rest:
            assert_within_bound(found, x, weight, scale, bias, threshold)
        exact = reference.linear(*args)
        assert (found.shape, found.dtype) == (exact.shape, exact.dtype)
        torch.testing.assert_close(found.double(), exact.double(), rtol=0, atol=2 * code_step(x, weight, scale, args))
    elif name == "linear_quantized":
        x, _, _, mask, weight, scale, bias, *epilogue = args
        threshold = 6.0 if mask.any() else INF
        assert_within_budget(found, x, weight, scale, bias, threshold, *epilogue)
    elif name == "grouped_linear":
        x, weight, scale, bias, offsets, threshold = args
        begin = 0
        for e, end in enumerate(offsets.tolist()):
            if end > begin:
                b = None if bias is None else bias[e]
                assert_within_bound(found[begin:end], x[begin:end], weight[e], scale[e], b, threshold)
            begin = end
        assert not found[begin:].any()


def code_step(x, weight, scale, args) -> float:
    """What two roundings of x to codes can make of an output, through an epilogue of slope below 1.13."""
    if not x.numel():
        return 0.0
    step = x.abs().double().clamp(max=args[4]).max().item() / 127 / 2
    other = args[6].abs().max().item() if len(args) > 6 and args[7] == "mul" else 1.0
    w = (weight.double().abs() * scale.double().unsqueeze(-1)).sum(-1).max().item()
    magnitude = reference.linear(*args).abs().max().item()
    return 1.13 * step * w * max(other, 1.0) + 4 * torch.finfo(x.dtype).eps * magnitude


@pytest.mark.parametrize("name", LIBRARY)
def test_opcheck_on_triton(name, on_triton):
    args = next(args for what, args in SAMPLES[name]() if "float16" in what)
    torch.library.opcheck(overload(name), args)


@settings(max_examples=10, phases=(Phase.explicit, Phase.generate))
@given(problems(batched=None))
def test_any_linear_on_triton_is_within_the_bound(p):
    y = gpu.linear(*p)
    if p.codes.dim() == 2:
        assert_within_bound(y, *p)
    else:
        for e in range(p.x.shape[0]):
            assert_within_bound(
                y[e], p.x[e], p.codes[e], p.scale[e], None if p.bias is None else p.bias[e], p.threshold
            )


def spied(monkeypatch, module, name):
    calls = []
    kernel = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args, **kwargs: calls.append(args) or kernel(*args, **kwargs))
    return calls


@pytest.mark.parametrize(
    ("M", "threshold", "dtype", "expected"),
    [
        (1, 6.0, torch.float16, [1, 0, 0, 0]),
        (2, 6.0, torch.bfloat16, [0, 0, 0, 1]),
        (32, INF, torch.bfloat16, [0, 0, 0, 1]),
        (33, 6.0, torch.bfloat16, [0, 1, 1, 0]),
        (33, INF, torch.bfloat16, [0, 1, 0, 0]),
        (1, 0.0, torch.float16, [0, 0, 0, 1]),
        (65, 0.0, torch.float16, [0, 0, 0, 1]),
        (2, 6.0, torch.float64, [0, 0, 0, 0]),
        (1, NO_THRESHOLD, torch.bfloat16, [1, 0, 0, 0]),
        (65, 1e300, torch.bfloat16, [0, 1, 0, 0]),
    ],
)
def test_the_table_of_kernels(M, threshold, dtype, expected, monkeypatch):
    kernels = [
        (fused_linear, "fused_linear"),
        (int8_matmul, "int8_matmul"),
        (outliers, "extract_outliers"),
        (weight_only, "weight_only"),
    ]
    calls = [spied(monkeypatch, *kernel) for kernel in kernels]
    p = problem(M, 32, 16, dtype=dtype, threshold=threshold)
    gpu.linear(*p)
    assert [len(c) for c in calls] == expected
    for c in calls:
        c.clear()
    gpu.grouped_linear(p.x, p.codes[None], p.scale[None], None, torch.tensor([M]), threshold)
    assert [len(c) for c in calls] == expected


@pytest.mark.parametrize("M", [1, 65])
def test_rotated_rows_are_quantised_and_multiplied_however_many_they_are(M, monkeypatch):
    modules = {"quantize_rowwise": quantize_rowwise, "int8_matmul": int8_matmul}
    modules |= {"outlier_mask": outliers, "extract_outliers": outliers, "fused_linear": fused_linear}
    calls = {name: spied(monkeypatch, module, name) for name, module in modules.items()}
    p = problem(M, 64, 16, dtype=torch.bfloat16, threshold=NO_THRESHOLD)
    gpu.linear(*p, "none", None, "none", 64, torch.tensor([3, 7]), torch.randn(16, 2).bfloat16())
    assert [name for name in calls for _ in calls[name]] == ["quantize_rowwise", "int8_matmul"]


def test_outliers_are_found_once_for_siblings(monkeypatch, on_triton):
    calls = spied(monkeypatch, outliers, "outlier_mask")
    p = problem(65, 32, 16)
    quantized = ops.quantize_rowwise(p.x, 6.0)
    for _ in range(3):
        ops.linear_quantized(p.x, *quantized, p.codes, p.scale, p.bias)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("device", "rows", "threshold", "rotation", "shared"),
    [
        ("cuda", EXACT_ROWS, 6.0, (), 0),  # nothing of x is quantised: see gpu.linear
        ("cuda", EXACT_ROWS + 1, 6.0, (), 1),
        ("cuda", EXACT_ROWS + 1, 0.0, (), 0),
        ("cuda", 1, NO_THRESHOLD, ("none", None, "none", 64), 1),
        ("cpu", 1, 6.0, (), 1),
    ],
)
def test_products_that_quantise_nothing_share_nothing(device, rows, threshold, rotation, shared):
    graph = torch.fx.Graph()
    with FakeTensorMode():
        x = torch.empty(rows, 64, device=device)
        weight = torch.empty(8, 64, dtype=torch.int8, device=device), torch.empty(8, device=device)
        nodes = [graph.placeholder(name) for name in ("x", "w", "scale")]
        for node, value in zip(nodes, (x, *weight), strict=True):
            node.meta["val"] = value
        products = [graph.call_function(ops.linear.default, (*nodes, None, threshold, *rotation)) for _ in range(2)]
        for product in products:
            product.meta["val"] = torch.empty(rows, 8, device=device)
        graph.output(tuple(products))
        assert share(graph) == shared
    assert count_ops(graph).get("quantize_rowwise", 0) == shared


# ---- tiles -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("M", [1, 16, 17, 64])
def test_a_tile_of_few_rows_holds_them_all(M, dtype):
    for N, K in ((4096, 4096), (1024, 4096), (28672, 8192), (8, 16)):
        for config in configs.weight_only(M, N, K, 1, dtype, "sm_90", 132):
            assert config.BLOCK_M >= M
            assert config.SPLIT_K == 1 or 4 * config.SPLIT_K * config.BLOCK_K <= K


def test_k_is_split_until_most_processors_work():
    device = (1, torch.float16, "sm_90", 132)
    shapes = ((4096, 4096), (8192, 8192), (28672, 8192), (1024, 4096))
    assert [configs.fused_linear(*shape, *device)[0].SPLIT_K for shape in shapes] == [2, 1, 1, 4]
    assert [configs.weight_only(16, *shape, *device)[0].SPLIT_K for shape in shapes] == [1, 1, 1, 4]
    assert [configs.weight_only(64, *shape, *device)[0].SPLIT_K for shape in shapes] == [2, 1, 1, 8]


def test_the_largest_tile_that_fills_the_device_comes_first():
    def tile(M, N):
        config = configs.int8_matmul(M, N, 4096, 1, torch.float16, False, "sm_90", 132)[0]
        return config.BLOCK_M, config.BLOCK_N, config.SPLIT_K

    assert (tile(2048, 8192), tile(2048, 4096), tile(512, 4096), tile(128, 4096), tile(17, 4096)) == (
        (128, 128, 1), (128, 128, 1), (64, 128, 1), (64, 64, 1), (64, 64, 2),
    )  # fmt: skip
    assert tile(17, 1024) == (64, 64, 8)


def test_a_tile_of_few_rows_is_for_few_rows():
    """Each row of tiles reads the whole weight: it never serves more rows, however many processors are idle."""
    for M, rows in ((1, 16), (16, 16), (17, 64), (128, 128), (2048, 128)):
        for N in (128, 4096, 28672):
            found = configs.int8_matmul(M, N, 4096, 1, torch.bfloat16, False, "sm_90", 132)
            assert all(c.BLOCK_M == 16 if rows == 16 else c.BLOCK_M >= 64 for c in found)
            assert N < 28672 or rows == found[0].BLOCK_M
            assert len(set(found)) == len(found)


def test_tiles_are_timed_once_and_never_while_a_graph_is_captured(monkeypatch, tmp_path):
    candidates = tuple(configs.Config(16, 16, 32, warps, 2) for warps in (1, 2, 4))
    timed = []
    capturing = True
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuning, "_fastest", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(tuning, "_time", lambda run: timed.append(run()) or abs(timed[-1] - 2))

    def choose():
        return tuning.fastest("kernel", (1, 2, 3), candidates, lambda config: config.num_warps)

    assert choose() is candidates[0]
    assert timed == []
    capturing = False
    assert choose() is choose() is candidates[1]
    monkeypatch.setattr(tuning, "_fastest", {})  # another process
    assert choose() is candidates[1]
    assert timed == [1, 2, 4]
    assert tuning.fastest("kernel", (1,), candidates[:1], None) is candidates[0]


# ---- CUDA tensors without CUDA ---------------------------------------------------------------------------------------


def on_cuda(t):
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")


@pytest.mark.parametrize(("name", "args"), CASES)
def test_fakes_on_cuda(name, args):
    with FakeTensorMode():
        args = tree_map_only(torch.Tensor, lambda t: on_cuda(t), args)
        result = overload(name)(*args)
        for y in (result,) if isinstance(result, torch.Tensor) else result:
            assert y.device.type == "cuda"


class WithoutDeviceGuards(TorchFunctionMode):
    """``x[...]`` and ``x.contiguous()`` by operators: the methods want the device's guard, which is not built in."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.contiguous:
            return torch.clone(args[0], memory_format=torch.contiguous_format)
        if func is not torch.Tensor.__getitem__:
            return func(*args, **(kwargs or {}))
        x, index = args
        index = index if isinstance(index, tuple) else (index,)
        given = sum(i is not None and i is not Ellipsis for i in index)
        at = 0
        for i in index:
            if i is Ellipsis:
                at += x.dim() - at - (given - sum(j is not None for j in index[: index.index(Ellipsis)]))
            elif i is None:
                x, at = x.unsqueeze(at), at + 1
            elif isinstance(i, slice):
                x, at = torch.ops.aten.slice.Tensor(x, at, i.start, i.stop, i.step or 1), at + 1
            elif isinstance(i, torch.Tensor):
                x, at = torch.ops.aten.index.Tensor(x, [*[None] * at, i]), at + i.dim()
            else:
                x = x.select(at, i)
        return x


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (models.llama, {"quantize_rowwise": 4, "linear_quantized": 10, "linear": 4}),
        (models.mixtral, {"quantize_rowwise": 2, "linear_quantized": 6, "linear": 2, "grouped_linear": 4}),
    ],
)
def test_a_converted_model_is_a_graph_of_int8fx_ops_on_cuda(make, expected):
    """Traced, lowered, shared and folded on CUDA tensors that do not exist; nothing is left on the CPU.

    Then Inductor writes its Triton code for an H100 that is not there: the int8fx ops are called between its kernels.
    Not for experts: the code of their sort asks the driver what it can do.
    """
    model, inputs = make(length=EXACT_ROWS)  # of two rows
    model = int8fx.convert(model.half())
    backend = GraphBackend([lower, share, fold])
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        state = {name: on_cuda(t) for name, t in state.items()}
        ids = on_cuda(inputs["input_ids"])
        length = ids.shape[1]
        mask = torch.zeros(1, 1, length, length, dtype=torch.float16, device="cuda")  # in the form attention takes
        run = backend.without_dynamo(lambda s, *args: functional_call(model, s, args, {"use_cache": False}).logits)
        with WithoutDeviceGuards():
            y = run(state, ids, mask)
        assert y.device.type == "cuda"
    (graph,) = backend.after
    assert count_ops(graph) == expected
    values = [node.meta["val"] for node in graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    assert {value.device.type for value in values if value.dim()} == {"cuda"}
    if make is models.mixtral:
        return
    code = triton_code(graph, mode)
    compile(code, "generated", "exec")
    calls = Counter(re.findall(r"torch\.ops\.int8fx\.(\w+)\.default\(", code))
    assert calls == expected
    assert code.count("@triton.jit") > 0
    assert "aten.mm" not in code
