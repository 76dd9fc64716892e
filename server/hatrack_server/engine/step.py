"""The engine's central loop: schedule, run, sample, collect."""

from __future__ import annotations

import itertools
import logging
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hatrack_server.adapters.apply import BatchEffects
from hatrack_server.adapters.pieces import Stage
from hatrack_server.adapters.slots import ProgramSlots
from hatrack_server.engine.blocks import KVBlocks
from hatrack_server.engine.graphs import DecodeGraphs
from hatrack_server.engine.messages import DEADLINE_ERROR
from hatrack_server.engine.sampler import Draw, Drawn, Sample, sample
from hatrack_server.engine.scheduler import Scheduler, Work
from hatrack_server.engine.sequence import PENDING, Sequence
from hatrack_server.kernels.transfer import to_device
from hatrack_server.model.batch import Batch, Chunk, build_batch
from hatrack_server.model.paged import PagedModel
from hatrack_server.types import Artifact, Delta, EngineStats, FinishReason, Generation

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Pass:
    """A forward pass that the device may still be computing."""

    work: list[Work]
    sequences: list[Sequence]  # those that it draws a token for
    sample: Sample | None

    def put_tokens(self, token_ids: Tensor, places: Mapping[Sequence, int]) -> None:
        """Puts the tokens that are drawn for some sequences at their places in token_ids[T], where they are drawn."""
        rows = [(row, places[sequence]) for row, sequence in enumerate(self.sequences) if sequence in places]
        if rows and self.sample:
            drawn, where = to_device(rows, token_ids.device).T
            token_ids[where] = self.sample.tokens[drawn]


