"""What the adapters of one batch do at each layer: which tokens meet which rows of which pools."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from hatrack_server.adapters.pieces import Action, Stage
from hatrack_server.adapters.pools import Pool
from hatrack_server.adapters.slots import Slot
from hatrack_server.kernels.low_rank import BatchLowRank
from hatrack_server.kernels.nf4_linear import BaseLinear, nf4_linear
from hatrack_server.kernels.runs import Run, Runs, merge_runs


class ModuleEffect:
    """All pieces that act at one module in one batch, and the `runs` of tokens that they act on."""

    def __init__(self, runs: Mapping[Pool, Runs]) -> None:
        self.runs = runs
        self.stacks: list[tuple[Pool, Any]] = []  # that its actions hold on to
        self._on_input: list[Action] = []
        self._on_output: list[Action] = []
        for pool, own in sorted(runs.items(), key=lambda found: found[0].kind.stage):
            actions = self._on_input if pool.kind.stage is Stage.INPUT else self._on_output
            actions.append(self._action(pool, own))
        # What is added first to the product of x as it came, the product can take along.
        first = self._on_output[0] if self._on_output and not self._on_input else None
        self._added = first if isinstance(first, BatchLowRank) else None
        self._after = self._on_output[1:] if self._added else self._on_output

    def _action(self, pool: Pool, runs: Runs) -> Action:
        if pool.copies:  # at every growth, and a device's memory has no room for both
            return lambda values, x: pool.kind.bind(pool.stacks, runs)(values, x)
        stacks = pool.stacks
        self.stacks.append((pool, stacks))
        return pool.kind.bind(stacks, runs)

    def linear(self, x: Tensor, layer: BaseLinear) -> Tensor:
        """What a linear layer gives for x[…, in] with all pieces: […, out]. x itself is left as it is."""
        y = nf4_linear(self._input(x) if self._on_input else x, layer, self._added)
        if self._after:
            outputs, tokens = y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
            for act in self._after:
                act(outputs, tokens)
        return y

    def output(self, y: Tensor, x: Tensor) -> None:
        """Changes another module's output y[T, …] in place, given x[T, …] (see Action)."""
        for act in self._on_output:
            act(y, x)

    def _input(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        values = tokens.clone()
        for act in self._on_input:
            act(values, tokens)
        return values.view(x.shape)


class ModuleEffects(dict[str, ModuleEffect]):
    """What the adapters of one batch do, by module."""

    @functools.cached_property
    def pools(self) -> frozenset[Pool]:
        """Those that any of them lies in."""
        return frozenset(pool for effect in self.values() for pool in effect.runs)


class Row(NamedTuple):
    """One sequence's part of a batch."""

    slot: Slot | None  # None: the base alone
    tokens: int
    position: int  # of the first of them in the sequence; all that lie behind the slot's soft prompt are alike


class BatchEffects:
    """Builds the effects of each step, and keeps the last ones: batches of decodes repeat."""

    def __init__(self, head: str | None = None) -> None:
        """`head` is the layer that sees only each row's last token."""
        self._head = head
        self._rows: list[Row] = []
        self._effects = ModuleEffects()

    def build(self, parts: Iterable[tuple[Slot | None, int, int]]) -> ModuleEffects:
        """`parts` gives each sequence's slot, number of tokens and position of the first, in the batch's order."""
        rows = [Row(slot, tokens, min(position, slot.soft_tokens if slot else 0)) for slot, tokens, position in parts]
        held = (stacks for effect in self._effects.values() for stacks in effect.stacks)
        # Where a pool has moved, rows in use are alike in both places, but the old one would go on taking memory.
        if rows != self._rows or any(pool.stacks is not stacks for pool, stacks in held):
            modules = _runs(_segments(rows))
            if self._head in modules:
                modules[self._head] = _runs(_segments(row._replace(tokens=1) for row in rows))[self._head]
            effects = ModuleEffects((module, ModuleEffect(pools)) for module, pools in modules.items())
            # Not before all are there: a row that fails is tried again, and must not find another batch's.
            self._rows, self._effects = rows, effects
        return self._effects


def _segments(rows: Iterable[Row]) -> list[tuple[Row, int]]:
    """(row, its first token), neighbours with the same slot joined where no soft prompt tells their tokens apart."""
    segments: list[tuple[Row, int]] = []
    start = 0
    for row in rows:
        if row.slot is not None:
            last, first = segments[-1] if segments else (None, 0)
            joinable = last is not None and last.slot is row.slot and first + last.tokens == start
            if last and joinable and last.position == row.position == row.slot.soft_tokens:
                segments[-1] = last._replace(tokens=last.tokens + row.tokens), first
            else:
                segments.append((row, start))
        start += row.tokens
    return segments


_Part = tuple[int, int, tuple[int, ...], int]  # what makes a Run


def _runs(segments: Iterable[tuple[Row, int]]) -> dict[str, dict[Pool, Runs]]:
    """By module and pool."""
    modules: dict[str, dict[Pool, list[_Part]]] = defaultdict(lambda: defaultdict(list))
    for row, start in segments:
        for place in row.slot.places if row.slot else ():
            if place.pool.kind.stage is not Stage.CACHE:
                modules[place.pool.module][place.pool].append((start, row.tokens, (place.row,), row.position))

    @functools.cache  # programs mostly lie alike in all their pools
    def merged(parts: tuple[_Part, ...]) -> Runs:
        return merge_runs(Run(*part) for part in parts)

    return {module: {pool: merged(tuple(parts)) for pool, parts in pools.items()} for module, pools in modules.items()}
