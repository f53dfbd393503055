"""What a wheel and an sdist hold, and that each way to install int8fx gives one import name.

Builds run the hooks that pip and ``python -m build`` call, on a copy of the repository, without network.
"""

from __future__ import annotations

import email
import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import pytest
import torch

import int8fx
from int8fx.ops import native

pytestmark = pytest.mark.slow  # builds, and starts processes
REPOSITORY = Path(__file__).parents[1]
SOURCES = {"int8fx": "int8fx", "triton_kernels": "int8fx/triton_kernels"}  # folder -> where it is installed
DIST_INFO = f"int8fx-{int8fx.__version__}.dist-info"


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = (sys.executable, *map(str, command))
    done = subprocess.run(command, cwd=cwd, env=inherited | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def build(hook: str, tree: Path, directory: Path, **environment: str) -> Path:
    """Runs a PEP 517 hook of the backend that pyproject.toml names."""
    directory.mkdir(exist_ok=True)
    code = f"import build_backend; print(build_backend.{hook}({str(directory)!r}))"
    return directory / run("-c", code, cwd=tree, **environment).splitlines()[-1]


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}


def sources(tree: Path) -> dict[str, bytes]:
    """The files that belong into a wheel, by the path they are installed at."""
    return {
        f"{installed}/{path.relative_to(tree / folder).as_posix()}": path.read_bytes()
        for folder, installed in SOURCES.items()
        for path in (tree / folder).rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the repository without what git ignores."""
    copy = tmp_path_factory.mktemp("source") / "tree"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "*.so")
    return shutil.copytree(REPOSITORY, copy, ignore=ignored)


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory) -> Path:
    return build("build_wheel", tree, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def pure_wheel(tree, tmp_path_factory) -> Path:
    """Without compiled kernels."""
    return build("build_wheel", tree, tmp_path_factory.mktemp("pure"), INT8FX_KERNELS="none")


@pytest.fixture(scope="module")
def sdist(tree, tmp_path_factory) -> Path:
    return build("build_sdist", tree, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder that holds the installed wheel and nothing else."""
    target = tmp_path_factory.mktemp("installed")
    run("-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", target, wheel, cwd=target)
    return target


def result_of(code: str, cwd: Path, **environment: str) -> Any:
    """What ``code`` leaves in ``result``, in another process."""
    return json.loads(
        run("-W", "ignore", "-c", f"import json\n{code}\nprint(json.dumps(result))", cwd=cwd, **environment)
    )


# ---- the files ------------------------------------------------------------------------------------------------------


def test_wheel_has_one_import_name(wheel):
    files = contents(wheel)
    assert {name.partition("/")[0] for name in files} == {"int8fx", DIST_INFO}
    assert files[f"{DIST_INFO}/top_level.txt"].split() == [b"int8fx"]
    [_, _, python, abi, platform] = wheel.stem.split("-", 4)
    assert (python, abi) == ("py3", "none")
    assert platform != "any"


def test_wheel_carries_the_kernels_for_each_instruction_set(wheel, pure_wheel):
    """And what links them to the torch that it was built with. Without them it is for any platform."""
    libraries = {library.name for library in (*native.INSTRUCTION_SETS, native.AUTOGRAD)}
    names = set(contents(wheel)) - set(contents(pure_wheel))
    assert names == {f"int8fx/ops/compiled/{name}.so" for name in libraries}
    assert pure_wheel.name == f"int8fx-{int8fx.__version__}-py3-none-any.whl"


def test_wheel_has_every_source_file(tree, pure_wheel):
    expected = sources(tree)
    assert {"int8fx/py.typed", "int8fx/ops/csrc/ops.cpp", "int8fx/triton_kernels/__init__.py"} <= set(expected)
    files = {name: data for name, data in contents(pure_wheel).items() if not name.startswith(DIST_INFO)}
    assert sorted(files) == sorted(expected)
    assert files == expected


def test_wheel_describes_itself(tree, wheel):
    files = contents(wheel)
    assert files[f"{DIST_INFO}/licenses/LICENSE"] == (tree / "LICENSE").read_bytes()
    metadata = email.message_from_bytes(files[f"{DIST_INFO}/METADATA"])
    assert (metadata["Name"], metadata["Version"]) == ("int8fx", int8fx.__version__)
    assert metadata["License-Expression"] == "Apache-2.0"
    needed = [requirement for requirement in metadata.get_all("Requires-Dist") if "extra ==" not in requirement]
    assert [requirement.partition(">")[0] for requirement in needed] == ["torch"]
    assert metadata.get_payload().strip(), "no README"
    entry_points = ConfigParser()
    entry_points.read_string(files[f"{DIST_INFO}/entry_points.txt"].decode())
    assert dict(entry_points["torch_dynamo_backends"]) == {"int8fx": "int8fx.passes.backend:int8fx"}
    assert dict(entry_points["console_scripts"]) == {"int8fx": "int8fx.tools.cli:main"}


def test_sdist_builds_the_same_wheel(sdist, pure_wheel, tmp_path):
    with tarfile.open(sdist) as archive:
        names = archive.getnames()
        archive.extractall(tmp_path, filter="data")
    [root] = {name.partition("/")[0] for name in names}
    assert root == f"int8fx-{int8fx.__version__}"
    assert {f"{root}/{name}" for name in ("LICENSE", "README.md", "pyproject.toml")} <= set(names)
    assert not [name for name in names if name.endswith((".pyc", ".so")) or "__pycache__" in name]
    again = contents(build("build_wheel", tmp_path / root, tmp_path / "wheel", INT8FX_KERNELS="none"))
    assert again == contents(pure_wheel)


def test_a_wheel_needs_torch_and_a_compiler_to_be_built_and_other_hooks_do_not(tree, tmp_path):
    code = "import build_backend as b; print([getattr(b, f'get_requires_for_build_{n}')() for n in KINDS])"
    code = code.replace("KINDS", "('wheel', 'sdist', 'editable')")
    assert run("-c", code, cwd=tree).splitlines()[-1] == "[['torch>=2.13'], [], []]"
    assert run("-c", code, cwd=tree, INT8FX_KERNELS="none").splitlines()[-1] == "[[], [], []]"
    nothing = {"CXX": "missing-compiler", "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    with pytest.raises(AssertionError, match="missing-compiler not found; INT8FX_KERNELS=none builds a wheel without"):
        build("build_wheel", tree, tmp_path / "wheel", **nothing)


# ---- installed ------------------------------------------------------------------------------------------------------


def test_installed_wheel_imports_outside_the_repository(installed, tmp_path):
    code = """
import int8fx, int8fx.passes, int8fx.triton_kernels, torch
model = int8fx.convert(torch.nn.Linear(8, 4))
result = [int8fx.__file__, int8fx.passes.__file__, int8fx.triton_kernels.__file__, list(model(torch.ones(2, 8)).shape)]
"""
    *files, shape = result_of(code, tmp_path, PYTHONPATH=str(installed))
    folders = ("int8fx", "int8fx/passes", "int8fx/triton_kernels")
    assert files == [str(installed / folder / "__init__.py") for folder in folders]
    assert shape == [2, 4]


@pytest.mark.parametrize("torch_is", ["that of the build", "another"])
def test_installed_wheel_runs_its_kernels_without_a_compiler_and_a_home(wheel, tmp_path, torch_is):
    """In a new environment, with nothing on PATH and no folder that can be written. torch is this environment's."""
    environment, nothing = tmp_path / "venv", tmp_path / "nothing"
    nothing.mkdir()
    venv.create(environment, symlinks=True)
    python = environment / "bin" / "python"
    run("-m", "pip", "--python", python, "install", "--quiet", "--no-index", "--no-deps", wheel, cwd=tmp_path)
    [site_packages] = environment.glob("lib/python*/site-packages")
    (site_packages / "torch.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")  # whose .pth files are not read
    compiled = site_packages / "int8fx" / "ops" / "compiled"
    if torch_is == "another":
        (compiled / f"{native.AUTOGRAD.name}.so").unlink()
    code = """
import json, warnings
import torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import int8fx
    from int8fx.ops import fallback, native
    fallback.linear = None  # torch's operators do not serve
    model = torch.nn.Sequential(torch.nn.Linear(64, 48), torch.nn.GELU(), torch.nn.Linear(48, 8)).to(torch.bfloat16)
    x = torch.randn(20, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        y = model(x)
        int8fx.convert(model)
        error = max(((model(x[:M]) - y[:M]).norm() / y[:M].norm()).item() for M in (1, 20))
with open("/proc/self/maps") as maps:
    libraries = {line.split()[-1] for line in maps if "/compiled/" in line}
words = [str(w.message) for w in caught if "int8fx" in str(w.message)]
print(json.dumps([int8fx.__file__, error, sorted(libraries), words]))
"""
    bare = {"HOME": "/proc/nonexistent", "TMPDIR": "/proc/nonexistent", "PATH": str(nothing)}
    done = subprocess.run([python, "-c", code], env=bare, cwd=nothing, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    file, error, libraries, words = json.loads(done.stdout.splitlines()[-1])
    assert file == str(site_packages / "int8fx" / "__init__.py")
    assert error < 0.03
    kernels = str(compiled / f"{native.instruction_set().name}.so")
    if torch_is == "another":
        assert libraries == [kernels]
        [word] = words
        assert "CPU calls take 10 us longer under torch.no_grad(): " in word
    else:
        assert libraries == sorted([kernels, str(compiled / f"{native.AUTOGRAD.name}.so")])
        assert words == []


def test_installed_wheel_registers_the_backend(installed, tmp_path):
    code = """
import torch
from torch._dynamo.backends.registry import lookup_backend
backend = lookup_backend("int8fx")
result = ["int8fx" in torch._dynamo.list_backends(), backend.__module__, backend.__code__.co_filename]
"""
    listed, module, file = result_of(code, tmp_path, PYTHONPATH=str(installed))
    assert (listed, module) == (True, "int8fx.passes.backend")
    assert file == str(installed / "int8fx" / "passes" / "backend.py")


def _import_error(name: str, cwd: Path, **environment: str) -> list[str]:
    code = f"""
try:
    import {name}
    result = ["imported", {name}.__file__]
except ImportError as error:
    result = [type(error).__name__, str(error)]
"""
    return result_of(code, cwd, **environment)


def test_the_bare_name_triton_kernels_is_not_int8fxs(installed, tree, tmp_path):
    kind, message = _import_error("triton_kernels", tree)
    assert kind == "ImportError"
    assert "import int8fx.triton_kernels" in message
    kind, _ = _import_error("triton_kernels", tmp_path, PYTHONPATH=str(installed))
    assert kind == "ModuleNotFoundError"


def test_editable_install_imports_the_sources(tree, tmp_path):
    """Without the .pth files of site-packages: they hold the editable install that this test runs in."""
    editable, target = build("build_editable", tree, tmp_path / "wheel"), tmp_path / "target"
    run("-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", target, editable, cwd=tmp_path)
    site_packages = Path(torch.__file__).parents[1]
    code = f"""
import site, sys
site.addsitedir({str(target)!r})
sys.path.append({str(site_packages)!r})
import int8fx, int8fx.passes, int8fx.triton_kernels
result = [int8fx.__file__, int8fx.passes.__file__, int8fx.triton_kernels.__file__]
"""
    code = f"import json\n{code}\nprint(json.dumps(result))"
    files = json.loads(run("-S", "-W", "ignore", "-c", code, cwd=tmp_path))
    assert files == [str(tree / folder / "__init__.py") for folder in ("int8fx", "int8fx/passes", "triton_kernels")]


def test_this_install_has_one_import_name():
    from importlib.metadata import distribution, entry_points, packages_distributions

    names = {name for name, owners in packages_distributions().items() if "int8fx" in owners}
    assert {name for name in names if not name.startswith("__editable__")} == {"int8fx"}
    assert distribution("int8fx").version == int8fx.__version__
    [backend] = entry_points(group="torch_dynamo_backends", name="int8fx")
    assert backend.value == "int8fx.passes.backend:int8fx"
