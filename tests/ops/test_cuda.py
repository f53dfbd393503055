"""Whole paths on a GPU, where there is one: `test_triton_*.py` test the kernels without."""

import copy

import pytest
import torch
from int8fx.triton_kernels import configs
from int8fx.triton_kernels.int8_matmul import int8_matmul
from support import hardware
from support.helpers import packed_weight
from support.models import llama, mixtral
from torch import nn

import int8fx
from int8fx import ops
from int8fx.ops.gpu import EXACT_ROWS
from int8fx.schemes.quantize import NO_THRESHOLD

pytestmark = pytest.mark.skipif(not hardware.DEVICE, reason="INT8FX_TEST_DEVICE=cuda runs it on a GPU")

SCHEMES = {"llm_int8": int8fx.llm_int8(), "rotated": int8fx.rotated(), "weight_only": int8fx.llm_int8(threshold=0.0)}
ROWS = (1, 2, 16, 17, 64, 65, 200, 2048)


def relative(y, exact):
    return float((y.cpu().double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("make", [llama, mixtral])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_model_is_as_exact_as_on_the_cpu_eager_and_compiled(make, scheme):
    model, inputs = make(length=EXACT_ROWS)  # of two rows: the scheme's own kernels
    model = model.to(torch.bfloat16).eval()
    on_gpu = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    with torch.no_grad():
        exact = copy.deepcopy(model).float()(**inputs).logits.double()  # experts are not for float64
        plain = relative(copy.deepcopy(model).cuda()(**on_gpu).logits, exact)
        expected = relative(int8fx.convert(copy.deepcopy(model), SCHEMES[scheme])(**inputs).logits, exact)
        converted = int8fx.convert(model.cuda(), SCHEMES[scheme])
        eager = relative(converted(**on_gpu).logits, exact)
        compiled = relative(torch.compile(converted, fullgraph=make is llama)(**on_gpu).logits, exact)
    assert max(eager, compiled) < 2 * (expected + plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_rotated_rows_result_does_not_depend_on_its_batch(dtype):
    layer = nn.Linear(1024, 768, device="cuda", dtype=dtype)
    layer = int8fx.convert(nn.Sequential(layer).eval(), int8fx.rotated())
    x = torch.randn(max(ROWS), 1024, device="cuda", dtype=dtype)
    x[:, ::100] *= 20
    with torch.no_grad():
        y = layer(x)
        for M in ROWS:
            assert torch.equal(layer(x[:M]), y[:M]), M


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kept_columns_add_up_to_the_same_bits_in_every_tile(dtype):
    """Of 16 rows or of 64 and more, whose matrix instructions differ on Hopper; of values of very different sizes."""
    M, N, K, C = 16, 8192, 256, 82
    rows = {config[0]: config for config in configs.INT8_MATMUL[configs.target_of(torch.device("cuda", 0))]}
    x, kept = (torch.randn(n, device="cuda") * torch.exp(2 * torch.randn(n, device="cuda")) for n in (M * K, N * C))
    x, kept = x.to(dtype).view(1, M, K), kept.to(dtype).view(1, N, C)
    codes = torch.randint(-127, 128, (M, K), device="cuda", dtype=torch.int8)
    weight = torch.randint(-127, 128, (1, N, K), device="cuda", dtype=torch.int8)
    scales = torch.rand(M, device="cuda"), torch.rand(1, N, device="cuda")
    columns = torch.randperm(K, device="cuda")[:C]

    def product(row):
        config = configs.Config(*row)
        return int8_matmul(
            codes, scales[0], weight, scales[1], None, None, torch.float32, kept=(x, columns, kept), config=config
        )

    first, *others = (product(row) for row in rows.values())
    assert len(others) >= 1
    assert all(torch.equal(first, other) for other in others)


ALL_PATHS = [(M, rotated) for M in (1, 2, 33, 100, 300, 600) for rotated in (False, True)]
"""Small products of a long K, which is split; with the mask's zeros, gathered weights and kept columns, or without."""


def product_of(rotated):
    codes, scale = (t.cuda() for t in packed_weight(256, 4096))
    rotation = ()
    if rotated:
        columns = torch.arange(3, 4096, 101, device="cuda")
        rotation = ("none", None, "none", 64, columns, torch.randn(256, len(columns), device="cuda").bfloat16())
    return lambda x: ops.linear(x, codes, scale, None, NO_THRESHOLD if rotated else 6.0, *rotation)


@pytest.mark.parametrize(("M", "rotated"), ALL_PATHS)
def test_a_recorded_graph_computes_what_was_recorded(M, rotated):
    product = product_of(rotated)
    static = torch.zeros(M, 4096, device="cuda", dtype=torch.bfloat16)
    product(static)  # chooses a tile
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = product(static)
    for seed in range(3):
        torch.manual_seed(seed)
        x = torch.randn(M, 4096, device="cuda").bfloat16()
        x[:, seed :: 97 + seed] *= 10  # other outliers, and another number of them, than when it was recorded
        static.copy_(x)
        graph.replay()
        assert torch.equal(y, product(x))


@pytest.mark.parametrize(("M", "rotated"), ALL_PATHS)
def test_a_call_awaits_nothing(M, rotated):
    """No value comes back to the host between two launches."""
    product = product_of(rotated)
    x = torch.randn(M, 4096, device="cuda").bfloat16()
    product(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        product(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
