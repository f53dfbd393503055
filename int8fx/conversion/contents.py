"""Whether the codes and the scale of a packed weight still belong together.

Code that copies ``parameters()`` alone gives a model the codes of another one and leaves the scales, which are buffers.
So a packed weight keeps a digest of both from when int8fx wrote them, and compares it once codes were written again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _get_dispatch_mode, _TorchDispatchModeKey

from .loading import is_readable
from .view import is_traced

_ROW = 4096  # bytes


def digest(tensor: Tensor) -> int:
    """``sum_i (2 i + 1) * sum_j words[i, j]`` in int64, for the bytes of ``tensor`` as rows of 512 words of 8 bytes.

    Zeros fill the last row. It is the same on every device.
    """
    if not tensor.numel():
        return 0
    data = tensor.detach().contiguous().view(-1).view(torch.int8)
    if data.numel() % _ROW or data.storage_offset() % 8:
        data = torch.cat([data, data.new_zeros(-data.numel() % _ROW)])
    rows = data.view(torch.int64).view(data.numel() // _ROW, _ROW // 8).sum(-1)
    return int((rows * torch.arange(1, 2 * rows.numel() + 1, 2, device=rows.device)).sum())


class Contents:
    """What the codes and the scale of a packed weight held when they were known to belong together.

    Tied weights share one.
    """

    digests: tuple[int, int] | None = None  # of codes and scale; None: unknown, and what is found next is right

    def take(self, codes: Tensor, scale: Tensor) -> None:
        """They belong together."""
        self.digests = (digest(codes), digest(scale)) if has_values(codes, scale) else None

    def accepts(self, codes: Tensor, scale: Tensor) -> bool:
        """False if codes have changed and the scale has not. Otherwise takes both."""
        before = self.digests
        self.take(codes, scale)
        if before is None or self.digests is None or before[0] == self.digests[0] or before[1] != self.digests[1]:
            return True
        self.digests = before
        return False


def has_values(*tensors: Tensor) -> bool:
    """Whether these are plain tensors whose values can be read now, without being recorded."""
    if is_traced() or _get_dispatch_mode(_TorchDispatchModeKey.FAKE) is not None:
        return False
    if any(type(t) not in (Tensor, nn.Parameter) or not is_readable(t) for t in tensors):
        return False
    return not (tensors[0].is_cuda and torch.cuda.is_current_stream_capturing())


def version(codes: Tensor | None) -> int | None:
    """How often ``codes`` were written; None where nobody counts it."""
    return None if codes is None or codes.is_inference() else codes._version


class Checked(dict[str, tuple[Tensor | None, int | None]]):
    """Name of a packed weight -> its format tensor, and the `version` of its codes, when both were last accepted.

    A copy is empty: its tensors are others, and count anew.
    """

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return type(self), ()


UNCHECKED: tuple[Any, int | None] = ((), None)
"""For a weight that is not in it: a format and a version that no tensor has."""
