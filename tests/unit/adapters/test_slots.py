from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from hatrack_server.adapters import pace
from hatrack_server.adapters.host_tier import HostTier
from hatrack_server.adapters.pieces import LowRank, Pieces
from hatrack_server.adapters.pools import Places, Pools
from hatrack_server.adapters.slots import Load, ProgramSlots
from hatrack_server.errors import InvalidArtifact
from hatrack_server.types import Artifact, LinearShape

LAYERS = {"up": LinearShape(6, 2), "down": LinearShape(2, 6)}
ROW_BYTES = 2 * 8 * 4  # of one program of rank 1: two layers, 8 float32 each
HOST_BYTES = 4 * 64  # the same on the host: four tensors, each in a line of its own
PATIENCE_SECONDS = 10.0
NOT_NOW_SECONDS = 0.1


def artifact(digest: str) -> Artifact:
    return Artifact(digest, Path(digest))


MakeRack = Callable[..., "Rack"]


class Rack:
    """Slots for `capacity` programs of rank 1, whose digests say what they are: `r2-anything` has rank 2."""

    def __init__(self, capacity: int, on_host: int = 0) -> None:
        """`on_host` programs of rank 1 are kept after they were evicted."""
        self.compiled: list[str] = []
        self.values: dict[str, float] = {}  # that fill the pieces of what was compiled
        self.threads = 0  # that the loading thread may use
        self.gate = threading.Event()
        self.gate.set()
        self.ended: queue.SimpleQueue[Load] = queue.SimpleQueue()
        self.budget = capacity * ROW_BYTES
        self.pools = Pools(torch.float32, torch.device("cpu"), self.budget)
        self.host = HostTier(on_host * HOST_BYTES, pinned=False)
        self.slots = ProgramSlots(self.pools, self.host, self._compile, self.ended.put)

    def request(self, *digests: str) -> None:
        """As a scheduler does, whose sequences wait for these programs."""
        for digest in digests:
            self.slots.request(artifact(digest))

    def preload(self, *digests: str) -> None:
        """For nobody: what is loaded may be evicted again at once."""
        for digest in digests:
            self.slots.preload(artifact(digest))

    def loaded(self) -> Load:
        """The next load that ends."""
        load = self.ended.get(timeout=PATIENCE_SECONDS)
        assert self.pools.bytes <= self.budget
        return load

    def load(self, *digests: str) -> None:
        """Loads programs one after the other, which nobody waits for."""
        for digest in digests:
            self.preload(digest)
            load = self.loaded()
            assert (load.artifact.digest, load.error) == (digest, None)

    def ends(self, seconds: float) -> Load | None:
        """The next load, if one ends so soon."""
        try:
            return self.ended.get(timeout=seconds)
        except queue.Empty:
            return None

    def waits(self) -> bool:
        """Whether no load ends for a while."""
        return self.ends(NOT_NOW_SECONDS) is None

    def resident(self, *digests: str) -> list[str]:
        """Those that can be pinned; changes their order of use."""
        found = [digest for digest in digests if self.slots.acquire(digest)]
        for digest in found:
            self.slots.release(digest)
        return found

    def content(self, digest: str) -> set[float]:
        """The values that lie in the places of a pinned program."""
        places = self.slots[digest].places
        return {value for place in places for value in place.pool.stacks[0][place.row].unique().tolist()}

    def _compile(self, wanted: Artifact) -> Pieces:
        assert self.gate.wait(PATIENCE_SECONDS)
        self.compiled.append(wanted.digest)
        self.threads = torch.get_num_threads()
        kind, _, _ = wanted.digest.partition("-")
        match kind:
            case "refused":
                raise InvalidArtifact("adapter_model.safetensors", "its tensors are wrong")
            case "broken":
                raise OSError("/secret/path")
            case "empty":
                return ()
            case "step":  # one begins meanwhile
                self.slots.beside_steps = True
        rank = int(kind[1:]) if kind[0] == "r" and kind[1:].isdigit() else 1
        self.values[wanted.digest] = float(len(self.compiled))
        return self._pieces(rank, self.values[wanted.digest])

    def _pieces(self, rank: int, value: float) -> Pieces:
        return tuple(
            (layer, LowRank(torch.full((rank, s.in_features), value), torch.full((rank, s.out_features), value)))
            for layer, s in LAYERS.items()
        )


