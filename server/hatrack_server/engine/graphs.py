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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from hatrack_server.adapters.apply import ModuleEffect, ModuleEffects
from hatrack_server.adapters.pieces import LowRank
from hatrack_server.adapters.pools import Pool
from hatrack_server.kernels.runs import FixedRuns, Runs, stretch_runs, token_tiles
from hatrack_server.kernels.transfer import to_device
from hatrack_server.model.batch import Batch, Decode
from hatrack_server.model.paged import PagedModel
from hatrack_server.model.probe import TOLERANCE

logger = logging.getLogger(__name__)

FEWEST_KEYS, MOST_KEYS = 64, 4096  # of a row; with more, attention takes so long that nobody waits for launches
MOST_GATHERED = 1 << 16  # keys of all rows: what gathers them takes memory for good
WORTH_RECORDING = 3  # batches of one bucket, before it gets a graph; twice as many each time that it has lost one
MOST_DOUBLINGS = 10
TRIALS = 2  # batches on which a graph is compared with the pass that it stands for, before it is used
MOST_GRAPHS = 128
MOST_FAILURES = 3  # without a success in between, after which no more are recorded
NO_RUNS = Runs()

Launch = Callable[[], Tensor]
Record = Callable[[Launch], Launch]
"""Makes of a function that reads and writes the same places at every call what does the same, only faster."""


class CudaRecorder:
    """Records launches as CUDA graphs, which share the memory of what they compute on the way."""

    def __init__(self) -> None:
        self._memory = torch.cuda.graph_pool_handle()
        self._anchor = torch.cuda.CUDAGraph()  # memory that no graph has any more can't be recorded into again
        with self._recording(self._anchor):
            torch.zeros(1, device="cuda")

    def __call__(self, run: Launch) -> Launch:
        """See Record. A replay is launched on the current stream, and gives the same tensor every time."""
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(current)
        try:
            with torch.cuda.stream(side):  # what libraries make at their first call can't be recorded
                run()
        finally:
            current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with self._recording(graph):
            out = run()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay

    @contextmanager
    def _recording(self, graph: torch.cuda.CUDAGraph) -> Iterator[None]:
        # One that fails would leave its own stream behind. Other threads go on loading programs meanwhile.
        record = torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local")
        with torch.cuda.stream(torch.cuda.current_stream()), record:
            yield


