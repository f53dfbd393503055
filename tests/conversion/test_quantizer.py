"""`Quantizer` and `Columns`: the tensors of a packed weight, and which columns of a weight are not quantised."""

import pytest
import torch
from support.helpers import generator
from torch import Tensor, nn

import int8fx
from int8fx.conversion.layers import walk
from int8fx.conversion.quantizer import Columns, Quantizer
from int8fx.schemes.calibration import Calibration
from int8fx.schemes.weight import COLUMNS

K = 60
TWO = int8fx.rotated(columns=2 / K)


def linears(*outputs: int) -> nn.Sequential:
    model = nn.Sequential(*(nn.Linear(K, n, bias=False) for n in outputs))
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(torch.randn(p.shape, generator=generator(i)))
    return model


def columns_of(module: nn.Module, name: str = "weight") -> list[int]:
    return module._buffers[name + COLUMNS].tolist()


def largest(size: Tensor, count: int = 2) -> list[int]:
    return size.topk(count).indices.sort().values.tolist()


def test_layers_without_data_keep_the_columns_of_largest_weight():
    layer = nn.Linear(K, 24)
    with torch.no_grad():
        layer.weight[:, [3, 50]] *= 9
    int8fx.convert(layer, TWO, calibration=Calibration())
    assert columns_of(layer) == [3, 50]


@pytest.mark.parametrize("scheme", [TWO, int8fx.weight_only("int4_clip", 16, rounding="gptq")])
@pytest.mark.parametrize("width", [K - 16, K + 16])
def test_statistics_of_another_width_are_refused_by_name(scheme, width):
    model = linears(24)
    other = nn.Sequential(nn.Linear(width, 24))
    calibration = int8fx.calibrate(other, [torch.randn(90, width, generator=generator(0))], moments=True)
    what = "absmax" if scheme is TWO else "moments"
    with pytest.raises(ValueError, match=rf"int8fx\.convert: .*calibration's {what} of layer '0': shape .*legal: "):
        int8fx.convert(model, scheme, calibration=calibration)
    assert not int8fx.is_packed(model)


def test_layers_with_data_keep_the_columns_of_largest_inputs():
    model, x = linears(24), torch.randn(9, K, generator=generator(0))
    x[4, [7, 41]] = 30
    int8fx.convert(model, TWO, calibration=int8fx.calibrate(model, [x]))
    assert columns_of(model[0]) == [7, 41]


class Block(nn.Module):
    """Four readers of x, one of another width."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(K, K) for _ in range(3))
        self.w, self.down = nn.Parameter(torch.randn(K, 20)), nn.Linear(20, K)

    def forward(self, x: Tensor) -> Tensor:
        return self.down((self.q(x) + self.k(x) + self.v(x)) @ self.w)


def test_without_data_the_weights_of_a_module_keep_the_same_columns():
    """So that products of one x share its quantisation; other widths and other modules choose for themselves."""
    model = nn.Sequential(Block(), nn.Linear(K, 8))
    block = model[0]
    with torch.no_grad():
        block.q.weight[:, 11] *= 99
        block.v.weight[:, 40] *= 99
        model[1].weight[:, 3] *= 9
    size = sum(getattr(block, n).weight.square().sum(0) for n in "qkv") + block.w.square().sum(1)
    int8fx.convert(model, TWO)
    columns = block.q._buffers["weight" + COLUMNS]
    assert columns.tolist() == largest(size) == [11, 40]
    assert columns is block.k._buffers["weight" + COLUMNS] is block.v._buffers["weight" + COLUMNS]
    assert columns is block._buffers["w" + COLUMNS]
    assert len(columns_of(block.down)) == 1
    assert 3 in columns_of(model[1])


def test_a_layer_with_data_does_not_count_for_the_others():
    model = linears(24, 24, 24)
    calibration = Calibration(absmax={"0": torch.arange(K).float()})
    norms = sum(model[i].weight.detach().square().sum(0) for i in (1, 2))
    int8fx.convert(model, TWO, calibration=calibration)
    assert columns_of(model[0]) == [K - 2, K - 1]
    assert columns_of(model[1]) == columns_of(model[2]) == largest(norms)


def test_tied_layers_in_two_modules_are_measured_before_they_are_packed():
    model = nn.ModuleDict({"a": linears(24, 24), "b": linears(24, 24)})
    model["b"][0].weight = model["a"][0].weight
    norms = {n: sum(layer.weight.detach().square().sum(0) for layer in model[n]) for n in "ab"}
    int8fx.convert(model, TWO)
    assert columns_of(model["a"][0]) == columns_of(model["a"][1]) == columns_of(model["b"][0]) == largest(norms["a"])
    assert columns_of(model["b"][1]) == largest(norms["b"])


def test_norms_are_computed_once_for_all_schemes(monkeypatch):
    from int8fx.conversion import quantizer as module

    calls, squares = [], module._squares
    monkeypatch.setattr(module, "_squares", lambda layer: calls.append(layer.name) or squares(layer))
    model = linears(24, 24)
    layers = list(walk(model))
    columns = Columns(None, layers)
    quantizers = [Quantizer(int8fx.rotated(columns=share), columns=columns) for share in (0.0, 0.1, 0.2)]
    assert calls == []  # a constructor does no work
    tensors = [[quantize([layer]) for layer in layers] for quantize in quantizers]
    assert calls == ["0", "1"]
    assert [t.columns is None for t, _ in tensors] == [True, False, False]
    assert all(a.columns is b.columns for a, b in tensors)
    monkeypatch.setattr(module, "_squares", lambda layer: pytest.fail("nothing needs it"))
    int8fx.convert(linears(24), int8fx.llm_int8())


def test_gptq_needs_the_moments_of_every_layer():
    model, scheme = linears(24, 24), int8fx.rotated(rounding="gptq")
    with pytest.raises(ValueError, match=r"rotated\(rounding='gptq'\) needs moments of the inputs of layer '1'; legal"):
        Quantizer(scheme, Calibration(moments={"0": torch.eye(K)})).check(walk(model))
    Quantizer({"0": scheme, "1": int8fx.plain()}, Calibration(moments={"0": torch.eye(K)})).check(walk(model))
