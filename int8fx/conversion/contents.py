"""Whether the codes and the scale of a packed weight still belong together.

Code that copies ``parameters()`` alone gives a model the codes of another one and leaves the scales, which are buffers.
So a packed weight keeps a digest of both from when int8fx wrote them, and compares it once its codes are other ones:
another tensor, memory elsewhere, or another count of writes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar
from weakref import WeakValueDictionary

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
    data = _bytes(tensor)
    return _digest_of_rows(data, 0, data.numel())


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.int8)


def _digest_of_rows(data: Tensor, start: int, stop: int) -> int:
    """The part of the digest of ``data`` from the rows that hold its bytes ``start`` to ``stop - 1``."""
    if start == stop:
        return 0
    first, last = start // _ROW, -(-stop // _ROW)
    data = data[first * _ROW : last * _ROW]
    if data.numel() % _ROW or data.storage_offset() % 8:
        data = torch.cat([data, data.new_zeros(-data.numel() % _ROW)])
    rows = data.view(torch.int64).view(last - first, _ROW // 8).sum(-1)
    return int((rows * torch.arange(2 * first + 1, 2 * last + 1, 2, device=rows.device)).sum())


# ---- codes that were read --------------------------------------------------------------------------------------------

READ = "_int8fx_read"
"""The attribute of codes that holds a `Read`. Code that replaces codes by a new tensor leaves it behind, and
``torch.utils.swap_tensors`` swaps it."""

PAIR = "_int8fx_pair"
"""The attribute of a scale that holds the digests of its codes and of itself."""

Read = tuple[int | None, int, int]
"""``(version, address, digest)``: how often a tensor had been written (None where nobody counts it), where its memory
was and the digest of what it held. Plain integers: pickles of the tensor name no class of int8fx."""


def _state(codes: Tensor) -> tuple[int | None, int]:
    return None if codes.is_inference() else codes._version, codes.data_ptr()


def read_of(codes: Tensor) -> Read | None:
    """What ``codes`` held when they were read, if torch knows of no write since."""
    read = codes.__dict__.get(READ)
    return read if read is not None and read[:2] == _state(codes) else None


def _set_read(codes: Tensor, found: int) -> None:
    setattr(codes, READ, (*_state(codes), found))


def follow(codes: Tensor, read: Read) -> bool:
    """Whether ``codes`` are those of ``read`` but for where their memory is. Then their `Read` says where it is."""
    if codes.__dict__.get(READ) is not read or _state(codes)[0] != read[0]:
        return False
    _set_read(codes, read[2])
    return True


_UNREAD: Read = (None, -1, 0)
"""A `Read` that no tensor has."""

Accepted = tuple[Any, Read, int | None, int]
"""``(format, read, version, address)``: a format tensor, the `Read` of codes, and two of its parts, which each call
compares."""


class Checked(dict[str, Accepted]):
    """Name of a packed weight -> its format tensor and its codes when both were last accepted.

    A copy is empty: its tensors are others.
    """

    def accept(self, name: str, form: Tensor | None, codes: Tensor) -> None:
        read = codes.__dict__.get(READ, _UNREAD)
        self[name] = form, read, read[0], read[1]

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return type(self), ()


UNCHECKED: Accepted = ((), _UNREAD, *_UNREAD[:2])
"""For a weight that is not in `Checked`: what no tensors have."""


# ---- codes and scales that belong together ---------------------------------------------------------------------------


class _Scale:
    """The scale of packed weights of this process, by its digest and the shape of the codes."""

    known: ClassVar[WeakValueDictionary[tuple, _Scale]] = WeakValueDictionary()


class _Pair:
    """Codes and scale of a packed weight of this process, by their digests and the shape of the codes."""

    known: ClassVar[WeakValueDictionary[tuple, _Pair]] = WeakValueDictionary()

    def __init__(self, scale: _Scale) -> None:
        self.scale = scale


_TELLING = 4
"""Channels. So many scales are not equal by chance; fewer can be: absmax of 16 bits takes about a hundred values."""


class Contents:
    """What the codes and the scale of a packed weight held when they were known to belong together.

    Tied weights share one.
    """

    digests: tuple[int, int] | None = None  # of codes and scale; None: unknown, and what is found next is right
    _pair: _Pair | None = None

    def take(self, codes: Tensor, scale: Tensor) -> None:
        """They belong together."""
        codes.__dict__.pop(READ, None)
        if _are_plain(codes, scale) and may_read(codes):
            self._know(codes, scale, (digest(codes), digest(scale)))
        else:
            scale.__dict__.pop(PAIR, None)
            self.digests = self._pair = None

    def accepts(self, codes: Tensor, scale: Tensor) -> bool:
        """False if the scale is known to belong to other codes only; else takes both. To be asked where `may_read`.

        It is known if it is the one from before, or that of another packed weight of this process.
        """
        if not _are_plain(codes, scale) or codes.is_floating_point():
            return True
        found = _read(codes), digest(scale)
        pair, of_scale = _keys(codes, found)
        own = [known for known in (self.digests, scale.__dict__.get(PAIR)) if known is not None]
        if pair not in _Pair.known and found not in own:
            if any(known[1] == found[1] for known in own):
                return False
            if self.digests is not None and of_scale in _Scale.known and scale.numel() >= _TELLING:
                return False
        self._know(codes, scale, found)
        return True

    @contextmanager
    def writing(self, codes: Tensor, scale: Tensor, rows: range) -> Iterator[None]:
        """Takes both after a context that writes ``rows`` of them, counted through all experts, and nothing else.

        They belong together before it. Only these rows of the codes are read.
        """
        known = self.digests
        if known is None or not (may_read(codes) and _are_plain(codes, scale)):
            yield
            self.take(codes, scale)
            return
        total = codes.shape[:-1].numel()
        before = _part(codes, rows, total)
        yield
        codes.__dict__.pop(READ, None)
        self._know(codes, scale, (_int64(known[0] - before + _part(codes, rows, total)), digest(scale)))

    def _know(self, codes: Tensor, scale: Tensor, digests: tuple[int, int]) -> None:
        if read_of(codes) is None:
            _set_read(codes, digests[0])
        setattr(scale, PAIR, digests)
        self.digests = digests
        pair, of_scale = _keys(codes, digests)
        self._pair = _Pair.known.setdefault(pair, _Pair(_Scale.known.setdefault(of_scale, _Scale())))

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return type(self), (), None if self.digests is None else {"digests": self.digests}


def _read(codes: Tensor) -> int:
    """The digest of ``codes``, which are read if torch may know of a write since they were."""
    read = read_of(codes)
    return digest(codes) if read is None else read[2]


def _keys(codes: Tensor, digests: tuple[int, int]) -> tuple[tuple, tuple]:
    return (codes.shape, *digests), (codes.shape, digests[1])


def _part(tensor: Tensor, rows: range, total: int) -> int:
    """The part of the digest of ``tensor`` that its ``rows`` of ``total`` have a part in."""
    data = _bytes(tensor)
    size = data.numel() // max(total, 1)
    return _digest_of_rows(data, rows.start * size, rows.stop * size)


def _int64(number: int) -> int:
    """``number`` modulo 2**64."""
    return (number + 2**63) % 2**64 - 2**63


def may_read(tensor: Tensor) -> bool:
    """Whether values of ``tensor`` may be read now: operators are not recorded, faked or captured for CUDA graphs."""
    if is_traced() or _get_dispatch_mode(_TorchDispatchModeKey.FAKE) is not None:
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def _are_plain(*tensors: Tensor) -> bool:
    return all(type(t) in (Tensor, nn.Parameter) and is_readable(t) for t in tensors)
