"""Programs that were evicted, kept in the memory of the machine: they come back without a read or a compilation."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hatrack_server.adapters.pieces import Pieces

logger = logging.getLogger(__name__)

ALIGNMENT = 64  # bytes; what any dtype needs


@dataclass(frozen=True, slots=True)
class _Copy:
    pieces: Pieces  # views of the buffer
    buffer: Tensor  # uint8 [bytes]: one for all pieces, since it takes long to pin many


class HostTier:
    """Copies of programs by digest within a budget of bytes, least recently used first out. One thread uses it."""

    def __init__(self, budget: int, *, pinned: bool) -> None:
        """`pinned` memory can't be swapped out, and is copied to a GPU without another copy in between."""
        self.bytes = 0  # any thread may ask
        self._budget = budget
        self._pinned = pinned
        self._copies: OrderedDict[str, _Copy] = OrderedDict()

    def __contains__(self, digest: str) -> bool:
        """Whether there is a copy."""
        return digest in self._copies

    def get(self, digest: str) -> Pieces | None:
        """The program, if there is a copy; not to be changed."""
        copy = self._copies.get(digest)
        if copy is None:
            return None
        self._copies.move_to_end(digest)
        return copy.pieces

    def put(self, digest: str, pieces: Pieces) -> None:
        """Copies the program, unless it is there already or too large for the whole budget."""
        if digest in self._copies or not self._budget:
            return
        size = sum(map(_aligned, _tensors(pieces)))
        if size > self._budget:
            return
        while self.bytes + size > self._budget:
            self.drop(next(iter(self._copies)))
        try:
            buffer = torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned)
        except (MemoryError, RuntimeError):  # the machine has no more, or can't pin more: it comes from disk next time
            logger.warning("no memory for a copy of %s on the host", digest)
            return
        self._copies[digest] = _Copy(_copied(pieces, buffer), buffer)
        self.bytes += size

    def drop(self, digest: str) -> None:
        """Frees the copy, if there is one."""
        copy = self._copies.pop(digest, None)
        if copy is not None:
            self.bytes -= copy.buffer.nbytes


def _copied(pieces: Pieces, buffer: Tensor) -> Pieces:
    parts = iter(torch.split(buffer, list(map(_aligned, _tensors(pieces)))))
    return tuple((module, piece.with_tensors(lambda tensor: _copy(tensor, next(parts)))) for module, piece in pieces)


def _copy(tensor: Tensor, part: Tensor) -> Tensor:
    # From a GPU this doesn't wait: whatever comes next to the tensor or its copy is queued behind it.
    return part[: tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor, non_blocking=True)


def _tensors(pieces: Pieces) -> Iterator[Tensor]:
    return (tensor for _, piece in pieces for tensor in piece.tensors)


def _aligned(tensor: Tensor) -> int:
    return tensor.nbytes + -tensor.nbytes % ALIGNMENT
