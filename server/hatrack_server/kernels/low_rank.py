"""y += (x Aᵀ) B for the tokens of each adapter, from stacked pools (LoRA, Hu et al. 2021; batched as in Punica)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Run:
    """Adjacent tokens whose adapters lie in consecutive rows of a pool, each with the same number of tokens.

    Tokens start … start + count·length - 1 belong to pool rows row … row + count - 1, `length` tokens to each.
    """

    start: int
    length: int
    row: int
    count: int = 1

    @property
    def stop(self) -> int:
        """One past the last token."""
        return self.start + self.count * self.length


def merge_runs(segments: list[Run]) -> list[Run]:
    """Joins neighbours that continue one another, so that one batched product serves them without a gather."""
    merged: list[Run] = []
    for run in segments:
        last = merged[-1] if merged else None
        if last and last.stop == run.start and last.length == run.length and last.row + last.count == run.row:
            merged[-1] = Run(last.start, last.length, last.row, last.count + run.count)
        else:
            merged.append(run)
    return merged


def add_low_rank(y: Tensor, x: Tensor, a: Tensor, b: Tensor, runs: list[Run]) -> None:
    """Adds each run's low-rank product to y in place; tokens outside of every run are left alone.

    y[T, out], x[T, in], a[rows, r, in], b[rows, r, out] with the scale folded in. Rows never mix: each token meets its
    own adapter's values only, so a NaN stays with its owner.
    """
    for run in runs:
        rows = slice(run.row, run.row + run.count)
        tokens = x[run.start : run.stop].to(a.dtype)
        out = y[run.start : run.stop]
        if run.count == 1:
            out += (tokens @ a[run.row].mT) @ b[run.row]
        else:
            shrunk = tokens.view(run.count, run.length, -1).bmm(a[rows].mT)
            out += shrunk.bmm(b[rows]).view_as(out)


def add_low_rank_reference(y: Tensor, x: Tensor, a: Tensor, b: Tensor, runs: list[Run]) -> None:
    """The same, token by token."""
    for run in runs:
        for token in range(run.start, run.stop):
            row = run.row + (token - run.start) // run.length
            y[token] += b[row].mT @ (a[row] @ x[token].to(a.dtype))
