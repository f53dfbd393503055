"""What `torch.nn.utils` does to float Parameters and must not do to packed weights: pruning and reparametrisations."""

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import models
from support.conversion import SCHEMES, packed_modules
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import int8fx


class Doubled(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w * 2


class Halved(Doubled):
    def right_inverse(self, w: Tensor) -> Tensor:
        return w / 2


FUNCTIONS: dict[str, Callable[[nn.Module, str], object]] = {
    "identity": prune.identity,
    "random_unstructured": lambda m, name: prune.random_unstructured(m, name, 0.5),
    "l1_unstructured": lambda m, name: prune.l1_unstructured(m, name, 0.5),
    "random_structured": lambda m, name: prune.random_structured(m, name, 0.5, dim=0),
    "ln_structured": lambda m, name: prune.ln_structured(m, name, 0.5, n=2, dim=0),
    "custom_from_mask": lambda m, name: prune.custom_from_mask(m, name, torch.ones(getattr(m, name).shape)),
    "global_unstructured": lambda m, name: prune.global_unstructured([(m, name)], prune.L1Unstructured, amount=0.5),
    "old weight_norm": weight_norm,
    "weight_norm": parametrizations.weight_norm,
    "old spectral_norm": spectral_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "parametrization": lambda m, name: parametrize.register_parametrization(m, name, Doubled()),
    "with an inverse": lambda m, name: parametrize.register_parametrization(m, name, Halved()),
    "unsafe": lambda m, name: parametrize.register_parametrization(m, name, Halved(), unsafe=True),
}
COPIES = {"itself": lambda m: m, "deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m))}

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")


def held(module: nn.Module) -> list:
    """Everything that ``module`` holds."""
    names = ("_parameters", "_buffers", "_modules", "_forward_pre_hooks", "_state_dict_hooks")
    return [type(module), *(dict(getattr(module, name)) for name in names)]


@given(st.sampled_from(sorted(FUNCTIONS)), st.sampled_from(sorted(SCHEMES)), st.sampled_from(sorted(COPIES)), st.data())
def test_a_packed_weight_is_refused_and_the_layer_is_unchanged(function, scheme, how, data):
    N, K = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 70))
    model = int8fx.convert(nn.Sequential(nn.Linear(K, K), nn.Linear(K, N)), SCHEMES[scheme], skip=["0"])
    model = COPIES[how](model)
    before, x = held(model[1]), torch.randn(3, K)
    y, state = model(x), {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(TypeError, match=r"int8fx: the weight '1' is packed.*skip=\['1'\]"):
        FUNCTIONS[function](model[1], "weight")
    after = held(model[1])
    assert all(a is b if isinstance(a, type) else a.keys() == b.keys() for a, b in zip(after, before, strict=True))
    assert all(a[k] is b[k] for a, b in zip(after[1:], before[1:], strict=True) for k in a)
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert torch.equal(model(x), y)
    FUNCTIONS[function](model[0], "weight")  # a float layer of the same model


@pytest.mark.parametrize("model", [models.gpt2, models.mixtral, models.transformer, models.bare_products])
def test_weights_of_every_kind_of_module_are_refused(model):
    model = int8fx.convert(model()[0])
    for module in packed_modules(model):
        for name in module.packed_weights:
            for function in ("l1_unstructured", "old weight_norm", "old spectral_norm", "weight_norm"):
                with pytest.raises(TypeError, match="is packed, and prune"):
                    FUNCTIONS[function](module, name)


def test_nothing_is_pruned_if_one_of_several_weights_is_packed():
    model = int8fx.convert(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), skip=["0"])
    with pytest.raises(TypeError, match="the weight '1' is packed"):
        prune.global_unstructured([(m, "weight") for m in model], prune.L1Unstructured, amount=0.5)
    assert not prune.is_pruned(model)


