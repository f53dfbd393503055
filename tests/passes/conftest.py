import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import config
from torch._inductor.utils import fresh_cache

from int8fx.passes.inductor import PASSES, install


@pytest.fixture
def from_scratch():
    """The passes are installed; Dynamo and the reports have forgotten what other tests compiled."""
    install()
    torch._dynamo.reset()
    counters.clear()
    PASSES.reports.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def nothing_installed(from_scratch):
    """Inductor's list of passes is as it comes, its caches are empty, and afterwards the list is as it was."""
    with config.patch(joint_custom_pre_pass=None), fresh_cache():
        yield


@pytest.fixture
def no_graphs_from_caches(from_scratch):
    """Passes and code generation run; compiled C++, which is stored according to its content, is used again."""
    with config.patch(fx_graph_cache=False), torch._functorch.config.patch(enable_autograd_cache=False):
        yield


@pytest.fixture
def empty_cache(from_scratch, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
