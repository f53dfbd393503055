"""`imports.when_imported`: callbacks of packages that are imported later, or never."""

import importlib
import sys
import threading

import pytest

from int8fx import imports


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package ``later`` with a module ``inner``, not imported yet."""
    folder = tmp_path / "later"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "inner.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "later.inner"
    for name in ("later", "later.inner"):
        sys.modules.pop(name, None)


def test_runs_once_and_after_the_module(package):
    seen = []
    imports.when_imported(package, lambda: seen.append(sys.modules[package].value))
    assert seen == []
    module = importlib.import_module(package)
    assert seen == [1]
    assert module.__spec__.loader is module.__loader__
    assert type(module.__loader__).__name__ == "SourceFileLoader"
    importlib.reload(module)
    assert seen == [1]


def test_runs_at_once_if_the_module_is_there():
    seen = []
    imports.when_imported("sys", lambda: seen.append(1))
    assert seen == [1]


def test_other_imports_are_left_alone_and_the_finder_goes(package):
    before = list(sys.meta_path)
    imports.when_imported(package, lambda: None)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("later.missing")
    importlib.import_module(package)
    assert sys.meta_path == before


def test_a_callback_that_is_there_twice_runs_once(package):
    seen = []
    callback = lambda: seen.append(1)  # noqa: E731  the same object twice
    imports.when_imported(package, callback)
    imports.when_imported(package, callback)
    importlib.import_module(package)
    assert seen == [1]


def test_an_error_is_raised_by_the_import(package):
    def broken():
        raise RuntimeError("no")

    imports.when_imported(package, broken)
    with pytest.raises(RuntimeError, match="no"):
        importlib.import_module(package)


def test_many_threads(package):
    seen = []
    imports.when_imported(package, lambda: seen.append(1))
    threads = [threading.Thread(target=importlib.import_module, args=(package,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [1]
