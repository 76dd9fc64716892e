"""Programs on their way to and from the device: loaded by a thread beside the step loop, evicted for one another."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from threadpoolctl import threadpool_limits

from hatrack_server.adapters.host_tier import HostTier
from hatrack_server.adapters.pace import Paced
from hatrack_server.adapters.pieces import Pieces
from hatrack_server.adapters.pools import Places, Pools
from hatrack_server.adapters.reclaim import Reclaim
from hatrack_server.adapters.residents import Residents, Slot
from hatrack_server.adapters.working_set import WorkingSet
from hatrack_server.errors import GenerationFailed, HatrackError
from hatrack_server.types import Artifact

__all__ = ["Load", "ProgramSlots", "Slot"]

logger = logging.getLogger(__name__)

EXPIRY_POLL_SECONDS = 1.0  # how often a load that waits for room looks for what nobody took
WARNING_SECONDS = 600.0  # between two about one thing

Compile = Callable[[Artifact], Pieces]
MakeRoom = Callable[[Artifact, Pieces], None]


@dataclass(frozen=True, slots=True)
class Load:
    """How one load ended."""

    artifact: Artifact
    seconds: float
    error: str | None = None


class _Abandoned(Exception):
    """Nobody wants the program that is being loaded any more, or it has to wait for another."""


class ProgramSlots:
    """Resident programs within the pools' budget, least recently used first out, then kept on the host for a while.

    No method blocks but `close`. The loading thread alone touches the pools and the host tier: it reads, compiles and
    copies without the lock, which guards nothing but who is resident, pinned and wanted. `on_load` is called there when
    a load has ended. Loads are made in the order of their requests; one waits for room while every resident program is
    pinned or awaited, and lets those pass meanwhile that fit in beside it.
    """

    def __init__(
        self, pools: Pools, host: HostTier, compile_artifact: Compile, on_load: Callable[[Load], None]
    ) -> None:
        self.beside_steps = False  # whether to leave the cores to steps that run
        self.disk_loads = 0
        self.host_loads = 0
        self.reloads = 0  # of programs that had been evicted
        self._pools = pools
        self._host = host
        self._compile = compile_artifact
        self._on_load = on_load
        self._residents = Residents(time.monotonic)
        self._working_set = WorkingSet(self._residents.pinned)
        self._wanted: OrderedDict[str, Artifact] = OrderedDict()  # first come, first loaded
        self._awaited: set[str] = set()  # of the wanted: those that somebody will pin
        self._next_warning = 0.0
        self._closed = False
        self._changed = threading.Condition()
        self._reclaim = Reclaim(pools, host, self._residents, self._changed)
        self._thread = threading.Thread(target=self._run, name="adapter-loader", daemon=True)
        self._thread.start()

    def request(self, artifact: Artifact) -> None:
        """Has the program loaded unless it is resident or on its way, and kept until it is first pinned or given up."""
        self._want(artifact, awaited=True)

    def preload(self, artifact: Artifact) -> None:
        """Has the program loaded, though nobody waits for it."""
        self._want(artifact, awaited=False)

    def abandon(self, digest: str) -> None:
        """Takes requests back: a load that has not ended yet comes to nothing."""
        with self._changed:
            self._wanted.pop(digest, None)
            self._awaited.discard(digest)
            self._residents.abandon(digest)
            self._changed.notify_all()

    def acquire(self, digest: str) -> bool:
        """Pins a resident program; False when it isn't resident yet, or has to make room first."""
        with self._changed:
            acquired = self._residents.acquire(digest)
            if acquired:
                self._working_set.use(digest, time.monotonic())
                self._changed.notify_all()
            return acquired

    def release(self, digest: str) -> None:
        """Undoes one `acquire`."""
        with self._changed:
            self._working_set.use(digest, time.monotonic())
            self._residents.release(digest)
            self._changed.notify_all()

    def forget(self, digest: str) -> None:
        """Frees a program that nothing names any more: now, or at its last release."""
        self.abandon(digest)
        with self._changed:
            self._residents.forget(digest)
            self._working_set.forget(digest)
            self._changed.notify_all()

    def __getitem__(self, digest: str) -> Slot:
        """The slot of an acquired program."""
        return self._residents.slots[digest]

    def __len__(self) -> int:
        """Resident programs."""
        return len(self._residents.slots)

    @property
    def evictions(self) -> int:
        """Programs that made room for others."""
        return self._residents.evictions

    @property
    def bytes(self) -> int:
        """What the pools take."""
        return self._pools.bytes

    @property
    def host_bytes(self) -> int:
        """What the copies on the host take."""
        return self._host.bytes

    @property
    def working_set_bytes(self) -> int:
        """See WorkingSet."""
        with self._changed:
            return self._working_set.bytes(time.monotonic())

    @property
    def budget_bytes(self) -> int:
        """What the pools may take."""
        return self._pools.budget

    def close(self) -> None:
        """Ends the loading thread, after the load that it is at; one that waits for room is given up."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _want(self, artifact: Artifact, *, awaited: bool) -> None:
        digest = artifact.digest
        with self._changed:
            self._working_set.use(digest, time.monotonic())
            if digest in self._residents.slots:
                if awaited:
                    self._residents.keep(digest)
                return
            self._wanted.setdefault(digest, artifact)
            if awaited:
                self._awaited.add(digest)
            self._changed.notify_all()

    def _run(self) -> None:
        # A team of threads of its own would take the cores from the step's: with more threads than cores, OpenMP puts
        # them to sleep between any two operations, and a step takes twice its time, also when nothing is loaded.
        with threadpool_limits(1, user_api="openmp"), Paced(lambda: self.beside_steps):
            self._load_wanted()

    def _load_wanted(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._wanted or self._residents.forgotten or self._closed)
                if self._closed:
                    return
                artifact = next(iter(self._wanted.values()), None)
            self._reclaim.evicted()  # before a load: it must not find the copy of what was forgotten
            if artifact is not None:
                self._load(artifact, self._make_room)

    def _load(self, artifact: Artifact, make_room: MakeRoom) -> None:
        """Makes the program resident and says so, or why not; nothing when it is given up."""
        start = time.monotonic()
        try:
            error = self._make_resident(artifact, make_room)
        except _Abandoned:
            return
        with self._changed:
            self._wanted.pop(artifact.digest, None)
            self._awaited.discard(artifact.digest)
        self._on_load(Load(artifact, time.monotonic() - start, error))

    def _make_resident(self, artifact: Artifact, make_room: MakeRoom) -> str | None:
        try:
            copy = self._host.get(artifact.digest)
            pieces = self._compile(artifact) if copy is None else copy
            self._measure(artifact.digest, self._pools.size(pieces))
            make_room(artifact, pieces)
            self._settle(artifact, self._pools.place(pieces), from_host=copy is not None)
        except HatrackError as error:
            return f"its adapter can't be loaded: {error.message}"
        except _Abandoned:
            raise
        except Exception:  # one artifact's fault must not end the thread that loads all others
            logger.exception("loading %s failed", artifact.digest)
            return "its adapter can't be loaded"
        return None

    def _measure(self, digest: str, size: int) -> None:
        now = time.monotonic()
        with self._changed:
            if digest in self._wanted:  # or it was forgotten
                self._working_set.measure(digest, size)
            wanted = self._working_set.bytes(now)
        if wanted > self._pools.budget and now >= self._next_warning:
            self._next_warning = now + WARNING_SECONDS
            message = "programs asked for in the last minute take %d bytes, the adapter memory holds %d"
            logger.warning(message, wanted, self._pools.budget)

    def _settle(self, artifact: Artifact, places: Places, *, from_host: bool) -> None:
        digest = artifact.digest
        with self._changed:
            if digest in self._wanted:
                self._residents.slots[digest] = Slot(places, artifact.soft_tokens)
                if digest in self._awaited:
                    self._residents.keep(digest)
                self.host_loads += from_host
                self.disk_loads += not from_host
                self.reloads += digest in self._residents.once_evicted
                return
        self._pools.free(places)
        raise _Abandoned

    def _make_room(self, artifact: Artifact, pieces: Pieces) -> None:
        """Waits until the pieces fit: free rows go first, then idle programs, oldest first.

        Whoever passes while it waits takes of what was free, and too little, when the wait began: what is freed later
        is for this one.
        """
        needed, tried, spare = self._pools.size(pieces), {artifact.digest}, None
        if needed > self._pools.budget:
            raise GenerationFailed(f"it takes {needed} bytes, the server's adapter memory holds {self._pools.budget}")
        while not self._pools.fits(pieces):
            if self._reclaim.evicted() or (needed <= self._pools.spare and self._reclaim.compact()):
                continue
            if not self._evict_one(artifact.digest):
                if spare is None:
                    spare = self._pools.spare if self._pools.spare < needed else 0
                spare -= self._let_pass(artifact.digest, tried, spare)

    def _evict_one(self, digest: str) -> bool:
        """Makes one program give its room to `digest`; False if none can now, but one will."""
        with self._changed:
            if self._closed or digest not in self._wanted:
                raise _Abandoned
            if self._residents.evicted or self._residents.evict_oldest():
                return True
            self._residents.doom_oldest()
            return False

    def _let_pass(self, digest: str, tried: set[str], spare: int) -> int:
        """Waits until there may be room for `digest`, or loads another program beside it; what that one takes."""

        def other() -> Artifact | None:
            untried = (one for key, one in self._wanted.items() if key not in tried)
            return next((one for one in untried if (self._working_set.size(one.digest) or 0) <= spare), None)

        def changed() -> bool:
            gone = self._closed or digest not in self._wanted
            return bool(gone or self._residents.evicted or self._residents.oldest_idle() or other())

        with self._changed:
            self._changed.wait_for(changed, EXPIRY_POLL_SECONDS)
            passing = other()
        if passing is None:
            return 0
        tried.add(passing.digest)
        self._reclaim.evicted()  # as before any load
        before = self._pools.spare
        self._load(passing, lambda _, pieces: self._refuse_beyond(spare, pieces))
        return before - self._pools.spare

    def _refuse_beyond(self, spare: int, pieces: Pieces) -> None:
        if self._pools.size(pieces) > spare or not self._pools.fits(pieces):
            raise _Abandoned
