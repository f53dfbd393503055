"""The lanes, hypothesis' profiles, and the kernels that CPU tests run on.

Lanes: ``pytest -m fast`` runs every test that is not marked ``slow``, with fewer examples; ``pytest`` runs all;
``HYPOTHESIS_PROFILE=thorough pytest`` draws many more examples.
"""

import os

from support import hardware

if hardware.DEVICE:
    os.environ.pop("TRITON_INTERPRET", None)
else:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported: the kernels' tests need no GPU

import pytest
import torch
from hypothesis import HealthCheck, settings
from support.kernels import KERNELS, Kernels, torch_kernels

from int8fx.ops import native

torch.set_num_threads(1)  # the tensors are tiny: on a busy machine a second thread makes the tests ten times slower

_slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("fast", derandomize=True, deadline=None, max_examples=8, suppress_health_check=_slow)
settings.register_profile("ci", derandomize=True, deadline=None, max_examples=40, suppress_health_check=_slow)
settings.register_profile("thorough", deadline=None, max_examples=1500, suppress_health_check=_slow)
if hardware.DEVICE:
    hardware.install()


def pytest_configure(config: pytest.Config) -> None:
    lane = "fast" if config.option.markexpr == "fast" else "ci"
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", lane))


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow") is None:
            item.add_marker("fast")


def pytest_runtest_setup() -> None:
    torch.manual_seed(0)  # whatever ran before, and on whichever worker


@pytest.fixture(params=KERNELS, scope="module")
def kernels(request):
    """The ops' kernels for CPU tensors: the C++ ones, or torch's operators with either way to multiply codes."""
    if request.param == "native":
        assert native.load(), "there is no C++ compiler: this would test torch's operators again"
        yield Kernels("native")
    else:
        with torch_kernels(request.param):
            yield Kernels(request.param)


@pytest.fixture(params=("cpu", pytest.param("triton", marks=pytest.mark.slow)), scope="module")
def served_by(request):
    """What serves the ops of CPU tensors: the CPU kernels, or the Triton kernels in the interpreter."""
    if request.param == "cpu":
        yield request.param
        return
    from support import interpreter

    with interpreter.cpu_tensors_on_triton():
        yield request.param
