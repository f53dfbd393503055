"""The ops are defined by Python or by the library of kernels, whichever a process loads first."""

import json
import subprocess
import sys

import pytest
import torch
from support.samples import LIBRARY

from int8fx.ops import native, schemas


def defined() -> list[str]:
    return [str(getattr(torch.ops.int8fx, name).default._schema) for name in schemas.NAMES]


def test_the_ops_are_those_of_the_schemas():
    assert sorted(schemas.NAMES) == LIBRARY
    assert defined() == [str(torch._C.parse_schema(f"int8fx::{schema}")) for schema in schemas.SCHEMAS]


@pytest.mark.parametrize("defined_before", [(), ("one",), ("one", "two")])
def test_what_is_defined_already_is_left(monkeypatch, defined_before):
    monkeypatch.setattr(schemas, "NAMESPACE", f"int8fx_test_{len(defined_before)}")
    monkeypatch.setattr(schemas, "SCHEMAS", ("one(Tensor x, int n=1) -> Tensor", "two(Tensor x) -> Tensor"))
    kernels = torch.library.Library(schemas.NAMESPACE, "FRAGMENT")
    for schema in schemas.SCHEMAS[: len(defined_before)]:
        kernels.define(schema)
    library = torch.library.Library(schemas.NAMESPACE, "DEF")
    schemas.define(library)
    assert len(library._op_defs) == 2 - len(defined_before)
    ops = getattr(torch.ops, schemas.NAMESPACE)
    assert str(ops.one.default._schema) == f"{schemas.NAMESPACE}::one(Tensor x, int n=1) -> Tensor"
    assert str(ops.two.default._schema) == f"{schemas.NAMESPACE}::two(Tensor x) -> Tensor"


@pytest.mark.parametrize("other", ["one(Tensor x, int n=2) -> Tensor", "one(Tensor x) -> Tensor"])
def test_kernels_of_another_version_are_refused(monkeypatch, other):
    monkeypatch.setattr(schemas, "NAMESPACE", "int8fx_test_" + str(abs(hash(other))))
    monkeypatch.setattr(schemas, "SCHEMAS", ("one(Tensor x, int n=1) -> Tensor",))
    kernels = torch.library.Library(schemas.NAMESPACE, "FRAGMENT")
    kernels.define(other)
    with pytest.raises(RuntimeError) as error:
        schemas.define(torch.library.Library(schemas.NAMESPACE, "DEF"))
    assert f"define {schemas.NAMESPACE}::{other}; legal: {schemas.NAMESPACE}::one(Tensor x, int n=1)" in str(
        error.value
    )


WITHOUT_PYTHON = """
import json, sys, torch
torch.ops.load_library(sys.argv[1])
"""


def run(code: str):
    """What ``code`` leaves in ``result``, in a process that has loaded the kernels and not int8fx."""
    command = [sys.executable, "-c", WITHOUT_PYTHON + code + "\nprint(json.dumps(result))"]
    path = native.build(native.instruction_set())
    done = subprocess.run([*command, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_the_library_defines_the_same_ops():
    result = run(f"result = [str(getattr(torch.ops.int8fx, name).default._schema) for name in {schemas.NAMES!r}]")
    assert result == defined()


@pytest.mark.slow
def test_int8fx_may_be_imported_after_the_library():
    """No kernels are built or loaded again; fakes, gradients and error messages are those of Python from then on."""
    code = """
codes, scale = torch.ones(5, 24, dtype=torch.int8), torch.ones(5)
x = torch.ones(3, 24, requires_grad=True)
before = torch.ops.int8fx.linear(x, codes, scale)
import int8fx
from int8fx.ops import native
native._load = [native.AUTOGRAD].remove  # raises if it is another library
result = [native.load(), torch.equal(before, int8fx.ops.linear(x, codes, scale))]
int8fx.ops.linear(x, codes, scale).sum().backward()
result.append(x.grad.unique().tolist())
with torch._subclasses.FakeTensorMode() as mode:
    result.append(list(int8fx.ops.linear(*map(mode.from_tensor, (x, codes, scale))).shape))
try:
    int8fx.ops.linear(x[:, 1:], codes, scale)
except ValueError as error:
    result.append(str(error))
"""
    message = "int8fx::linear: x has shape (3, 23); legal: [..., 24] for K = 24"
    assert run(code) == [True, True, [5.0], [3, 5], message]


@pytest.mark.slow
def test_without_int8fx_errors_list_the_arguments():
    code = """
result = []
codes, scale, x = torch.ones(5, 24, dtype=torch.int8), torch.ones(5), torch.ones(3, 24)
for call in (
    lambda: torch.ops.int8fx.linear(x[:, 1:], codes, scale, 6.0),
    lambda: torch.ops.int8fx.dequantize(codes, scale, dtype=torch.int8),
    lambda: torch.ops.int8fx.quantize_rowwise(x.int()),
    lambda: torch.ops.int8fx.grouped_linear(x, torch.tensor([1, 3]), codes, scale),
    lambda: torch.ops.int8fx.linear_quantized(x, x, x, x, codes, scale),
):
    try:
        call()
    except RuntimeError as error:
        result.append(str(error).splitlines()[0])
assert "int8fx" not in sys.modules
"""
    weight = "weight = Char [5, 24], weight_scale = Float [5]"
    options = "threshold = {}, block = 1, columns = None, columns_weight = None, format = None, group_size = None, "
    options += "in_features = None, zero_point = None, scale_range = None"
    epilogue = "bias = None, activation = none, other = None, binary = none"
    advice = "; after `import int8fx` the error says which one and why"
    assert run(code) == [
        f"int8fx::{name}: illegal arguments: {found}{advice}"
        for name, found in {
            "linear": f"x = Float [3, 23], {weight}, {options.format(6)}, {epilogue}",
            "dequantize": f"{weight}, {options.format(None)}, dtype = Char",
            "quantize_rowwise": "x = Int [3, 24], threshold = None, block = 1, columns = None, for_linear = 0",
            "grouped_linear": f"x = Float [3, 24], offsets = Long [2], {weight}, {options.format(None)}, bias = None",
            "linear_quantized": "x = Float [3, 24], codes = Float [3, 24], x_scale = Float [3, 24], outlier_mask = "
            f"Float [3, 24], {weight}, {options.format(None)}, {epilogue}",
        }.items()
    ]