class Bucket(NamedTuple):
    """Which batches one graph serves."""

    rows: int  # up to so many
    keys: int  # up to so many of each
    ranks: frozenset[int]  # of the pools that their adapters lie in

    @classmethod
    def of(cls, batch: Batch, effects: ModuleEffects) -> Bucket | None:
        """None for batches that no graph serves."""
        if batch.prefills or len(batch.decodes) != 1 or any(pool.kind is not LowRank for pool in effects.pools):
            return None
        rows, keys = batch.decodes[0].slots.shape
        rows = _power_of_2(rows) if rows < 16 else -(-rows // 16) * 16
        keys = max(_power_of_2(keys), FEWEST_KEYS)
        if keys > MOST_KEYS or rows * keys > MOST_GATHERED:
            return None
        return cls(rows, keys, frozenset(pool.shapes[0][0] for pool in effects.pools))


class DecodeGraphs:
    """A model's forward passes, by graphs wherever there is one."""

    def __init__(self, model: PagedModel, record: Record | None = None) -> None:
        """`record` is a CudaRecorder unless something else is given."""
        self._model = model
        self._record = record
        self._graphs: OrderedDict[Bucket, _Graph] = OrderedDict()  # longest unused first
        self._seen: Counter[Bucket] = Counter()  # batches since a bucket has last lost its graph
        self._lost: Counter[Bucket] = Counter()  # graphs
        self._wrong: set[Bucket] = set()
        self._pools: dict[frozenset[int], frozenset[Pool]] = {}  # that batches of these ranks have met
        self._failures = 0

    def forward(self, batch: Batch, effects: ModuleEffects) -> Tensor:
        """See PagedModel: logits [chunks, vocab], which the next call may overwrite."""
        bucket = Bucket.of(batch, effects)
        if bucket is None or bucket in self._wrong:
            return self._model.forward(batch, effects)
        graph = self._graphs.get(bucket)
        if graph is not None and not graph.trials:
            logits = self._replayed(bucket, graph, batch, effects)
            if logits is not None:
                return logits
            graph = None
        logits = self._model.forward(batch, effects)
        if graph is None:
            self._seen[bucket] += 1
            if not self._is_worth_recording(bucket):
                return logits
        if not logits.isfinite().all() or self._try(bucket, batch, effects, logits):
            return logits
        return self._model.forward(batch, effects)  # again: other keys and values may have been written

    def _is_worth_recording(self, bucket: Bucket) -> bool:
        wanted = WORTH_RECORDING << min(self._lost[bucket], MOST_DOUBLINGS)
        return self._seen[bucket] >= wanted and self._failures < MOST_FAILURES

    def _replayed(self, bucket: Bucket, graph: _Graph, batch: Batch, effects: ModuleEffects) -> Tensor | None:
        """None where the graph can't be used any more; then it is lost."""
        try:
            logits = graph.replay(batch, effects)
        except Exception:  # the pass itself may do all the same
            logger.warning("a CUDA graph of %s failed", bucket, exc_info=True)
            self._failures += 1
            logits = None
        if logits is None:
            self._lose(bucket)
        else:
            self._graphs.move_to_end(bucket)
        return logits

    def _try(self, bucket: Bucket, batch: Batch, effects: ModuleEffects, expected: Tensor) -> bool:
        """Whether the bucket's graph, recorded if there is none, gives what was expected; else it is lost."""
        try:
            graph = self._graphs.get(bucket) or self._recorded(bucket, batch, effects)
            found = graph.replay(batch, effects)
        except Exception:
            logger.warning("no CUDA graph of %s", bucket, exc_info=True)
            self._failures += 1
            self._lose(bucket)
            return False
        if found is None:
            self._lose(bucket)
            return False
        if not _agree(found, expected):
            logger.warning("a CUDA graph of %s gave other logits than the model", bucket)
            self._failures += 1
            self._wrong.add(bucket)
            self._lose(bucket)
            return False
        self._failures = 0
        graph.trials -= 1
        self._graphs[bucket] = graph
        if len(self._graphs) > MOST_GRAPHS:
            self._lose(next(iter(self._graphs)))
        return True

    def _recorded(self, bucket: Bucket, batch: Batch, effects: ModuleEffects) -> _Graph:
        """Serves all pools that batches of its ranks have met, but those that are empty by now."""
        met = self._pools.get(bucket.ranks, frozenset())
        pools = self._pools[bucket.ranks] = effects.pools | {pool for pool in met if pool.taken}
        if self._record is None:  # not before: a device that records nothing must not keep a server from starting
            self._record = CudaRecorder()
        return _Graph(self._model, bucket, pools, self._record, batch, effects)

    def _lose(self, bucket: Bucket) -> None:
        self._graphs.pop(bucket, None)
        self._seen[bucket] = 0
        self._lost[bucket] += 1


class _Graph:
    """One bucket's forward pass, and the places where it finds what differs from batch to batch.

    trials: batches on which it has still to be compared with the pass that it stands for.
    """

    def __init__(
        self,
        model: PagedModel,
        bucket: Bucket,
        pools: frozenset[Pool],
        record: Record,
        batch: Batch,
        effects: ModuleEffects,
    ) -> None:
        """Is recorded with a batch's values, so that what is computed on the way is what that computes anyway."""
        rows, keys, _ = bucket
        device = model.device
        self.trials = TRIALS
        self._model = model
        self._rows = torch.arange(rows, device=device)
        self._token_ids, self._positions, self._write_slots = torch.zeros(3, rows, dtype=torch.int64, device=device)
        self._slots = torch.zeros(rows, keys, dtype=torch.int64, device=device)
        # A multiple of 16 bytes for each pool: Triton compiles other kernels for other alignments.
        self._tables = torch.zeros(len(pools), -(-rows // 4) * 4, 3, dtype=torch.int32, device=device)[:, :rows]
        self._pools = pools
        ordered = sorted(pools, key=lambda pool: pool.number)
        self._runs = {pool: FixedRuns(table) for pool, table in zip(ordered, self._tables, strict=True)}
        modules: dict[str, dict[Pool, FixedRuns]] = {}
        for pool, runs in self._runs.items():
            modules.setdefault(pool.module, {})[pool] = runs
        self._effects = ModuleEffects((module, ModuleEffect(own)) for module, own in modules.items())
        self._last_put: ModuleEffects | None = None
        held = self._stacks()  # until all is launched: the loading thread may move a pool meanwhile
        self._put(batch, effects)
        self._replay = record(self._run)
        self._recorded = [weakref.ref(stack) for stack in held]  # whose addresses the launches have

    def replay(self, batch: Batch, effects: ModuleEffects) -> Tensor | None:
        """Logits [chunks, vocab]; None where a pool has moved since it was recorded, or the batch has other pools."""
        held = self._stacks()
        moved = any(recorded() is not stack for recorded, stack in zip(self._recorded, held, strict=True))
        if moved or not effects.pools <= self._pools:
            return None
        self._put(batch, effects)
        return self._replay()[: len(batch.token_ids)]

    def _stacks(self) -> list[Tensor]:
        return [stack for pool in self._runs for stack in pool.stacks]

    def _run(self) -> Tensor:
        # Anew at each call: what a Decode makes of its tensors must be made by the graph.
        decode = Decode(slice(0, len(self._rows)), self._slots, self._positions)
        batch = Batch(self._token_ids, self._positions, self._write_slots, self._rows, [decode], [])
        return self._model.forward(batch, self._effects)

    def _put(self, batch: Batch, effects: ModuleEffects) -> None:
        """Rows that the batch lacks repeat its last one: they write the same keys and values to the same places."""
        rows, [decode] = len(batch.token_ids), batch.decodes
        chosen = self._rows.clamp(max=rows - 1)
        self._token_ids.copy_(batch.token_ids[chosen])
        self._positions.copy_(batch.positions[chosen])
        self._write_slots.copy_(batch.write_slots[chosen])
        keys = decode.slots.shape[1]
        self._slots[:, :keys] = decode.slots[chosen]
        self._slots[:, keys:] = 0  # where zeros are: what lies elsewhere may be another's, and not finite
        if effects is not self._last_put:
            self._put_runs(effects, rows)
            self._last_put = effects

    def _put_runs(self, effects: ModuleEffects, rows: int) -> None:
        # Programs mostly lie alike in all their pools, which then share their runs.
        made: dict[int, tuple[Runs, Tensor]] = {}
        tables = []
        for pool, fixed in self._runs.items():
            runs = effects[pool.module].runs.get(pool, NO_RUNS) if pool.module in effects else NO_RUNS
            if id(runs) not in made:
                stretched = stretch_runs(runs, rows, len(self._rows))
                made[id(runs)] = stretched, token_tiles(stretched, len(self._rows))
            stretched, table = made[id(runs)]
            fixed[:] = stretched
            tables.append(table)
        if tables:
            self._tables.copy_(to_device(torch.stack(tables), self._tables.device))


def _agree(found: Tensor, expected: Tensor) -> bool:
    """Whether each row's logits are the same as far as their dtype tells."""
    difference = (found.float() - expected.float()).abs().amax(-1)
    return bool((difference <= TOLERANCE[expected.dtype] * expected.float().abs().amax(-1)).all())


def _power_of_2(number: int) -> int:
    """The least that is no less."""
    return 1 << (number - 1).bit_length()
