"""How the C++ kernels are built, stored and chosen. `test_kernels` and `test_ops` test what they compute."""

import os
import re
import shutil
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.helpers import assert_within_budget, problem

from int8fx import ops
from int8fx.ops import native

HERE = Path(__file__)
assert native.load()
LIBRARY = native.build(native.instruction_set())
"""The real one."""


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
    paths = [native.path_of(isa, extensions) for isa in (native.DEFAULT, native.AVX2, native.AVX512_VNNI)]
    sources = tmp_path / "csrc"
    sources.mkdir()
    for path in native.SOURCES.iterdir():
        (sources / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(native, "SOURCES", sources)
    assert native.path_of(native.AVX2, extensions) == paths[1]
    (sources / "product.h").write_text("// nothing")
    paths.append(native.path_of(native.AVX2, extensions))
    monkeypatch.setattr(native.platform, "machine", lambda: "another")
    paths.append(native.path_of(native.AVX2, extensions))
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
        assert not native._load(native.instruction_set())
    assert not list(extensions.glob("*/*.so"))


# ---- folders ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_home(monkeypatch, tmp_path):
    """A user whose home cannot be written, root included; the folder for temporary files."""
    for name in ("TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/proc/nonexistent")
    monkeypatch.setattr(native.tempfile, "tempdir", str(tmp_path))
    return tmp_path


HOME = Path("/proc/nonexistent/.cache/torch_extensions")


def test_folders(no_home, monkeypatch):
    private = no_home / f"int8fx-{os.geteuid()}"
    assert native.folders() == [HOME, private]
    monkeypatch.setattr(native.tempfile, "gettempdir", lambda: (_ for _ in ()).throw(FileNotFoundError("no folder")))
    assert native.folders() == [HOME]
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/chosen")
    assert native.folders() == [Path("/chosen")]


def test_without_a_home_a_folder_of_this_user_holds_the_library(no_home, compiler):
    path = native.build(native.AVX2)
    assert path == native.path_of(native.AVX2, no_home / f"int8fx-{os.geteuid()}")
    assert path.read_text() == "built\n"
    assert path.parents[1].stat().st_mode & 0o777 == 0o700
    assert native.build(native.AVX2) == path
    assert compiler.read_text().count("call") == 1


def test_a_library_in_a_home_that_cannot_be_written_is_used(no_home, compiler, monkeypatch):
    written = native.build(native.AVX2)
    monkeypatch.setattr(native, "private_folder", lambda: no_home / "another")
    monkeypatch.setattr(native, "folders", lambda: [written.parents[1], no_home / "another"])
    written.parent.chmod(0o500)
    written.parents[1].chmod(0o500)
    assert native.build(native.AVX2) == written


def test_a_folder_that_was_chosen_is_the_only_one(no_home, compiler, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))
    with pytest.raises(RuntimeError, match=r"no folder .*/file: .*set the environment variable TORCH_EXTENSIONS_DIR"):
        native.build(native.AVX2)
    assert not compiler.exists()


def test_the_warning_names_the_folders_the_reasons_and_the_variable(no_home):
    (no_home / f"int8fx-{os.geteuid()}").symlink_to(no_home)
    with pytest.warns(UserWarning, match="several times slower") as caught:
        assert not native._load(native.instruction_set())
    [message] = [str(w.message) for w in caught]
    assert f"({HOME}: [Errno 2] No such file or directory" in message
    assert f"; {no_home}/int8fx-{os.geteuid()}: it has mode lrwx" in message
    assert message.endswith("set the environment variable TORCH_EXTENSIONS_DIR to a folder that can be written")


@given(st.integers(0, 0o777))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_private_folder_is_one_that_nobody_else_may_enter(tmp_path, mode):
    folder = tmp_path / "private"
    folder.mkdir(exist_ok=True)
    folder.chmod(mode)
    if mode & 0o077:
        with pytest.raises(PermissionError, match=r"legal: a folder of user \d+ with mode 0700"):
            native._make_private(folder)
    else:
        native._make_private(folder)