@pytest.mark.parametrize("name", ["weight_codes", "weight_scale", "weight_format"])
def test_the_tensors_of_a_packed_weight_take_no_parametrization(name):
    layer = int8fx.convert(nn.Linear(8, 8))
    with pytest.raises(TypeError, match="is packed, and prune"):
        parametrize.register_parametrization(layer, name, Doubled())
    assert not parametrize.is_parametrized(layer)


def test_queries_answer():
    layer = int8fx.convert(nn.Linear(8, 8))
    assert not parametrize.is_parametrized(layer, "weight")
    assert not prune.is_pruned(layer)
    assert not hasattr(layer, "parametrizations")
    assert parametrize.type_before_parametrizations(layer) is type(layer)
    with pytest.raises(KeyError):
        layer._parameters["other"]


@pytest.mark.slow
def test_weights_are_read_at_the_top_of_a_script():
    script = """
import torch, int8fx
layer = int8fx.convert(torch.nn.Linear(8, 8))
print(layer.weight.shape, layer.packed_weight("weight").shape, hasattr(layer, "parametrizations"))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.split("\n")[0] == "torch.Size([8, 8]) torch.Size([8, 8]) False"


@pytest.mark.parametrize("function", ["l1_unstructured", "parametrization", "with an inverse"])
def test_a_bias_is_pruned_and_parametrised_as_that_of_a_float_layer(function):
    torch.manual_seed(0)
    layer = nn.Linear(8, 8)
    packed, x = int8fx.convert(copy.deepcopy(layer)), torch.randn(3, 8)
    product = packed(x) - packed.bias
    for module in (layer, packed):
        FUNCTIONS[function](module, "bias")
    torch.testing.assert_close(packed(x), product + layer.bias)
    if function != "l1_unstructured":
        assert parametrize.is_parametrized(packed, "bias")
        parametrize.remove_parametrizations(packed, "bias")
        assert int8fx.is_packed(packed)
        torch.testing.assert_close(packed(x), product + layer.bias)


def test_a_weight_that_was_pruned_for_good_is_converted():
    layer = nn.Linear(64, 8)
    prune.l1_unstructured(layer, "weight", 0.5)
    prune.remove(layer, "weight")
    packed = int8fx.convert(copy.deepcopy(layer))
    assert int8fx.is_packed(packed)
    assert not packed.weight[layer.weight == 0].any()


# ---- a Parameter in place of a packed weight ------------------------------------------------------------------------


def swap(module: nn.Module, name: str, p: nn.Parameter) -> None:
    torch.utils.swap_tensors(getattr(module, name), p)


def swap_back(module: nn.Module, name: str, p: nn.Parameter) -> None:
    torch.utils.swap_tensors(p, getattr(module, name))


def set_item(module: nn.Module, name: str, p: nn.Parameter) -> None:
    module._parameters[name] = p


REPLACEMENTS = {"swap": swap, "swap back": swap_back, "item": set_item}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("replace", REPLACEMENTS)
def test_a_parameter_in_place_of_a_packed_weight_is_refused_by_name(replace, how):
    model = COPIES[how](int8fx.convert(nn.Sequential(nn.Linear(8, 6))))
    before, p, x = held(model[0]), nn.Parameter(torch.ones(6, 8)), torch.randn(3, 8)
    with torch.no_grad():
        y = model(x)
    with pytest.raises(TypeError, match=r"int8fx: the (packed )?weight '0'.* legal: a write into it"):
        REPLACEMENTS[replace](model[0], "weight", p)
    after = held(model[0])
    assert all(a is b if isinstance(a, type) else a.keys() == b.keys() for a, b in zip(after, before, strict=True))
    assert torch.equal(model(x), y)
    assert type(p) is nn.Parameter
    assert torch.equal(p, torch.ones(6, 8))
    product = y - model[0].bias.detach()
    REPLACEMENTS[replace](model[0], "bias", nn.Parameter(torch.ones(6)))
    torch.testing.assert_close(model(x), product + 1)
