import os

from support import hardware

if hardware.DEVICE:
    os.environ.pop("TRITON_INTERPRET", None)
else:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported: the kernels' tests need no GPU

import pytest
import torch
from hypothesis import HealthCheck, settings

from int8fx import ops
from int8fx.ops import fallback as cpu
from int8fx.ops import native

torch.set_num_threads(1)  # the tensors are tiny: on a busy machine a second thread makes the tests ten times slower

_slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("ci", derandomize=True, deadline=None, max_examples=40, suppress_health_check=_slow)
settings.register_profile("thorough", deadline=None, max_examples=1500, suppress_health_check=_slow)
if hardware.DEVICE:
    hardware.install()
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_runtest_setup() -> None:
    torch.manual_seed(0)  # whatever ran before, and on whichever worker


KERNELS = ("native", "float_gemm", "int_mm")


@pytest.fixture(params=KERNELS, scope="module")
def kernels(request):
    """What has ``linear``, ``quantize_rowwise``, ...: the ops (so the C++ kernels), or torch's operators either way."""
    if request.param == "native":
        assert native.load(), "there is no C++ compiler: this would test torch's operators again"
        yield ops
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "has_fast_int_mm", lambda: request.param == "int_mm")
        yield cpu


@pytest.fixture(params=("cpu", "triton"), scope="module")
def served_by(request):
    """What serves the ops of CPU tensors: the CPU kernels, or the Triton kernels in the interpreter."""
    if request.param == "cpu":
        yield request.param
        return
    from support import interpreter

    with interpreter.cpu_tensors_on_triton():
        yield request.param
