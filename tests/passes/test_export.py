"""Converted modules through ``torch.export``, and exported programs through AOTInductor."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
import torch
from support import models
from support.compiled import FAMILIES
from support.conversion import close
from support.helpers import activation, generator
from support.models import HIDDEN
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

import int8fx
from int8fx.graph.count import count_ops
from int8fx.ops import native
from int8fx.passes import Report
from int8fx.passes.inductor import PASSES
from int8fx.schemes.weight import CODES, SCALE, Int8Weight, PackedTensors

N = 48
SIZES = ((2, 9), (3, 5), (7, 2), (2, 64))
DYNAMIC = {"x": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}}


class Small(nn.Module):
    """Two Linears and a bare Parameter; all between them is exact or rounded once, so that results compare by bits."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, N), nn.Linear(N, HIDDEN, bias=False)
        self.bare = nn.Parameter(torch.empty(HIDDEN, N))
        g = generator(0)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=g) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)) + x @ self.bare)


def sample(size: tuple[int, int], seed: int = 0) -> Tensor:
    x = activation(size[0] * size[1], HIDDEN, outliers="column", seed=seed)
    return x.view(*size, HIDDEN)


def outside_of_a_compiler(model: Small, x: Tensor) -> Tensor:
    """What a program of ``model`` computes: its linears in int8, with its bare Parameter dequantised."""
    return x + model.down(torch.relu(model.up(x)) + x @ model.dequantize("bare"))


def exported(model: nn.Module, strict: bool = False) -> ExportedProgram:
    return export(model, (sample((3, 5)),), dynamic_shapes=DYNAMIC, strict=strict)


# ---- torch.export ---------------------------------------------------------------------------------------------------


SCHEMES = {
    "llm_int8": int8fx.llm_int8(),
    "plain": int8fx.plain(),
    "weight_only": int8fx.weight_only(),
    "columns": int8fx.llm_int8(columns=0.05),
    "rotated": int8fx.rotated(columns=0.0, block=16),
    "rotated_columns": int8fx.rotated(columns=0.05, block=16),
}


@pytest.fixture(params=SCHEMES)
def scheme(request) -> int8fx.Scheme:
    return SCHEMES[request.param]


@pytest.fixture
def small(scheme) -> nn.Module:
    return int8fx.convert(Small().eval(), scheme)


@pytest.mark.parametrize("strict", [False, True], ids=["nonstrict", "strict"])
def test_programs_of_converted_modules(small, strict):
    program = exported(small, strict)
    assert count_ops(program.graph) == {"linear": 2, "dequantize": 1}
    assert {str(s) for s in program.range_constraints} == _symbols(program)
    assert len(program.range_constraints) == 2
    for size in SIZES:
        x = sample(size, seed=1)
        assert torch.equal(program.module()(x), outside_of_a_compiler(small, x))


def _symbols(program: ExportedProgram) -> set[str]:
    """All symbols in shapes of the graph: none but those of the input."""
    values = [value for node in program.graph.nodes if isinstance(value := node.meta.get("val"), Tensor)]
    sizes = [size.node.expr for value in values for size in value.shape if isinstance(size, torch.SymInt)]
    return {str(symbol) for expression in sizes for symbol in expression.free_symbols}


def test_programs_come_back_from_a_file(small):
    program, file = exported(small), io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file)
    assert count_ops(loaded.graph) == count_ops(program.graph)
    dtypes = {name: t.dtype for name, t in loaded.state_dict.items()}
    assert dtypes == {name: t.dtype for name, t in small.state_dict().items()}
    assert (dtypes["up.weight" + CODES], dtypes["up.weight" + SCALE]) == (torch.int8, torch.float32)
    x = sample((4, 7), seed=2)
    assert torch.equal(loaded.module()(x), outside_of_a_compiler(small, x))


@pytest.mark.slow
def test_decompositions_leave_int8fx_ops(small):
    program = exported(small).run_decompositions()
    assert count_ops(program.graph) == {"linear": 2, "dequantize": 1}
    x = sample((4, 7), seed=2)
    assert torch.equal(program.module()(x), outside_of_a_compiler(small, x))


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_models_export(name):
    model, inputs = models.ALL[name]()
    viewed = name in ("transformer", "bare_products")  # a program dequantises weights outside of linear layers
    int8fx.convert(model, int8fx.weight_only() if viewed else None)
    with torch.no_grad():
        program = export(model, (), inputs)
        y, expected = program.module()(**inputs), model(**inputs)
    y, expected = (v if isinstance(v, Tensor) else v[0] for v in (y, expected))
    assert close(y, expected) if viewed else torch.equal(y, expected)
    assert count_ops(program.graph) == FAMILIES[name].captured


