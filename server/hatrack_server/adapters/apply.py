"""What the adapters of one batch do at each layer: which tokens meet which rows of which pools."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence as Rows

from torch import Tensor

from hatrack_server.adapters.pools import LowRankPool
from hatrack_server.adapters.slots import Slot
from hatrack_server.kernels.low_rank import Run, add_low_rank, merge_runs


class LayerEffect:
    """All low-rank pieces that act at one layer in one batch."""

    def __init__(self, runs: dict[LowRankPool, list[Run]]) -> None:
        self._runs = runs

    def __call__(self, y: Tensor, x: Tensor) -> None:
        """Adds each token's own product to y[T, out], given x[T, in]."""
        for pool, runs in self._runs.items():
            add_low_rank(y, x, pool.a, pool.b, runs)


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
    layers: dict[str, dict[LowRankPool, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for slot, start, length in segments:
        for layer, place in slot.places.items():
            layers[layer][place.pool].append(Run(start, length, place.row))
    return {
        layer: LayerEffect({pool: merge_runs(runs) for pool, runs in pools.items()}) for layer, pools in layers.items()
    }
