"""Where the pieces of resident programs lie: stacks kept per (module, kind of piece, shapes), which a batch reads in
place.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hatrack_server.adapters.pieces import Piece, Pieces


@dataclass(frozen=True, slots=True)
class Place:
    """One piece's row in a pool."""

    pool: Pool
    row: int


Places = tuple[Place, ...]
"""Where a program's pieces lie."""


class Pool:
    """Rows of one module's pieces of one kind and equal shapes.

    One thread changes it. Another may read `stacks` meanwhile: growing and trimming put new ones in place of the old,
    and the rows in use are alike in both.
    """

    def __init__(self, number: int, module: str, like: Piece, dtype: torch.dtype, device: torch.device) -> None:
        """For pieces of the kind and shapes of `like`."""
        self.number = number  # in the order in which pools were made
        self.module = module
        self.kind = type(like)
        self._empty = tuple(
            torch.empty(0, *shape, dtype=dtype if tensor.is_floating_point() else tensor.dtype, device=device)
            for shape, tensor in zip(like.shapes, like.tensors, strict=True)
        )
        # For each of the piece's tensors: one of [rows, …], or a list of them where the kind is not `stacked`.
        self.stacks: tuple[Any, ...] = self._empty if self.kind.stacked else tuple([] for _ in self._empty)
        self.row_bytes = sum(math.prod(stack.shape[1:]) * stack.itemsize for stack in self._empty)
        self._free: list[int] = []

    @property
    def capacity(self) -> int:
        """Rows, taken or free."""
        return len(self.stacks[0])

    @property
    def taken(self) -> int:
        """Rows taken."""
        return self.capacity - len(self._free)

    @property
    def full(self) -> bool:
        """Whether it must grow before another row can be taken."""
        return not self._free

    def grow(self, rows: int) -> None:
        """Adds free rows; where the kind is stacked, this copies what is there."""
        added = range(self.capacity, self.capacity + rows)
        # All or none: the second may find no memory.
        self.stacks = tuple(self._grown(*pair, rows) for pair in zip(self.stacks, self._empty, strict=True))
        self._free.extend(added)  # higher than all others, so still a heap

    def _grown(self, stack: Any, like: Tensor, rows: int) -> Any:
        if self.kind.stacked:
            return torch.cat([stack, like.new_zeros(rows, *like.shape[1:])])
        return [*stack, *(like.new_zeros(like.shape[1:]) for _ in range(rows))]

    def take(self) -> int:
        """The lowest free row: programs loaded in a row become neighbours, which one product can serve."""
        return heapq.heappop(self._free)

    def free(self, row: int) -> None:
        """Undoes one `take`; the row's content may be overwritten from now on."""
        heapq.heappush(self._free, row)

    def write(self, row: int, tensors: Iterable[Tensor]) -> None:
        """Copies a piece into a taken row, padding it with zeros."""
        for stack, values in zip(self.stacks, tensors, strict=True):
            stack[row].zero_()
            stack[row][tuple(map(slice, values.shape))].copy_(values)

    def copy_lower(self, row: int) -> int:
        """A copy of a taken row in the lowest free one, if that is lower; else the row itself."""
        if self.full or self._free[0] > row:
            return row
        lowest = self.take()
        for stack in self.stacks:
            stack[lowest].copy_(stack[row])
        return lowest

    def trim(self) -> bool:
        """Gives the memory of the free rows behind the last taken one back; False when there are none."""
        taken = set(range(self.capacity)).difference(self._free)
        rows = max(taken, default=-1) + 1
        if rows == self.capacity:
            return False
        self.stacks = tuple(stack[:rows].clone() if self.kind.stacked else stack[:rows] for stack in self.stacks)
        self._free = [row for row in range(rows) if row not in taken]  # in order, so a heap
        return True


class Pools:
    """All pools of one base, made as they are needed, within a budget of bytes. One thread changes them."""

    def __init__(self, dtype: torch.dtype, device: torch.device, budget: int) -> None:
        self.budget = budget
        self._dtype = dtype
        self._device = device
        self._pools: dict[tuple[object, ...], Pool] = {}
        self.bytes = 0  # what all pools take, free rows included; any thread may ask, as every step does

    def size(self, pieces: Pieces) -> int:
        """What the pieces take, padded as they will be."""
        return sum(pool.row_bytes for pool in self._of_all(pieces))

    def fits(self, pieces: Pieces) -> bool:
        """Whether `place` stays within the budget."""
        return self.bytes + sum(pool.row_bytes for pool in self._of_all(pieces) if pool.full) <= self.budget

    def would_fit(self, pieces: Pieces) -> bool:
        """Whether `place` would stay within the budget if no row were free."""
        taken = sum(pool.taken * pool.row_bytes for pool in self._pools.values())
        return taken + self.size(pieces) <= self.budget

    def place(self, pieces: Pieces) -> Places:
        """Copies the pieces into free rows, growing the pools that have none."""
        self._grow([pool for pool in self._of_all(pieces) if pool.full])
        return tuple(self._place(module, piece) for module, piece in pieces)

    def copy_lower(self, places: Places) -> Places:
        """The same pieces in lower rows, wherever one is free; the given places stay taken."""
        return tuple(Place(place.pool, place.pool.copy_lower(place.row)) for place in places)

    def free(self, places: Iterable[Place]) -> None:
        """Gives the rows back; their contents may be overwritten from now on."""
        for place in places:
            place.pool.free(place.row)

    def trim(self) -> bool:
        """Gives the memory of every pool's free rows behind its last taken one back; False when there are none."""
        trimmed = sum(pool.trim() for pool in self._pools.values())  # every one, not up to the first
        self._count_bytes()
        return trimmed > 0

    def _of_all(self, pieces: Pieces) -> Iterator[Pool]:
        return (self._of(module, piece) for module, piece in pieces)

    def _of(self, module: str, piece: Piece) -> Pool:
        key = (module, type(piece), piece.shapes)
        if key not in self._pools:
            self._pools[key] = Pool(len(self._pools), module, piece, piece.dtype or self._dtype, self._device)
        return self._pools[key]

    def _place(self, module: str, piece: Piece) -> Place:
        pool = self._of(module, piece)
        place = Place(pool, pool.take())
        pool.write(place.row, piece.tensors)
        return place

    def _grow(self, full: list[Pool]) -> None:
        """Makes a free row in each: half as many again where growing copies and the budget allows it, else one.

        Growing by halves keeps the copying linear in the number of programs.
        """
        wanted = [1 + pool.capacity // 2 if pool.kind.stacked else 1 for pool in full]
        generous = (
            self.bytes + sum(pool.row_bytes * rows for pool, rows in zip(full, wanted, strict=True)) <= self.budget
        )
        for pool, rows in zip(full, wanted, strict=True):
            pool.grow(rows if generous else 1)
        self._count_bytes()

    def _count_bytes(self) -> None:
        self.bytes = sum(pool.capacity * pool.row_bytes for pool in self._pools.values())
