"""What torch does to a converted GraphModule."""

import copy

import pytest
import torch
from support.conversion import (
    COPIES,
    GRAPH_MODULES,
    PROGRAMS,
    SCHEMES,
    converted_names,
    copied,
    equal,
    run,
    saved,
)
from support.models import mlp
from torch import Tensor, nn
from torch.fx import GraphModule

import int8fx
from int8fx.schemes.weight import COLUMNS, COLUMNS_WEIGHT, SCALE


def converted(kind: str, scheme: str = "llm_int8", negated: bool = False) -> tuple[GraphModule, dict]:
    model, inputs = mlp()
    if negated:
        for p in model.parameters():
            p.data.mul_(-1)
    return int8fx.convert(PROGRAMS[kind](model, inputs), SCHEMES[scheme]), inputs


def packed_tensors(program: nn.Module) -> dict[str, Tensor]:
    """Copies of what is stored of packed weights."""
    suffixes = (SCALE, COLUMNS, COLUMNS_WEIGHT)
    buffers = program.named_buffers(remove_duplicate=False)
    return {n: t.clone() for n, t in buffers if t.dtype == torch.int8 or n.endswith(suffixes)}


@pytest.mark.parametrize(
    ("kind", "how"), [(kind, how) for kind in GRAPH_MODULES for how in COPIES if kind != "unlifted" or how == COPIES[0]]
)  # torch cannot pickle a module that export made
@pytest.mark.parametrize("scheme", ["llm_int8", "rotated columns"])
def test_copies_and_what_they_are_cast_to(kind, how, scheme):
    program, inputs = converted(kind, scheme)
    y, expected = run(program, inputs), packed_tensors(program)
    other = copied(program, how)
    assert torch.equal(run(other, inputs), y)
    assert converted_names(other) == converted_names(program)
    assert int8fx.is_packed(other)
    for model in (copied(other, how), other, program):
        model.half()
        packed = packed_tensors(model)
        assert all(t.dtype == expected[n].dtype and torch.equal(t, expected[n]) for n, t in packed.items())
        if how == "deepcopy" or scheme == "llm_int8":  # torch pickles a graph with one name for columns that are tied
            assert packed.keys() == expected.keys()
        z = run(model, {"x": inputs["x"].half()})
        assert z.dtype == torch.float16
        assert (z.float() - y).norm() < 0.01 * y.norm()
        with pytest.raises(ValueError, match="already converted"):
            int8fx.convert(model)


@pytest.mark.parametrize("kind", GRAPH_MODULES)
@pytest.mark.parametrize("cast", ["bfloat16", "double", "share_memory", "meta", "type"])
@pytest.mark.parametrize("scheme", ["llm_int8", "rotated columns"])
def test_casts_leave_packed_tensors(kind, cast, scheme):
    program, inputs = converted(kind, scheme)
    y, expected = run(program, inputs), packed_tensors(program)
    if cast == "meta":
        state = {n: t.clone() for n, t in program.state_dict().items()}
        program.to("meta")
        assert {t.device.type for t in program.buffers()} == {"meta"}
        program.to_empty(device="cpu")
        program.load_state_dict(state)
        assert equal(packed_tensors(program), expected)
        assert torch.equal(run(program, inputs), y)
        return
    program.type(torch.float64) if cast == "type" else getattr(program, cast)()
    assert equal(packed_tensors(program), expected)
    assert all(t.dtype == expected[n].dtype for n, t in packed_tensors(program).items())
    dtype = {"bfloat16": torch.bfloat16, "share_memory": torch.float32}.get(cast, torch.float64)
    z = run(program, {"x": inputs["x"].to(dtype)})
    assert z.dtype == dtype
    assert (z.double() - y.double()).norm() < 0.05 * y.double().norm()