@pytest.fixture
def rack() -> Iterator[MakeRack]:
    made: list[Rack] = []

    def make(capacity: int, on_host: int = 0) -> Rack:
        made.append(Rack(capacity, on_host))
        return made[-1]

    yield make
    for one in made:
        one.gate.set()
        one.slots.close()


def test_a_program_is_resident_when_its_load_has_ended(rack: MakeRack) -> None:
    r = rack(4)
    r.gate.clear()
    r.request("x")
    assert not r.slots.acquire("x")
    r.gate.set()
    assert r.loaded().error is None
    assert r.slots.acquire("x")
    assert r.content("x") == {1.0}
    assert (len(r.slots), r.slots.bytes) == (1, r.pools.bytes)


def test_loading_leaves_the_cores_to_the_step_loop(rack: MakeRack) -> None:
    r = rack(4)
    before = torch.get_num_threads()
    r.load("x")
    assert r.threads == 1
    assert torch.get_num_threads() == before


def test_many_requests_of_one_digest_load_once(rack: MakeRack) -> None:
    r = rack(4)
    r.gate.clear()
    threads = [threading.Thread(target=r.request, args=("x", "y")) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_SECONDS)
    r.gate.set()
    assert {r.loaded().artifact.digest, r.loaded().artifact.digest} == {"x", "y"}
    r.load("z")  # nothing else was queued before it
    assert sorted(r.compiled) == ["x", "y", "z"]
    r.request("x")  # resident
    r.load("w")
    assert r.compiled.count("x") == 1


def test_programs_loaded_in_a_row_are_neighbours(rack: MakeRack) -> None:
    r = rack(8)
    r.load("a", "b", "c")
    for digest in "abc":
        assert r.slots.acquire(digest)
    assert [r.slots[d].places[0].row for d in "abc"] == [0, 1, 2]
    assert [r.slots[d].order for d in "abc"] == [(0, 0), (0, 1), (0, 2)]


def test_the_least_recently_used_goes_first(rack: MakeRack) -> None:
    r = rack(3)
    r.load("a", "b", "c")
    assert r.resident("a") == ["a"]
    r.load("d")
    assert r.slots.evictions == 1
    assert r.resident("a", "b", "c", "d") == ["a", "c", "d"]


def test_an_evicted_program_can_be_loaded_again(rack: MakeRack) -> None:
    r = rack(1)
    r.load("a", "b", "a")
    assert r.compiled == ["a", "b", "a"]
    assert r.slots.acquire("a")
    assert r.content("a") == {3.0}


def test_a_pinned_program_is_never_evicted_nor_overwritten(rack: MakeRack) -> None:
    r = rack(2)
    r.load("a", "b")
    assert r.slots.acquire("a")
    r.load(*"cdef")
    assert r.content("a") == {1.0}
    assert r.resident("b", "c", "d", "e", "f") == ["f"]


def test_a_load_waits_while_all_is_pinned_and_goes_on_at_a_release(rack: MakeRack) -> None:
    r = rack(2)
    r.load("a", "b")
    for digest in ("a", "b", "b"):
        assert r.slots.acquire(digest)
    r.request("c")
    assert r.waits()
    r.slots.release("b")
    assert r.waits()
    r.slots.release("b")
    assert r.loaded().artifact.digest == "c"
    assert r.content("a") == {1.0}
    assert not r.slots.acquire("b")


def test_busy_programs_cannot_keep_others_out_for_good(rack: MakeRack) -> None:
    r = rack(2)
    r.load("a", "b")
    assert r.slots.acquire("a")
    assert r.slots.acquire("b")
    r.request("c")
    assert r.waits()
    # New sequences come before the old ones end; the least recently used program takes none.
    assert not r.slots.acquire("a")
    assert r.slots.acquire("b")
    r.request("a")  # as the scheduler does: nothing to load while its old program is there
    r.slots.release("a")
    assert r.loaded().artifact.digest == "c"
    assert r.slots.evictions == 1
    assert r.slots.acquire("c")
    r.request("a")
    assert r.waits()
    assert not r.slots.acquire("b")  # its turn
    r.slots.release("b")
    assert r.waits()
    r.slots.release("b")
    assert r.loaded().artifact.digest == "a"
    assert r.slots.acquire("a")