@pytest.mark.parametrize("what", ["a link", "a file", "of another user"])
def test_a_private_folder_is_a_folder_of_this_user(tmp_path, monkeypatch, what):
    folder, elsewhere = tmp_path / "private", tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    if what == "a link":
        folder.symlink_to(elsewhere)
    elif what == "a file":
        folder.touch(mode=0o600)
    else:
        folder.mkdir(mode=0o700)
        user = os.geteuid()
        monkeypatch.setattr(native.os, "geteuid", lambda: user + 1)
    with pytest.raises(PermissionError, match=r"it has mode .* and belongs to user \d+; legal: a folder of user \d+"):
        native._make_private(folder)


@pytest.mark.parametrize(
    ("mode", "safe"),
    [(0o700, True), (0o755, True), (0o1777, True), (0o1770, True), (0o777, False), (0o770, False), (0o702, False)],
)
def test_nobody_else_may_rename_a_private_folder(tmp_path, mode, safe):
    """In /tmp (1777) the system sees to it. A folder that exists already is judged in the same way."""
    parent = tmp_path / "parent"
    parent.mkdir()
    parent.chmod(mode)
    for _ in range(2):
        if safe:
            native._make_private(parent / "private")
        else:
            with pytest.raises(PermissionError, match="in which others cannot rename files"):
                native._make_private(parent / "private")


def test_what_somebody_else_put_into_the_private_folder_is_not_loaded(no_home, monkeypatch):
    """A complete library, in a folder that all may write: nothing loads it, and nothing is compiled over it."""
    monkeypatch.setattr(native, "compile_to", None)
    path = native.path_of(native.instruction_set(), no_home / f"int8fx-{os.geteuid()}")
    path.parent.mkdir(parents=True)
    path.parents[1].chmod(0o777)
    path.write_text("harm")
    native._digest_file(path).write_text(native._digest(path))
    monkeypatch.setattr(torch.ops, "load_library", lambda path: pytest.fail(f"{path} was loaded"))
    with pytest.warns(UserWarning, match="it has mode drwxrwxrwx and belongs to user"):
        assert not native._load(native.instruction_set())


def test_a_folder_from_which_the_system_loads_nothing(extensions, compiler, monkeypatch):
    """A file system that is mounted with ``noexec``."""
    monkeypatch.setattr(native.os, "ST_NOEXEC", 8, raising=False)
    monkeypatch.setattr(native.os, "statvfs", lambda folder: SimpleNamespace(f_flag=8))
    with pytest.raises(RuntimeError, match=r"it is mounted with the option noexec\); set the environment variable"):
        native.build(native.AVX2)
    assert not compiler.exists()


# ---- libraries of a wheel --------------------------------------------------------------------------------------------


@pytest.fixture
def carried(monkeypatch, tmp_path):
    """The folder of a wheel's libraries, with one that is not a library."""
    folder = tmp_path / "compiled"
    folder.mkdir()
    monkeypatch.setattr(native, "CARRIED", folder)
    (folder / "avx2.so").write_text("text")
    return folder


def test_a_library_of_the_wheel_is_taken_and_nothing_compiled(carried, compiler, monkeypatch):
    loaded = []
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    assert native.build(native.AVX2) == carried / "avx2.so"
    assert native._load(native.AVX2)
    assert loaded == [str(carried / "avx2.so")]
    assert not compiler.exists()


def test_a_library_of_the_wheel_that_does_not_load_is_compiled_with_a_word(carried, extensions, compiler):
    with (
        pytest.warns(UserWarning, match=r"this system does not load .*avx2\.so: "),
        pytest.warns(UserWarning, match="several times slower"),
    ):
        assert not native._load(native.AVX2)
    assert compiler.exists()


def test_what_the_wheel_lacks_is_compiled(carried, extensions, compiler):
    """As for another torch than the one that the wheel was built with."""
    assert native.build(native.AUTOGRAD).read_text() == "built\n"
    with pytest.warns(UserWarning, match=r"CPU calls take 10 us longer under torch\.no_grad\(\): "):
        assert not native._load(native.AUTOGRAD)


