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

SLOW = (
    "tests/test_examples.py",
    "tests/tools/test_audit.py::test_every_shipped_tile_compiles",
    "tests/tools/test_demo.py",
    "tests/tools/bench/test_check.py",
    "tests/tools/bench/test_memory.py::test_a_process_reports_its_memory",
    "tests/tools/bench/test_memory.py::test_bytes_of_a_converted_model",
    "tests/conversion/test_compiled.py",
    "tests/conversion/test_interruptions.py::test_float_weights_of_graphs_are_freed_one_by_one",
    "tests/conversion/test_interruptions.py::test_peak_memory_is_the_source_model_plus_one_layer",
    "tests/conversion/test_packed.py::test_a_pickled_model_opens_in_a_fresh_process",
    "tests/ops/test_gpu.py::test_a_model_is_lowered_shared_folded_and_as_exact_as_on_the_cpu",
    "tests/ops/test_gpu.py::test_a_rotated_row_has_the_same_bits_in_every_batch",
    "tests/ops/test_gpu.py::test_opcheck",
    "tests/passes/test_export.py::test_models_export",
    "tests/triton_kernels/test_int8_matmul.py::test_a_row_depends_on_no_other_row_and_no_split",
    "tests/triton_kernels/test_int8_matmul.py::test_many_rows_gather",
    "tests/triton_kernels/test_weight_only.py::test_a_row_depends_on_no_other_row",
)
"""How the ids of slow tests begin, where a file does not mark them itself."""


def pytest_configure(config: pytest.Config) -> None:
    lane = "fast" if config.option.markexpr == "fast" else "ci"
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", lane))


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.nodeid.startswith(SLOW):
            item.add_marker("slow")
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
