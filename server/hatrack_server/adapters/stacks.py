"""How the rows of a pool lie in memory, and how there come to be more of them."""

from __future__ import annotations

import math
import mmap
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor


class Rows(Protocol):
    """Rows of one shape, which never change: more or fewer are other Rows. What is kept is alike in both."""

    @property
    def rows(self) -> Tensor | list[Tensor]:
        """What is read: those that were asked for, and maybe more behind them."""

    def grown(self, kept: int, capacity: int, reserve: int) -> Self:
        """`capacity` rows, the first `kept` as they are; `reserve` is how many there may come to be."""

    def trimmed(self, kept: int) -> Self:
        """The first `kept` rows, without the memory of the others."""


@dataclass(frozen=True)
class ReservedRows:
    """One tensor in the machine's memory: addresses are reserved at once, and pages taken as rows are written.

    So growing copies nothing until there are more rows than were reserved, and trimming never does.
    """

    rows: Tensor
    memory: mmap.mmap | None = None

    @classmethod
    def of(cls, shape: tuple[int, ...], dtype: torch.dtype) -> ReservedRows:
        """None yet."""
        return cls(torch.empty(0, *shape, dtype=dtype))

    def grown(self, kept: int, capacity: int, reserve: int) -> ReservedRows:
        """See Rows; raises OSError when there is no room for `capacity` rows."""
        if capacity <= len(self.rows):
            return self
        try:
            memory = self._reserve(max(capacity, reserve, 2 * kept))
        except OSError:  # a machine may limit the addresses: then every growth copies
            memory = self._reserve(capacity)
        wider = torch.frombuffer(memory, dtype=self.rows.dtype).view(-1, *self.rows.shape[1:])
        wider[:kept] = self.rows[:kept]
        return ReservedRows(wider, memory)

    def trimmed(self, kept: int) -> ReservedRows:
        """See Rows."""
        start = kept * self._row_bytes
        start += -start % mmap.PAGESIZE
        if self.memory is not None and start < len(self.memory):
            self.memory.madvise(mmap.MADV_DONTNEED, start)
        return self

    @property
    def _row_bytes(self) -> int:
        return math.prod(self.rows.shape[1:]) * self.rows.itemsize

    def _reserve(self, rows: int) -> mmap.mmap:
        memory = mmap.mmap(-1, rows * self._row_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_NOHUGEPAGE"):  # else hundreds of stacks would each take megabytes with their first row
            with suppress(OSError):  # a kernel that has no huge pages doesn't know the advice
                memory.madvise(mmap.MADV_NOHUGEPAGE)
        return memory


@dataclass(frozen=True)
class DenseRows:
    """One tensor, as a GPU keeps it: growing and trimming copy."""

    rows: Tensor

    @classmethod
    def of(cls, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> DenseRows:
        """None yet."""
        return cls(torch.empty(0, *shape, dtype=dtype, device=device))

    def grown(self, kept: int, capacity: int, reserve: int) -> DenseRows:  # noqa: ARG002
        """See Rows."""
        return DenseRows(torch.cat([self.rows[:kept], self.rows.new_empty(capacity - kept, *self.rows.shape[1:])]))

    def trimmed(self, kept: int) -> DenseRows:
        """See Rows."""
        return DenseRows(self.rows[:kept].clone())


@dataclass(frozen=True)
class SeparateRows:
    """A tensor for each row: large ones, of which there are few."""

    like: Tensor
    rows: list[Tensor]

    @classmethod
    def of(cls, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> SeparateRows:
        """None yet."""
        return cls(torch.empty(0, *shape, dtype=dtype, device=device), [])

    def grown(self, kept: int, capacity: int, reserve: int) -> SeparateRows:  # noqa: ARG002
        """See Rows."""
        added = [self.like.new_empty(self.like.shape[1:]) for _ in range(capacity - kept)]
        return SeparateRows(self.like, [*self.rows[:kept], *added])

    def trimmed(self, kept: int) -> SeparateRows:
        """See Rows."""
        return SeparateRows(self.like, self.rows[:kept])
