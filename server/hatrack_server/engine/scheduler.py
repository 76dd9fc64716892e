"""Which sequences compute which tokens in the next step. Policy only: no tensors, no clock of its own."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from hatrack_server.engine.blocks import KVBlocks
from hatrack_server.engine.sequence import Sequence
from hatrack_server.types import Artifact


class Slots(Protocol):
    """Where adapters are resident; all that the scheduler knows of them."""

    def request(self, artifact: Artifact) -> None:
        """Starts loading the artifact's program unless it is resident or being loaded. Never blocks."""

    def acquire(self, digest: str) -> bool:
        """Pins a resident program, once per call; False when it isn't resident yet."""

    def release(self, digest: str) -> None:
        """Undoes one `acquire`."""


@dataclass(frozen=True, slots=True)
class Work:
    """The next `count` tokens of a sequence; it samples when they are its last ones.

    The `ready` tokens before them are not computed: their keys and values, which its adapter brings, are to be put into
    its blocks first.
    """

    sequence: Sequence
    count: int
    ready: int = 0

    @property
    def samples(self) -> bool:
        """Whether the step gives the sequence's next token."""
        return self.count == self.sequence.remaining


class Scheduler:
    """Continuous batching with chunked prefill, fair across tenants.

    Running sequences come first, decodes before prefills. A waiting one is admitted when it can have its adapter's slot
    and KV blocks for all its tokens, with one left over for each running one, or nothing; tenants take turns. When a
    running one finds no block, the youngest is preempted: it gives everything back, and computes its tokens anew when
    it is admitted again.
    """

    def __init__(self, blocks: KVBlocks, slots: Slots, *, max_rows: int, max_step_tokens: int) -> None:
        self.blocks = blocks
        self.running: list[Sequence] = []  # in order of admission
        self.preemptions = 0
        self._slots = slots
        self._max_rows = max_rows
        self._max_step_tokens = max_step_tokens
        self._waiting: dict[str, deque[Sequence]] = {}  # by tenant; the first tenant has the next turn

    @property
    def waiting(self) -> int:
        """Sequences that wait for admission."""
        return sum(len(queue) for queue in self._waiting.values())

    @property
    def has_work(self) -> bool:
        """Whether any sequence is running or waiting."""
        return bool(self.running or self._waiting)

    @property
    def must_preempt(self) -> bool:
        """Whether running sequences need more blocks for the next step than are free."""
        return not self.blocks.can_grow(*((s, s.computed + min(s.remaining, 1)) for s in self.running))

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence behind its tenant's others, and starts loading its adapter."""
        if sequence.generation.artifact:
            self._slots.request(sequence.generation.artifact)
        self._waiting.setdefault(sequence.generation.tenant, deque()).append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Ends a sequence, running or waiting: its blocks and its slot are free at once."""
        if sequence in self.running:
            self._leave(sequence)
        else:
            self._dequeue(sequence)

    def expired(self, now: float) -> list[Sequence]:
        """Sequences, running or waiting, whose deadline has passed; the caller removes them."""
        return [
            s
            for s in (*self.running, *self._queued())
            if s.generation.deadline is not None and s.generation.deadline <= now
        ]

    def waiting_for(self, digest: str) -> list[Sequence]:
        """Waiting sequences of one artifact."""
        return [s for s in self._queued() if s.digest == digest]

    def schedule(self, now: float) -> list[Work]:
        """The next step's work, at most max_rows sequences and max_step_tokens tokens; empty when nothing can run."""
        work = self._continue_running()
        budget = self._max_step_tokens - sum(w.count for w in work)
        work.extend(self._admit(budget, now))
        return work

    def advance(self, work: Iterable[Work]) -> None:
        """Records that the work's tokens are computed, so that their blocks can be shared."""
        for w in work:
            w.sequence.computed += w.count
            self.blocks.publish(w.sequence, w.ready + w.count)

    def check(self) -> None:
        """Asserts the invariants; for tests, and for an idle engine."""
        self.blocks.check(self.running)
        assert all(not s.blocks for s in self._queued())

    def _continue_running(self) -> list[Work]:
        budget = self._max_step_tokens
        counts: dict[Sequence, int] = {}
        for sequence in sorted(self.running, key=lambda s: s.remaining > 1):  # stable: decodes first, then by age
            count = min(sequence.remaining, budget)
            if count and sequence in self.running and self._make_room(sequence, count):
                counts[sequence] = count
                budget -= count
        return [Work(sequence, count) for sequence, count in counts.items()]

    def _make_room(self, sequence: Sequence, count: int) -> bool:
        """Grows the sequence's blocks, preempting the youngest until it fits; False if that was itself.

        Only decodes grow, the older ones first: a victim never has work in this step already.
        """
        tokens = sequence.computed + count
        while not self.blocks.can_grow((sequence, tokens)):
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        self.blocks.grow(sequence, tokens)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._leave(sequence)
        self._waiting.setdefault(sequence.generation.tenant, deque()).appendleft(sequence)
        self.preemptions += 1

    def _admit(self, budget: int, now: float) -> Iterator[Work]:
        while budget > 0 and len(self.running) < self._max_rows:
            sequence = self._next_admissible()
            if sequence is None:
                return
            self._dequeue(sequence)
            self.blocks.admit(sequence)
            if sequence.admitted is None:
                sequence.admitted = now
                sequence.cached_tokens = max(0, sequence.computed - sequence.virtual_tokens)
            ready = max(0, sequence.prefix_tokens - sequence.computed)
            sequence.computed += ready
            count = min(sequence.remaining, budget)
            # All of the prompt's blocks now: what was promised at admission can't be given to another in between.
            self.blocks.grow(sequence, len(sequence.tokens))
            self.running.append(sequence)
            budget -= count
            yield Work(sequence, count, ready)

    def _next_admissible(self) -> Sequence | None:
        """The first, tenant by tenant, whose adapter is resident; it is pinned. None if that one's blocks don't fit.

        A sequence whose adapter is still being loaded is passed over; one that lacks blocks is not, or long prompts
        would starve behind short ones.
        """
        for tenant in list(self._waiting):
            for sequence in self._waiting[tenant]:
                if not self._acquire(sequence):
                    continue
                if self.blocks.can_admit(sequence, spare=len(self.running)):
                    self._waiting[tenant] = self._waiting.pop(tenant)  # the next turn is the others'
                    return sequence
                self._release(sequence)
                return None
        return None

    def _acquire(self, sequence: Sequence) -> bool:
        """Pins the sequence's program; asks for it (again: it may have been evicted meanwhile) if it isn't resident."""
        artifact = sequence.generation.artifact
        if artifact is None or self._slots.acquire(artifact.digest):
            return True
        self._slots.request(artifact)
        return False

    def _release(self, sequence: Sequence) -> None:
        if sequence.digest is not None:
            self._slots.release(sequence.digest)

    def _leave(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.blocks.release(sequence)
        self._release(sequence)

    def _dequeue(self, sequence: Sequence) -> None:
        tenant = sequence.generation.tenant
        self._waiting[tenant].remove(sequence)
        if not self._waiting[tenant]:
            del self._waiting[tenant]

    def _queued(self) -> Iterator[Sequence]:
        return (sequence for queue in self._waiting.values() for sequence in queue)
