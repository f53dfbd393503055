"""``when_imported``: code that runs when another package is imported, if it ever is."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

Callback = Callable[[], object]

_lock = threading.Lock()
_pending: dict[str, list[Callback]] = {}


def when_imported(module: str, callback: Callback) -> None:
    """Calls ``callback`` now if ``module`` is imported, and otherwise once, right after its first import.

    So int8fx takes part in packages that the process may never import, and does not import them itself. The same
    callback twice is called once. An error of ``callback`` is raised by the import. While something is pending, a
    finder stands first in ``sys.meta_path``.
    """
    with _lock:
        if module not in sys.modules or module in _pending:
            callbacks = _pending.setdefault(module, [])
            if callback not in callbacks:
                callbacks.append(callback)
            if _FINDER not in sys.meta_path:
                sys.meta_path.insert(0, _FINDER)
            return
    importlib.import_module(module)  # waits, if another thread is still importing it
    callback()


def cancel(module: str, callback: Callback) -> None:
    """Forgets what ``when_imported`` was given, if it has not been called yet."""
    with _lock:
        others = [other for other in _pending.pop(module, ()) if other != callback]
        if others:
            _pending[module] = others
        _leave()


def _leave() -> None:
    if not _pending and _FINDER in sys.meta_path:
        sys.meta_path.remove(_FINDER)


def _call(callbacks: Sequence[Callback]) -> None:
    """Calls all of ``callbacks``, also if one raises."""
    if callbacks:
        try:
            callbacks[0]()
        finally:
            _call(callbacks[1:])


class _Finder(MetaPathFinder):
    """Lets the other finders find a pending module, and gives it a loader that runs its callbacks."""

    def __init__(self) -> None:
        self.local = threading.local()

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        searching = self.local.__dict__.setdefault("names", set())
        if fullname not in _pending or fullname in searching:  # the latter: asked by a finder that asks all others
            return None
        searching.add(fullname)
        try:
            spec = _find_elsewhere(fullname, path, target)
        finally:
            searching.remove(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def _find_elsewhere(*wanted: Any) -> ModuleSpec | None:
    finders = [getattr(finder, "find_spec", None) for finder in sys.meta_path if finder is not _FINDER]
    return next((spec for find in finders if find is not None and (spec := find(*wanted)) is not None), None)


class _Loader(Loader):
    """The loader of a module, and what is to run after it. The module itself keeps ``loader`` alone."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # a copy that has nothing yet
            raise AttributeError(name)
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> Any:
        return self.loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        with _lock:
            callbacks = _pending.pop(module.__name__, [])
            _leave()
        _call(callbacks)


_FINDER = _Finder()
