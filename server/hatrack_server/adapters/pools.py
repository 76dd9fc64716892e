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

from hatrack_server.adapters.pieces import Piece, Pieces
from hatrack_server.adapters.stacks import DenseRows, ReservedRows, Rows, SeparateRows


@dataclass(frozen=True, slots=True)
class Place:
    """One piece's row in a pool."""

    pool: Pool
    row: int


Places = tuple[Place, ...]
"""Where a program's pieces lie."""


class Pool:
    """Rows of one module's pieces of one kind and equal shapes.

    One thread changes it. Another may read `stacks` meanwhile: growing and trimming leave them as they are or put new
    ones in their place, and the rows in use are alike in both.
    """

    def __init__(
        self, number: int, module: str, like: Piece, dtype: torch.dtype, device: torch.device, *, lazy: bool
    ) -> None:
        """For pieces of the kind and shapes of `like`; `lazy` where memory is only taken once it is written."""
        self.number = number  # in the order in which pools were made
        self.module = module
        self.kind = type(like)
        self.shapes = like.shapes  # of a row's tensors
        self.capacity = 0  # rows that take memory, taken or free
        dtypes = [dtype if tensor.is_floating_point() else tensor.dtype for tensor in like.tensors]
        self._rows = tuple(self._new_rows(*of, device, lazy=lazy) for of in zip(like.shapes, dtypes, strict=True))
        self.copies = any(isinstance(rows, DenseRows) for rows in self._rows)  # when it grows
        # For each of the piece's tensors: one of [capacity or more, …], or a list where the kind is not `stacked`.
        self.stacks: tuple[Any, ...] = tuple(rows.rows for rows in self._rows)
        self.row_bytes = sum(math.prod(shape) * of.itemsize for shape, of in zip(like.shapes, dtypes, strict=True))
        self._free: list[int] = []

    @property
    def taken(self) -> int:
        """Rows taken."""
        return self.capacity - len(self._free)

    @property
    def full(self) -> bool:
        """Whether it must grow before another row can be taken."""
        return not self._free

    def grow(self, rows: int, reserve: int = 0) -> None:
        """Adds free rows; `reserve` is how many there may come to be."""
        added = range(self.capacity, self.capacity + rows)
        self._put(tuple(stack.grown(self.capacity, added.stop, reserve) for stack in self._rows), added.stop)
        self._free.extend(added)  # higher than all others, so still a heap

    def take(self) -> int:
        """The lowest free row: programs loaded in a row become neighbours, which one product can serve."""
        return heapq.heappop(self._free)

    def free(self, row: int) -> None:
        """Undoes one `take`; the row's content may be overwritten from now on."""
        heapq.heappush(self._free, row)

    def write(self, row: int, piece: Piece) -> None:
        """Copies a piece into a taken row."""
        piece.write(tuple(stack[row] for stack in self.stacks))

    def read(self, row: int) -> Piece:
        """The piece in a taken row, padded as it is: no copy."""
        return self.kind(*(stack[row] for stack in self.stacks))

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
        self._put(tuple(stack.trimmed(rows) for stack in self._rows), rows)
        self._free = [row for row in range(rows) if row not in taken]  # in order, so a heap
        return True

    def _put(self, rows: tuple[Rows, ...], capacity: int) -> None:
        """All at once: where one tensor found no memory, the others must stay what they were, too."""
        moved = any(new is not old for new, old in zip(rows, self._rows, strict=True))
        self._rows, self.capacity = rows, capacity
        if moved:
            self.stacks = tuple(each.rows for each in rows)

    def _new_rows(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, lazy: bool) -> Rows:
        if not self.kind.stacked:
            return SeparateRows.of(shape, dtype, device)
        return ReservedRows.of(shape, dtype) if lazy else DenseRows.of(shape, dtype, device)


class Pools:
    """All pools of one base, made as they are needed, within a budget of bytes. One thread changes them."""

    def __init__(self, dtype: torch.dtype, device: torch.device, budget: int, *, lazy: bool | None = None) -> None:
        """`lazy` says whether the device takes memory only once it is written; None: as the machine's own does."""
        self.budget = budget
        self._dtype = dtype
        self._device = device
        self._lazy = device.type == "cpu" if lazy is None else lazy
        self._pools: dict[tuple[object, ...], Pool] = {}
        self.bytes = 0  # what all pools take, free rows included; any thread may ask, as every step does

    def size(self, pieces: Pieces) -> int:
        """What the pieces take, padded as they will be."""
        return sum(pool.row_bytes for pool in self._of_all(pieces))

    def fits(self, pieces: Pieces) -> bool:
        """Whether `place` stays within the budget."""
        return self.bytes + sum(pool.row_bytes for pool in self._of_all(pieces) if pool.full) <= self.budget

    @property
    def spare(self) -> int:
        """What would be left of the budget if no row were free."""
        return self.budget - sum(pool.taken * pool.row_bytes for pool in self._pools.values())

    def place(self, pieces: Pieces) -> Places:
        """Copies the pieces into free rows, growing the pools that have none; if that fails, no row stays taken."""
        pools = list(self._of_all(pieces))
        # As many rows as programs like this one fit into the budget: most pools never get more.
        reserve = self.budget // max(1, sum(pool.row_bytes for pool in pools))
        self._grow([pool for pool in pools if pool.full], reserve)
        places: list[Place] = []
        try:
            for pool, (_, piece) in zip(pools, pieces, strict=True):
                places.append(Place(pool, pool.take()))
                pool.write(places[-1].row, piece)
        except BaseException:
            self.free(places)
            raise
        return tuple(places)

    def read(self, places: Places) -> Pieces:
        """The pieces that lie there, padded as they are: no copies, and only valid while the places are taken."""
        return tuple((place.pool.module, place.pool.read(place.row)) for place in places)

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
            dtype = piece.dtype or self._dtype
            self._pools[key] = Pool(len(self._pools), module, piece, dtype, self._device, lazy=self._lazy)
        return self._pools[key]

    def _grow(self, full: list[Pool], reserve: int) -> None:
        """Makes a free row in each: half as many again where growing copies and the budget allows it, else one.

        Growing by halves keeps the copying linear in the number of programs.
        """
        wanted = [1 + pool.capacity // 2 if pool.copies else 1 for pool in full]
        generous = (
            self.bytes + sum(pool.row_bytes * rows for pool, rows in zip(full, wanted, strict=True)) <= self.budget
        )
        try:
            for pool, rows in zip(full, wanted, strict=True):
                pool.grow(rows if generous else 1, reserve)
        finally:  # those that grew before one that found no memory take theirs
            self._count_bytes()

    def _count_bytes(self) -> None:
        self.bytes = sum(pool.capacity * pool.row_bytes for pool in self._pools.values())
