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
        known = _are_plain(codes, scale) and may_read(codes)
        self.digests = (digest(codes), digest(scale)) if known else None

    def accepts(self, codes: Tensor, scale: Tensor) -> bool:
        """False if codes have changed and the scale has not. Otherwise takes both. To be asked where `may_read`."""
        if not _are_plain(codes, scale):
            return True
        found = digest(codes), digest(scale)
        if self.digests is not None and found[0] != self.digests[0] and found[1] == self.digests[1]:
            return False
        self.digests = found
        return True


def may_read(tensor: Tensor) -> bool:
    """Whether values of ``tensor`` may be read now: operators are not recorded, faked or captured for CUDA graphs."""
    if is_traced() or _get_dispatch_mode(_TorchDispatchModeKey.FAKE) is not None:
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def _are_plain(*tensors: Tensor) -> bool:
    return all(type(t) in (Tensor, nn.Parameter) and is_readable(t) for t in tensors)


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