@pytest.mark.skipif(shutil.which("nm") is None, reason="binutils")
def test_kernels_call_torch_by_its_stable_abi():
    """C functions only: no symbol of the namespaces at, c10, torch and caffe2, which differ from version to version."""
    done = subprocess.run(["nm", "-D", "--undefined-only", LIBRARY], capture_output=True, text=True, check=True)
    symbols = [line.split()[-1] for line in done.stdout.splitlines()]
    assert "torch_library_impl" in symbols
    assert not [name for name in symbols if re.match(r"_Z\w*?(2at|3c10|5torch|6caffe2)", name)]
    assert not [name for name in symbols if name.startswith(("GOMP_", "omp_"))]  # torch's threads, whichever they are


@pytest.mark.slow
def test_without_the_library_for_autograd_the_formulas_give_the_same(tmp_path):
    """In a process in which it cannot be loaded: values without and with gradients, and a gradient."""
    code = """
import sys, torch
from int8fx.ops import native
if sys.argv[2] == "without":
    load = native._load
    native._load = lambda library: library != native.AUTOGRAD and load(library)
assert native.load()
assert native._has_kernels_for("AutogradCPU") is (sys.argv[2] != "without")
import int8fx
torch.manual_seed(0)
layer = int8fx.convert(torch.nn.Linear(40, 5))
x = torch.randn(7, 40, requires_grad=True)
with torch.no_grad():
    values = [layer(x)]
values.append(layer(x))
values[-1].sum().backward()
torch.save([*values, x.grad, torch.tensor([v.requires_grad for v in values])], sys.argv[1])
"""
    results = []
    for which in ("with", "without"):
        path = tmp_path / f"{which}.pt"
        subprocess.run([sys.executable, "-c", code, str(path), which], check=True)
        results.append(torch.load(path))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    assert results[0][-1].tolist() == [False, True]


# ---- libraries that do not load --------------------------------------------------------------------------------------


def test_a_library_that_does_not_load_is_compiled_again_once(extensions, compiler):
    with pytest.warns(UserWarning, match=r"several times slower .*int8fx_cpu\.so: .*set the environment variable"):
        assert not native._load(native.instruction_set())
    assert compiler.read_text().count("call") == 2
    with pytest.warns(UserWarning, match="several times slower"):
        assert not native._load(native.instruction_set())
    assert compiler.read_text().count("call") == 3


def test_the_next_folder_is_tried_if_a_library_does_not_load(no_home, compiler, monkeypatch):
    """As in a home that is shared with other machines."""
    monkeypatch.setattr(native, "folders", lambda: [no_home / "home", no_home / "second"])
    seen = []

    def load(path):
        seen.append(path)
        if "home" in path:
            raise OSError("Could not load this library") from OSError("version `GLIBC_2.99' not found")

    monkeypatch.setattr(torch.ops, "load_library", load)
    assert native._load(native.instruction_set())
    assert ["home" in path for path in seen] == [True, True, False]


