"""Where the pieces of resident programs lie: stacks kept per (layer, rank class), which a batch reads in place."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import torch

from hatrack_server.adapters.pieces import LowRank
from hatrack_server.types import LinearShape


def rank_class(rank: int) -> int:
    """The next power of two: what a piece of this rank is padded to."""
    return 1 << (rank - 1).bit_length()


@dataclass(frozen=True, slots=True)
class Place:
    """One piece's row in a pool."""

    pool: LowRankPool
    row: int


class LowRankPool:
    """Rows of low-rank pieces of one layer and one rank class.

    Threads: `take`, `free`, `lower` and `trim` under the owner's lock; all but `free` by the one loading thread. A step
    may read meanwhile: growing and trimming put new stacks in place of the old ones, and the rows in use are alike in
    both.
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
        for row in added:
            heapq.heappush(self._free, row)  # one by one: `free` may push from another thread in between

    def lower(self, row: int) -> int:
        """Moves a taken row that nobody reads to the lowest free one if that is lower; where it is now."""
        if self.full or self._free[0] > row:
            return row
        lowest = heapq.heapreplace(self._free, row)
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


class Pools:
    """All pools of one base, made as they are needed, within a budget of bytes."""

    def __init__(self, linears: dict[str, LinearShape], dtype: torch.dtype, device: torch.device, budget: int) -> None:
        self.budget = budget
        self._linears = linears
        self._dtype = dtype
        self._device = device
        self._pools: dict[tuple[str, int], LowRankPool] = {}

    @property
    def bytes(self) -> int:
        """What all pools take, free rows included."""
        pools = tuple(self._pools.values())  # at one go: the loading thread may add one while another thread asks
        return sum(pool.capacity * pool.row_bytes for pool in pools)

    def of(self, layer: str, rank: int) -> LowRankPool:
        """The pool for pieces of this rank at this layer."""
        key = (layer, rank_class(rank))
        if key not in self._pools:
            self._pools[key] = LowRankPool(self._linears[layer], key[1], self._dtype, self._device)
        return self._pools[key]

    def fits(self, pools: list[LowRankPool]) -> bool:
        """Whether one more row in each of `pools` stays within the budget."""
        return self.bytes + sum(pool.row_bytes for pool in pools if pool.full) <= self.budget

    def would_fit(self, pools: list[LowRankPool]) -> bool:
        """Whether one more row in each of `pools` would, if no row were free."""
        taken = sum(pool.taken * pool.row_bytes for pool in self._pools.values())
        return taken + sum(pool.row_bytes for pool in pools) <= self.budget

    def grow(self, pools: list[LowRankPool]) -> None:
        """Makes a free row in each of `pools` that is full: half as many again where the budget allows, else one.

        Growing by halves keeps the copying linear in the number of programs.
        """
        full = [pool for pool in pools if pool.full]
        generous = self.bytes + sum(pool.row_bytes * (1 + pool.capacity // 2) for pool in full) <= self.budget
        for pool in full:
            pool.grow(1 + pool.capacity // 2 if generous else 1)

    def trim(self) -> bool:
        """Gives the memory of every pool's free rows behind its last taken one back; False when there are none."""
        return sum(pool.trim() for pool in self._pools.values()) > 0  # every one, not up to the first