def test_no_program_is_held_back_while_a_forgotten_one_makes_room(rack: MakeRack) -> None:
    r = rack(2)
    r.load("a", "b")
    assert r.slots.acquire("a")
    assert r.slots.acquire("b")
    r.slots.forget("b")
    r.request("c")
    assert r.waits()
    assert r.slots.acquire("a")
    r.slots.release("b")
    assert r.loaded().artifact.digest == "c"


def test_a_program_beyond_the_whole_budget_is_refused_in_a_sentence(rack: MakeRack) -> None:
    r = rack(2)
    r.load("a", "b")
    r.request("r4-huge")
    error = r.loaded().error
    assert error == (
        f"its adapter can't be loaded: it takes {4 * ROW_BYTES} bytes, the server's adapter memory holds {r.budget}"
    )
    assert r.resident("a", "b") == ["a", "b"]


@pytest.mark.parametrize(
    ("digest", "error"),
    [
        ("refused-1", "its adapter can't be loaded: its tensors are wrong"),
        ("broken-1", "its adapter can't be loaded"),
    ],
)
def test_a_failed_load_says_so_and_leaks_nothing(rack: MakeRack, digest: str, error: str) -> None:
    r = rack(2)
    for _ in range(3):
        r.request(digest)
        load = r.loaded()
        assert (load.artifact.digest, load.error) == (digest, error)
        assert not r.slots.acquire(digest)
    r.load("a", "b")
    assert r.resident("a", "b") == ["a", "b"]
    assert r.slots.evictions == 0


def test_a_program_without_pieces_is_resident_too(rack: MakeRack) -> None:
    r = rack(1)
    r.load("a", "empty-1")
    assert r.resident("a", "empty-1") == ["a", "empty-1"]


def test_forgetting_frees_at_once_or_at_the_last_release(rack: MakeRack) -> None:
    r = rack(2)
    r.load("a", "b")
    r.slots.forget("never seen")
    r.slots.forget("a")
    assert not r.slots.acquire("a")
    assert r.slots.acquire("b")
    assert r.slots.acquire("b")
    r.slots.forget("b")
    r.slots.release("b")
    assert r.content("b") == {2.0}
    r.slots.release("b")
    assert len(r.slots) == 0
    r.load("c", "d")
    assert r.slots.evictions == 0


def test_a_waiting_load_takes_the_room_of_a_forgotten_program(rack: MakeRack) -> None:
    r = rack(1)
    r.load("a")
    assert r.slots.acquire("a")
    r.request("b")
    assert r.waits()
    r.slots.forget("a")
    r.slots.release("a")
    assert r.loaded().artifact.digest == "b"


def test_free_rows_are_given_back_before_programs_are_evicted(rack: MakeRack) -> None:
    r = rack(7)
    r.load("a", "b", "c", "d")
    r.slots.forget("d")
    r.load("r4-x")
    assert r.slots.evictions == 0
    assert r.pools.bytes == 7 * ROW_BYTES


def test_another_rank_class_evicts_no_more_than_it_needs(rack: MakeRack) -> None:
    r = rack(6)
    r.load(*"abcdef")
    assert r.slots.acquire("c")
    r.load("r2-x")
    assert r.slots.evictions == 2
    kept = ["c", "d", "e", "f", "r2-x"]
    assert r.resident("a", "b", *kept) == kept
    for value, digest in enumerate(kept, 3):  # wherever they lie now
        assert r.slots.acquire(digest)
        assert r.content(digest) == {float(value)}


def test_another_rank_class_gets_room_though_one_is_spread_over_the_budget(rack: MakeRack) -> None:
    r = rack(4)
    r.load(*"abcd")
    assert r.slots.acquire("d")  # the last row: its pool can't be trimmed before it goes
    r.preload("r2-x")
    assert r.waits()
    assert not r.slots.acquire("d")
    r.slots.release("d")
    assert r.loaded().artifact.digest == "r2-x"
    r.load("r4-y")
    r.load(*"efgh")
    assert r.resident(*"efgh") == list("efgh")


def test_all_of_many_mixed_programs_are_served_while_others_are_pinned(rack: MakeRack) -> None:
    r = rack(5)
    digests = [f"r{1 + n % 4}-{n}" for n in range(24)]
    r.request(*digests)
    pinned: list[str] = []
    for _ in digests:
        while (load := r.ends(0.01)) is None:
            if pinned:
                r.slots.release(pinned.pop(0))
        assert load.error is None
        if r.slots.acquire(load.artifact.digest):
            pinned.append(load.artifact.digest)
            padded_to_the_class = r.content(load.artifact.digest)
            assert padded_to_the_class - {0.0} == {r.values[load.artifact.digest]}
    assert set(r.compiled) == set(digests)


def test_closing_ends_a_load_that_waits(rack: MakeRack) -> None:
    r = rack(1)
    r.load("a")
    assert r.slots.acquire("a")
    r.request("b")
    assert r.waits()
    closing = threading.Thread(target=r.slots.close, daemon=True)
    closing.start()
    closing.join(PATIENCE_SECONDS)
    assert not closing.is_alive()
    assert r.content("a") == {1.0}


def test_bytes_can_be_asked_for_while_new_pools_are_made(rack: MakeRack) -> None:
    r = rack(400)
    digests = [f"r{1 << n}-{n}" for n in range(7)]
    r.request(*digests)
    while r.ended.qsize() < len(digests):
        assert 0 <= r.slots.bytes <= r.budget


def test_a_load_that_nobody_wants_any_more_comes_to_nothing(rack: MakeRack) -> None:
    r = rack(2)
    r.gate.clear()
    r.request("a", "b", "c")
    r.slots.abandon("a")  # begun
    r.slots.abandon("b")  # queued
    r.slots.abandon("never asked for")
    r.gate.set()
    assert r.loaded().artifact.digest == "c"
    assert r.resident("a", "b", "c") == ["c"]
    r.load("d")  # "a" holds no row
    assert r.slots.evictions == 0


def test_abandoning_ends_a_wait_for_room(rack: MakeRack) -> None:
    r = rack(1)
    r.load("a")
    assert r.slots.acquire("a")
    r.request("b")
    assert r.waits()
    r.slots.abandon("b")
    r.slots.release("a")
    r.load("c")
    assert "b" not in r.resident("a", "b", "c")


def test_forgetting_during_a_load_leaves_nothing_resident(rack: MakeRack) -> None:
    r = rack(2)
    r.gate.clear()
    r.request("a")
    r.slots.forget("a")
    r.gate.set()
    r.load("b")
    assert r.resident("a", "b") == ["b"]


def test_an_evicted_program_comes_back_from_the_host(rack: MakeRack) -> None:
    r = rack(1, on_host=1)
    r.load("a", "b", "a")
    assert r.compiled == ["a", "b"]
    assert r.slots.acquire("a")
    assert r.content("a") == {1.0}
    assert (r.slots.disk_loads, r.slots.host_loads, r.slots.reloads) == (2, 1, 1)
    assert r.slots.host_bytes == HOST_BYTES


def test_what_is_never_evicted_takes_nothing_on_the_host(rack: MakeRack) -> None:
    r = rack(4, on_host=4)
    r.load("a", "b", "c")
    assert (r.slots.host_bytes, r.slots.host_loads, r.slots.reloads) == (0, 0, 0)


def test_reloads_count_wherever_they_come_from(rack: MakeRack) -> None:
    r = rack(1)
    r.load("a", "b", "a", "b")
    assert (r.slots.disk_loads, r.slots.host_loads, r.slots.reloads) == (4, 0, 2)


@pytest.mark.parametrize("where", ["on the host", "pinned", "evicted since"])
def test_a_forgotten_program_leaves_nothing_on_the_host(rack: MakeRack, where: str) -> None:
    r = rack(1, on_host=2)
    r.load("a", "b", "a")  # both have been evicted, "a" is resident
    if where == "pinned":
        assert r.slots.acquire("a")
    if where == "evicted since":
        r.load("b")
    r.slots.forget("a")
    if where == "pinned":
        r.slots.release("a")
    r.load("c")  # whatever was to be done is done
    assert "a" not in r.host
    r.load("a")
    assert r.compiled.count("a") == 2


def test_forgetting_wakes_the_thread_that_frees_the_copy(rack: MakeRack) -> None:
    r = rack(1, on_host=2)
    r.load("a", "b")
    assert r.slots.host_bytes == HOST_BYTES
    r.slots.forget("a")
    deadline = time.monotonic() + PATIENCE_SECONDS
    while r.slots.host_bytes and time.monotonic() < deadline:
        time.sleep(0.001)
    assert r.slots.host_bytes == 0


def test_a_program_that_is_awaited_is_not_evicted_before_it_was_used(rack: MakeRack) -> None:
    r = rack(2)
    r.request("a", "b", "c")
    assert {r.loaded().artifact.digest for _ in "ab"} == {"a", "b"}
    assert r.waits()
    assert r.slots.acquire("a")
    r.slots.release("a")
    assert r.loaded().artifact.digest == "c"
    assert r.resident("a", "b", "c") == ["b", "c"]


def test_one_that_was_resident_is_kept_for_who_asks_for_it(rack: MakeRack) -> None:
    r = rack(2)
    r.load("a", "b")
    r.request("a")  # the oldest
    r.load("c")
    assert r.resident("a", "b", "c") == ["a", "c"]


def test_what_was_asked_for_and_given_up_may_be_evicted(rack: MakeRack) -> None:
    r = rack(1)
    r.request("a")
    assert r.loaded().error is None
    r.request("b")
    assert r.waits()
    r.slots.abandon("a")
    assert r.loaded().artifact.digest == "b"


def test_small_programs_pass_one_that_waits_for_room(rack: MakeRack) -> None:
    r = rack(5)
    r.load("a", "b", "c")
    for digest in "abc":
        assert r.slots.acquire(digest)
    r.request("r4-large", "d", "e", "f")
    assert [r.loaded().artifact.digest for _ in "de"] == ["d", "e"]
    assert r.waits()  # what is freed from now on is for the large one
    assert r.slots.acquire("d")
    assert r.slots.acquire("e")
    for digest in "abc":
        r.slots.release(digest)
    assert r.waits()
    for digest in "de":
        r.slots.release(digest)
    assert [r.loaded().artifact.digest for _ in range(2)] == ["r4-large", "f"]
    assert r.compiled.count("r4-large") == 1


def test_a_program_that_fails_passes_too(rack: MakeRack) -> None:
    r = rack(1)
    r.load("a")
    assert r.slots.acquire("a")
    r.request("b", "refused-1", "empty-1")
    assert r.loaded().error == "its adapter can't be loaded: its tensors are wrong"
    assert r.loaded().artifact.digest == "empty-1"
    assert r.waits()
    r.slots.release("a")
    assert r.loaded().artifact.digest == "b"


def test_a_working_set_beyond_the_budget_is_told_and_warned_of_once(
    rack: MakeRack, caplog: pytest.LogCaptureFixture
) -> None:
    r = rack(2)
    r.load("a", "b")
    assert r.slots.working_set_bytes == r.slots.budget_bytes == r.budget
    assert not caplog.records
    r.load("c", "d")
    assert r.slots.working_set_bytes == 2 * r.budget
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    r.slots.forget("a")
    assert r.slots.working_set_bytes == 3 * ROW_BYTES


class SlowPools(Pools):
    """Pools whose compaction stops half-way."""

    def __init__(self, budget: int) -> None:
        super().__init__(torch.float32, torch.device("cpu"), budget)
        self.copying = threading.Event()
        self.go_on = threading.Event()

    def copy_lower(self, places: Places) -> Places:
        copied = super().copy_lower(places)
        self.copying.set()
        assert self.go_on.wait(PATIENCE_SECONDS)
        return copied


@pytest.mark.parametrize("meanwhile", ["used", "forgotten", "left alone"])
def test_compaction_holds_nobody_up(meanwhile: str) -> None:
    pools = SlowPools(4 * ROW_BYTES)
    ended: queue.SimpleQueue[Load] = queue.SimpleQueue()

    def compiled(wanted: Artifact) -> Pieces:
        rank = 2 if wanted.digest == "wide" else 1
        value = float(ord(wanted.digest[0]))
        return tuple(
            (name, LowRank(torch.full((rank, s.in_features), value), torch.zeros(rank, s.out_features)))
            for name, s in LAYERS.items()
        )

    slots = ProgramSlots(pools, HostTier(0, pinned=False), compiled, ended.put)
    try:
        for digest in "abcd":
            slots.request(artifact(digest))
            assert ended.get(timeout=PATIENCE_SECONDS).error is None
        slots.forget("a")
        slots.forget("b")
        slots.request(artifact("wide"))
        assert pools.copying.wait(PATIENCE_SECONDS)  # "c" is being copied into the lowest row
        match meanwhile:
            case "used":
                assert slots.acquire("c")  # at once, where it is
                before = slots["c"]
            case "forgotten":
                slots.forget("c")
        pools.go_on.set()
        if meanwhile == "used":
            slots.request(artifact("e"))
            assert slots["c"] is before
            assert before.places[0].pool.stacks[0][before.places[0].row].unique().tolist() == [float(ord("c"))]
            slots.release("c")
        assert ended.get(timeout=PATIENCE_SECONDS).error is None
        assert slots.acquire("wide")
        if meanwhile != "used":  # else its old place may have kept the room too small, and one had to go
            assert slots.acquire("d")
            place = slots["d"].places[0]
            assert place.pool.stacks[0][place.row].unique().tolist() == [float(ord("d"))]
            assert slots.acquire("c") == (meanwhile != "forgotten")
    finally:
        pools.go_on.set()
        slots.close()


def test_copies_that_fail_cost_no_row_and_keep_no_program_out(
    rack: MakeRack, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(_: HostTier, digest: str, __: Pieces) -> None:
        raise OSError(digest)

    monkeypatch.setattr(HostTier, "put", full)
    r = rack(2)
    r.load("a", "b", "r2-x", "c", "d")
    assert r.resident("c", "d") == ["c", "d"]
    assert [record.levelname for record in caplog.records].count("ERROR") == 3  # of "a", "b" and "r2-x"


def test_what_was_forgotten_and_asked_for_again_is_compiled_again(rack: MakeRack) -> None:
    r = rack(1, on_host=2)
    r.load("a", "b")
    r.gate.clear()
    r.request("empty-1")  # so that both come while the thread is busy
    r.slots.forget("a")
    r.preload("a")
    r.gate.set()
    assert [r.loaded().artifact.digest for _ in "12"] == ["empty-1", "a"]
    assert r.compiled.count("a") == 2
    assert "a" not in r.host


def test_what_was_forgotten_is_compiled_again_when_it_passes(rack: MakeRack) -> None:
    r = rack(2, on_host=2)
    r.load("a", "b", "c")
    assert r.slots.acquire("c")
    r.request("r2-large")
    assert r.waits()
    r.slots.forget("a")
    r.request("a")
    assert r.loaded().artifact.digest == "a"
    assert r.compiled.count("a") == 2


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """One for each operation beside steps."""
    taken: list[float] = []
    monkeypatch.setattr(pace, "BURST_SECONDS", 0.0)
    monkeypatch.setattr(time, "sleep", taken.append)
    return taken


def test_a_load_leaves_the_cores_to_steps_that_begin_after_it(rack: MakeRack, pauses: list[float]) -> None:
    r = rack(2)
    r.load("a")
    assert not pauses
    r.load("step-1")
    assert pauses


def test_one_that_passes_pauses_no_more_often(
    rack: MakeRack, pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled, counts = Rack._pieces, []

    def counted(self: Rack, rank: int, value: float) -> Pieces:
        before = len(pauses)
        pieces = compiled(self, rank, value)
        counts.append(len(pauses) - before)
        return pieces

    monkeypatch.setattr(Rack, "_pieces", counted)
    r = rack(2)
    r.slots.beside_steps = True
    r.load("a")
    assert r.slots.acquire("a")
    r.request("r2-large", "b")
    assert r.loaded().artifact.digest == "b"
    alone, _, passing = counts
    assert 0 < alone == passing
