"""``import int8fx`` needs torch and nothing else, and loads nothing that is slow to load."""

import json
import subprocess
import sys
from typing import Any

import pytest

pytestmark = pytest.mark.slow  # each test starts a process
HIDDEN = (
    "triton", "triton_kernels", "torchao", "bitsandbytes", "transformers", "accelerate", "safetensors", "gguf", "rich",
    "platformdirs", "numpy", "matplotlib", "hypothesis", "pytest",
)  # fmt: skip
_HIDE = f"""
import json, sys
from importlib.machinery import PathFinder

find_spec = PathFinder.find_spec

def find_others(cls, name, path=None, target=None):
    return None if name.partition(".")[0] in {HIDDEN!r} else find_spec(name, path, target)

PathFinder.find_spec = classmethod(find_others)
"""


def run(code: str, directory) -> Any:
    """What ``code`` leaves in ``result``, in a process that has torch only."""
    command = [sys.executable, "-W", "ignore", "-c", _HIDE + code + "\nprint(json.dumps(result))"]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_other_packages_are_hidden(tmp_path):
    code = """
result = []
for name in ("numpy", "transformers", "hypothesis"):
    try:
        __import__(name)
    except ModuleNotFoundError as error:
        result.append(str(error))
"""
    assert run(code, tmp_path) == [f"No module named {name!r}" for name in ("numpy", "transformers", "hypothesis")]


def test_import_loads_int8fx_only(tmp_path):
    """Its time is that of what it loads: modules of int8fx and Python, no part of torch that torch did not load."""
    loaded = run(
        """
import torch
before = set(sys.modules)
import int8fx
result = sorted(set(sys.modules) - before)
""",
        tmp_path,
    )
    assert "int8fx" in loaded
    foreign = [name for name in loaded if name.partition(".")[0] not in {"int8fx", *sys.stdlib_module_names}]
    assert not foreign
    unneeded = ("int8fx.passes.backend", "int8fx.tools", "int8fx.triton_kernels", "int8fx.integrations")
    assert not [name for name in loaded if name.startswith(unneeded)]


EAGER = """
import sys
import torch
from torch import nn

class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(8, 4))

    def forward(self, x):
        return x @ self.w

x = torch.arange(16.0).view(2, 8)
import int8fx
"""


def test_a_process_that_stays_eager_loads_no_compiler(tmp_path):
    """Neither in ``import int8fx``, nor in `convert`, of layers and of a bare Parameter, nor in an eager forward."""
    loaded = run(
        EAGER
        + """
before = set(sys.modules)
model = int8fx.convert(nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoderLayer(8, 2, 16)))
bare = int8fx.convert(Bare())
result = [sorted(set(sys.modules) - before)]
model(x)
int8fx.reports(), int8fx.uninstall()
result.append([name for name in ("torch._dynamo", "torch._inductor", "triton") if name in sys.modules])
""",
        tmp_path,
    )
    assert [name for name in loaded[0] if name not in sys.stdlib_module_names] == ["torch._appdirs"]
    assert loaded[1] == []


@pytest.mark.parametrize(
    "first",
    [
        "import torch._dynamo",
        "import torch._inductor.config",
        "from int8fx.passes import backend",
        "from int8fx.passes import inductor; inductor.install(); import torch._inductor",
    ],
)
@pytest.mark.parametrize("uninstalled", [False, True])
def test_the_passes_are_installed_whatever_imports_inductor(tmp_path, first, uninstalled):
    """After `convert`, unless `uninstall` took it back; and at once if Inductor is there already."""
    code = f"""
int8fx.convert(Bare())
if {uninstalled and "install()" not in first}:
    int8fx.uninstall()
{first}
if {uninstalled and "install()" in first}:
    int8fx.uninstall()
from torch._inductor import config
from int8fx.passes.inductor import PASSES
result = [config.joint_custom_pre_pass == [PASSES]]
int8fx.convert(Bare())
result.append(config.joint_custom_pre_pass == [PASSES])
"""
    installed, again = run(EAGER + code, tmp_path)
    assert installed is not uninstalled
    assert again


def test_public_names_are_there_with_torch_alone(tmp_path):
    facts = run(
        """
import int8fx, torch
from int8fx import *
model = torch.nn.Sequential(torch.nn.Linear(8, 4))
x = torch.arange(16.0).view(2, 8)
y = model(x)
int8fx.convert(model)
difference = float((model(x) - y).abs().max() / y.abs().max())
needed = []
for name in ("Int8FxConfig", "LLMInt8Config"):
    try:
        getattr(int8fx, name)
    except ImportError as error:
        needed.append(str(error))
missing = [name for name in int8fx.__all__ if not hasattr(int8fx, name)]
converted = len(int8fx.summary(model).converted)
result = [needed, missing, int8fx.is_packed(model[0]), converted, difference, int8fx.__version__]
""",
        tmp_path,
    )
    needed, missing, packed, converted, error, version = facts
    assert needed == [
        'int8fx.Int8FxConfig needs transformers: pip install "int8fx[transformers]"',
        'int8fx.LLMInt8Config needs torchao: pip install "torchao>=0.18"',
    ]
    assert (missing, packed, converted) == ([], True, 1)
    assert error < 2 / 127
    assert version.count(".") == 2


def test_the_public_names():
    """``int8fx.__all__`` is what the README documents; everything else may change."""
    import int8fx

    assert int8fx.__all__ == sorted(int8fx.__all__, key=lambda name: (name[0].islower(), name))
    assert set(int8fx.__all__) == {
        "Calibration", "LLMInt8", "Plan", "Rotated", "Scheme", "calibrate", "convert", "equalize",
        "is_packed", "llm_int8", "plain", "plan", "reports", "rotated", "summary", "uninstall", "weight_only",
    }  # fmt: skip
    assert set(int8fx.__all__) <= set(dir(int8fx))
    with pytest.raises(AttributeError, match="module 'int8fx' has no attribute 'pack'"):
        int8fx.pack  # noqa: B018  the access is the test
