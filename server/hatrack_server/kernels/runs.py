"""Which tokens of a ragged batch meet which rows of a pool: what every kernel of adapters takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from hatrack_server.kernels.transfer import to_device

# Tokens of one row that a GPU kernel takes with tiles of 1, or of 16; higher tiles read a longer row less often.
SHORT, MEDIUM = 4, 64


@dataclass(frozen=True)
class Run:
    """Adjacent tokens of adapters with the same number of tokens each.

    `length` tokens belong to each of the pool's `rows`, in order, from token `start` on. All of them begin at
    `position` of their sequences, as far as an adapter cares: what lies behind its virtual tokens is one to it.
    """

    start: int
    length: int
    rows: tuple[int, ...]
    position: int = 0

    # What follows is made once: a run serves every layer, and the steps whose batch stays as it is.
    @cached_property
    def index(self) -> slice | Tensor:
        """Of the rows in a stack: a slice where they lie side by side, which spares a copy of them."""
        first, count = self.rows[0], len(self.rows)
        adjacent = self.rows == tuple(range(first, first + count))
        return slice(first, first + count) if adjacent else torch.tensor(self.rows)

    @cached_property
    def row_numbers(self) -> Tensor:
        """The rows as a C kernel takes them: int32 [rows], on the CPU."""
        return torch.tensor(self.rows, dtype=torch.int32)

    @property
    def stop(self) -> int:
        """One past the last token."""
        return self.start + len(self.rows) * self.length

    def tokens(self, values: Tensor) -> Tensor:
        """Its part of values[T, n]: a view [rows, length, n]."""
        return values[self.start : self.stop].view(len(self.rows), self.length, -1)

    @cached_property
    def stretches(self) -> list[Run]:
        """The same, cut wherever rows don't lie side by side: many large ones are better read in place than copied."""
        if isinstance(self.index, slice):
            return [self]
        cuts = [0, *(n for n in range(1, len(self.rows)) if self.rows[n] != self.rows[n - 1] + 1), len(self.rows)]
        return [
            Run(self.start + first * self.length, self.length, self.rows[first:last], self.position)
            for first, last in pairwise(cuts)
        ]

    def parts(self) -> Iterator[tuple[slice, int]]:
        """(tokens, their row), one row after the other."""
        for nth, row in enumerate(self.rows):
            start = self.start + nth * self.length
            yield slice(start, start + self.length), row


@dataclass(frozen=True)
class Tiles:
    """Runs cut up into as many tokens of one row as one program of a GPU takes: one launch serves them all."""

    height: int  # tokens that a tile has room for
    table: Tensor  # int32 [tiles, 3]: the first token, how many there are, their row

    @classmethod
    def of(cls, runs: Iterable[Run], device: torch.device) -> Tiles:
        """Single tokens where all rows have a few only, else tiles that suit the longest row; without a sync."""
        parts = [part for run in runs for part in run.parts()]
        longest = max((tokens.stop - tokens.start for tokens, _ in parts), default=0)
        height = 1 if longest <= SHORT else 16 if longest <= MEDIUM else 64
        cut = [
            (first, min(height, tokens.stop - first), row)
            for tokens, row in parts
            for first in range(tokens.start, tokens.stop, height)
        ]
        return cls(height, to_device(cut, device, torch.int32).view(-1, 3))


class Runs(list[Run]):
    """Runs with what is made of them once, for all the layers and steps that they serve."""

    def __init__(self, runs: Iterable[Run] = ()) -> None:
        super().__init__(runs)
        self._tiles: dict[torch.device, Tiles] = {}

    @classmethod
    def of(cls, runs: list[Run]) -> Runs:
        """The same list where it is one of these."""
        return runs if isinstance(runs, cls) else cls(runs)

    def tiles(self, device: torch.device) -> Tiles:
        """Their tiles, on a device."""
        if device not in self._tiles:
            self._tiles[device] = Tiles.of(self, device)
        return self._tiles[device]


class FixedRuns(Runs):
    """Runs that change while their tiles stay where they are, as a recorded CUDA graph needs them.

    Whoever changes them fills the table, too, which many of them may share: with the `token_tiles` of the same runs.
    """

    def __init__(self, table: Tensor) -> None:
        """table[tokens, 3]: of tiles of single tokens."""
        super().__init__()
        self._tiles[table.device] = Tiles(1, table)


def merge_runs(runs: Iterable[Run]) -> Runs:
    """Joins neighbours of one length, so that one batched product serves them."""
    merged = Runs()
    for run in runs:
        last = merged[-1] if merged else None
        if last and (last.stop, last.length, last.position) == (run.start, run.length, run.position):
            merged[-1] = replace(last, rows=last.rows + run.rows)
        else:
            merged.append(run)
    return merged


def stretch_runs(runs: Runs, stop: int, tokens: int) -> Runs:
    """The same runs of a batch of `stop` tokens, the last one's row taking those behind it, too, up to `tokens`."""
    last = runs[-1] if runs else None
    if last is None or last.stop < stop or stop == tokens:
        return runs
    return Runs([*runs, Run(stop, 1, last.rows[-1:] * (tokens - stop), last.position)])


def token_tiles(runs: Iterable[Run], tokens: int) -> Tensor:
    """A table of tiles of one token each, filled up with empty ones: int32 [tokens, 3], on the CPU."""
    cut = [(token, 1, row) for token, row in each_token(runs)]
    return torch.tensor(cut + [(0, 0, 0)] * (tokens - len(cut)), dtype=torch.int32).view(tokens, 3)


def each_token(runs: Iterable[Run]) -> Iterator[tuple[int, int]]:
    """(token, its pool row), for references that compute token by token."""
    for run in runs:
        for tokens, row in run.parts():
            for token in range(tokens.start, tokens.stop):
                yield token, row
