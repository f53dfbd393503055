"""Installs the passes in Inductor when a process comes to use it. Importing this file does not import Inductor."""

from __future__ import annotations

from .. import imports

_INDUCTOR = "torch._inductor.config"  # it holds the lists of passes


def install_when_imported() -> None:
    """`inductor.install`, now if Inductor is imported, else when it is. A process that stays eager never imports it."""
    imports.forget(_INDUCTOR, _install)
    imports.when_imported(_INDUCTOR, _install)


def cancel() -> None:
    """Takes back an `install_when_imported` that has not happened."""
    imports.forget(_INDUCTOR, _install)


def _install() -> None:
    from .inductor import install

    install()
