"""`imports.when_imported`: callbacks of packages that are imported later, or never."""

import importlib
import importlib.util
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from int8fx import imports

MODULE = "later.inner"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package ``later`` with the module `MODULE`, not imported yet; the folder that holds it."""
    folder = tmp_path / "later"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "inner.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(imports, "_pending", {})
    monkeypatch.setattr(sys, "meta_path", [finder for finder in sys.meta_path if finder is not imports._FINDER])
    yield folder
    forget()


def forget():
    for name in ("later", MODULE):
        sys.modules.pop(name, None)


def test_runs_once_and_after_the_module(package):
    seen = []
    imports.when_imported(MODULE, lambda: seen.append(sys.modules[MODULE].value))
    assert seen == []
    module = importlib.import_module(MODULE)
    assert seen == [1]
    assert module.__spec__.loader is module.__loader__
    assert type(module.__loader__).__name__ == "SourceFileLoader"
    importlib.reload(module)
    assert seen == [1]


def test_runs_at_once_if_the_module_is_there(package):
    before, seen = list(sys.meta_path), []
    for _ in range(2):
        imports.when_imported("sys", lambda: seen.append(1))
    assert seen == [1, 1]
    assert sys.meta_path == before


def test_other_imports_are_left_alone_and_the_finder_goes(package):
    before = list(sys.meta_path)
    imports.when_imported(MODULE, lambda: None)
    assert sys.meta_path == [imports._FINDER, *before]
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("later.missing")
    importlib.import_module(MODULE)
    assert sys.meta_path == before


def test_a_module_that_does_not_exist_is_not_found(package):
    imports.when_imported("later.missing", lambda: None)
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'later\.missing'"):
        importlib.import_module("later.missing")
    assert importlib.util.find_spec("later.missing") is None


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=12))
def test_what_is_asked_for_and_not_cancelled_runs_once_in_order(calls):
    """``calls``: which callback, and whether it is registered or cancelled."""
    name, seen, expected = "int8fx_missing", [], []
    callbacks = {letter: (lambda letter=letter: seen.append(letter)) for letter in "abc"}
    for letter, registered in calls:
        (imports.when_imported if registered else imports.cancel)(name, callbacks[letter])
        if not registered and letter in expected:
            expected.remove(letter)
        elif registered and letter not in expected:
            expected.append(letter)
    assert (imports._FINDER in sys.meta_path) >= bool(expected)
    spec = importlib.util.spec_from_loader(name, imports._Loader(Empty()))
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert seen == expected
    assert name not in imports._pending


class Empty:
    """The loader of a module without code."""

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        pass


def test_the_finder_goes_when_the_last_is_cancelled(package):
    before, keep, drop = list(sys.meta_path), (lambda: None), (lambda: None)
    imports.when_imported(MODULE, keep)
    imports.when_imported(MODULE, drop)
    imports.cancel(MODULE, drop)
    assert sys.meta_path == [imports._FINDER, *before]
    imports.cancel(MODULE, keep)
    imports.cancel(MODULE, keep)
    assert sys.meta_path == before


def test_an_error_is_raised_by_the_import_and_the_others_run(package):
    seen = []

    def broken():
        raise RuntimeError("no")

    imports.when_imported(MODULE, broken)
    imports.when_imported(MODULE, lambda: seen.append(1))
    with pytest.raises(RuntimeError, match="no"):
        importlib.import_module(MODULE)
    assert seen == [1]
    assert importlib.import_module(MODULE).value == 1  # the next try is left alone


def test_a_module_that_fails_stays_pending(package):
    seen = []
    (package / "inner.py").write_text("raise ValueError('first')\n")
    imports.when_imported(MODULE, lambda: seen.append(1))
    with pytest.raises(ValueError, match="first"):
        importlib.import_module(MODULE)
    assert seen == []
    (package / "inner.py").write_text("value = 'of the second try'\n")
    importlib.invalidate_caches()
    importlib.import_module(MODULE)
    assert seen == [1]


def test_many_threads(package):
    seen = []
    imports.when_imported(MODULE, lambda: seen.append(1))
    in_threads(8, lambda: importlib.import_module(MODULE))
    assert seen == [1]


def test_while_another_thread_imports(package):
    """The callback waits until the module is complete, whether or not the finder saw its import begin."""
    (package / "inner.py").write_text(
        "import later\nlater.started.set()\nassert later.goes_on.wait(60)\nvalue = 'complete'\n"
    )
    for registered_before in (False, True):
        import later

        later.started, later.goes_on, seen = threading.Event(), threading.Event(), []
        if registered_before:
            imports.when_imported(MODULE, lambda seen=seen: seen.append("before"))
        importing = threading.Thread(target=importlib.import_module, args=(MODULE,))
        importing.start()
        assert later.started.wait(60)
        note = lambda seen=seen: seen.append(getattr(sys.modules[MODULE], "value", "part"))  # noqa: E731
        registering = threading.Thread(target=imports.when_imported, args=(MODULE, note))
        registering.start()
        later.goes_on.set()
        importing.join()
        registering.join()
        assert seen == ["before"] * registered_before + ["complete"]
        forget()


def in_threads(count, call):
    threads = [threading.Thread(target=call) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class AsksAll:
    """A finder of somebody else that does the same, with ``importlib.util.find_spec``, which asks all finders."""

    def __init__(self):
        self.busy, self.found = False, 0

    def find_spec(self, name, path=None, target=None):
        if self.busy or name != MODULE:
            return None
        self.busy = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.busy = False
        self.found += 1
        return spec


@pytest.mark.parametrize("first", [True, False])
def test_another_finder_of_the_same_kind(package, first):
    other, seen = AsksAll(), []
    if not first:
        sys.meta_path.insert(0, other)
    imports.when_imported(MODULE, lambda: seen.append(1))
    if first:
        sys.meta_path.insert(0, other)
    assert importlib.import_module(MODULE).__loader__.path.endswith("inner.py")
    assert seen == [1]
    assert other.found


def test_finders_without_find_spec_are_passed_over(package):
    sys.meta_path.insert(0, object())
    imports.when_imported("inner", lambda: None)
    assert imports._FINDER.find_spec("inner", [str(package)]).origin == str(package / "inner.py")


def test_a_lazily_loaded_module_runs_it_when_it_is_loaded(package):
    """``importlib.util.LazyLoader`` takes the spec, and executes the module at its first use."""
    seen = []
    imports.when_imported(MODULE, lambda: seen.append(1))
    spec = importlib.util.find_spec(MODULE)
    spec.loader = importlib.util.LazyLoader(spec.loader)
    module = importlib.util.module_from_spec(spec)
    sys.modules[MODULE] = module
    spec.loader.exec_module(module)
    assert seen == []
    assert module.value == 1
    assert seen == [1]
