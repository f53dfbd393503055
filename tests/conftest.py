import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported: the kernels' tests need no GPU

import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)  # the tensors are tiny: on a busy machine a second thread makes the tests ten times slower

_slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("ci", derandomize=True, deadline=None, max_examples=40, suppress_health_check=_slow)
settings.register_profile("thorough", deadline=None, max_examples=1500, suppress_health_check=_slow)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_runtest_setup() -> None:
    torch.manual_seed(0)  # whatever ran before, and on whichever worker
