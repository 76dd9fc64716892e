"""Where the pieces of resident programs lie: stacks kept per (layer, rank class), which a batch reads in place."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from hatrack_server.adapters.pieces import LowRank, Pieces
from hatrack_server.types import LinearShape


def rank_class(rank: int) -> int:
    """The next power of two: what a piece of this rank is padded to."""
    return 1 << (rank - 1).bit_length()


@dataclass(frozen=True, slots=True)
class Place:
    """One piece's row in a pool."""

    pool: LowRankPool
    row: int


Places = Mapping[str, Place]
"""Where a program's pieces lie, by layer."""


class LowRankPool:
    """Rows of low-rank pieces of one layer and one rank class.

    One thread changes it. Another may read `a` and `b` meanwhile: growing and trimming put new stacks in place of the
    old ones, and the rows in use are alike in both.
    """

    def __init__(self, shape: LinearShape, rank: int, dtype: torch.dtype, device: torch.device) -> None:
        self.rank = rank
        self.a = torch.empty(0, rank, shape.in_features, dtype=dtype, device=device)
        self.b = torch.empty(0, rank, shape.out_features, dtype=dtype, device=device)
        self.row_bytes = rank * (shape.in_features + shape.out_features) * dtype.itemsize
        self._free: list[int] = []

    @property
    def capacity(self) -> int:
        """Rows, taken or free."""
        return self.a.shape[0]

    @property
    def taken(self) -> int:
        """Rows taken."""
        return self.capacity - len(self._free)

    @property
    def full(self) -> bool:
        """Whether it must grow before another row can be taken."""
        return not self._free

    def grow(self, rows: int) -> None:
        """Adds free rows; copies what is there."""
        added = range(self.capacity, self.capacity + rows)
        # Both or neither: the second may find no memory.
        self.a, self.b = (torch.cat([s, s.new_zeros(rows, *s.shape[1:])]) for s in (self.a, self.b))
        self._free.extend(added)  # higher than all others, so still a heap

    def take(self) -> int:
        """The lowest free row: programs loaded in a row become neighbours, which one product can serve."""
        return heapq.heappop(self._free)

    def free(self, row: int) -> None:
        """Undoes one `take`; the row's content may be overwritten from now on."""
        heapq.heappush(self._free, row)

    def write(self, row: int, piece: LowRank) -> None:
        """Copies a piece of at most this rank into a taken row, padding it with zeros."""
        for stack, values in ((self.a, piece.a), (self.b, piece.b)):
            stack[row, : piece.rank].copy_(values)
            stack[row, piece.rank :].zero_()

    def copy_lower(self, row: int) -> int:
        """A copy of a taken row in the lowest free one, if that is lower; else the row itself."""
        if self.full or self._free[0] > row:
            return row
        lowest = self.take()
        self.a[lowest], self.b[lowest] = self.a[row], self.b[row]
        return lowest

    def trim(self) -> bool:
        """Gives the memory of the free rows behind the last taken one back; False when there are none."""
        taken = set(range(self.capacity)).difference(self._free)
        rows = max(taken, default=-1) + 1
        if rows == self.capacity:
            return False
        self.a, self.b = self.a[:rows].clone(), self.b[:rows].clone()
        self._free = [row for row in range(rows) if row not in taken]  # in order, so a heap
        return True


class Pools:
    """All pools of one base, made as they are needed, within a budget of bytes. One thread changes them."""

    def __init__(self, linears: dict[str, LinearShape], dtype: torch.dtype, device: torch.device, budget: int) -> None:
        self.budget = budget
        self._linears = linears
        self._dtype = dtype
        self._device = device
        self._pools: dict[tuple[str, int], LowRankPool] = {}

    @property
    def bytes(self) -> int:
        """What all pools take, free rows included. Any thread may ask."""
        return sum(pool.capacity * pool.row_bytes for pool in tuple(self._pools.values()))

    def size(self, pieces: Pieces) -> int:
        """What the pieces take, padded to their rank classes."""
        return sum(self._of(layer, piece).row_bytes for layer, piece in pieces.items())

    def fits(self, pieces: Pieces) -> bool:
        """Whether `place` stays within the budget."""
        pools = (self._of(layer, piece) for layer, piece in pieces.items())
        return self.bytes + sum(pool.row_bytes for pool in pools if pool.full) <= self.budget

    def would_fit(self, pieces: Pieces) -> bool:
        """Whether `place` would stay within the budget if no row were free."""
        taken = sum(pool.taken * pool.row_bytes for pool in self._pools.values())
        return taken + self.size(pieces) <= self.budget

    def place(self, pieces: Pieces) -> Places:
        """Copies the pieces into free rows, growing the pools that have none."""
        self._grow([pool for layer, piece in pieces.items() if (pool := self._of(layer, piece)).full])
        places: dict[str, Place] = {}
        try:
            for layer, piece in pieces.items():
                pool = self._of(layer, piece)
                places[layer] = Place(pool, pool.take())
                pool.write(places[layer].row, piece)
        except Exception:
            self.free(places.values())
            raise
        return places

    def copy_lower(self, places: Places) -> Places:
        """The same pieces in lower rows, wherever one is free; the given places stay taken."""
        return {layer: Place(place.pool, place.pool.copy_lower(place.row)) for layer, place in places.items()}

    def free(self, places: Iterable[Place]) -> None:
        """Gives the rows back; their contents may be overwritten from now on."""
        for place in places:
            place.pool.free(place.row)

    def trim(self) -> bool:
        """Gives the memory of every pool's free rows behind its last taken one back; False when there are none."""
        return sum(pool.trim() for pool in self._pools.values()) > 0  # every one, not up to the first

    def _of(self, layer: str, piece: LowRank) -> LowRankPool:
        key = (layer, rank_class(piece.rank))
        if key not in self._pools:
            self._pools[key] = LowRankPool(self._linears[layer], key[1], self._dtype, self._device)
        return self._pools[key]

    def _grow(self, full: list[LowRankPool]) -> None:
        """Makes a free row in each: half as many again where the budget allows, else one.

        Growing by halves keeps the copying linear in the number of programs.
        """
        generous = self.bytes + sum(pool.row_bytes * (1 + pool.capacity // 2) for pool in full) <= self.budget
        for pool in full:
            pool.grow(1 + pool.capacity // 2 if generous else 1)
