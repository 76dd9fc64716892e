"""Decodes as CUDA graphs: a step's hundreds of launches are recorded once, and then given to the GPU at a stroke.

A graph reads and writes the same places whenever it is replayed. So each serves one bucket of batches, which have one
token per row, up to so many rows and keys, and adapters that do nothing but add low ranks of certain classes. What
differs from batch to batch is copied to where the graph reads it. All other batches, as those with prompts, run as they
come.
"""

from __future__ import annotations

import logging
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from hatrack_server.adapters.apply import ModuleEffect
from hatrack_server.adapters.pieces import LowRank
from hatrack_server.adapters.pools import Pool
from hatrack_server.kernels.runs import FixedRuns, Runs, stretch_runs, token_tiles
from hatrack_server.model.batch import Batch, Decode
from hatrack_server.model.paged import PagedModel
from hatrack_server.model.probe import TOLERANCE

logger = logging.getLogger(__name__)

FEWEST_KEYS, MOST_KEYS = 64, 4096  # with more, attention takes so long that nobody waits for launches
WORTH_RECORDING = 3  # batches of one bucket, before it gets a graph
MOST_GRAPHS = 64
NO_RUNS = Runs()

Effects = Mapping[str, ModuleEffect]
Launch = Callable[[], Tensor]
Record = Callable[[Launch], Launch]
"""Makes of a function that reads and writes the same places at every call what does the same, only faster."""


class CudaRecorder:
    """Records launches as CUDA graphs, which share the memory of what they compute on the way."""

    def __init__(self) -> None:
        self._memory = torch.cuda.graph_pool_handle()

    def __call__(self, run: Launch) -> Launch:
        """See Record. A replay is launched on the current stream, and gives the same tensor every time."""
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(current)
        with torch.cuda.stream(side):  # what libraries make at their first call can't be recorded
            run()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        record = torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local")  # programs go on loading
        with torch.cuda.stream(current), record:  # one that fails would leave its own stream behind
            out = run()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay


class Bucket(NamedTuple):
    """Which batches one graph serves."""

    rows: int  # up to so many
    keys: int  # up to so many of each
    ranks: frozenset[int]  # of the pools that their adapters lie in

    @classmethod
    def of(cls, batch: Batch, ranks: frozenset[int]) -> Bucket | None:
        """None for batches that no graph serves."""
        if batch.prefills or len(batch.decodes) != 1:
            return None
        rows, keys = batch.decodes[0].slots.shape
        if keys > MOST_KEYS:
            return None
        return cls(_power_of_2(rows) if rows < 8 else -(-rows // 8) * 8, max(_power_of_2(keys), FEWEST_KEYS), ranks)


class DecodeGraphs:
    """A model's forward passes, by graphs wherever there is one."""

    def __init__(self, model: PagedModel, record: Record | None = None) -> None:
        """`record` is a CudaRecorder unless something else is given."""
        self._model = model
        self._record = record or CudaRecorder()
        self._graphs: OrderedDict[Bucket, _Graph] = OrderedDict()  # longest unused first
        self._seen: Counter[Bucket] = Counter()
        self._refused: set[Bucket] = set()
        self._pools: dict[frozenset[int], set[Pool]] = {}  # all that batches of these ranks have met
        self._last: tuple[Effects, frozenset[int] | None] = {}, frozenset()

    def forward(self, batch: Batch, effects: Effects) -> Tensor:
        """See PagedModel: logits [chunks, vocab], which the next call may overwrite."""
        ranks = self._ranks(effects)
        bucket = None if ranks is None else Bucket.of(batch, ranks)
        if bucket is None or bucket in self._refused:
            return self._model.forward(batch, effects)
        logits = self._replayed(bucket, batch, effects)
        if logits is not None:
            return logits
        logits = self._model.forward(batch, effects)
        self._seen[bucket] += 1
        if self._seen[bucket] < WORTH_RECORDING or self._recorded(bucket, batch, effects, logits):
            return logits
        return self._model.forward(batch, effects)  # again: a graph may have written other keys and values

    def _ranks(self, effects: Effects) -> frozenset[int] | None:
        """Of the effects' pools; None where other pieces act, too. Looked up once for a batch and its repetitions."""
        last, ranks = self._last
        if effects is not last:
            pools = {pool for effect in effects.values() for pool in effect.runs}
            low_rank = all(pool.kind is LowRank for pool in pools)
            ranks = frozenset(pool.stacks[0].shape[1] for pool in pools) if low_rank else None
            if ranks is not None and not pools <= self._pools.setdefault(ranks, set()):
                self._pools[ranks] |= pools
                for bucket in [bucket for bucket in self._graphs if bucket.ranks == ranks]:
                    del self._graphs[bucket]
            self._last = effects, ranks
        return ranks

    def _replayed(self, bucket: Bucket, batch: Batch, effects: Effects) -> Tensor | None:
        """None where there is no graph, or none any more."""
        graph = self._graphs.get(bucket)
        if graph is None:
            return None
        logits = graph.replay(batch, effects)
        if logits is None:
            del self._graphs[bucket]
        else:
            self._graphs.move_to_end(bucket)
        return logits

    def _recorded(self, bucket: Bucket, batch: Batch, effects: Effects, expected: Tensor) -> bool:
        """Records a graph and tries it on the batch; False, and never again, if it doesn't give what was expected."""
        if not expected.isfinite().all():  # nothing to compare with
            return True
        try:
            graph = _Graph(self._model, bucket, sorted(self._pools[bucket.ranks], key=lambda pool: pool.number))
            graph.record(self._record, batch, effects)
            found = graph.replay(batch, effects)
            fits = found is None or _agree(found, expected)
        except Exception:
            logger.warning("no CUDA graph of %s", bucket, exc_info=True)
            fits = False
        else:
            if not fits:
                logger.warning("a CUDA graph of %s gave other logits than the model", bucket)
        if fits:
            self._graphs[bucket] = graph
            while len(self._graphs) > MOST_GRAPHS:
                self._graphs.popitem(last=False)
        else:
            self._refused.add(bucket)
        return fits


class _Graph:
    """One bucket's forward pass, and the places where it finds what differs from batch to batch."""

    def __init__(self, model: PagedModel, bucket: Bucket, pools: list[Pool]) -> None:
        rows, keys, _ = bucket
        self._model = model
        self._rows = torch.arange(rows, device=model.device)
        self._token_ids, self._positions, self._write_slots = torch.zeros(
            3, rows, dtype=torch.int64, device=model.device
        )
        self._slots = torch.zeros(rows, keys, dtype=torch.int64, device=model.device)
        self._tables = torch.zeros(len(pools), rows, 3, dtype=torch.int32, device=model.device)
        self._runs = {pool: FixedRuns(table) for pool, table in zip(pools, self._tables, strict=True)}
        modules: dict[str, dict[Pool, FixedRuns]] = {}
        for pool, runs in self._runs.items():
            modules.setdefault(pool.module, {})[pool] = runs
        self._effects = {module: ModuleEffect(runs) for module, runs in modules.items()}
        self._put_effects: Effects | None = None
        self._stacks: list[weakref.ref[Tensor]] = []  # whose addresses were recorded

    def record(self, record: Record, batch: Batch, effects: Effects) -> None:
        """With the batch's values, so that what is computed on the way is what the batch computes anyway."""
        held = self._stacks_now()
        self._put(batch, effects)
        self._replay = record(self._run)
        self._stacks = [weakref.ref(stack) for stack in held]

    def replay(self, batch: Batch, effects: Effects) -> Tensor | None:
        """Logits [chunks, vocab]; None where a pool has moved since it was recorded."""
        held = self._stacks_now()  # until all is launched: the loading thread may move one meanwhile
        if any(recorded() is not stack for recorded, stack in zip(self._stacks, held, strict=True)):
            return None
        self._put(batch, effects)
        return self._replay()[: len(batch.token_ids)]

    def _stacks_now(self) -> list[Tensor]:
        return [stack for pool in self._runs for stack in pool.stacks]

    def _run(self) -> Tensor:
        # Anew at each call: what a Decode makes of its tensors must be made by the graph.
        decode = Decode(slice(0, len(self._rows)), self._slots, self._positions)
        batch = Batch(self._token_ids, self._positions, self._write_slots, self._rows, [decode], [])
        return self._model.forward(batch, self._effects)

    def _put(self, batch: Batch, effects: Effects) -> None:
        """Rows that the batch lacks repeat its last one: they write the same keys and values to the same places."""
        rows, [decode] = len(batch.token_ids), batch.decodes
        chosen = self._rows.clamp(max=rows - 1)
        self._token_ids.copy_(batch.token_ids[chosen])
        self._positions.copy_(batch.positions[chosen])
        self._write_slots.copy_(batch.write_slots[chosen])
        keys = decode.slots.shape[1]
        self._slots[:, :keys] = decode.slots[chosen]
        self._slots[:, keys:] = 0
        if effects is not self._put_effects:
            self._put_runs(effects, rows)
            self._put_effects = effects

    def _put_runs(self, effects: Effects, rows: int) -> None:
        made: dict[int, tuple[Runs, Tensor]] = {}  # programs mostly lie alike in all their pools, and share their runs
        tables = []
        for pool, fixed in self._runs.items():
            runs = effects[pool.module].runs.get(pool, NO_RUNS) if pool.module in effects else NO_RUNS
            if id(runs) not in made:
                stretched = stretch_runs(runs, rows, len(self._rows))
                made[id(runs)] = stretched, token_tiles(stretched, len(self._rows))
            fixed[:], table = made[id(runs)]
            tables.append(table)
        if tables:
            self._tables.copy_(torch.stack(tables), non_blocking=True)


def _agree(found: Tensor, expected: Tensor) -> bool:
    """Whether logits are the same as far as their dtype tells."""
    difference = (found.float() - expected.float()).abs().max()
    return bool(difference <= TOLERANCE[expected.dtype] * expected.float().abs().max())


def _power_of_2(number: int) -> int:
    """The least that is no less."""
    return 1 << (number - 1).bit_length()
