"""Runs batches through a model block by block: all of them through one block, before any enters the next."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence

import torch
from torch import nn


class _Stopped(BaseException):
    """Ends a batch that waits at a block."""


class _Batch(threading.Thread):
    """Runs ``call`` in a thread of its own, which waits at each block until `advance`."""

    def __init__(self, call: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self.call, self.done, self.stopped = call, False, False
        self.error: BaseException | None = None
        self._go, self._waits = threading.Semaphore(0), threading.Semaphore(0)
        self.start()

    def run(self) -> None:
        self._go.acquire()
        try:
            if not self.stopped:
                self.call()
        except _Stopped:
            pass
        except BaseException as error:  # raised again by `advance`, in the caller's thread
            self.error = error
        finally:
            self.done = True
            self._waits.release()

    def wait(self) -> None:
        """Called in this thread, at a block."""
        self._waits.release()
        self._go.acquire()
        if self.stopped:
            raise _Stopped

    def advance(self) -> None:
        """Runs it to the next block, or to its end."""
        self._go.release()
        self._waits.acquire()
        if self.error is not None:
            raise self.error

    def stop(self) -> None:
        self.stopped = True
        self._go.release()
        self.join()


def stages(model: nn.Module, calls: Sequence[Callable[[], object]]) -> Generator[int, None, None]:
    """Runs ``calls``, each of which runs ``model`` on a batch, and yields 0, 1 ... when all have come as far.

    Stage 0 is what comes before the first of `blocks_of` the model, stage i the part up to the block after. Between two
    stages a batch is a thread that waits, with the tensors that its forward holds. One thread runs at a time, with the
    caller's grad mode and autocast. An exception of a call is raised here, and ends the others.
    """

    def at_block(module: nn.Module, args: object) -> None:
        thread = threading.current_thread()
        if isinstance(thread, _Batch):
            thread.wait()

    handles = [block.register_forward_pre_hook(at_block, prepend=True) for block in blocks_of(model)]
    batches: list[_Batch] = []
    try:
        batches += [_Batch(_as_here(call)) for call in calls]
        running, stage = batches, 0
        while running:
            for batch in running:
                batch.advance()
            running = [batch for batch in running if not batch.done]
            yield stage
            stage += 1
    finally:
        for batch in batches:
            if not batch.done:
                batch.stop()
        for handle in handles:
            handle.remove()


def _as_here(call: Callable[[], object]) -> Callable[[], None]:
    """``call`` with the grad mode and the autocast of this thread: torch keeps both for each thread."""
    grad = torch.is_grad_enabled()
    devices = [d for d in ("cpu", "cuda") if torch.is_autocast_enabled(d)]
    dtypes = [torch.get_autocast_dtype(d) for d in devices]

    def run() -> None:
        with torch.set_grad_enabled(grad):
            contexts = [torch.autocast(d, dtype=dtype) for d, dtype in zip(devices, dtypes, strict=True)]
            for context in contexts:
                context.__enter__()
            try:
                call()
            finally:
                for context in reversed(contexts):
                    context.__exit__(None, None, None)

    return run


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a model: the modules of each ``nn.ModuleList`` and ``nn.Sequential`` that is in no other.

    Modules without Parameters are left out.
    """
    blocks: dict[nn.Module, None] = {}
    inside: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and module not in inside:
            blocks.update((child, None) for child in module if any(True for _ in child.parameters()))
            inside.update(module.modules())
    return list(blocks)
