"""Inductor's code for a GPU that is not there: it asks for the device's properties, which are read from paper here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest import mock

import torch
from torch import fx
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import scheduler
from torch._inductor.codegen.common import init_backend_registration
from torch._inductor.debug import DebugContext
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses import FakeTensorMode

H100 = SimpleNamespace(
    name="H100",
    gcnArchName="",
    major=9,
    minor=0,
    warp_size=32,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_block_optin=232448,
    total_memory=80 << 30,
)


@contextmanager
def _on_paper() -> Iterator[None]:
    interface = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda device=None: H100,
    }
    with ExitStack() as stack:
        for name, function in interface.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, function))
            stack.enter_context(mock.patch.object(CudaInterface, name, staticmethod(function)))
        for module, name, value in (
            (torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
            (CudaInterface, "get_compute_capability", staticmethod(lambda device=None: 90)),
            (torch.utils._triton, "triton_hash_with_backend", lambda: "of paper"),
            (scheduler, "has_triton", lambda: True),
        ):
            stack.enter_context(mock.patch.object(module, name, value))
        yield


def triton_code(graph: fx.Graph, mode: FakeTensorMode) -> str:
    """The Python module that Inductor writes for ``graph``, whose placeholders are fakes of ``mode`` on "cuda"."""
    inputs = [node.meta["val"] for node in graph.find_nodes(op="placeholder")]
    with _on_paper():
        init_backend_registration()
        lowering = GraphLowering(fx.GraphModule({}, graph), example_inputs=inputs, is_inference=True)
        handlers = V.set_graph_handler(lowering), V.set_fake_mode(mode), V.set_debug_handler(DebugContext())
        with ExitStack() as stack:
            for handler in (*handlers, torch.no_grad()):
                stack.enter_context(handler)
            lowering.run(*inputs)
            return lowering.codegen()[0].value
