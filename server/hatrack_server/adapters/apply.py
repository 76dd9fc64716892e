"""What the adapters of one batch do at each layer: which tokens meet which rows of which pools."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from collections.abc import Sequence as Rows

from torch import Tensor

from hatrack_server.adapters.pieces import Stage
from hatrack_server.adapters.pools import Pool
from hatrack_server.adapters.slots import Slot
from hatrack_server.kernels.runs import Run, merge_runs


class LayerEffect:
    """All pieces that act at one layer in one batch."""

    def __init__(self, runs: Mapping[Pool, list[Run]]) -> None:
        in_order = sorted(runs.items(), key=lambda found: found[0].kind.stage)
        self._on_input = [(pool, runs) for pool, runs in in_order if pool.kind.stage is Stage.INPUT]
        self._on_output = [(pool, runs) for pool, runs in in_order if pool.kind.stage is not Stage.INPUT]

    def input(self, x: Tensor) -> Tensor:
        """What the base's product takes in place of x[T, in]; x itself is left as it is."""
        if not self._on_input:
            return x
        values = x.clone()
        for pool, runs in self._on_input:
            pool.kind.act(values, x, pool.stacks, runs)
        return values

    def output(self, y: Tensor, x: Tensor) -> None:
        """Changes the base's output y[T, out] in place, given the layer's input x[T, in]."""
        for pool, runs in self._on_output:
            pool.kind.act(y, x, pool.stacks, runs)


class BatchEffects:
    """Builds the effects of each step, and keeps the last ones: batches of decodes repeat."""

    def __init__(self, head: str | None = None) -> None:
        """`head` is the layer that sees only each row's last token."""
        self._head = head
        self._rows: list[tuple[Slot | None, int]] = []
        self._effects: dict[str, LayerEffect] = {}

    def build(self, rows: Rows[tuple[Slot | None, int]]) -> dict[str, LayerEffect]:
        """`rows` gives each sequence's slot (None: the base alone) and number of tokens, in the batch's order."""
        if list(rows) != self._rows:
            self._rows = list(rows)
            self._effects = _effects(_segments(rows))
            if self._head in self._effects:
                last_tokens = [(slot, 1) for slot, _ in rows]
                self._effects[self._head] = _effects(_segments(last_tokens))[self._head]
        return self._effects


def _segments(rows: Rows[tuple[Slot | None, int]]) -> list[tuple[Slot, int, int]]:
    """(slot, first token, tokens), neighbours with the same slot joined."""
    segments: list[tuple[Slot, int, int]] = []
    start = 0
    for slot, length in rows:
        if slot is not None:
            if segments and segments[-1][0] is slot and segments[-1][1] + segments[-1][2] == start:
                slot, first, before = segments.pop()
                segments.append((slot, first, before + length))
            else:
                segments.append((slot, start, length))
        start += length
    return segments


def _effects(segments: list[tuple[Slot, int, int]]) -> dict[str, LayerEffect]:
    layers: dict[str, dict[Pool, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for slot, start, length in segments:
        for place in slot.places:
            layers[place.pool.layer][place.pool].append(Run(start, length, place.row))
    return {
        layer: LayerEffect({pool: merge_runs(runs) for pool, runs in pools.items()}) for layer, pools in layers.items()
    }
