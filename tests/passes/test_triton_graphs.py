"""The tests of the passes again, with every int8fx op on the Triton kernels in the interpreter."""

import pytest
import test_fold
import test_lower
import test_share
from support import interpreter
from test_fold import *  # noqa: F403
from test_fold import test_dynamic_shapes as test_dynamic_shapes_fold  # noqa: F401
from test_fold import test_near_miss_is_left as test_near_miss_is_left_by_fold  # noqa: F401
from test_lower import *  # noqa: F403
from test_share import *  # noqa: F403


@pytest.fixture(autouse=True, scope="module")
def on_triton():
    with interpreter.cpu_tensors_on_triton():
        yield


def test_no_test_hides_another_of_the_same_name():
    here = {value for value in globals().values() if callable(value)}
    for module in (test_fold, test_lower, test_share):
        assert {f for name, f in vars(module).items() if name.startswith("test_") and callable(f)} <= here
