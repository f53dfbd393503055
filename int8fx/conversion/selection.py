"""``select`` and ``skip``: which layers of a model are to be converted."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

from torch import nn

Selection = str | Iterable[str] | Callable[[str, nn.Module], bool]


class Names:
    """A selection of layers by name patterns or by a function of name and module.

    A pattern matches a layer's whole dotted name (``*`` and ``?`` as in file names), or a run of whole parts of it:
    ``lm_head``, ``layers.0``, ``mlp.down_proj``, ``model.layers.*.q_proj``.
    """

    def __init__(self, selection: Selection, argument: str) -> None:
        self.argument = argument
        self.function = selection if callable(selection) else None
        legal = f"int8fx.convert: {argument} takes name patterns or a function (name, module) -> bool"
        if not isinstance(selection, Iterable) and not callable(selection):
            raise TypeError(f"{legal}, found {selection!r}")
        self.patterns = [] if callable(selection) else [selection] if isinstance(selection, str) else list(selection)
        for pattern in self.patterns:
            if not isinstance(pattern, str):
                raise TypeError(f"{legal}, found {pattern!r}")
        self.unused = set(self.patterns)

    def __call__(self, name: str, module: nn.Module) -> bool:
        if self.function is not None:
            return bool(self.function(name, module))
        hits = [p for p in self.patterns if fnmatchcase(name, p) or f".{p}." in f".{name}."]
        self.unused.difference_update(hits)
        return bool(hits)

    def check_all_used(self, names: Iterable[str]) -> None:
        """Raises ValueError for patterns that matched none of ``names``: most likely a typing error."""
        if self.unused:
            pattern = min(self.unused)
            close = difflib.get_close_matches(pattern, _runs(names, pattern.count(".") + 1), n=3, cutoff=0.4)
            hint = f"; close: {', '.join(close)}" if close else ""
            raise ValueError(f"int8fx.convert: {self.argument}: {pattern!r} matches no layer of this model{hint}")


class Choice:
    """``select`` and ``skip`` together."""

    def __init__(self, select: Selection | None = None, skip: Selection = ()) -> None:
        self._select = None if select is None else Names(select, "select")
        self._skip = Names(skip, "skip")

    @property
    def by_default(self) -> bool:
        """Whether nothing was selected, so that `convert` chooses by its defaults."""
        return self._select is None

    def selects(self, names: Iterable[str], module: nn.Module) -> bool:
        return self._select is not None and _matches(self._select, names, module)

    def skips(self, names: Iterable[str], module: nn.Module) -> bool:
        return _matches(self._skip, names, module)

    def check_all_used(self, names: list[str]) -> None:
        """Raises ValueError for patterns that matched none of ``names``."""
        for selection in (self._select, self._skip):
            if selection is not None:
                selection.check_all_used(names)


def _matches(selection: Names, names: Iterable[str], module: nn.Module) -> bool:
    hits = [selection(name, module) for name in names]  # all of them: each pattern that matches counts as used
    return any(hits)


def _runs(names: Iterable[str], length: int) -> list[str]:
    """All runs of ``length`` parts of the dotted ``names``, and shorter names as they are, each once."""
    runs: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        starts = range(max(1, len(parts) - length + 1))
        runs.update((".".join(parts[i : i + length]), None) for i in starts)
    return list(runs)
