"""The layout of the tree: imports go one way between folders, without circles, and only tools import other packages.

Imports are read from the source, with those in functions and under ``TYPE_CHECKING``. ``python tests/test_layout.py``
prints the folders and what they import.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("schemes", "ops", "graph", "passes", "conversion", "calibration", "integrations", "tools")
"""Each folder of int8fx/ imports from those before it."""
ANYWHERE = ("imports", "terminal")
"""Modules that all folders may import. They import nothing of int8fx."""
OTHER_PACKAGES = ("tools", "integrations")
"""The folders that may import more than torch and the standard library."""
BY_ARGUMENT = ("int8fx.imports", "module")
"""`imports.when_imported` waits for the import of the module that its caller names."""
TRITON_IMPORTERS = ("int8fx.ops.gpu", "int8fx.tools", "int8fx.integrations")
"""Modules and folders that may import triton_kernels/, which is installed as int8fx.triton_kernels."""

IMPORTERS = ("import_module", "__import__")
"""Functions that import a module by name."""

TRITON = "int8fx.triton_kernels"


class Import(NamedTuple):
    source: str  # module names
    target: str
    place: str  # file:line


def _is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def _folder(module: str) -> str:
    """``schemes`` of ``int8fx.schemes.rotate``; empty for ``int8fx``."""
    return module.split(".")[1] if "." in module else ""


def read_modules(root: Path) -> dict[str, Path]:
    """Module name -> file, for int8fx/ and triton_kernels/."""
    modules = {}
    for folder, package in ((root / "int8fx", "int8fx"), (root / "triton_kernels", TRITON)):
        for path in sorted(folder.rglob("*.py")):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            modules[".".join(part for part in parts if part != "__init__")] = path
    return modules


def read_imports(root: Path) -> list[Import]:
    """Every import statement and every call of `IMPORTERS`, by its literal or else by its expression."""
    modules = read_modules(root)
    imports = []
    for source, path in modules.items():
        package = source if path.name == "__init__.py" else source.rpartition(".")[0]
        for node in ast.walk(ast.parse(path.read_text())):
            for target in _targets(node, package, modules):
                imports.append(Import(source, target, f"{path.relative_to(root)}:{node.lineno}"))
    return imports


def _targets(node: ast.AST, package: str, modules: dict[str, Path]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
        base = ".".join([*above, *([node.module] if node.module else [])])
        for alias in node.names:
            submodule = f"{base}.{alias.name}"
            yield submodule if submodule in modules else base
    elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in IMPORTERS:
        for name in [*node.args, *(keyword.value for keyword in node.keywords)][:1]:
            yield str(name.value) if isinstance(name, ast.Constant) else ast.unparse(name)


def find_faults(root: Path) -> list[str]:
    """What breaks the layout: ``file:line: what; legal: what is``."""
    imports = read_imports(root)
    faults = [fault for one in imports for fault in _faults_of(one)]
    faults += [f"circle of modules: {'; '.join(circle)}; legal: no circles" for circle in find_circles(imports)]
    entries = [path for path in (root / "int8fx").iterdir() if not path.name.startswith((".", "__"))]
    for path in sorted(entries):
        legal_folders = {*FOLDERS}
        if path.is_dir() and path.name not in legal_folders and list(path.rglob("*.py")):
            faults.append(f"int8fx/{path.name}/: an unknown folder; legal: {', '.join(FOLDERS)}")
    modules = sorted(path.stem for path in entries if path.suffix == ".py")
    others = [module for module in modules if module not in ANYWHERE]
    if others:
        faults.append(f"int8fx/: modules {', '.join(others)}; legal: {', '.join(ANYWHERE)}, the rest in folders")
    return faults


def _faults_of(one: Import) -> Iterator[str]:
    source, target, place = one
    what = f"{place}: {source} imports {target}; legal"
    folder, target_folder = _folder(source), _folder(target)
    inside = _is_in(target, "int8fx")
    top_level = target.partition(".")[0]
    if _is_in(source, TRITON):
        if not _is_in(target, TRITON) and top_level not in ("torch", "triton", *sys.stdlib_module_names):
            yield f"{what}: triton_kernels imports torch, triton and the standard library"
    elif folder in ANYWHERE and inside:
        yield f"{what}: {folder} imports nothing of int8fx"
    elif _is_in(target, TRITON):
        if not any(_is_in(source, importer) for importer in TRITON_IMPORTERS):
            yield f"{what}: triton_kernels is imported by {', '.join(TRITON_IMPORTERS)}"
    elif not inside:
        legal = folder in OTHER_PACKAGES or (source, target) == BY_ARGUMENT
        if not legal and top_level not in ("torch", *sys.stdlib_module_names):
            yield f"{what}: torch and the standard library; other packages in {', '.join(OTHER_PACKAGES)}"
    elif folder and target_folder and folder != target_folder and target_folder not in ANYWHERE:
        before = FOLDERS[: FOLDERS.index(folder)] if folder in FOLDERS else ()
        if target_folder not in before:
            yield f"{what}: {folder} imports from {', '.join(before) or 'no other folder'}"


def find_circles(imports: list[Import]) -> list[list[str]]:
    """Modules that import each other, each as the list of its imports; a module that imports itself too."""
    edges: dict[str, dict[str, str]] = {}
    for source, target, place in imports:
        if _is_in(target, "int8fx"):
            edges.setdefault(source, {}).setdefault(target, place)
    reached = {source: _reach(source, edges) for source in edges}
    circles, seen = [], set()
    for module in sorted(edges):
        members = {other for other in reached[module] if module in reached.get(other, ())}
        if members and module not in seen:
            seen |= members
            circles.append([
                f"{edges[a][b]}: {a} imports {b}" for a in sorted(members) for b in sorted(edges[a]) if b in members
            ])  # fmt: skip
    return circles


def _reach(start: str, edges: dict[str, dict[str, str]]) -> set[str]:
    reached, ahead = set(), list(edges.get(start, ()))
    while ahead:
        module = ahead.pop()
        if module not in reached:
            reached.add(module)
            ahead += edges.get(module, ())
    return reached


def describe(root: Path) -> str:
    """A line for each folder: modules, lines of code, and the folders that it imports."""
    modules, imports = read_modules(root), read_imports(root)
    lines = []
    for folder in ("", *ANYWHERE, *FOLDERS, "triton_kernels"):
        paths = [path for module, path in modules.items() if _folder(module) == folder]
        if paths:
            targets = {_folder(i.target) or "int8fx" for i in imports if _folder(i.source) == folder}
            inside = {_folder(module) for module in modules}
            named = [t for t in (*ANYWHERE, *FOLDERS, "triton_kernels") if t in targets & inside - {folder}]
            count = sum(len(path.read_text().splitlines()) for path in paths)
            lines.append(f"{folder or '__init__':16}{len(paths):4} modules{count:7} lines  imports {', '.join(named)}")
    return "\n".join(lines)


# ---- this tree -------------------------------------------------------------------------------------------------------


def test_imports_go_one_way():
    faults = find_faults(ROOT)
    assert not faults, "\n" + "\n".join(faults)


def test_every_import_is_seen():
    """Or the test above would pass on nothing."""
    modules, imports = read_modules(ROOT), read_imports(ROOT)
    assert {_folder(module) for module in modules} >= {*FOLDERS, "triton_kernels"}
    assert {(_folder(i.source), _folder(i.target)) for i in imports} >= {("ops", "schemes"), ("ops", "triton_kernels")}
    in_functions = {i.target for i in imports if i.source == "int8fx.ops.gpu"}
    assert f"{TRITON}.int8_matmul" in in_functions


def test_pyproject_lists_every_folder_with_modules():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    on_disk = {
        module if path.name == "__init__.py" else module.rpartition(".")[0]
        for module, path in read_modules(ROOT).items()
    }
    assert len(listed) == len(set(listed))
    assert set(listed) == on_disk, f"pyproject.toml, tool.setuptools.packages; on disk: {sorted(on_disk)}"


# ---- the checker, on small trees -------------------------------------------------------------------------------------


def write_tree(root: Path, files: dict[str, str]) -> list[str]:
    """The faults of a tree with these files."""
    for name, text in {"int8fx/__init__.py": "", **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return find_faults(root)


LEGAL = {
    "downwards": {"int8fx/passes/a.py": "from ..ops.b import f\nfrom ..schemes import g\n", "int8fx/ops/b.py": ""},
    "downwards, in a function": {"int8fx/tools/a.py": "def f():\n    from ..graph import b\n", "int8fx/graph/b.py": ""},
    "within a folder": {"int8fx/ops/__init__.py": "from . import b\n", "int8fx/ops/b.py": "from .c import f\n",
                        "int8fx/ops/c.py": "import math, torch\n"},
    "the one module": {"int8fx/terminal.py": "import sys\n", "int8fx/schemes/a.py": "from ..terminal import bar\n"},
    "kernels": {"triton_kernels/a.py": "import triton, torch\nfrom . import b\n", "triton_kernels/b.py": "",
                "int8fx/ops/gpu.py": "def f():\n    from ..triton_kernels.a import k\n",
                "int8fx/tools/audit/a.py": "from ...triton_kernels import a\n"},
    "other packages": {"int8fx/tools/a.py": "import rich, transformers\n", "int8fx/integrations/b.py": "import gguf\n"},
    "integrations": {"int8fx/integrations/a.py": "from ..conversion import b\n", "int8fx/conversion/b.py": ""},
    "the package's face": {"int8fx/__init__.py": "from .schemes import a\nfrom .conversion.b import f\n",
                           "int8fx/schemes/a.py": "", "int8fx/conversion/b.py": "",
                           "int8fx/tools/c.py": "from .. import a\n"},
    "a name like a package's": {"int8fx/ops/a.py": "from .numpy import f\n", "int8fx/ops/numpy.py": ""},
}  # fmt: skip
ILLEGAL = {
    "upwards": (
        {"int8fx/schemes/a.py": "import math\nfrom ..ops.b import f\n", "int8fx/ops/b.py": ""},
        ["int8fx/schemes/a.py:2: int8fx.schemes.a imports int8fx.ops.b; legal: schemes imports from no other folder"],
    ),
    "upwards, in a function": (
        {"int8fx/ops/a.py": "def f():\n    from ..conversion import b\n", "int8fx/conversion/b.py": ""},
        ["int8fx/ops/a.py:2: int8fx.ops.a imports int8fx.conversion.b; legal: ops imports from schemes"],
    ),
    "upwards, for types": (
        {"int8fx/graph/a.py": "if TYPE_CHECKING:\n    from int8fx.passes import b\n", "int8fx/passes/b.py": ""},
        ["int8fx/graph/a.py:2: int8fx.graph.a imports int8fx.passes.b; legal: graph imports from schemes, ops"],
    ),
    "upwards, by name": (
        {"int8fx/graph/a.py": "import importlib\nimportlib.import_module('int8fx.tools.b')\n", "int8fx/tools/b.py": ""},
        ["int8fx/graph/a.py:2: int8fx.graph.a imports int8fx.tools.b; legal: graph imports from schemes, ops"],
    ),
    "upwards, by a computed name": (
        {"int8fx/graph/a.py": "importlib.import_module(name=f'{x}.tools')\n__import__('int8fx.tools')\n",
         "int8fx/tools/__init__.py": ""},
        ["int8fx/graph/a.py:1: int8fx.graph.a imports f'{x}.tools'; legal: torch and the standard library; other "
         "packages in tools, integrations",
         "int8fx/graph/a.py:2: int8fx.graph.a imports int8fx.tools; legal: graph imports from schemes, ops"],
    ),
    "unknown folder": (
        {"int8fx/integrations/a.py": "from ..tools import b\n", "int8fx/tools/b.py": ""},
        ["int8fx/integrations/a.py:1: int8fx.integrations.a imports int8fx.tools.b; legal: integrations imports from "
         "schemes, ops, graph, passes, conversion, calibration"],
    ),
    "a circle": (
        {"int8fx/ops/a.py": "from .b import f\n", "int8fx/ops/b.py": "\ndef f():\n    from . import c\n",
         "int8fx/ops/c.py": "import int8fx.ops.a\nfrom .d import g\n", "int8fx/ops/d.py": ""},
        ["circle of modules: int8fx/ops/a.py:1: int8fx.ops.a imports int8fx.ops.b; int8fx/ops/b.py:3: int8fx.ops.b "
         "imports int8fx.ops.c; int8fx/ops/c.py:1: int8fx.ops.c imports int8fx.ops.a; legal: no circles"],
    ),
    "a circle through the package's face": (
        {"int8fx/__init__.py": "from .ops.a import f\n", "int8fx/ops/a.py": "from .. import version\n"},
        ["circle of modules: int8fx/__init__.py:1: int8fx imports int8fx.ops.a; int8fx/ops/a.py:1: int8fx.ops.a "
         "imports int8fx; legal: no circles"],
    ),
    "kernels that know int8fx": (
        {"triton_kernels/a.py": "from int8fx.schemes import b\n", "int8fx/schemes/b.py": ""},
        ["triton_kernels/a.py:1: int8fx.triton_kernels.a imports int8fx.schemes.b; legal: triton_kernels imports "
         "torch, triton and the standard library"],
    ),
    "kernels of another package": (
        {"triton_kernels/a.py": "def f():\n    import numpy\n"},
        ["triton_kernels/a.py:2: int8fx.triton_kernels.a imports numpy; legal: triton_kernels imports torch, triton "
         "and the standard library"],
    ),
    "kernels from another module of ops": (
        {"triton_kernels/a.py": "", "int8fx/ops/checks.py": "from ..triton_kernels.a import k\n"},
        ["int8fx/ops/checks.py:1: int8fx.ops.checks imports int8fx.triton_kernels.a; legal: triton_kernels is imported "
         "by int8fx.ops.gpu, int8fx.tools, int8fx.integrations"],
    ),
    "another package": (
        {"int8fx/conversion/a.py": "def f():\n    import transformers.utils\n"},
        ["int8fx/conversion/a.py:2: int8fx.conversion.a imports transformers.utils; legal: torch and the standard "
         "library; other packages in tools, integrations"],
    ),
    "two modules": (
        {"int8fx/terminal.py": "", "int8fx/utils.py": ""},
        ["int8fx/: modules utils; legal: imports, terminal, the rest in folders"],
    ),
    "an unknown folder": (
        {"int8fx/common/a.py": ""},
        ["int8fx/common/: an unknown folder; legal: schemes, ops, graph, passes, conversion, calibration, "
         "integrations, tools"],
    ),
    "a module for all that imports another package": (
        {"int8fx/imports.py": "import numpy\n"},
        ["int8fx/imports.py:1: int8fx.imports imports numpy; legal: torch and the standard library; other packages in "
         "tools, integrations"],
    ),
    "a module for all that knows one": (
        {"int8fx/terminal.py": "from .ops.a import f\n", "int8fx/ops/a.py": ""},
        ["int8fx/terminal.py:1: int8fx.terminal imports int8fx.ops.a; legal: terminal imports nothing of int8fx"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LEGAL)
def test_legal_trees_pass(tmp_path, name):
    assert write_tree(tmp_path, LEGAL[name]) == []


@pytest.mark.parametrize("name", ILLEGAL)
def test_illegal_trees_are_named_by_file_and_line(tmp_path, name):
    files, faults = ILLEGAL[name]
    assert write_tree(tmp_path, files) == faults


if __name__ == "__main__":
    print(describe(ROOT))
