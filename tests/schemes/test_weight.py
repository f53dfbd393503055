"""The types of a packed weight and an epilogue: their fields by expert and by buffer name."""

import pytest
import torch
from support.samples import make_bias, make_other, make_weight, overload

from int8fx.schemes.weight import NO_EPILOGUE, SUFFIXES, Epilogue, Int8Weight, PackedTensors


def test_fields_have_the_order_and_the_defaults_of_the_ops_arguments():
    expected = [("weight", None), ("weight_scale", None), ("threshold", None), ("block", 1)]
    expected += [("columns", None), ("columns_weight", None), ("format", None), ("group_size", None)]
    expected += [("in_features", None), ("zero_point", None), ("scale_range", None)]
    expected += [("bias", None), ("activation", "none"), ("other", None), ("binary", "none")]
    arguments = [(a.name, a.default_value) for a in overload("linear")._schema.arguments[1:]]
    assert arguments == expected
    defaults = {**Int8Weight._field_defaults, **Epilogue._field_defaults}
    renamed = {"codes": "weight", "scale": "weight_scale"}
    fields = (*Int8Weight._fields, *Epilogue._fields)
    assert [(renamed.get(name, name), defaults.get(name)) for name in fields] == expected
    assert Epilogue() == NO_EPILOGUE


@pytest.mark.parametrize("columns", [False, True])
def test_the_weight_of_an_expert(columns):
    weight = make_weight(experts=3, block=8, columns=columns)
    for e in range(3):
        expert = weight.of_expert(e)
        assert torch.equal(expert.codes, weight.codes[e])
        assert torch.equal(expert.scale, weight.scale[e])
        assert (expert.threshold, expert.block) == (None, 8)
        assert expert.columns is weight.columns
        if columns:
            assert torch.equal(expert.columns_weight, weight.columns_weight[e])
        else:
            assert expert.columns_weight is None


def test_the_epilogue_of_an_expert():
    epilogue = Epilogue(make_bias(3, 7), "gelu", make_other(3, 5), "mul")
    expert = epilogue.of_expert(1)
    assert torch.equal(expert.bias, epilogue.bias[1])
    assert torch.equal(expert.other, epilogue.other[1])
    assert (expert.activation, expert.binary) == ("gelu", "mul")
    assert Epilogue(activation="relu").of_expert(2) == Epilogue(activation="relu")


@pytest.mark.parametrize("columns", [False, True])
def test_tensors_are_read_back_by_name(columns):
    weight = make_weight(columns=columns)
    packed = PackedTensors(weight.codes, weight.scale, weight.columns, weight.columns_weight)
    named = packed.named("in_proj")
    assert list(named) == ["in_proj" + suffix for suffix in (SUFFIXES[:4] if columns else SUFFIXES[:2])]
    others = {"bias": make_bias(7), "in_proj_other": make_bias(7)}
    again = PackedTensors.of({**others, **named}, "in_proj")
    assert all(a is b for a, b in zip(again, packed, strict=True))