class Engine:
    """Owns the scheduler, the resident programs and the model; none of them knows another."""

    def __init__(
        self,
        model: PagedModel,
        slots: ProgramSlots,
        blocks: KVBlocks,
        *,
        max_rows: int,
        max_step_tokens: int,
        ahead: bool = False,
        graphs: DecodeGraphs | None = None,
    ) -> None:
        """`ahead`: see `step`. `graphs`: of the model's passes, for those that they serve."""
        self.model = model
        self.slots = slots
        self.blocks = blocks
        self.scheduler = Scheduler(blocks, slots, max_rows=max_rows, max_step_tokens=max_step_tokens)
        self.steps = 0
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._completion_tokens = 0
        self._last_adapters = 0  # distinct adapters of the last step
        self._effects = BatchEffects(model.head)
        self._sequences: dict[int, Sequence] = {}
        self._ahead = ahead
        self._graphs = graphs
        self._in_flight: list[Pass] = []

    @property
    def has_work(self) -> bool:
        """Whether any sequence waits for something: its tokens, its program, or a place among the running ones."""
        return self.scheduler.has_work

    def submit(self, generation: Generation) -> None:
        """Queues a completion."""
        sequence = Sequence(generation, arrival=time.monotonic())
        self._sequences[generation.id] = sequence
        self.scheduler.add(sequence)

    def cancel(self, generation_id: int) -> None:
        """Ends a completion without another delta; unknown ids are those that have just ended."""
        sequence = self._sequences.get(generation_id)
        if sequence is not None:
            self._end(sequence)

    def load_failed(self, artifact: Artifact, error: str) -> list[Delta]:
        """Ends the completions that wait for a program that can't be loaded.

        Those that have the same artifact from another place go on waiting: its files may have moved during the load,
        from where an upload was staged into the store.
        """
        waiting = self.scheduler.waiting_for(artifact.digest)
        return [self._fail(sequence, error) for sequence in waiting if sequence.generation.artifact == artifact]

    def step(self) -> list[Delta]:
        """Starts one forward pass over what the scheduler chose, if any can run; what sequences got, or ended with.

        With `ahead` they get what the pass before gave: while the device computes one, the next is made ready behind
        it, so that it never waits for us. A row that turns out to have ended was computed once in vain, and is left.
        """
        now = time.monotonic()
        deltas: list[Delta] = []
        # A token that is computed anew must be known; and an answer whose last one is on its way is not too late.
        if self._in_flight and (self.scheduler.must_preempt or self.scheduler.expired(now)):
            deltas += self._collect()
        deltas += [self._fail(sequence, DEADLINE_ERROR) for sequence in self.scheduler.expired(now)]
        work = self._in_order(self.scheduler.schedule(now))
        passes = self._run_isolated(work) if work else []
        deltas += self._collect()
        deltas += self._advance(work, passes)
        if not self._ahead:
            deltas += self._collect()
        return deltas

    def stats(self, *, stepped: bool) -> EngineStats:
        """A snapshot; `stepped` says whether it follows a forward pass."""
        return EngineStats(
            steps=self.steps,
            running=len(self.scheduler.running),
            waiting=self.scheduler.waiting,
            kv_blocks_used=self.blocks.used,
            kv_blocks_total=self.blocks.total,
            resident_programs=len(self.slots),
            resident_bytes=self.slots.bytes,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            completion_tokens=self._completion_tokens,
            preemptions=self.scheduler.preemptions,
            evictions=self.slots.evictions,
            host_bytes=self.slots.host_bytes,
            disk_loads=self.slots.disk_loads,
            host_loads=self.slots.host_loads,
            reloads=self.slots.reloads,
            working_set_bytes=self.slots.working_set_bytes,
            adapter_budget_bytes=self.slots.budget_bytes,
            adapters_per_step=(self._last_adapters,) if stepped else (),
        )

    def _run_isolated(self, work: list[Work]) -> list[Pass]:
        """What `_run` gives; when the batch fails, its rows are tried one by one, and those that fail again left out.

        Running a row again writes the same keys and values to the same places. Raises RuntimeError when every row fails
        and the base does, too: then a new process must take over.
        """
        try:
            return [self._run(work)]
        except Exception:  # whatever one row brought about must not end the others
            logger.exception("a batch of %d rows failed; trying its rows one by one", len(work))
        passes: list[Pass] = []
        for w in work:
            try:
                passes.append(self._run([w]))
            except Exception:
                logger.exception("generation %d of artifact %s failed", w.sequence.id, w.sequence.digest)
        if not passes:
            self.model.check_device()
        return passes

    def _run(self, work: list[Work]) -> Pass:
        """Has the work computed, without waiting for it."""
        for w in work:
            if w.ready:
                self._put_prefix(w)
        rows = [
            (self.slots[w.sequence.digest] if w.sequence.digest else None, w.count, w.sequence.computed) for w in work
        ]
        self._last_adapters = len({w.sequence.digest for w in work if w.sequence.digest})
        logits = (self._graphs or self.model).forward(self._batch(work), self._effects.build(rows))
        sampling = [row for row, w in enumerate(work) if w.samples]
        if not sampling:
            return Pass(work, [], None)
        if len(sampling) < len(work):
            logits = logits[to_device(sampling, logits.device)]
        sequences = [work[row].sequence for row in sampling]
        return Pass(work, sequences, sample(logits, list(map(self._draw, sequences))))

    def _advance(self, work: list[Work], passes: list[Pass]) -> list[Delta]:
        """Puts passes in flight, and fails the work that is in none. What has ended meanwhile gets no further."""
        self._in_flight = passes
        done = [w for p in passes for w in p.work if self._runs(w.sequence)]
        self.scheduler.advance(done)
        for p in passes:
            for sequence in filter(self._runs, p.sequences):
                sequence.tokens.append(PENDING)
        self.steps += bool(passes)
        started = {w.sequence for p in passes for w in p.work}
        lost = [w.sequence for w in work if w.sequence not in started and self._runs(w.sequence)]
        return [self._fail(sequence, "its computation failed") for sequence in lost]

    def _collect(self) -> list[Delta]:
        """Waits for the passes in flight, and takes what they have drawn."""
        passes, self._in_flight = self._in_flight, []
        drawn = [found for p in passes if p.sample for found in zip(p.sequences, p.sample.read(), strict=True)]
        return [self._take(sequence, token) for sequence, token in drawn if self._runs(sequence)]

    def _runs(self, sequence: Sequence) -> bool:
        return self._sequences.get(sequence.id) is sequence

    def _put_prefix(self, work: Work) -> None:
        """Puts the keys and values that an adapter brings into the sequence's own blocks."""
        sequence = work.sequence
        assert sequence.digest is not None
        ready = slice(sequence.computed - work.ready, sequence.computed)
        slots = self._kv_slots(sequence, ready.stop)[ready]
        for place in self.slots[sequence.digest].places:
            if place.pool.kind.stage is Stage.CACHE:
                keys, values = (stack[place.row, ready] for stack in place.pool.stacks)
                self.model.write_kv(place.pool.module, slots, keys, values)

    def _in_order(self, work: list[Work]) -> list[Work]:
        """Rows of one adapter side by side, and adapters by their tokens in this step and by where they lie.

        So those that one batched product can serve are neighbours.
        """
        tokens: Counter[str | None] = Counter()
        for w in work:
            tokens[w.sequence.digest] += w.count

        def key(w: Work) -> tuple[int, tuple[int, int]]:
            digest = w.sequence.digest
            return (tokens[digest], self.slots[digest].order) if digest else (0, (0, 0))

        return sorted(work, key=key)

    def _batch(self, work: list[Work]) -> Batch:
        chunks = []
        for w in work:
            sequence, end = w.sequence, w.sequence.computed + w.count
            tokens = sequence.tokens[sequence.computed : end]
            chunks.append(Chunk(tokens, sequence.computed, self._kv_slots(sequence, end)))
        batch = build_batch(chunks, self.model.device)
        if self._in_flight:
            ends = itertools.accumulate(w.count for w in work)
            pending = {
                w.sequence: end - 1 for w, end in zip(work, ends, strict=True) if w.sequence.tokens[-1] == PENDING
            }
            for p in self._in_flight:
                p.put_tokens(batch.token_ids, pending)
        return batch

    def _kv_slots(self, sequence: Sequence, end: int) -> Tensor:
        """Where the keys and values of the sequence's first `end` tokens lie: int64 [end]."""
        size = self.blocks.block_size
        return (torch.tensor(sequence.blocks)[:, None] * size + torch.arange(size)).view(-1)[:end]

    def _draw(self, sequence: Sequence) -> Draw:
        return Draw(sequence.generation.sampling, len(sequence.tokens), sequence.generated, self.model.eos_token_ids)

    def _take(self, sequence: Sequence, drawn: Drawn | None) -> Delta:
        if drawn is None:
            return self._fail(sequence, "its logits are not finite")
        sequence.tokens[-1] = drawn.token
        self._count(sequence)
        finish = self._finish(sequence, drawn.token)
        if finish:
            self._end(sequence)
        return Delta(
            id=sequence.id,
            tokens=(drawn.token,),
            logprobs=(drawn.logprobs,) if drawn.logprobs else (),
            finish=finish,
            cached_tokens=sequence.cached_tokens,
            queue_seconds=(sequence.admitted or sequence.arrival) - sequence.arrival,
        )

    def _count(self, sequence: Sequence) -> None:
        self._completion_tokens += 1
        if sequence.generated == 1:
            self._prompt_tokens += len(sequence.generation.prompt)
            self._cached_tokens += sequence.cached_tokens

    def _finish(self, sequence: Sequence, token: int) -> FinishReason | None:
        sampling = sequence.generation.sampling
        ends = token in sampling.stop_token_ids or (token in self.model.eos_token_ids and not sampling.ignore_eos)
        if ends and sequence.generated >= sampling.min_tokens:
            return FinishReason.STOP
        return FinishReason.LENGTH if sequence.generated >= sampling.max_tokens else None

    def _fail(self, sequence: Sequence, error: str) -> Delta:
        self._end(sequence)
        return Delta(id=sequence.id, finish=FinishReason.ERROR, error=error)

    def _end(self, sequence: Sequence) -> None:
        del self._sequences[sequence.id]
        if not self._sequences:
            self._effects.build(())  # those of the last step hold on to memory that may be given back while none runs
        self.scheduler.remove(sequence)
        digest = sequence.digest
        if digest and not self.scheduler.waiting_for(digest):
            self.slots.abandon(digest)
