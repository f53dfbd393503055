"""`find_folds`: which producers are found in which modules, near misses, and that scales change no result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support import models
from support.helpers import generator, seeds
from torch import Tensor, nn

from int8fx.graph.producers import Folds, find_folds

C, H = 8, 12


class Net(nn.Module):
    """Parts, and how they make an output of x."""

    def __init__(self, run: Callable, **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.run = run

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def up(bias: bool = True) -> nn.Linear:
    return nn.Linear(C, H, bias=bias)


def down(bias: bool = True) -> nn.Linear:
    return nn.Linear(H, C, bias=bias)


def scale(size: int = C) -> nn.Parameter:
    return nn.Parameter(1 + torch.rand(size))


def heads(t: Tensor, count: int) -> Tensor:
    return t.view(*t.shape[:2], count, -1).transpose(1, 2)


def attention(m: Net, x: Tensor) -> Tensor:
    q, k, v = (heads(f(x), 2) for f in (m.q, m.k, m.v))
    return m.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def grouped_attention(m: Net, x: Tensor) -> Tensor:
    q, k, v = heads(m.q(x), 4), heads(m.k(x), 2), heads(m.v(x), 2)
    return m.o(F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2))


def eager_attention(m: Net, x: Tensor) -> Tensor:
    q, (k, v) = heads(m.q(x), 4), (heads(f(x), 2).repeat_interleave(2, 1) for f in (m.k, m.v))
    return m.o(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).reshape(*x.shape[:2], -1))


def fused_attention(m: Net, x: Tensor) -> Tensor:
    q, k, v = (heads(t, 2) for t in m.qkv(x).split(C, -1))
    return m.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def gated(m: Net, x: Tensor) -> Tensor:
    gate, value = m.a(x).chunk(2, -1)
    return m.b(F.silu(gate) * value)


def convolution(m: Net, x: Tensor) -> Tensor:
    return torch.addmm(m.c, torch.relu(torch.addmm(m.bias, x.flatten(0, 1), m.w)), m.v)


def qkvo(kv: int = C) -> dict[str, nn.Module]:
    return {"q": nn.Linear(C, C), "k": nn.Linear(C, kv), "v": nn.Linear(C, kv), "o": nn.Linear(C, C)}


FOLDED: dict[str, tuple[Callable[[], nn.Module], dict[str, set[str]]]] = {
    "layer norm": (lambda: Net(lambda m, x: m.a(m.n(x)), n=nn.LayerNorm(C), a=up()), {"n.weight": {"a.weight"}}),
    "layer norm without bias": (
        lambda: Net(lambda m, x: m.a(m.n(x)), n=nn.LayerNorm(C, bias=False), a=up()), {"n.weight": {"a.weight"}},
    ),
    "rms norm": (lambda: Net(lambda m, x: m.a(m.n(x)), n=nn.RMSNorm(C), a=up()), {"n.weight": {"a.weight"}}),
    "two consumers": (
        lambda: Net(lambda m, x: (y := m.n(x), m.a(y) + m.b(y))[1], n=nn.LayerNorm(C), a=up(), b=up()),
        {"n.weight": {"a.weight", "b.weight"}},
    ),
    "a vector times x": (lambda: Net(lambda m, x: m.a(m.s * x), s=scale(), a=up()), {"s": {"a.weight"}}),
    "x times a vector": (lambda: Net(lambda m, x: m.a(x * m.s), s=scale(), a=up()), {"s": {"a.weight"}}),
    "relu": (lambda: Net(lambda m, x: m.b(m.a(x).relu()), a=up(), b=down()), {"a.weight": {"b.weight"}}),
    "relu in place": (lambda: Net(lambda m, x: m.b(m.a(x).relu_()), a=up(), b=down()), {"a.weight": {"b.weight"}}),
    "no biases": (
        lambda: Net(lambda m, x: m.b(m.a(x)), a=up(bias=False), b=down(bias=False)), {"a.weight": {"b.weight"}},
    ),
    "dropout in eval mode": (
        lambda: Net(lambda m, x: m.b(m.d(m.a(x))), a=up(), d=nn.Dropout(0.5), b=down()), {"a.weight": {"b.weight"}},
    ),
    "a gate": (
        lambda: Net(lambda m, x: m.b(F.silu(m.g(x)) * m.a(x)), g=up(), a=up(), b=down()), {"a.weight": {"b.weight"}},
    ),
    "a gate in one matrix": (
        lambda: Net(gated, a=nn.Linear(C, 2 * H), b=down()), {"a.weight": {"b.weight"}},
    ),
    "two factors": (
        lambda: Net(lambda m, x: m.b(m.g(x).relu() * m.a(x)), g=up(), a=up(), b=down()),
        {"g.weight": {"b.weight"}, "a.weight": {"b.weight"}},
    ),
    "permuted channels": (
        lambda: Net(lambda m, x: m.b(m.a(x).view(2, 3, 4, 3).mT.flatten(2)), a=up(), b=down()),
        {"a.weight": {"b.weight"}},
    ),
    "some channels": (
        lambda: Net(lambda m, x: m.b(m.a(x)[..., :C]), a=up(), b=nn.Linear(C, C)), {"a.weight": {"b.weight"}},
    ),
    "repeated channels": (
        lambda: Net(lambda m, x: m.b(m.a(x).repeat(1, 1, 2)), a=up(), b=nn.Linear(2 * H, C)),
        {"a.weight": {"b.weight"}},
    ),
    "a cat with nothing": (
        lambda: Net(lambda m, x: m.b(torch.cat([x.new_empty(0), m.a(x)], -2)), a=up(), b=down()),
        {"a.weight": {"b.weight"}},
    ),
    "matrices [K, N]": (
        lambda: Net(
            convolution, bias=scale(H), w=nn.Parameter(torch.randn(C, H)), c=scale(), v=nn.Parameter(torch.randn(H, C))
        ),
        {"w": {"v"}},
    ),
    "attention": (lambda: Net(attention, **qkvo()), {"v.weight": {"o.weight"}}),
    "grouped attention": (lambda: Net(grouped_attention, **qkvo(4)), {"v.weight": {"o.weight"}}),
    "attention without the operator": (lambda: Net(eager_attention, **qkvo(4)), {"v.weight": {"o.weight"}}),
    "attention in one matrix": (
        lambda: Net(fused_attention, qkv=nn.Linear(C, 3 * C), o=nn.Linear(C, C)), {"qkv.weight": {"o.weight"}},
    ),
    "what else a channel reaches": (
        lambda: Net(lambda m, x: (y := m.a(x), m.b(y), y[..., :5].exp())[1:], a=up(), b=down()),
        {"a.weight": {"b.weight"}},
    ),
}  # fmt: skip


def tied(m: Net, x: Tensor) -> Tensor:
    return m.b(m.a(x)) + F.linear(m.a2(x), m.b.weight)


LEFT: dict[str, Callable[[], nn.Module]] = {
    "the residual reads the norm": lambda: Net(
        lambda m, x: (y := m.n(x), y + m.a(y))[1], n=nn.LayerNorm(C), a=nn.Linear(C, C)
    ),
    "gelu": lambda: Net(lambda m, x: m.b(F.gelu(m.a(x))), a=up(), b=down()),
    "silu": lambda: Net(lambda m, x: m.b(F.silu(m.a(x))), a=up(), b=down()),
    "sigmoid": lambda: Net(lambda m, x: m.b(m.a(x).sigmoid()), a=up(), b=down()),
    "softmax": lambda: Net(lambda m, x: m.b(m.a(x).softmax(-1)), a=up(), b=down()),
    "relu6": lambda: Net(lambda m, x: m.b(F.relu6(m.a(x))), a=up(), b=down()),
    "a square": lambda: Net(lambda m, x: (y := m.a(x), m.b(y * y))[1], a=up(), b=down()),
    "a value times its own gate": lambda: Net(lambda m, x: (y := m.a(x), m.b(y * y.sigmoid()))[1], a=up(), b=down()),
    "a consumer used twice": lambda: Net(tied, a=up(), a2=up(), b=down()),
    "a producer used twice": lambda: Net(lambda m, x: m.b(m.a(x)) + m.b2(m.a(-x)).exp(), a=up(), b=down(), b2=down()),
    "its bias used elsewhere": lambda: Net(lambda m, x: m.b(m.a(x)) * m.a.bias.sum(), a=up(), b=down()),
    "one plus weight": lambda: Net(lambda m, x: m.a((1 + m.s) * x), s=scale(), a=up()),
    "a norm without weight": lambda: Net(
        lambda m, x: m.a(m.n(x)), n=nn.LayerNorm(C, elementwise_affine=False), a=up()
    ),
    "an output": lambda: Net(lambda m, x: (y := m.n(x), m.a(y))[:], n=nn.LayerNorm(C), a=up()),
    "a sum over channels": lambda: Net(lambda m, x: m.b(m.a(x).mT @ x), a=nn.Linear(C, C), b=nn.Linear(C, C)),
    "channels that differ by token": lambda: Net(
        lambda m, x: m.b(m.a(x).view(2, 3, 4, 3).transpose(1, 2).reshape(2, 3, 12)), a=up(), b=down()
    ),
    "added to": lambda: Net(lambda m, x: (y := m.a(x), y.add_(1), m.b(y))[2], a=up(), b=down()),
    "added to in a view": lambda: Net(lambda m, x: (y := m.a(x), y.view(-1).add_(1), m.b(y))[2], a=up(), b=down()),
    "a cat with another value": lambda: Net(
        lambda m, x: m.b(torch.cat([m.a(x), x], -1)), a=nn.Linear(C, H - C), b=down()
    ),
    "cast to integers": lambda: Net(lambda m, x: m.b(m.a(x).int().to(x.dtype)), a=up(), b=down()),
    "a divisor": lambda: Net(lambda m, x: m.b(x.repeat(1, 1, 2)[..., :H] / m.a(x)), a=up(), b=down()),
    "queries that are values": lambda: Net(
        lambda m, x: m.b(F.scaled_dot_product_attention(*[heads(m.a(x), 2)] * 3).transpose(1, 2).flatten(2)),
        a=up(), b=down(),
    ),
    "dropout in training": lambda: Net(
        lambda m, x: m.b(F.dropout(m.a(x), 0.5, training=True)), a=up(), b=down()
    ),
}  # fmt: skip


def folds_of(model: nn.Module, args: tuple = (), kwargs: dict | None = None) -> Folds:
    with torch.no_grad():
        program = torch.export.export(model, args, kwargs, strict=False)
    return find_folds(program.graph, program.graph_signature.inputs_to_parameters)


def names(folds: Folds) -> dict[str, set[str]]:
    return {fold.name: {c.weight.parameter for c in fold.consumers} for fold in folds.folds}


@torch.no_grad()
def apply_scales(model: nn.Module, folds: Folds, seed: int) -> None:
    """Any positive scales, of free channels."""
    parameters, g = dict(model.named_parameters(remove_duplicate=False)), generator(seed)
    for fold in folds.folds:
        s = torch.where(fold.free, torch.exp(2 * torch.randn(len(fold.free), generator=g).double()), 1)
        factors = [(place, 1 / s) for place in fold.producer] + [(c.weight, s[c.channels]) for c in fold.consumers]
        for (name, dim), factor in factors:
            shape = [1] * parameters[name].dim()
            shape[dim] = -1
            parameters[name].mul_(factor.view(shape))


def small(make: Callable[[], nn.Module]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return make().double().eval(), torch.randn(2, 3, C, dtype=torch.float64)


@pytest.mark.parametrize("name", FOLDED)
def test_is_found(name):
    make, expected = FOLDED[name]
    model, x = small(make)
    folds = folds_of(model, (x,))
    assert names(folds) == expected
    assert all(fold.free.any() for fold in folds.folds)


@given(st.sampled_from(sorted(FOLDED)), seeds)
def test_scales_change_no_result(name, seed):
    model, x = small(FOLDED[name][0])
    folds = folds_of(model, (x,))
    before = [t.detach().clone() for t in torch.utils._pytree.tree_leaves(model(x))]
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    apply_scales(model, folds, seed)
    assert any(not torch.equal(p, weights[n]) for n, p in model.named_parameters())
    for y, expected in zip(torch.utils._pytree.tree_leaves(model(x)), before, strict=True):
        assert (y - expected).norm() <= 1e-9 * expected.norm()


@pytest.mark.parametrize("name", LEFT)
def test_near_misses_are_left(name):
    model, x = small(LEFT[name])
    folds = folds_of(model, (x,))
    assert names(folds) == {}
    linears = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert folds.reasons.keys() == linears


def test_reasons_name_the_producer_and_the_operator():
    shown = ("gelu", "one plus weight", "the residual reads the norm")
    reasons = {name: folds_of(*((m := small(LEFT[name]))[0], (m[1],))).reasons for name in shown}
    assert reasons["gelu"] == {
        "a.weight": "its input comes from the model's input x",
        "b.weight": "its input comes from gelu",
    }  # fmt: skip
    assert reasons["the residual reads the norm"] == {"a.weight": "n.weight scales its input, and that of add too"}
    assert reasons["one plus weight"] == {"a.weight": "its input comes from mul"}


def test_free_channels_are_those_that_reach_nothing_else():
    make = {name: FOLDED[name][0] for name in ("attention in one matrix", "a gate in one matrix", "some channels")}
    free = {name: folds_of(*((m := small(f))[0], (m[1],))).folds[0].free.nonzero().flatten().tolist()
            for name, f in make.items()}  # fmt: skip
    assert free == {
        "attention in one matrix": [*range(2 * C, 3 * C)],
        "a gate in one matrix": [*range(H, 2 * H)],
        "some channels": [*range(C)],
    }


def test_grouped_queries_read_a_channel_of_values_several_times():
    model, x = small(FOLDED["grouped attention"][0])
    (fold,) = folds_of(model, (x,)).folds
    assert fold.consumers[0].channels.tolist() == [0, 1, 0, 1, 2, 3, 2, 3]


@pytest.mark.parametrize("dims", [(0, 3, C), (2, 0, C)])
def test_no_rows_give_no_folds(dims):
    model, _ = small(FOLDED["relu"][0])
    assert folds_of(model, (torch.empty(dims, dtype=torch.float64),)).folds == []


def opt() -> tuple[nn.Module, dict]:
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=models.VOCAB, hidden_size=64, ffn_dim=136, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=64,
    )  # fmt: skip
    return OPTForCausalLM(config).eval(), {"input_ids": torch.arange(3, 17).view(2, 7), "use_cache": False}


MODELS: dict[str, tuple[Callable[[], Any], dict[str, str]]] = {
    "llama": (
        lambda: models.llama(num_hidden_layers=1),
        {"input_layernorm": "q_proj k_proj v_proj", "v_proj": "o_proj", "post_attention_layernorm": "gate_proj up_proj",
         "up_proj": "down_proj", "norm": "lm_head"},
    ),
    "gpt2": (lambda: models.gpt2(n_layer=1), {"ln_1": "c_attn", "c_attn": "c_proj", "ln_2": "c_fc"}),
    "opt": (
        opt, {"self_attn_layer_norm": "q_proj k_proj v_proj", "v_proj": "out_proj", "final_layer_norm": "fc1",
              "fc1": "fc2"},
    ),
    "bert": (lambda: models.bert(num_hidden_layers=1), {"value": "dense"}),
    "t5": (
        lambda: models.t5(num_layers=1, num_decoder_layers=0, feed_forward_proj="relu"),
        {"layer_norm": "wi", "v": "o", "wi": "wo"},  # the last of two norms,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_models_of_transformers(name):
    make, expected = MODELS[name]
    model, inputs = make()
    model.double()

    def last(name: str) -> str:
        return name.removesuffix(".weight").rpartition(".")[2]

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, **inputs: Any) -> Tensor:
            return self.model(**inputs)[0]

    wrapped = Logits().eval()
    folds = folds_of(wrapped, (), inputs)
    found = {last(fold.name): " ".join(last(c.weight.parameter) for c in fold.consumers) for fold in folds.folds}
    assert expected.items() <= found.items()
    assert found.keys() == expected.keys()
    y = wrapped(**inputs)
    apply_scales(wrapped, folds, 0)
    assert (wrapped(**inputs) - y).norm() <= 1e-9 * y.norm()
