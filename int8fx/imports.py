"""``when_imported``: code that runs when another package is imported, if it is."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from typing import Any

_lock = threading.RLock()
_pending: dict[str, list[Callable[[], None]]] = {}


def when_imported(module: str, callback: Callable[[], None]) -> None:
    """Calls ``callback`` now if ``module`` is imported, and otherwise once, right after its first import.

    So int8fx takes part in packages that the process may never import, and does not import them itself. An error of
    ``callback`` is raised by the import. While something is pending, a finder stands first in ``sys.meta_path``.
    """
    with _lock:
        if module not in sys.modules:
            callbacks = _pending.setdefault(module, [])
            if callback not in callbacks:
                callbacks.append(callback)
            if _FINDER not in sys.meta_path:
                sys.meta_path.insert(0, _FINDER)
            return
    callback()


def _leave() -> None:
    if not _pending and _FINDER in sys.meta_path:
        sys.meta_path.remove(_FINDER)


class _Finder(MetaPathFinder):
    """Lets the other finders find a pending module, and runs its callbacks after its loader."""

    def __init__(self) -> None:
        self.searching = threading.local()

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname not in _pending or getattr(self.searching, "now", False):
            return None
        self.searching.now = True
        try:
            spec = find_spec(fullname)
        finally:
            self.searching.now = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """The loader of a module, and what is to run after it."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> Any:
        return self.loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        with _lock:
            callbacks = _pending.pop(module.__name__, [])
            _leave()
        for callback in callbacks:
            callback()


_FINDER = _Finder()
