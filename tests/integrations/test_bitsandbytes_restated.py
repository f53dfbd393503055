"""bitsandbytes' tests of int8, in our words and on our API, with its shapes and tolerances.

docs/bitsandbytes.md has the table: their test, ours, outcome. Those of them that other files have are not here:
`opcheck` is in tests/ops/test_ops.py, state dicts of `Linear8bitLt` in test_foreign.py, equal codes and scales in
tests/schemes/test_bitsandbytes.py. A threshold of 0.0 is `plain()` here, as `int8fx.convert` translates it.
"""

import copy
import io
import pickle

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import hardware
from support.conversion import COPIES, copied
from support.helpers import generator
from support.models import tied_lm
from torch import Tensor, nn

import int8fx
from int8fx import ops

SCHEMES = {0.0: int8fx.plain(), 2.0: int8fx.llm_int8(2.0), 3.0: int8fx.llm_int8(3.0), 6.0: int8fx.llm_int8()}
HALVES = (torch.float16, torch.bfloat16)
DTYPES = (*HALVES, torch.float32)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=generator(seed)).to(dtype)


def float_linear(K: int, N: int, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    """The same at each call, with the distribution that `nn.Linear` has."""
    layer, g = nn.Linear(K, N, bias=bias, dtype=dtype), generator(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_((2 * torch.rand(parameter.shape, generator=g) - 1) / K**0.5)
    return layer


def int8_linear(K: int, N: int, threshold: float = 6.0, bias: bool = True, dtype: torch.dtype = torch.float32):
    return int8fx.convert(float_linear(K, N, bias, dtype), SCHEMES[threshold])


def share_outside(y: Tensor, expected: Tensor, atol: float, rtol: float) -> float:
    return 1 - torch.isclose(y.float(), expected.float(), atol=atol, rtol=rtol).float().mean().item()


# ---- products --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lead", [(128,), (128, 256), (1,), (0,), (2, 0), (5, 1, 3, 2)], ids=str)
@pytest.mark.parametrize("K", [499, 512])
def test_products_of_integers_are_exact(lead, K):
    """`int8_linear_matmul`. A row with a 127 has the scale 1, so that x and the weight are their codes."""
    layer, g = float_linear(K, 512, bias=False), generator(3)
    x = torch.randint(-127, 128, (*lead, K), generator=g).float()
    weight = torch.randint(-127, 128, (512, K), generator=g).float()
    x[..., 0], weight[:, 0] = 127, -127
    layer.load_state_dict({"weight": weight})
    y = int8fx.convert(layer, int8fx.plain())(x)
    assert torch.equal(y, x @ weight.T)  # exact in float32 as well: sums stay below 2**24


def test_sums_above_2_24_are_exact():
    """Where bitsandbytes has no int8 matmul, it multiplies in float32, which rounds such sums."""
    K = 2049
    layer = nn.Linear(K, 3, bias=False, dtype=torch.float64)
    nn.init.constant_(layer.weight, 127)
    x = torch.full((8, K), 127.0, dtype=torch.float64)
    assert K * 127**2 > 2**24
    assert (int8fx.convert(layer, int8fx.plain())(x) == K * 127**2).all()


def test_a_product_of_32_by_32_by_32_in_half_precision():
    layer, x = float_linear(32, 32, bias=False, dtype=torch.float16), randn(32, 32, dtype=torch.float16)
    expected = layer(x).detach()
    y = int8fx.convert(layer, int8fx.plain())(x)
    assert y.dtype == torch.float16
    assert share_outside(y, expected, atol=0.025, rtol=0.05) < 0.01


@pytest.mark.parametrize("M", [64, 256])
@pytest.mark.parametrize("N", [64, 1024])
@pytest.mark.parametrize("bias", [False, True])
def test_dequantised_products(M, N, bias):
    layer, x = float_linear(128, N, bias, torch.float16), randn(M, 128, dtype=torch.float16)
    expected = layer(x).detach()
    y = int8fx.convert(layer, int8fx.plain())(x)
    assert share_outside(y, expected, atol=0.015, rtol=0.1) <= 0.01


@pytest.mark.parametrize("shape", [(1, 2, 4), (8, 128, 256), (256, 512, 128)], ids=str)
def test_quantise_multiply_dequantise(shape):
    """Scales are the absmax, codes within 1, and the layer adds no error to that of the codes."""
    M, K, N = shape
    layer, x = float_linear(K, N, bias=False), randn(M, K)
    weight = layer.weight.detach().clone()
    int8fx.convert(layer, int8fx.plain())
    codes, scale, _ = ops.quantize_rowwise(x)
    for values, c, s in ((x, codes, scale), (weight, layer.weight_codes, layer.weight_scale)):
        assert torch.equal(s, values.abs().amax(1) / 127)
        assert (c - values.double() / s[:, None]).abs().max() <= 0.5 + 1e-4
    exact = x.double() @ weight.double().T
    by_codes = (codes.double() @ layer.weight_codes.double().T) * scale[:, None] * layer.weight_scale
    assert (layer(x) - exact).abs().mean() <= 1.025 * (by_codes - exact).abs().mean()


@pytest.mark.parametrize("threshold", [2.0, 3.0])
@pytest.mark.parametrize("shape", [(512, 1024), (2048, 1024), (512, 4096)], ids=str)
def test_columns_from_the_threshold_on_are_left_out(threshold, shape):
    """`int8_vectorwise_quant`. A value that equals the threshold counts; one just below does not."""
    x = randn(*shape, dtype=torch.float16).clamp(-1.9, 1.9)
    x[7, 3], x[8, 5], x[9, 11] = threshold, -threshold, threshold - 2**-9
    x[::50, 17] = threshold + 1
    codes, scale, mask = ops.quantize_rowwise(x, threshold)
    assert mask.nonzero().flatten().tolist() == [3, 5, 17]
    kept = torch.where(mask, 0, x)
    torch.testing.assert_close(codes * scale[:, None], kept.float(), rtol=0.05, atol=1.5e-2)
    assert not codes[:, mask].any()


# ---- the layer against the float layer -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("M", [0, 1, 64])
def test_outputs_and_gradients(M, bias, threshold, dtype):
    """`test_matmullt`: some columns hold exactly 6.0, which is an outlier."""
    K, N = 32, 48
    layer = float_linear(K, N, bias, dtype)
    x = randn(M, K, dtype=dtype)
    if threshold:
        x[:, torch.randperm(K, generator=generator(4))[: K // 8]] = 6.0
    twin, x_twin = copy.deepcopy(layer), x.clone().requires_grad_()
    int8fx.convert(layer, SCHEMES[threshold])
    x.requires_grad_()
    y, expected = layer(x), twin(x_twin)
    assert y.dtype == dtype
    assert y.shape == expected.shape
    g = randn(M, N, seed=5, dtype=dtype)
    y.backward(g)
    expected.backward(g)
    assert x.grad.shape == x.shape
    if bias:
        torch.testing.assert_close(layer.bias.grad, twin.bias.grad)
    if M:
        assert share_outside(y, expected, atol=0.01, rtol=0.1) <= (0.0175 if dtype == torch.float16 else 0.021)
        assert share_outside(y, expected, atol=0.035, rtol=0.2) <= 0.001
        torch.testing.assert_close(x.grad, x_twin.grad, atol=0.015, rtol=0.1)


@pytest.mark.parametrize("rows", [1, 3, 32])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [6.0, 60.0])
def test_outliers_add_no_error_of_their_own(size, dtype, rows):
    """No test of theirs has outliers above 6.0, in one row, or in float32 and bfloat16."""
    layer, x = float_linear(256, 128, dtype=dtype), randn(rows, 256).clamp(-3, 3)
    calm = int8_linear(256, 128, dtype=dtype)
    exact = copy.deepcopy(layer).double()
    int8fx.convert(layer, int8fx.llm_int8())

    def error(x: Tensor) -> float:
        x = x.to(dtype)
        return (layer(x).double() - exact(x.double())).norm().item() / exact(x.double()).norm().item()

    without = error(x)
    x[:, [3, 77]] = torch.tensor([size, -size])
    assert error(x) < 2 * without
    assert torch.equal(layer.weight_codes, calm.weight_codes)
    x[:, [3, 77]] = 5.9  # no outliers: int8 all through
    assert error(x) < 4 * without


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_outliers_is_what_no_threshold_is(dtype):
    x = randn(40, 64, dtype=dtype).clamp(-5, 5)
    assert torch.equal(int8_linear(64, 48, 6.0, dtype=dtype)(x), int8_linear(64, 48, 0.0, dtype=dtype)(x))
    x[3, 9] = 6.0
    assert not torch.equal(int8_linear(64, 48, 6.0, dtype=dtype)(x), int8_linear(64, 48, 0.0, dtype=dtype)(x))


@pytest.mark.parametrize("M", [3, 32])
def test_a_wide_layer_in_half_precision(M):
    """`test_linear_no_igemmlt`: 1024 -> 3072 at threshold 6."""
    layer, x = float_linear(1024, 3072, dtype=torch.float16), randn(M, 1024, dtype=torch.float16)
    twin, x_twin = copy.deepcopy(layer), x.clone().requires_grad_()
    int8fx.convert(layer)
    x.requires_grad_()
    y, expected = layer(x), twin(x_twin)
    g = randn(M, 3072, seed=6, dtype=torch.float16) / 64
    y.backward(g)
    expected.backward(g)
    assert share_outside(y, expected, atol=0.02, rtol=0) < 2.5e-4
    torch.testing.assert_close(y, expected, atol=0.03, rtol=1e-5)
    torch.testing.assert_close(x.grad, x_twin.grad, atol=0.01, rtol=1e-5)
    assert layer.weight_codes.grad is None


@pytest.mark.parametrize("threshold", [0.0, 3.0])
def test_a_hundred_calls(threshold):
    layer, x = int8_linear(32, 64, threshold), randn(16, 8, 32)
    state, first = copy.deepcopy(layer.state_dict()), layer(x)
    for _ in range(100):
        assert torch.equal(layer(x), first)
    assert all(torch.equal(layer.state_dict()[key], tensor) for key, tensor in state.items())


@pytest.mark.parametrize("threshold", [0.0, 2.0])
@pytest.mark.parametrize("cast", ["before", "after"])
@pytest.mark.parametrize("training", [False, True])
def test_a_network_without_float_weights(threshold, cast, training):
    """A layer that trains multiplies in int8 too, which bitsandbytes' does not on the CPU."""
    model = nn.Sequential(float_linear(32, 64), float_linear(64, 32))
    twin, x = copy.deepcopy(model), randn(16, 8, 32)
    if cast == "before":
        model.half()
    int8fx.convert(model, SCHEMES[threshold]).train(training)
    model.half()
    assert [layer.weight_codes.dtype for layer in model] == [torch.int8] * 2
    assert [layer.weight_scale.dtype for layer in model] == [torch.float32] * 2
    half, x = x.half().requires_grad_(), x.requires_grad_()
    y, expected = model(half), twin(x)
    assert y.dtype == torch.float16
    assert (y - expected).norm() < 0.02 * expected.norm()
    g = randn(16, 8, 32, seed=7)
    y.backward(g.half())
    expected.backward(g)
    scale = x.grad.abs().mean().item()
    torch.testing.assert_close(half.grad.float(), x.grad, rtol=0, atol=0.05 * scale)
    assert share_outside(half.grad, x.grad, atol=0.01 * scale, rtol=0.1) <= 0.005
    assert torch.equal(model.train(not training)(half), y)
    with torch.no_grad():
        assert torch.equal(model(half), y)


@pytest.mark.parametrize("dtype", HALVES)
def test_gradients_of_the_layer_before(dtype):
    """`test_kbit_backprop`: 36 -> 84 in floats, 84 -> 128 in int8, 100 times."""
    model = nn.Sequential(float_linear(36, 84), float_linear(84, 128)).to(dtype)
    twin = copy.deepcopy(model)
    int8fx.convert(model, select="1")
    for seed in range(100):
        x = randn(32, 36, seed=seed, dtype=dtype)
        for network in (model, twin):
            network.zero_grad()
            network(x).square().mean().backward()
        for ours, theirs in zip(model[0].parameters(), twin[0].parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, atol=0.015, rtol=0.05)
            assert ours.grad.norm() > 0
    assert model[1].bias.grad.norm() > 0
    assert not model[1].weight.requires_grad


# ---- what a layer takes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_a_bias_in_float32_stays(dtype, threshold):
    """bitsandbytes casts the layer's own bias to the dtype of x."""
    layer = float_linear(32, 48)
    bias = layer.bias.detach().clone()
    twin = int8_linear(32, 48, threshold, bias=False, dtype=dtype)
    int8fx.convert(layer, SCHEMES[threshold])
    x = randn(16, 32, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert layer.bias.dtype == torch.float32
    assert torch.equal(layer.bias, bias)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y.float(), twin(x).float() + bias, rtol=eps, atol=16 * eps)


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_values_above_those_of_float16(threshold):
    """bitsandbytes casts x to float16: at threshold 0 the result has no finite values."""
    x = randn(16, 64, dtype=torch.bfloat16)
    x[:, 5] = 1e5
    layer = float_linear(64, 48, dtype=torch.bfloat16)
    expected = layer(x).float()
    theirs = bnb.nn.Linear8bitLt(64, 48, has_fp16_weights=False, threshold=threshold)
    theirs.load_state_dict(layer.state_dict())
    assert theirs.to("cpu").eval()(x).isfinite().all() == (threshold > 0)
    y = int8fx.convert(layer, SCHEMES[threshold])(x)
    assert (y - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("lead", [(), (1,), (0, 3), (2, 3, 4), (2, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_any_number_of_dimensions(lead, threshold):
    """bitsandbytes takes two and three."""
    layer, x = int8_linear(32, 48, threshold), randn(*lead, 32)
    y = layer(x)
    assert y.shape == (*lead, 48)
    assert torch.equal(y.reshape(-1, 48), layer(x.reshape(-1, 32)))


# ---- saving, copying, moving -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("file", ["torch.save", "safetensors"])
@pytest.mark.parametrize("into", ["same device", "meta"])
def test_saving_and_loading(threshold, ran, file, into, tmp_path):
    """`test_linear_serialization`: 32 -> 96. bitsandbytes refuses to load before a move to a device."""
    layer, x = int8_linear(32, 96, threshold), randn(16, 32)
    x[:, 4] = 7.0
    if ran:
        layer(x)
    path, float_path = tmp_path / "int8", tmp_path / "float"
    torch.save(float_linear(32, 96).state_dict(), float_path)
    if file == "torch.save":
        torch.save(layer.state_dict(), path)
        state = torch.load(path)
    else:
        save_file(layer.state_dict(), path)
        state = load_file(path)
    assert layer.weight_codes.nbytes + layer.weight_scale.nbytes < 0.5 * 32 * 96 * 4
    assert path.stat().st_size < 0.5 * float_path.stat().st_size
    with torch.device("meta" if into == "meta" else "cpu"):
        other = nn.Linear(32, 96)
    int8fx.convert(other, SCHEMES[threshold])
    other.load_state_dict(state, assign=into == "meta")
    xs = [x.clone().requires_grad_() for _ in range(2)]
    for module, leaf in zip((layer, other), xs, strict=True):
        module(leaf).square().sum().backward()
    assert torch.equal(other(x), layer(x))
    assert torch.equal(xs[0].grad, xs[1].grad)
    assert torch.equal(layer.bias.grad, other.bias.grad)


@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("how", ["copy", *COPIES])
def test_copies_of_a_layer(threshold, ran, how):
    layer, x = int8_linear(32, 96, threshold), randn(16, 32)
    if ran:
        layer(x)
    other = copy.copy(layer) if how == "copy" else copied(layer, how)
    assert torch.equal(other(x), layer(x))
    for name in ("weight_codes", "weight_scale", "bias"):
        ours, theirs = getattr(layer, name), getattr(other, name)
        assert torch.equal(ours, theirs)
        assert (ours.data_ptr() == theirs.data_ptr()) == (how == "copy")


@pytest.mark.parametrize("how", COPIES)
def test_copies_of_a_weight_alone(how):
    """`Int8Params` keeps its codes. `module.weight` is a view: a copy of it is the float weight."""
    layer = int8_linear(32, 96)
    weight = copied(layer.weight, how)
    assert weight.dtype == torch.float32
    assert torch.equal(weight.detach(), layer.dequantize())


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_shared_weights(threshold):
    """bitsandbytes raises at the load of a layer whose weight is another's. Here ties stay ties, and are checked."""
    model = nn.Sequential(float_linear(32, 32), nn.ReLU(), float_linear(32, 32))
    model[2].weight = model[0].weight
    int8fx.convert(model, SCHEMES[threshold])
    assert model[0].weight_codes is model[2].weight_codes
    x, state = randn(8, 32), model.state_dict()
    assert {"0.weight_codes", "2.weight_codes", "0.weight_scale", "2.weight_scale"} <= state.keys()
    assert state["0.weight_codes"].data_ptr() == state["2.weight_codes"].data_ptr()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight.mul_(2)
    assert not torch.equal(other(x), model(x))
    other.load_state_dict(pickle.loads(pickle.dumps(state)))
    assert torch.equal(other(x), model(x))
    assert other[0].weight_codes is other[2].weight_codes
    state = {key: tensor.clone() for key, tensor in state.items()}
    state["2.weight_codes"][0, 0] ^= 1
    with pytest.raises((RuntimeError, ValueError), match="weight"):
        other.load_state_dict(state)
    assert torch.equal(other(x), model(x))


def test_a_layer_with_float_weights_trains_before_it_is_converted_and_not_afterwards():
    """``has_fp16_weights=True`` is an `nn.Linear` here, converted after training."""
    layer, x = float_linear(32, 48), randn(8, 32)
    optimiser = torch.optim.SGD(layer.parameters(), 0.1)
    layer(x).square().mean().backward()
    optimiser.step()
    trained = layer.weight.detach().clone()
    int8fx.convert(layer)
    assert (layer.dequantize() - trained).abs().max() <= trained.abs().max() / 254 * 1.001
    with pytest.raises(TypeError, match="adapters"):
        layer.weight.requires_grad_()
    codes = layer.weight_codes.clone()
    optimiser = torch.optim.SGD(layer.parameters(), 0.1)
    bias = layer.bias.detach().clone()
    layer(x).square().mean().backward()
    optimiser.step()
    assert torch.equal(layer.weight_codes, codes)
    assert not torch.equal(layer.bias, bias)


@pytest.mark.skipif(not hardware.DEVICE, reason="INT8FX_TEST_DEVICE=cuda runs it on a GPU")
@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_to_a_device_and_back(threshold):
    layer, x = int8_linear(32, 128, threshold), randn(16, 32)
    y = layer(x)
    there = layer.to(hardware.DEVICE)(x.to(hardware.DEVICE))
    assert (there.cpu() - y).norm() < 0.02 * y.norm()
    assert torch.equal(layer.to("cpu")(x), y)


# ---- embeddings ------------------------------------------------------------------------------------------------------


def test_embeddings_of_plus_and_minus_one_are_exact_and_are_saved():
    """`Embedding8bit`: here an embedding becomes int8 with the output layer it is tied to. Theirs cannot be saved."""
    model, inputs = tied_lm()
    with torch.no_grad():
        model.embed.weight.copy_(randn(*model.embed.weight.shape).sign())
    expected = model.embed(inputs["ids"]).detach().clone()
    int8fx.convert(model, select=["*"])
    assert torch.equal(model.embed(inputs["ids"]), expected)
    other = int8fx.convert(tied_lm(seed=1)[0], select=["*"])
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    assert torch.equal(other.embed(inputs["ids"]), expected)
    assert torch.equal(other(**inputs), model(**inputs))


def test_the_error_of_an_embedding():
    model, inputs = tied_lm()
    expected = model.embed(inputs["ids"]).detach().clone()
    int8fx.convert(model, select=["*"])
    error = (model.embed(inputs["ids"]) - expected).abs()
    assert (error <= expected.abs().amax(-1, keepdim=True) / 254 * 1.001).all()
    assert error.max() > 0


# ---- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias_dtype", [None, torch.float32, torch.float16])
@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("mode", [None, pytest.param("reduce-overhead", marks=pytest.mark.slow)])
def test_one_graph_without_an_eager_call_first(mode, threshold, bias_dtype):
    """Four layers of 256, 16 rows. Theirs needs an eager call first if the bias is float32, and has gradients only at
    threshold 0."""
    torch._dynamo.reset()
    device = hardware.DEVICE or "cpu"
    model = nn.Sequential(*(float_linear(256, 256, bias_dtype is not None, torch.float16) for _ in range(4)))
    for layer in model if bias_dtype else ():
        layer.bias.data = layer.bias.data.to(bias_dtype)
    model = int8fx.convert(model.to(device), SCHEMES[threshold])
    x = randn(16, 256, dtype=torch.float16).to(device)
    x[:, 7] = 8.0
    leaf, eager_leaf = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = torch.compile(model, fullgraph=True, mode=mode)(leaf)
    y.sum().backward()
    expected = model(eager_leaf)
    expected.sum().backward()
    torch.testing.assert_close(y, expected, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(leaf.grad, eager_leaf.grad, rtol=1e-3, atol=1e-3)
    assert leaf.grad.norm() > 0
