from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from hatrack_server.engine.blocks import KVBlocks
from hatrack_server.engine.scheduler import Scheduler, Work
from hatrack_server.engine.sequence import Sequence
from hatrack_server.types import Artifact

NewSequence = Callable[..., Sequence]


class Residency:
    """Slots whose programs are resident when the test says so."""

    def __init__(self, *resident: str) -> None:
        self.resident = set(resident)
        self.requested: list[str] = []
        self.pins: Counter[str] = Counter()

    def request(self, artifact: Artifact) -> None:
        assert artifact.path == Path(artifact.digest)
        self.requested.append(artifact.digest)

    def acquire(self, digest: str) -> bool:
        self.pins[digest] += digest in self.resident
        return digest in self.resident

    def release(self, digest: str) -> None:
        self.pins[digest] -= 1
        assert self.pins[digest] >= 0


def scheduler(slots: Residency, *, blocks: int = 64, max_rows: int = 8, max_step_tokens: int = 32) -> Scheduler:
    return Scheduler(KVBlocks(blocks, 4, "base"), slots, max_rows=max_rows, max_step_tokens=max_step_tokens)


def step(s: Scheduler, now: float = 0.0) -> list[tuple[Sequence, int]]:
    """One step; every sequence that samples gets token 7."""
    work = s.schedule(now)
    sampling = [w.sequence for w in work if w.samples]
    s.advance(work)
    for sequence in sampling:
        sequence.tokens.append(7)
    s.check()
    return [(w.sequence, w.count) for w in work]


def test_work_samples_when_it_reaches_the_last_token(new_sequence: NewSequence) -> None:
    sequence = new_sequence(5)
    assert not Work(sequence, 4).samples
    assert Work(sequence, 5).samples


def test_a_prompt_is_prefilled_whole_then_decoded(new_sequence: NewSequence) -> None:
    s, sequence = scheduler(Residency()), new_sequence(5)
    assert not s.has_work
    s.add(sequence)
    assert (s.has_work, s.waiting) == (True, 1)
    assert [step(s) for _ in range(3)] == [[(sequence, 5)], [(sequence, 1)], [(sequence, 1)]]
    s.remove(sequence)
    assert not s.has_work
    assert s.blocks.used == 0


def test_a_long_prompt_comes_in_chunks_beside_decodes_which_come_first(new_sequence: NewSequence) -> None:
    s = scheduler(Residency(), max_step_tokens=10)
    old, long, young = new_sequence(2), new_sequence(17), new_sequence(3)
    s.add(old)
    step(s)
    s.add(long)
    assert step(s) == [(old, 1), (long, 9)]
    assert len(long.blocks) == 5  # of all 17 tokens: nobody can take them in between
    s.add(young)
    assert step(s) == [(old, 1), (long, 8), (young, 1)]
    assert step(s) == [(old, 1), (long, 1), (young, 2)]
    assert step(s) == [(old, 1), (long, 1), (young, 1)]


def test_decodes_come_before_an_older_prefill(new_sequence: NewSequence) -> None:
    s = scheduler(Residency(), max_step_tokens=10)
    long, short = new_sequence(25), new_sequence(1)
    s.add(long)
    step(s)
    long.computed = 0  # as if it were far from done
    s.running.append(short)
    s.blocks.grow(short, 1)
    assert [w.sequence for w in s.schedule(0.0)] == [short, long]


def test_rows_are_bounded(new_sequence: NewSequence) -> None:
    s = scheduler(Residency(), max_rows=2)
    sequences = [new_sequence(1) for _ in range(3)]
    for sequence in sequences:
        s.add(sequence)
    assert [sequence for sequence, _ in step(s)] == sequences[:2]
    s.remove(sequences[0])
    assert [sequence for sequence, _ in step(s)] == sequences[1:]


def test_one_tenants_request_is_not_behind_anothers_hundred(new_sequence: NewSequence) -> None:
    s = scheduler(Residency(), max_rows=4)
    crowd = [new_sequence(1, tenant="crowd") for _ in range(100)]
    single = new_sequence(1, tenant="single")
    for sequence in (*crowd, single):
        s.add(sequence)
    assert [sequence for sequence, _ in step(s)] == [crowd[0], single, crowd[1], crowd[2]]


def test_tenants_take_turns(new_sequence: NewSequence) -> None:
    s = scheduler(Residency(), max_rows=1)
    for tenant in "aaabbbccc":
        s.add(new_sequence(1, tenant=tenant))
    turns = ""
    while s.has_work:
        [(sequence, _)] = step(s)
        turns += sequence.generation.tenant
        s.remove(sequence)
    assert turns == "abcabcabc"


def test_a_sequence_that_waits_for_its_program_holds_nobody_up(new_sequence: NewSequence) -> None:
    slots = Residency("there")
    s = scheduler(slots)
    late, same_tenant, other = (
        new_sequence(3, digest="late"),
        new_sequence(3, digest="there"),
        new_sequence(3, tenant="b"),
    )
    for sequence in (late, same_tenant, other):
        s.add(sequence)
    assert [sequence for sequence, _ in step(s)] == [same_tenant, other]
    assert s.waiting_for("late") == [late]
    slots.resident.add("late")
    assert late in [sequence for sequence, _ in step(s)]
    assert slots.pins == {"late": 1, "there": 1}


def test_a_program_that_was_evicted_meanwhile_is_asked_for_again(new_sequence: NewSequence) -> None:
    slots = Residency()
    s = scheduler(slots)
    s.add(new_sequence(1, digest="d"))
    assert slots.requested == ["d"]
    step(s)
    assert slots.requested == ["d", "d"]


