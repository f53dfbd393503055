"""Conversion of exported programs: dynamic shapes, files, decompositions."""

import copy

import pytest
import torch
from support import models
from support.conversion import PROGRAMS, SCHEMES, converted_names, equal, exported, run, tensors
from support.helpers import activation
from support.models import mlp

import int8fx
from int8fx.graph.count import count_ops


@pytest.mark.parametrize("scheme", SCHEMES)
def test_dynamic_shapes(scheme):
    model, inputs = mlp()
    shapes = {"x": {0: torch.export.Dim("rows", min=1, max=64)}}
    program = torch.export.export(model, (), inputs, dynamic_shapes=shapes)
    int8fx.convert(program, SCHEMES[scheme])
    int8fx.convert(model, SCHEMES[scheme])
    assert count_ops(program.graph) == {"linear": 3}
    for rows in (1, 5, 33):
        x = activation(rows, 16, outliers="column", seed=rows)
        with torch.no_grad():
            expected = model.packed_linear(model.down(torch.relu(model.up(x))), "w")
        assert torch.equal(run(program, {"x": x}), expected)


@pytest.mark.parametrize("kind", ["exported", "decomposed"])
@pytest.mark.parametrize("scheme", ["llm_int8", "plain", "rotated columns"])
def test_save_and_load(scheme, kind, tmp_path):
    model, inputs = models.bare_products()
    program = PROGRAMS[kind](model, inputs)
    int8fx.convert(program, SCHEMES[scheme])
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2")
    assert equal(run(loaded, inputs), run(program, inputs))
    assert equal(tensors(loaded), tensors(program))
    assert all(t.dtype == tensors(program)[k].dtype for k, t in tensors(loaded).items())
    assert converted_names(loaded) == converted_names(program)
    assert int8fx.is_packed(loaded)
    with pytest.raises(ValueError, match="is already converted by int8fx"):
        int8fx.convert(loaded)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_converted_module_exported_to_a_file(scheme, tmp_path):
    """Its linear layers run in int8. A bare weight is dequantised until the program is compiled."""
    model, inputs = mlp()
    int8fx.convert(model, SCHEMES[scheme])
    torch.export.save(exported(model, inputs), tmp_path / "model.pt2")
    with torch.no_grad():
        expected = model.down(torch.relu(model.up(inputs["x"]))) @ model.dequantize("w")
    assert torch.equal(run(torch.export.load(tmp_path / "model.pt2"), inputs), expected)


def test_a_converted_program_can_be_decomposed_copied_and_unlifted():
    model, inputs = mlp()
    program = exported(model, inputs)
    int8fx.convert(program)
    y = run(program, inputs)
    for other in (program.run_decompositions(), copy.deepcopy(program), program.module()):
        assert torch.equal(run(other, inputs), y)
        assert int8fx.is_packed(other)
    assert count_ops(program.run_decompositions().graph) == {"linear": 3}