@pytest.mark.slow
def test_without_the_ops_a_program_does_not_load_and_torch_names_them(tmp_path):
    """With the library of kernels it does, without int8fx."""
    program, x = exported(int8fx.convert(Small().eval(), int8fx.rotated(block=16))), sample((4, 7), seed=2)
    torch.export.save(program, tmp_path / "program.pt2")
    torch.save((x, program.module()(x)), tmp_path / "expected.pt")
    code = """
import sys, torch
program, expected, *library = sys.argv[1:]
for path in library:
    torch.ops.load_library(path)
x, y = torch.load(expected)
assert torch.equal(torch.export.load(program).module()(x), y)
assert "int8fx" not in sys.modules
"""
    command = [sys.executable, "-c", code, str(tmp_path / "program.pt2"), str(tmp_path / "expected.pt")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "failed to resolve torch.ops.int8fx.linear.default" in done.stderr
    done = subprocess.run([*command, str(native.build(native.instruction_set()))], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


# ---- AOTInductor ----------------------------------------------------------------------------------------------------


def as_rewritten(state: dict[str, Tensor], bias: Tensor, x: Tensor, scheme: int8fx.Scheme) -> Tensor:
    """`Small` as the passes leave it: every matmul is int8, also that with the bare Parameter."""

    def linear(x: Tensor, name: str, bias: Tensor | None = None) -> Tensor:
        packed = PackedTensors.of(state, name)
        weight = Int8Weight(*packed[:2], scheme.threshold, scheme.rotation, *packed[2:])
        return int8fx.ops.linear(x, *weight, bias)

    return x + linear(torch.relu(linear(x, "up.weight", bias)) + linear(x, "bare"), "down.weight")


@pytest.mark.slow
@pytest.mark.parametrize("first", ["convert", "export"])
def test_aot_inductor_packages_run(scheme, first, tmp_path):
    """Built, loaded and run, with gradients enabled and sizes that the example did not have."""
    if first == "convert":
        program = exported(int8fx.convert(Small().eval(), scheme))
    else:
        program = int8fx.convert(exported(Small().eval()), scheme)
        assert count_ops(program.graph) == {"linear": 3}
    PASSES.reports.clear()
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "small.pt2"))
    [report] = int8fx.reports()
    # A converted program has an input for every buffer, also for columns that are one tensor: it shares nothing then.
    lowered, shared = (1, 1) if first == "convert" else (0, 0 if scheme.needs_columns else 1)
    # folded: what is added to the bare matmul, and x; relu goes into the first matmul
    assert report == Report(lowered, shared, folded=3, linears=3, dequantized=0)
    run = torch._inductor.aoti_load_package(path)
    state, bias = program.state_dict, program.state_dict["up.bias"].detach()
    for size in SIZES:
        x = sample(size, seed=3)
        assert torch.equal(run(x), as_rewritten(state, bias, x, scheme))
        if first == "export":
            assert torch.equal(run(x), program.module()(x))


class Read(Small):
    """Reads a packed weight in a way that no int8 matmul can serve: `dequantize` stays in the graph."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.bare.sum()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [int8fx.llm_int8(columns=0.05), int8fx.rotated(columns=0.05, block=16)], ids=str)
def test_a_package_needs_the_library_of_kernels_only(scheme, tmp_path):
    """In a process that has not imported int8fx, bit for bit."""
    program = exported(int8fx.convert(Read().eval(), scheme))
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "read.pt2"))
    assert int8fx.reports()[-1].dequantized == 1
    run, inputs = torch._inductor.aoti_load_package(path), [sample(size, seed=3) for size in SIZES]
    torch.save([(x, run(x)) for x in inputs], tmp_path / "expected.pt")
    code = """
import sys, torch
library, package, expected = sys.argv[1:]
torch.ops.load_library(library)
run = torch._inductor.aoti_load_package(package)
for x, y in torch.load(expected):
    assert torch.equal(run(x), y)
assert "int8fx" not in sys.modules
"""
    library = native.build(native.instruction_set())
    command = [sys.executable, "-c", code, str(library), path, str(tmp_path / "expected.pt")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