@pytest.mark.parametrize("kind", GRAPH_MODULES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_state_dicts(kind, scheme):
    program, inputs = converted(kind, scheme)
    y, state = run(program, inputs), {n: t.clone() for n, t in program.state_dict().items()}
    for assign in (False, True):
        other, _ = converted(kind, scheme, negated=True)
        assert not torch.equal(run(other, inputs), y)
        other.load_state_dict(saved(state), assign=assign)
        assert torch.equal(run(other, inputs), y)


@pytest.mark.parametrize("kind", GRAPH_MODULES)
@pytest.mark.parametrize("strict", [True, False])
def test_float_state_dicts_are_refused(kind, strict):
    model, inputs = mlp()
    floats = PROGRAMS[kind](model, inputs).state_dict()
    floats = {n: -t for n, t in floats.items()}
    program, _ = converted(kind)
    state = {n: t.clone() for n, t in program.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"is packed and takes int8 codes, found torch\.float32"):
        program.load_state_dict(floats, strict=strict)
    assert equal(program.state_dict(), state)


class Siblings(nn.Module):
    """Two readers of x at two depths, a third layer after them."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v, self.layer = nn.Parameter(torch.randn(20, 20)), nn.Parameter(torch.randn(20, 20)), nn.Module()
        self.layer.w = nn.Parameter(torch.randn(20, 30))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.w + x @ self.v) @ self.layer.w


def siblings(kind: str) -> tuple[GraphModule, dict, list[str]]:
    """A converted graph of `Siblings`, and the names of columns that are one tensor in it."""
    inputs = {"x": torch.randn(9, 20)}
    program = int8fx.convert(PROGRAMS[kind](Siblings(), inputs), int8fx.rotated(columns=0.2))
    buffers = {n: t for n, t in program.named_buffers(remove_duplicate=False) if n.endswith(COLUMNS)}
    tied = [n for n, t in buffers.items() if sum(t is other for other in buffers.values()) > 1]
    return program, inputs, tied


@pytest.mark.parametrize("kind", GRAPH_MODULES)
def test_tied_columns_share_no_memory_in_a_state_dict(kind, tmp_path):
    from safetensors.torch import load_file, save_file

    program, inputs, tied = siblings(kind)
    assert len(tied) == (3 if kind == "make_fx" and len(tied) == 3 else 2)
    for model, prefix in ((program, ""), (nn.ModuleDict({"inner": program}), "inner.")):
        state = model.state_dict()
        assert len({state[prefix + name].data_ptr() for name in tied}) == len(tied)
        assert all(torch.equal(state[prefix + name], program.get_buffer(name)) for name in tied)
    save_file(program.state_dict(), tmp_path / "state.safetensors")
    y = run(program, inputs)
    program.load_state_dict(load_file(tmp_path / "state.safetensors"))
    assert torch.equal(run(program, inputs), y)
    assert len({id(program.get_buffer(name)) for name in tied}) == 1  # equal columns stay tied
    other = {**state, prefix + tied[0]: (state[prefix + tied[0]] + 1) % 20}
    model.load_state_dict(other)
    assert torch.equal(program.get_buffer(tied[0]), other[prefix + tied[0]])
    assert torch.equal(program.get_buffer(tied[1]), state[prefix + tied[1]])


WRONG_COLUMNS = {
    "beyond K": (lambda c: c + 20, r"column 2\d is out of range; legal: different columns, from 0 to 19"),
    "negative": (lambda c: c - 20, r"column -\d+ is out of range; legal: different columns, from 0 to 19"),
    "twice": (lambda c: c[:1].expand(len(c)), r"column \d+ is there twice; legal: different columns, from 0 to 19"),
    "floats": (lambda c: c.float(), r"takes the numbers of columns as torch\.int64, found torch\.float32"),
    "int32": (lambda c: c.int(), r"takes the numbers of columns as torch\.int64, found torch\.int32"),
}


@pytest.mark.parametrize("kind", GRAPH_MODULES)
@pytest.mark.parametrize("what", WRONG_COLUMNS)
@pytest.mark.parametrize("assign", [False, True])
def test_wrong_columns_are_refused_by_name_and_the_graph_is_left(kind, what, assign):
    wrong, message = WRONG_COLUMNS[what]
    for copy_of in (lambda p: p, copy.deepcopy):
        program, inputs, tied = siblings(kind)
        program = copy_of(program)
        name = tied[-1]
        y, state = run(program, inputs), {n: t.clone() for n, t in program.state_dict().items()}
        unfit = {n: -t if t.is_floating_point() else t for n, t in state.items()} | {name: wrong(state[name])}
        with pytest.raises(RuntimeError, match=f'"{name}"?:? {message}'):
            program.load_state_dict(unfit, assign=assign)
        assert equal(program.state_dict(), state)
        assert torch.equal(run(program, inputs), y)


@pytest.mark.parametrize("kind", GRAPH_MODULES)
def test_the_graph_module_itself_stays(kind):
    model, inputs = mlp()
    program = PROGRAMS[kind](model, inputs)
    cls, graph = type(program), program.graph
    bases = cls.__mro__[1:]
    program.note = "a note"
    assert int8fx.convert(program) is program
    assert program.graph is graph
    assert program.note == "a note"
    assert all(isinstance(program, base) for base in bases)
    assert type(program).__name__ == cls.__name__
    program.graph.lint()
    assert "int8fx.linear" in program.code


@pytest.mark.parametrize("kind", ["symbolic", "unlifted"])
def test_gradients_flow_through_a_converted_graph(kind):
    program, inputs = converted(kind)
    x = inputs["x"].clone().requires_grad_()
    program(x=x).sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad.abs().sum() > 0
    assert all(p.grad is not None for p in program.parameters() if p.requires_grad)
