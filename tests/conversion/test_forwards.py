"""What packed attention, convolutions and experts compute."""

import copy

import pytest
import torch
from support import models
from support.conversion import (
    EVERYTHING,
    SCHEMES,
    as_reference,
    assert_as_good_as_the_reference,
    close,
    codes_of,
    converted_names,
    dequantised_twin,
    dequantized_in,
    no_fast_path,
    outputs,
    reasons,
)
from support.helpers import activation, assert_within_budget, generator
from torch import Tensor, nn

import int8fx
from int8fx.conversion.packed import PackedModule
from int8fx.schemes.quantize import quantize_weight
from int8fx.schemes.weight import COLUMNS, Epilogue

# ---- attention ------------------------------------------------------------------------------------------------------

ATTENTION = {
    "self": {},
    "batch_first": {"batch_first": True},
    "no bias": {"bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero attn": {"add_zero_attn": True},
    "kdim and vdim": {"kdim": 24, "vdim": 20},
    "all": {"kdim": 24, "vdim": 20, "add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("unbatched", [False, True])
@pytest.mark.parametrize("settings", ATTENTION)
def test_multihead_attention(settings, unbatched, training):
    """It computes torch's own function with int8 weights, and dequantises none."""
    settings = ATTENTION[settings]
    attention = nn.MultiheadAttention(32, 4, **settings).train(training)
    nn.init.normal_(attention.in_proj_bias) if attention.in_proj_bias is not None else None
    L, S, B = 5, 7, 3
    g = generator(0)

    def randn(length: int, size: int) -> Tensor:
        shape = (length, size) if unbatched else (B, length, size) if attention.batch_first else (length, B, size)
        return torch.randn(shape, generator=g)

    query, key, value = randn(L, 32), randn(S, settings.get("kdim", 32)), randn(S, settings.get("vdim", 32))
    padding = torch.zeros(S, dtype=torch.bool) if unbatched else torch.zeros(B, S, dtype=torch.bool)
    padding[..., -2:] = True
    causal = torch.ones(L, S, dtype=torch.bool).triu(1)
    additive = torch.randn((4, L, S) if unbatched else (B * 4, L, S), generator=g)
    calls = [
        {}, {"need_weights": False}, {"key_padding_mask": padding}, {"attn_mask": causal},
        {"attn_mask": causal, "is_causal": True, "need_weights": False}, {"attn_mask": additive},
        {"average_attn_weights": False}, {"key_padding_mask": padding.float() * -1e9, "attn_mask": additive},
    ]  # fmt: skip
    fill = dequantised_twin(attention)
    int8fx.convert(attention, int8fx.weight_only())
    names = {"q_proj_weight", "k_proj_weight", "v_proj_weight"} if "kdim" in settings else {"in_proj_weight"}
    assert converted_names(attention) == names | {"out_proj"}
    assert isinstance(attention, nn.MultiheadAttention)
    twin = fill(attention)
    triples = [(query, key, value)]
    triples += [] if "kdim" in settings else [(query, query, query), (query, key, key)]
    for q, k, v in triples:
        for call in calls:
            if k is q:
                call = {n: t[..., :L] if n in ("attn_mask", "key_padding_mask") else t for n, t in call.items()}
            with torch.no_grad(), no_fast_path():
                (y, weights), (z, expected) = attention(q, k, v, **call), twin(q, k, v, **call)
            assert close(y, z)
            assert (weights is None) == (expected is None)
            assert weights is None or close(weights, expected)
    assert dequantized_in(lambda: attention(query, key, value)) == 0


def test_multihead_attention_converted_in_part():
    attention = nn.MultiheadAttention(32, 4, kdim=24, vdim=20).eval()
    fill = dequantised_twin(attention)
    int8fx.convert(attention, int8fx.weight_only(), select="k_proj_weight")
    assert converted_names(attention) == {"k_proj_weight"}
    q, k, v = torch.randn(5, 2, 32), torch.randn(7, 2, 24), torch.randn(7, 2, 20)
    assert close(attention(q, k, v)[0], fill(attention)(q, k, v)[0])
    attention = nn.MultiheadAttention(32, 4, batch_first=True).eval()
    fill = dequantised_twin(attention)
    int8fx.convert(attention, int8fx.weight_only(), select="out_proj")
    x = torch.randn(2, 5, 32)
    with torch.no_grad():  # the fast path of attention that is not converted
        assert close(attention(x, x, x, need_weights=False)[0], fill(attention)(x, x, x, need_weights=False)[0])


def test_attention_keeps_the_outlier_columns_of_its_inputs():
    torch.manual_seed(0)
    attention, x = nn.MultiheadAttention(60, 4, batch_first=True).eval(), torch.randn(2, 6, 60)
    x[..., 7] *= 30
    y_float = attention(x, x, x)[0]
    calibration = int8fx.calibrate(attention, [(x, x, x)])
    assert set(calibration.absmax) == {"in_proj_weight", "out_proj"}
    int8fx.convert(attention, SCHEMES["rotated columns"], calibration=calibration)
    assert 7 in attention._buffers["in_proj_weight" + COLUMNS]
    assert (attention(x, x, x)[0] - y_float).norm() < 0.02 * y_float.norm()


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("select", [None, "layers.1.linear1"])
def test_transformer_encoder_in_eval_with_padding(norm_first, batch_first, activation, select):
    """The fast path with nested tensors, which float models take here, takes float weights only."""
    settings = {"batch_first": batch_first, "norm_first": norm_first, "activation": activation}
    layer = nn.TransformerEncoderLayer(32, 4, 48, **settings, dtype=torch.float64)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first and batch_first).eval()
    src = torch.randn((3, 6, 32) if batch_first else (6, 3, 32), generator=generator(0), dtype=torch.float64)
    padding = torch.zeros(3, 6, dtype=torch.bool)
    padding[0, 4:] = padding[1, 5:] = True
    fill = dequantised_twin(encoder)
    int8fx.convert(encoder, int8fx.weight_only(), select=select)
    assert len(converted_names(encoder)) == (8 if select is None else 1)
    twin = fill(encoder)
    for grad in (False, True):
        for call in (
            {},
            {"src_key_padding_mask": padding},
            {"mask": nn.Transformer.generate_square_subsequent_mask(6, dtype=torch.float64)},
        ):
            with torch.set_grad_enabled(grad):
                y = encoder(src, **call).detach()
                z = twin(src, **call).detach()  # by the fast path, if there is no grad and batch_first
            real = ~padding if "src_key_padding_mask" in call else torch.ones_like(padding)
            real = real if batch_first else real.t()
            assert y.shape == z.shape
            assert close(y[real], z[real])


def test_an_encoder_whose_layer_is_converted_alone_says_what_it_cannot_do():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, batch_first=True), 2).eval()
    src, padding = torch.randn(2, 5, 32), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    y_float = outputs(encoder, {"src": src})["y"]
    int8fx.convert(encoder.layers[0])
    y = outputs(encoder, {"src": src})["y"]
    assert 0 < (y - y_float).norm() < 0.1 * y_float.norm()
    with torch.no_grad(), pytest.raises(ValueError, match=r"convert the nn\.TransformerEncoder with its layers"):
        encoder(src, src_key_padding_mask=padding)


