"""How the C++ kernels are built, stored and chosen. `test_kernels` and `test_ops` test what they compute."""

import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.helpers import assert_within_budget, problem

from int8fx import ops
from int8fx.ops import native

HERE = Path(__file__)


@pytest.fixture
def extensions(monkeypatch, tmp_path):
    """An empty folder for extensions."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """A compiler that writes its calls to a file, waits, and writes text as the library."""
    script, calls = tmp_path / "compiler", tmp_path / "calls"
    script.write_text(f'#!/bin/sh\necho call >> {calls}\nsleep 0.3\nfor last; do :; done\necho built > "$last"\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    return calls


def test_kernels_are_native():
    assert native.load()
    assert torch._C._dispatch_has_kernel_for_dispatch_key("int8fx::linear", "CPU")


def test_a_library_is_compiled_once(extensions, compiler, capfd):
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: native.build(native.AVX2), range(4)))
    assert len(paths) == 1
    assert next(iter(paths)).read_text() == "built\n"
    assert compiler.read_text().count("call") == 1
    assert capfd.readouterr().err.count("compiling the CPU kernels for avx2") == 1
    assert not [p for p in paths.pop().parent.iterdir() if p.is_dir()]  # where it was compiled


def test_other_sources_flags_and_instructions_are_other_libraries(extensions, monkeypatch, tmp_path):
    paths = [native.library(isa) for isa in (native.DEFAULT, native.AVX2, native.AVX512_VNNI)]
    sources = tmp_path / "csrc"
    sources.mkdir()
    for path in native.SOURCES.iterdir():
        (sources / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(native, "SOURCES", sources)
    paths.append(native.library(native.AVX2))
    (sources / "product.h").write_text("// nothing")
    paths.append(native.library(native.AVX2))
    assert len(set(paths)) == 5


@pytest.mark.parametrize(
    ("script", "word"),
    [
        (None, r"no C\+\+ compiler: .*missing not found"),
        ("#!/bin/sh\necho 'no such flag' >&2; exit 1\n", "no such flag"),
    ],
)
def test_without_a_working_compiler_torch_serves_with_a_word(extensions, monkeypatch, tmp_path, script, word):
    path = tmp_path / "missing"
    if script is not None:
        path.write_text(script)
        path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    with pytest.raises(RuntimeError, match=word):
        native.build(native.AVX2)
    with pytest.warns(UserWarning, match=f"(?s)several times slower than the C\\+\\+ kernels: .*{word}"):
        assert not native._load()
    assert not list(extensions.glob("*/*.so"))


def test_a_folder_that_cannot_be_written(extensions, monkeypatch):
    (extensions / "file").write_text("")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(extensions / "file"))
    with pytest.warns(UserWarning, match="several times slower"):
        assert not native._load()


@pytest.mark.slow
def test_torch_serves_ops_where_there_is_no_library(tmp_path):
    """The same answers, in a process without a compiler: few rows, many, and a refusal."""
    calls = [problem(M, 40, 5, threshold=2.0, seed=M).args for M in (2, 7)]
    torch.save([(args, ops.linear(*args)) for args in calls], tmp_path / "calls.pt")
    code = """
import sys, torch, warnings, int8fx
from int8fx import ops
from int8fx.ops import native
calls = torch.load(sys.argv[1])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    results = [[ops.linear(*args) for args, _ in calls] for _ in range(2)]
assert not native.load()
assert sum("no C++ compiler" in str(w.message) for w in caught) == 1
for (_, expected), y, z in zip(calls, *results, strict=True):
    assert torch.equal(y, z)
    torch.testing.assert_close(y, expected)
x, *weight = calls[0][0]
try:
    ops.linear(x[:, 1:], *weight)
except ValueError as error:
    assert "legal: [..., 40] for K = 40" in str(error)
else:
    raise AssertionError("no error")
"""
    environment = os.environ | {"CXX": "missing-compiler", "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "calls.pt")], env=environment, check=True)


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_a_process_limited_to_fewer_instructions_gives_the_same_answers(tmp_path, capability):
    """By the environment variables that limit torch and oneDNN; few rows and many."""
    few, many = (problem(M, 300, 21, outliers="some", seed=M) for M in (1, 9))
    torch.save([few.args, many.args], tmp_path / "problems.pt")
    code = """