def test_a_sequence_without_room_pins_nothing_and_keeps_its_turn(new_sequence: NewSequence) -> None:
    slots = Residency("d")
    s = scheduler(slots, blocks=5)
    first, big, small = new_sequence(9), new_sequence(9, digest="d", tenant="b"), new_sequence(1, tenant="c")
    for sequence in (first, big, small):
        s.add(sequence)
    assert [sequence for sequence, _ in step(s)] == [first]
    assert not +slots.pins
    s.remove(first)
    assert [sequence for sequence, _ in step(s)] == [big, small]


def test_the_youngest_is_preempted_and_computes_its_tokens_anew(new_sequence: NewSequence) -> None:
    slots = Residency("d")
    s = scheduler(slots, blocks=5)
    old, young = new_sequence(8), new_sequence(8, digest="d")
    s.add(old)
    s.add(young)
    step(s)
    assert step(s) == [(old, 1)]
    assert (s.preemptions, s.running, young.blocks, young.generated) == (1, [old], [], 1)
    assert not +slots.pins
    s.remove(old)
    assert step(s) == [(young, 1)]  # its blocks were still there
    assert young.cached_tokens == 0  # what the prompt found at first


def test_running_sequences_keep_room_to_grow(new_sequence: NewSequence) -> None:
    """One that took the last blocks would be preempted as soon as the others need one."""
    s = scheduler(Residency(), blocks=4)
    old, young = new_sequence(8), new_sequence(8)
    s.add(old)
    s.add(young)
    for _ in range(4):
        assert [sequence for sequence, _ in step(s)] == [old]
    s.remove(old)
    assert [sequence for sequence, _ in step(s)] == [young]
    assert s.preemptions == 0


def test_a_preempted_sequence_is_first_of_its_tenant(new_sequence: NewSequence) -> None:
    s = scheduler(Residency(), blocks=5)
    old, young, later = new_sequence(8), new_sequence(8), new_sequence(1)
    for sequence in (old, young):
        s.add(sequence)
    step(s)
    s.add(later)
    step(s)
    s.remove(old)
    assert [sequence for sequence, _ in step(s)] == [young, later]


def test_admission_is_timed_once(new_sequence: NewSequence) -> None:
    s = scheduler(Residency(), blocks=5)
    old, young = new_sequence(8), new_sequence(8)
    s.add(old)
    s.add(young)
    step(s, now=1.0)
    step(s, now=2.0)
    s.remove(old)
    step(s, now=3.0)
    assert young.admitted == 1.0


def test_a_soft_prompt_is_computed_like_text(new_sequence: NewSequence) -> None:
    s, sequence = scheduler(Residency("d")), new_sequence(5, digest="d", soft_tokens=6)
    s.add(sequence)
    assert [(w.count, w.ready) for w in s.schedule(0.0)] == [(11, 0)]
    assert (len(sequence.tokens), sequence.generated) == (11, 0)


def test_a_prefix_is_ready_and_only_the_text_is_computed(new_sequence: NewSequence) -> None:
    s = scheduler(Residency("d"))
    first, second = (new_sequence(range(5), digest="d", prefix_tokens=6) for _ in range(2))
    s.add(first)
    [work] = s.schedule(0.0)
    assert (work.count, work.ready, work.samples) == (5, 6, True)
    s.advance([work])
    s.add(second)
    [work] = s.schedule(0.0)
    # Two blocks of four are found: one of the prefix alone, and one that its end shares with the text.
    assert (second.computed, work.count, work.ready) == (8, 3, 0)
    assert second.cached_tokens == 2
    s.check()


def test_a_preempted_prefix_is_put_back(new_sequence: NewSequence) -> None:
    s = scheduler(Residency("d"), blocks=5)
    old, young = new_sequence(8), new_sequence(2, digest="d", prefix_tokens=6)
    for sequence in (old, young):
        s.add(sequence)
    step(s)
    assert step(s) == [(old, 1)]
    s.remove(old)
    s.blocks._block_of.clear()  # nothing of it is found again
    s.blocks._key_of.clear()
    [work] = s.schedule(0.0)
    assert (work.ready, work.count) == (6, 3)


def test_cached_tokens_are_those_of_the_first_admission(new_sequence: NewSequence) -> None:
    s = scheduler(Residency())
    first = new_sequence(range(9))
    s.add(first)
    step(s)
    second = new_sequence(range(9))
    s.add(second)
    assert step(s) == [(first, 1), (second, 1)]
    assert (first.cached_tokens, second.cached_tokens) == (0, 8)


def test_passed_deadlines_are_reported_running_and_waiting(new_sequence: NewSequence) -> None:
    s = scheduler(Residency(), max_rows=1)
    running, waiting, patient = new_sequence(1, deadline=5.0), new_sequence(1, deadline=6.0), new_sequence(1)
    for sequence in (running, waiting, patient):
        s.add(sequence)
    step(s)
    assert s.expired(4.9) == []
    assert s.expired(5.0) == [running]
    assert s.expired(9.0) == [running, waiting]


@pytest.mark.parametrize("run", [False, True])
def test_removal_frees_blocks_and_pins_at_once(new_sequence: NewSequence, run: bool) -> None:
    slots = Residency("d")
    s = scheduler(slots)
    sequence = new_sequence(9, digest="d")
    s.add(sequence)
    if run:
        step(s)
        assert (s.blocks.used, slots.pins["d"]) == (3, 1)
    s.remove(sequence)
    assert (s.blocks.used, slots.pins["d"], s.has_work, s.waiting_for("d")) == (0, 0, False, [])
    s.check()