# ---- convolutions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("unbatched", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_1x1_convolutions_on_request(dims, stride, unbatched, bias):
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    conv = kind(40, 24, 1, stride=stride, bias=bias)
    x = activation(2 * 5**dims, 40, outliers="column").reshape(2, *[5] * dims, 40).movedim(-1, 1)
    x = (x[0] if unbatched else x).contiguous()
    y, weight = conv(x), conv.weight.detach()
    model = nn.Sequential(conv, nn.Flatten())
    with pytest.warns(UserWarning, match="no layer was converted"):
        int8fx.convert(model)
    assert reasons(model) == {"0": "a 1x1 convolution: converted if selected"}
    int8fx.convert(model, select="0")
    assert isinstance(conv, kind)
    assert conv.weight.shape == weight.shape
    assert torch.equal(codes_of(conv)[0], quantize_weight(weight.flatten(1))[0])
    z = conv(x).detach()
    assert z.shape == y.shape
    assert z.stride() == y.stride()  # later code may view it
    rows = x.movedim(-dims - 1, -1)[(..., *[slice(None, None, stride)] * dims, slice(None))]
    epilogue = Epilogue(None if conv.bias is None else conv.bias.detach())
    assert_within_budget(z.movedim(-dims - 1, -1), rows, conv.packed(), epilogue)


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_1x1_convolutions_with_padding_by_name(padding):
    conv = nn.Conv2d(8, 4, 1, padding=padding)
    x = torch.randn(2, 8, 3, 3)
    y = conv(x)
    int8fx.convert(conv, **EVERYTHING)
    assert isinstance(conv, PackedModule)
    assert conv(x).shape == y.shape


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, (1, 3)), nn.Conv2d(8, 8, 1, groups=2), nn.Conv2d(8, 8, 1, padding=1),
        nn.Conv1d(8, 8, 2), nn.Conv3d(8, 8, 1, padding=(0, 0, 1)),
        nn.Conv1d(8, 8, 1, padding=1, padding_mode="circular"),
    ],
)  # fmt: skip
def test_other_convolutions_are_left(conv):
    model = nn.Sequential(copy.deepcopy(conv), nn.Linear(8, 8))
    int8fx.convert(model, **EVERYTHING)
    assert converted_names(model) == {"1"}
    assert reasons(model)["0"] == "a convolution; only 1x1 convolutions without groups or padding are matmuls"


# ---- experts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_experts_give_the_same_whatever_implementation_is_set(name, implementation):
    model, inputs = models.ALL[name](experts_implementation=implementation)
    y_float, twin = outputs(model, inputs), copy.deepcopy(model)
    int8fx.convert(model)
    twin = as_reference(twin, model)
    assert_as_good_as_the_reference(outputs(model, inputs), outputs(twin, inputs), y_float)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_experts_alone_within_the_budget_of_their_products(name, scheme):
    model, _ = models.ALL[name]()
    experts = model.model.layers[0].mlp.experts
    int8fx.convert(model, SCHEMES[scheme], select="experts")
    weight = experts.packed("gate_up_proj")
    assert (*weight.codes.shape[:2], weight.K) == (4, 144, 64)
    hidden = activation(9, 64, outliers="column")
    products = []
    experts._apply_gate = lambda y, gate=experts._apply_gate: products.append(y) or gate(y)
    index = torch.randint(0, 4, (9, 2), generator=generator(1))
    experts(hidden, index, torch.rand(9, 2, generator=generator(2)))
    ids, order = index.flatten().sort(stable=True)
    for e in range(4):
        rows = hidden[order[ids == e] // 2]
        bias = experts.gate_up_proj_bias[e].detach() if experts.has_bias else None
        assert_within_budget(products[0][ids == e].detach(), rows, weight.of_expert(e), Epilogue(bias))


def test_experts_that_see_no_token_and_experts_of_another_rank():
    model, _ = models.mixtral()
    experts = model.model.layers[0].mlp.experts
    hidden, weights = torch.randn(3, 64), torch.rand(3, 2)
    index = torch.tensor([[0, 0], [0, 4], [4, 4]])  # 4: the id of experts that live elsewhere

    def routed(experts: nn.Module, index: Tensor) -> dict[str, Tensor]:
        return outputs(experts, {"hidden_states": hidden, "top_k_index": index, "top_k_weights": weights})

    weights_here = weights * (index < 4)
    here = index.clamp_max(3)
    twin = copy.deepcopy(experts)
    y_float = outputs(twin, {"hidden_states": hidden, "top_k_index": here, "top_k_weights": weights_here})
    int8fx.convert(experts)
    y = routed(experts, index)
    with torch.no_grad():
        r = {"y": as_reference(twin, experts)(hidden, here, weights_here)}
    assert_as_good_as_the_reference(y, r, y_float)
    assert torch.equal(y["y"][2], torch.zeros(64))
    assert experts(hidden[:0], index[:0], weights[:0]).shape == (0, 64)