def test_what_another_process_compiled_meanwhile_is_not_compiled_again(extensions, compiler):
    path = native.build(native.AVX2)
    assert native._build(extensions, native.AVX2, broken=path.stat().st_mtime_ns - 1) == path
    assert compiler.read_text().count("call") == 1
    assert native._build(extensions, native.AVX2, broken=path.stat().st_mtime_ns) == path
    assert compiler.read_text().count("call") == 2


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["empty", "cut off", "without a digest", "not a library", "none"])
def test_a_faulty_library_is_replaced(extensions, tmp_path, monkeypatch, fault):
    """In a new process, with a compiler that copies the real library. Truncated ones would end it by SIGBUS."""
    script, calls = tmp_path / "compiler", tmp_path / "calls"
    script.write_text(f'#!/bin/sh\necho call >> {calls}\nfor last; do :; done\ncp {LIBRARY} "$last"\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    path, content = native.build(native.instruction_set()), LIBRARY.read_bytes()
    calls.unlink()
    path.unlink()
    path.write_bytes(
        {"empty": b"", "cut off": content[: len(content) // 2], "not a library": b"text"}.get(fault, content)
    )
    if fault == "without a digest":
        native._digest_file(path).unlink()
    elif fault == "not a library":
        native._digest_file(path).write_text(native._digest(path))
    code = "import sys, warnings; warnings.simplefilter('error'); from int8fx.ops import native; "
    code += "assert native._load(native.instruction_set())"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert path.read_bytes() == content
    assert native._is_complete(path)
    assert calls.exists() is (fault != "none")
    if fault != "none":
        assert calls.read_text().count("call") == 1


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
        device, layout = torch.device("cuda:0"), torch.strided

    kernel, sparse = ops._without_library("linear"), torch.randn(3, 8).to_sparse()
    for x, found in ((Elsewhere(), "torch.strided on cuda:0"), (sparse, "torch.sparse_coo on cpu")):
        with pytest.raises(NotImplementedError, match=f"int8fx::linear: no kernel for x {found}; legal: dense tensors"):
            kernel(x)


BFLOAT16 = ("avx512_bf16", "avx512_vbmi")


@pytest.mark.parametrize(
    ("capability", "has", "permitted", "expected"),
    [
        ("DEFAULT", ("avx512_vnni", "amx_int8"), True, native.DEFAULT),
        ("AVX2", ("avx512_vnni", "amx_int8"), True, native.AVX2),
        ("AVX512", (), True, native.AVX2),
        ("AVX512", ("amx_int8",), True, native.AVX2),
        ("AVX512", ("avx512_vnni",), True, native.AVX512_VNNI),
        ("AVX512", ("avx512_vnni", "amx_int8"), False, native.AVX512_VNNI),
        ("AVX512", ("avx512_vnni", *BFLOAT16[1:], "amx_int8"), True, native.AVX512_VNNI),
        ("AVX512", ("avx512_vnni", *BFLOAT16), True, native.AVX512_BF16),
        ("AVX512", ("avx512_vnni", *BFLOAT16, "amx_int8"), True, native.AVX512_BF16),
        ("AVX512", ("avx512_vnni", *BFLOAT16, "amx_int8", "amx_bf16"), True, native.AMX),
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
    assert native.path_of(native.instruction_set(), extensions).exists()


def test_the_command_says_why_it_failed(extensions, monkeypatch, capsys):
    from int8fx.tools.cli import main

    monkeypatch.setenv("CXX", "missing-compiler")
    assert main(["build"]) == 1
    assert "int8fx build: no C++ compiler: missing-compiler not found" in capsys.readouterr().err


def portable(tile, *flags):
    """The tile of an instruction set that this CPU may lack, compiled to loops."""
    flags = (*native.AVX2.flags, f"-DINT8FX_TILE={tile}", *flags)
    return replace(native.AVX2, name=f"portable_{tile}{len(flags)}", flags=flags)


PORTABLE = [portable("VnniTile"), portable("VnniTile", "-DINT8FX_BFLOAT16"), portable("AmxTile", "-DINT8FX_BFLOAT16")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("isa", "instructions"),
    [
        (native.AVX512_VNNI, ["vpdpbusd"]),
        (native.AVX512_BF16, ["vpdpbusd", "vdpbf16ps", "vpermb"]),
        (native.AMX, ["tdpbssd", "tdpbf16ps", "vdpbf16ps"]),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_kernels_compile_to_the_instructions_of_their_set(isa, instructions, tmp_path):
    """A CPU without them can test no more."""
    assembly = tmp_path / "kernels.s"
    done = subprocess.run([*native.command(isa, assembly), "-O0", "-S"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:3000]
    lines = assembly.read_text().splitlines()
    for instruction in instructions:
        assert any(instruction in line for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("isa", [native.DEFAULT, *PORTABLE], ids=lambda isa: isa.name)
def test_kernels_for_other_instructions_pass_the_same_tests(isa):
    """Those of `test_kernels` that run the C++ kernels, in another process: a process loads one library."""
    code = f"""
import sys, pytest
from int8fx.ops import native
from int8fx.ops.native import Library

native.instruction_set = lambda: {isa!r}
options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", "native"]
sys.exit(pytest.main([*options, {str(HERE.parent / "test_kernels.py")!r}]))
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, cwd=HERE.parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout
