"""Models and ops on a GPU. Without one, `test_gpu.py` and `tests/triton_kernels` run the kernels in the interpreter."""

import copy

import pytest
import torch
from int8fx.triton_kernels import tiles
from int8fx.triton_kernels.int8_matmul import int8_matmul
from int8fx.triton_kernels.tiles import Tile
from support import hardware
from support.helpers import packed_weight
from support.models import llama, mixtral
from torch import nn

import int8fx
from int8fx import ops
from int8fx.ops.rows import WEIGHT_ONLY_ROWS_GPU
from int8fx.schemes.weight import Int8Weight

pytestmark = pytest.mark.skipif(not hardware.DEVICE, reason="INT8FX_TEST_DEVICE=cuda runs it on a GPU")

SCHEMES = {"llm_int8": int8fx.llm_int8(), "rotated": int8fx.rotated(), "weight_only": int8fx.weight_only()}
ROWS = (1, 2, 16, 17, 64, 65, 200, 2048)


def relative_error(y, exact):
    return float((y.cpu().double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("make", [llama, mixtral])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_model_is_as_exact_as_on_the_cpu_eager_and_compiled(make, scheme):
    model, inputs = make(length=WEIGHT_ONLY_ROWS_GPU)  # two sequences: more rows than run weight-only
    model = model.to(torch.bfloat16).eval()
    on_gpu = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    with torch.no_grad():
        exact = copy.deepcopy(model).float()(**inputs).logits.double()  # transformers' experts do not run in float64
        bfloat16 = relative_error(copy.deepcopy(model).cuda()(**on_gpu).logits, exact)
        on_cpu = relative_error(int8fx.convert(copy.deepcopy(model), SCHEMES[scheme])(**inputs).logits, exact)
        converted = int8fx.convert(model.cuda(), SCHEMES[scheme])
        eager = relative_error(converted(**on_gpu).logits, exact)
        compiled = relative_error(torch.compile(converted, fullgraph=make is llama)(**on_gpu).logits, exact)
    assert max(eager, compiled) < 2 * (on_cpu + bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_rotated_row_has_the_same_bits_in_every_batch(dtype):
    layer = nn.Linear(1024, 768, device="cuda", dtype=dtype)
    layer = int8fx.convert(nn.Sequential(layer).eval(), int8fx.rotated())
    x = torch.randn(max(ROWS), 1024, device="cuda", dtype=dtype)
    x[:, ::100] *= 20
    with torch.no_grad():
        y = layer(x)
        for M in ROWS:
            assert torch.equal(layer(x[:M]), y[:M]), M


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_unquantised_columns_add_up_to_the_same_bits_in_every_tile(dtype):
    """Tiles of 16 rows and of 64 and more have different matrix instructions on Hopper; values differ much in size."""
    M, N, K, C = 16, 8192, 256, 82
    one_per_height = {row[0]: Tile(*row) for row in tiles.INT8_MATMUL[tiles.target_of(torch.device("cuda", 0))]}
    x, columns_weight = (
        torch.randn(n, device="cuda") * torch.exp(2 * torch.randn(n, device="cuda")) for n in (M * K, N * C)
    )
    x, columns_weight = x.to(dtype).view(1, M, K), columns_weight.to(dtype).view(1, N, C)
    codes = torch.randint(-127, 128, (M, K), device="cuda", dtype=torch.int8)
    weight = torch.randint(-127, 128, (1, N, K), device="cuda", dtype=torch.int8)
    x_scale, weight_scale = torch.rand(M, device="cuda"), torch.rand(1, N, device="cuda")
    unquantised = x, torch.randperm(K, device="cuda")[:C], columns_weight
    first, *others = (
        int8_matmul(codes, x_scale, weight, weight_scale, None, None, torch.float32, unquantised=unquantised, tile=tile)
        for tile in one_per_height.values()
    )
    assert len(others) >= 1
    assert all(torch.equal(first, other) for other in others)


ALL_PATHS = [(M, rotated) for M in (1, 2, 33, 100, 300, 600) for rotated in (False, True)]
"""Small layers of a long K, which is split; with the mask filled with zeros, gathered weights and columns, or not."""


def layer(rotated):
    weight = Int8Weight(*(t.cuda() for t in packed_weight(256, 4096)), threshold=6.0)
    if rotated:
        columns = torch.arange(3, 4096, 101, device="cuda")
        columns_weight = torch.randn(256, len(columns), device="cuda").bfloat16()
        weight = Int8Weight(weight.codes, weight.scale, None, 64, columns, columns_weight)
    return lambda x: ops.linear(x, *weight)


@pytest.mark.parametrize(("M", "rotated"), ALL_PATHS)
def test_a_recorded_graph_computes_what_was_recorded(M, rotated):
    linear = layer(rotated)
    static = torch.zeros(M, 4096, device="cuda", dtype=torch.bfloat16)
    linear(static)  # chooses a tile
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear(static)
    for seed in range(3):
        torch.manual_seed(seed)
        x = torch.randn(M, 4096, device="cuda").bfloat16()
        x[:, seed :: 97 + seed] *= 10  # other outliers, and another number of them, than when it was recorded
        static.copy_(x)
        graph.replay()
        assert torch.equal(y, linear(x))


@pytest.mark.parametrize(("M", "rotated"), ALL_PATHS)
def test_a_call_does_not_wait_for_the_gpu(M, rotated):
    """No value is copied to the host between two launches."""
    linear = layer(rotated)
    x = torch.randn(M, 4096, device="cuda").bfloat16()
    linear(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
