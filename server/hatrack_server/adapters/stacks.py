"""How the rows of a pool lie in memory, and how there come to be more of them."""

from __future__ import annotations

import math
import mmap
from contextlib import suppress
from typing import Protocol

import torch
from torch import Tensor


class Rows(Protocol):
    """Rows of one shape. Those that are kept are alike, and where a reader has them, before and after a change."""

    @property
    def rows(self) -> Tensor | list[Tensor]:
        """What is read: those that were asked for, and maybe more behind them."""

    def grow(self, kept: int, capacity: int, reserve: int) -> None:
        """Makes room for `capacity` rows, the first `kept` as they are; `reserve` is how many there may come to be."""

    def trim(self, kept: int) -> None:
        """Gives the memory of all but the first `kept` rows back."""


class ReservedRows:
    """One tensor in the machine's memory: addresses are reserved at once, and pages taken as rows are written.

    So growing copies nothing until there are more rows than were reserved, and trimming never does.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._row_bytes = math.prod(shape) * dtype.itemsize
        self._memory: mmap.mmap | None = None
        self.rows: Tensor = torch.empty(0, *shape, dtype=dtype)

    def grow(self, kept: int, capacity: int, reserve: int) -> None:
        """See Rows; raises OSError when there is no room for `capacity` rows."""
        if capacity <= len(self.rows):
            return
        try:
            memory = self._reserve(max(capacity, reserve, 2 * kept))
        except OSError:  # a machine may limit the addresses: then every growth copies
            memory = self._reserve(capacity)
        wider = torch.frombuffer(memory, dtype=self.rows.dtype).view(-1, *self.rows.shape[1:])
        wider[:kept] = self.rows[:kept]
        self._memory, self.rows = memory, wider

    def trim(self, kept: int) -> None:
        """See Rows."""
        start = kept * self._row_bytes
        start += -start % mmap.PAGESIZE
        if self._memory is not None and start < len(self._memory):
            self._memory.madvise(mmap.MADV_DONTNEED, start)

    def _reserve(self, rows: int) -> mmap.mmap:
        memory = mmap.mmap(-1, rows * self._row_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_NOHUGEPAGE"):  # else hundreds of stacks would each take megabytes with their first row
            with suppress(OSError):  # a kernel that has no huge pages doesn't know the advice
                memory.madvise(mmap.MADV_NOHUGEPAGE)
        return memory


class DenseRows:
    """One tensor, as a GPU keeps it: growing and trimming copy."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.rows: Tensor = torch.empty(0, *shape, dtype=dtype, device=device)

    def grow(self, kept: int, capacity: int, reserve: int) -> None:  # noqa: ARG002
        """See Rows."""
        self.rows = torch.cat([self.rows[:kept], self.rows.new_empty(capacity - kept, *self.rows.shape[1:])])

    def trim(self, kept: int) -> None:
        """See Rows."""
        self.rows = self.rows[:kept].clone()


class SeparateRows:
    """A tensor for each row: large ones, of which there are few."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self._like = torch.empty(0, *shape, dtype=dtype, device=device)
        self.rows: list[Tensor] = []

    def grow(self, kept: int, capacity: int, reserve: int) -> None:  # noqa: ARG002
        """See Rows."""
        added = (self._like.new_empty(self._like.shape[1:]) for _ in range(capacity - kept))
        self.rows = [*self.rows[:kept], *added]

    def trim(self, kept: int) -> None:
        """See Rows."""
        self.rows = self.rows[:kept]
