"""Which tokens of a ragged batch meet which rows of a pool: what every kernel of adapters takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Run:
    """Adjacent tokens whose adapters lie in consecutive rows of a pool, each with the same number of tokens.

    Tokens start … start + count·length - 1 belong to pool rows row … row + count - 1, `length` tokens to each. Each of
    them starts at `position` of its sequence, as far as an adapter cares: what lies behind its virtual tokens is one
    position to it.
    """

    start: int
    length: int
    row: int
    count: int = 1
    position: int = 0

    @property
    def stop(self) -> int:
        """One past the last token."""
        return self.start + self.count * self.length

    @property
    def rows(self) -> slice:
        """The pool's rows."""
        return slice(self.row, self.row + self.count)

    def tokens(self, values: Tensor) -> Tensor:
        """Its part of values[T, n]: a view [count, length, n]."""
        return values[self.start : self.stop].view(self.count, self.length, -1)


def merge_runs(segments: Iterable[Run]) -> list[Run]:
    """Joins neighbours that continue one another, so that one batched product serves them without a gather."""
    merged: list[Run] = []
    for run in segments:
        last = merged[-1] if merged else None
        alike = last and (last.length, last.position) == (run.length, run.position)
        if last and alike and (last.stop, last.row + last.count) == (run.start, run.row):
            merged[-1] = replace(last, count=last.count + run.count)
        else:
            merged.append(run)
    return merged


def each_token(runs: Iterable[Run]) -> Iterator[tuple[int, int]]:
    """(token, its pool row), for references that compute token by token."""
    for run in runs:
        for token in range(run.start, run.stop):
            yield token, run.row + (token - run.start) // run.length
