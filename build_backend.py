"""Builds wheels by setuptools. A wheel carries the compiled CPU kernels, for each Python and torch of its platform.

The environment variable ``INT8FX_KERNELS=none`` builds a wheel without them, which needs no C++ compiler: the kernels
are then compiled where it is used. So are those of an editable install.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  the hooks of PEP 517
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

KERNELS = os.environ.get("INT8FX_KERNELS", "all")
if KERNELS not in ("all", "none"):
    raise SystemExit(f"INT8FX_KERNELS is {KERNELS!r}; legal: 'all', 'none'")


def get_requires_for_build_wheel(config_settings=None):
    """The kernels are compiled with torch's headers."""
    needed = build_meta.get_requires_for_build_wheel(config_settings)
    return needed if KERNELS == "none" else [*needed, "torch>=2.13"]


class BuildWithKernels(build_py):
    """Adds the libraries of `int8fx.ops.native` to the package."""

    def run(self) -> None:
        super().run()
        if KERNELS == "none" or self.editable_mode:
            return
        sys.path.insert(0, str(Path(__file__).parent))
        from int8fx.ops import native

        folder = Path(self.build_lib, "int8fx", "ops", native.CARRIED.name)
        folder.mkdir(parents=True, exist_ok=True)
        for library in (*native.INSTRUCTION_SETS, native.AUTOGRAD):
            try:
                shutil.copy2(native.build(library), folder / f"{library.name}.so")
            except (ImportError, RuntimeError) as error:
                raise SystemExit(f"{error}; INT8FX_KERNELS=none builds a wheel without compiled kernels") from error


class PlatformWheel(bdist_wheel):
    """A wheel for one platform and any version of Python."""

    def finalize_options(self) -> None:
        self.distribution.has_ext_modules = lambda: KERNELS == "all"
        super().finalize_options()

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]
