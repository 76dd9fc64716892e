"""Whatever comes in whatever order: the scheduler keeps its promises, and the cache never serves a foreign token."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hatrack_server.engine.blocks import KVBlocks
from hatrack_server.engine.scheduler import Scheduler
from hatrack_server.engine.sequence import PENDING, Sequence
from hatrack_server.types import Artifact, Generation, Sampling

DIGESTS = ("x", "y", "z")
Cell = tuple[bytes, str | None, tuple[int, ...]]  # what the key of a token depends on


def drawn_at(position: int) -> int:
    return position % 2


class LateSlots:
    """Programs that are loaded and evicted when the machine says so."""

    def __init__(self) -> None:
        self.resident: set[str] = set()
        self.wanted: set[str] = set()
        self.pins: Counter[str] = Counter()

    def request(self, artifact: Artifact) -> None:
        self.wanted.add(artifact.digest)

    def acquire(self, digest: str) -> bool:
        self.pins[digest] += digest in self.resident
        return digest in self.resident

    def release(self, digest: str) -> None:
        assert self.pins[digest] > 0
        self.pins[digest] -= 1

    def load(self, digest: str) -> None:
        if digest in self.wanted:
            self.resident.add(digest)
            self.wanted.remove(digest)

    def evict(self, digest: str) -> None:
        if not self.pins[digest]:
            self.resident.discard(digest)


class SchedulerMachine(RuleBasedStateMachine):
    """An engine whose KV cells hold the very thing that a key and a value would be computed from."""

    @initialize(
        blocks=st.integers(3, 12),
        size=st.sampled_from([1, 2, 4]),
        rows=st.integers(1, 5),
        extra=st.integers(0, 6),
        cache=st.booleans(),
        ahead=st.booleans(),
    )
    def start(self, blocks: int, size: int, rows: int, extra: int, cache: bool, ahead: bool) -> None:
        self.slots = LateSlots()
        self.kv = KVBlocks(blocks, size, "base", prefix_cache=cache)
        self.limits = (rows, rows + extra)
        self.scheduler = Scheduler(self.kv, self.slots, max_rows=rows, max_step_tokens=rows + extra)
        self.cells: dict[tuple[int, int], Cell] = {}
        self.sequences: list[Sequence] = []
        self.ahead = ahead
        self.in_flight: list[Sequence] = []
        self.ids = itertools.count(1)

    @rule(
        tenant=st.sampled_from("ab"),
        digest=st.sampled_from([None, *DIGESTS]),
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=12),
        more=st.integers(1, 8),
    )
    def add(self, tenant: str, digest: str | None, prompt: list[int], more: int) -> None:
        room = self.kv.total * self.kv.block_size
        prompt = prompt[: room - 1]
        sampling = Sampling(max_tokens=min(more, room - len(prompt)))
        artifact = Artifact(digest, Path(digest)) if digest else None
        generation = Generation(next(self.ids), tenant, tenant.encode(), artifact, tuple(prompt), sampling)
        self.sequences.append(Sequence(generation, 0.0))
        self.scheduler.add(self.sequences[-1])

    @rule()
    def step(self) -> None:
        if self.in_flight and self.scheduler.must_preempt:
            self.collect()
        before = self.scheduler.preemptions
        work = self.scheduler.schedule(0.0)
        assert not self.in_flight or self.scheduler.preemptions == before
        assert len(work) <= self.limits[0]
        assert sum(w.count for w in work) <= self.limits[1]
        assert len({w.sequence for w in work}) == len(work)
        for w in work:
            assert w.sequence in self.scheduler.running
            assert 1 <= w.count <= w.sequence.remaining
            for position in range(w.sequence.computed, w.sequence.computed + w.count):
                self.cells[self.place(w.sequence, position)] = self.content(w.sequence, position)
        sampling = [w.sequence for w in work if w.samples]
        self.collect()
        self.scheduler.advance(w for w in work if w.sequence in self.sequences)
        self.in_flight = [sequence for sequence in sampling if sequence in self.sequences]
        for sequence in self.in_flight:
            sequence.tokens.append(PENDING)
        if not self.ahead:
            self.collect()

    def collect(self) -> None:
        """Some end where nobody could know it, at a token that they stop at."""
        for sequence in self.in_flight:
            if sequence in self.sequences:
                sequence.tokens[-1] = drawn_at(len(sequence.tokens) - 1)
                if sequence.generated == sequence.generation.sampling.max_tokens or len(sequence.tokens) % 7 == 0:
                    self.end(sequence)
        self.in_flight = []

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.end(data.draw(st.sampled_from(self.sequences)))

    @rule(digest=st.sampled_from(DIGESTS))
    def load(self, digest: str) -> None:
        self.slots.load(digest)

    @rule(digest=st.sampled_from(DIGESTS))
    def evict(self, digest: str) -> None:
        self.slots.evict(digest)

    @invariant()
    def promises_are_kept(self) -> None:
        self.scheduler.check()
        running = self.scheduler.running
        assert +self.slots.pins == Counter(s.digest for s in running if s.digest)
        assert len(running) + self.scheduler.waiting == len(self.sequences)
        assert len(running) <= self.limits[0]
        assert not any(PENDING in sequence.tokens for sequence in self.sequences if sequence not in self.in_flight)
        assert set(self.in_flight) & set(self.sequences) <= set(running)

    @invariant()
    def every_computed_token_is_the_sequences_own(self) -> None:
        for sequence in self.scheduler.running:
            assert sequence.computed <= len(sequence.blocks) * self.kv.block_size
            for position in range(sequence.computed):
                assert self.cells[self.place(sequence, position)] == self.content(sequence, position)

    def teardown(self) -> None:
        """Once programs load, all that is left ends, in a number of steps that its tokens explain."""
        steps = 2 * sum(len(s.generation.prompt) + s.generation.sampling.max_tokens for s in self.sequences) ** 2
        while self.sequences:
            assert steps > 0, "no progress"
            steps -= 1
            for digest in DIGESTS:
                self.load(digest)
            self.step()
            self.promises_are_kept()
            self.every_computed_token_is_the_sequences_own()
        assert not self.scheduler.has_work
        assert self.kv.used == 0

    def end(self, sequence: Sequence) -> None:
        self.sequences.remove(sequence)
        self.scheduler.remove(sequence)

    def place(self, sequence: Sequence, position: int) -> tuple[int, int]:
        return sequence.blocks[position // self.kv.block_size], position % self.kv.block_size

    def content(self, sequence: Sequence, position: int) -> Cell:
        tokens = tuple(drawn_at(n) if t == PENDING else t for n, t in enumerate(sequence.tokens[: position + 1]))
        return sequence.generation.salt, sequence.digest, tokens


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, derandomize=True, database=None
)