import sys, torch
from int8fx import ops
from int8fx.ops import native
torch.save([ops.linear(*args) for args in torch.load(sys.argv[1])], sys.argv[2])
assert native.load()
print(native.instruction_set().name)
"""
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    command = [sys.executable, "-c", code, str(tmp_path / "problems.pt"), str(tmp_path / "results.pt")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [capability]
    for p, y in zip((few, many), torch.load(tmp_path / "results.pt"), strict=True):
        assert_within_budget(y, *p)


def test_tensors_elsewhere_are_refused():
    class Elsewhere:
        device = torch.device("cuda:0")

    kernel = ops._without_library("linear")
    with pytest.raises(NotImplementedError, match="int8fx::linear: no kernel for tensors on cuda:0; legal: cpu, cuda"):
        kernel(Elsewhere())


@pytest.mark.parametrize(
    ("capability", "has", "permitted", "expected"),
    [
        ("DEFAULT", ("avx512_vnni", "amx_int8"), True, native.DEFAULT),
        ("AVX2", ("avx512_vnni", "amx_int8"), True, native.AVX2),
        ("AVX512", (), True, native.AVX2),
        ("AVX512", ("amx_int8",), True, native.AVX2),
        ("AVX512", ("avx512_vnni",), True, native.AVX512_VNNI),
        ("AVX512", ("avx512_vnni", "amx_int8"), False, native.AVX512_VNNI),
        ("AVX512", ("avx512_vnni", "amx_int8"), True, native.AMX),
    ],
)
def test_instructions_are_those_of_the_cpu_and_within_torchs(monkeypatch, capability, has, permitted, expected):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(has, True))
    monkeypatch.setattr(native, "_tiles_permitted", lambda: permitted)
    assert native.instruction_set() is expected


class Linux:
    """A C library whose ``syscall`` notes its arguments and returns an answer."""

    def __init__(self, answer: int) -> None:
        self.answer, self.calls = answer, []

    def syscall(self, *args: int) -> int:
        self.calls.append(args)
        return self.answer


@pytest.mark.parametrize(("answer", "permitted"), [(0, True), (-1, False)])
def test_tiles_are_permitted_if_linux_says_so(monkeypatch, answer, permitted):
    """``arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)``, on every CPU."""
    system = Linux(answer)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(native.ctypes, "CDLL", lambda name: system)
    assert native._tiles_permitted() is permitted
    assert system.calls == [(158, 0x1023, 18)]


@pytest.mark.skipif(sys.platform != "linux", reason="a request to Linux")
def test_this_system_permits_tiles_only_if_the_cpu_has_them():
    """Linux knows XTILEDATA where the CPU flag amx_tile is. (A CPU that has it may still be refused.)"""
    if native._tiles_permitted():
        assert " amx_tile" in Path("/proc/cpuinfo").read_text()
    else:
        assert native.instruction_set() is not native.AMX


def test_tiles_are_not_permitted_by_other_systems(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(native.ctypes, "CDLL", None)
    assert not native._tiles_permitted()


def test_the_command(extensions, compiler):
    from int8fx.tools.cli import main

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main(["build"]) == 0
    assert native.library(native.instruction_set()).exists()


def test_the_command_says_why_it_failed(extensions, monkeypatch, capsys):
    from int8fx.tools.cli import main

    monkeypatch.setenv("CXX", "missing-compiler")
    assert main(["build"]) == 1
    assert "int8fx build: no C++ compiler: missing-compiler not found" in capsys.readouterr().err


def portable(tile):
    """The tile of an instruction set that this CPU may lack, compiled to loops."""
    return replace(native.AVX2, name=f"portable_{tile}", flags=(*native.AVX2.flags, f"-DINT8FX_TILE={tile}"))


@pytest.mark.slow
@pytest.mark.parametrize("isa", [native.AVX512_VNNI, native.AMX], ids=lambda isa: isa.name)
def test_kernels_compile_to_the_instructions_of_their_set(isa, tmp_path):
    """A CPU without them can test no more."""
    instruction = {"avx512_vnni": "vpdpbusd", "amx": "tdpbssd"}[isa.name]
    assembly = tmp_path / "kernels.s"
    done = subprocess.run([*native.command(isa, assembly), "-O0", "-S"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:3000]
    lines = assembly.read_text().splitlines()
    assert any(instruction in line for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("isa", [native.DEFAULT, portable("VnniTile"), portable("AmxTile")], ids=lambda isa: isa.name)
def test_kernels_for_other_instructions_pass_the_same_tests(isa):
    """Those of `test_kernels` that run the C++ kernels, in another process: a process loads one library."""
    code = f"""
import sys, pytest
from int8fx.ops import native
from int8fx.ops.native import InstructionSet

native.instruction_set = lambda: {isa!r}
options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", "native"]
sys.exit(pytest.main([*options, {str(HERE.parent / "test_kernels.py")!r}]))
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, cwd=HERE.parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout
