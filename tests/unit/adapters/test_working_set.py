from __future__ import annotations

from hatrack_server.adapters.working_set import WINDOW_SECONDS, WorkingSet


def test_distinct_programs_count_once_from_their_first_load_on() -> None:
    working_set = WorkingSet(lambda _: False)
    for now, digest in enumerate("abab"):
        working_set.use(digest, now)
    assert working_set.bytes(4) == 0
    assert working_set.size("a") is None
    working_set.measure("a", 10)
    working_set.measure("b", 5)
    working_set.measure("b", 7)
    assert (working_set.bytes(4), working_set.size("b")) == (17, 7)


def test_what_was_not_used_for_a_while_counts_no_more_until_it_is_used_again() -> None:
    working_set = WorkingSet(lambda _: False)
    for digest, size in {"a": 10, "b": 7}.items():
        working_set.use(digest, 0)
        working_set.measure(digest, size)
    working_set.use("a", 30)
    assert working_set.bytes(WINDOW_SECONDS) == 17
    assert working_set.bytes(WINDOW_SECONDS + 1) == 10
    assert working_set.bytes(WINDOW_SECONDS + 31) == 0
    working_set.use("b", 200)
    assert working_set.bytes(200) == 7


def test_a_pinned_program_counts_however_long_it_runs() -> None:
    pinned = {"a"}
    working_set = WorkingSet(pinned.__contains__)
    working_set.use("a", 0)
    working_set.measure("a", 10)
    assert working_set.bytes(1000) == 10
    pinned.clear()
    assert working_set.bytes(1000 + WINDOW_SECONDS) == 10
    assert working_set.bytes(1001 + WINDOW_SECONDS) == 0


def test_a_forgotten_program_counts_no_more() -> None:
    working_set = WorkingSet(lambda _: False)
    for digest in "ab":
        working_set.use(digest, 0)
        working_set.measure(digest, 10)
    working_set.forget("a")
    working_set.forget("never seen")
    assert (working_set.bytes(0), working_set.size("a")) == (10, None)
