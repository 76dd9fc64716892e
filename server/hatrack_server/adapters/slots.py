"""Which programs are resident: loaded by a thread beside the step loop, pinned by running sequences, evicted by age."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from threadpoolctl import threadpool_limits

from hatrack_server.adapters.pieces import Pieces
from hatrack_server.adapters.pools import Places, Pools
from hatrack_server.errors import GenerationFailed, HatrackError
from hatrack_server.types import Artifact

logger = logging.getLogger(__name__)

Compile = Callable[[Artifact], Pieces]


@dataclass(slots=True, eq=False)
class Slot:
    """A resident program: where it lies, and how many running sequences pin it."""

    places: Places
    soft_tokens: int = 0  # see Artifact
    pins: int = 0
    doomed: bool = False  # not to be pinned again, and evicted at the last release

    @property
    def order(self) -> tuple[int, int]:
        """Where its first piece lies: programs that are neighbours in it tend to be neighbours in all pools."""
        return (self.places[0].pool.number, self.places[0].row) if self.places else (-1, 0)


@dataclass(frozen=True, slots=True)
class Load:
    """How one load ended."""

    artifact: Artifact
    seconds: float
    error: str | None = None


class _Abandoned(Exception):
    """Nobody wants the program that is being loaded any more."""


class ProgramSlots:
    """Resident programs within the pools' budget, least recently used first out.

    No method blocks but `close`. The loading thread alone touches the pools: it reads, compiles and copies without the
    lock, which guards nothing but who is resident, pinned and wanted. `on_load` is called there when a load has ended.
    Loads are made in the order of their requests; one waits for room while every resident program is pinned.
    """

    def __init__(self, pools: Pools, compile_artifact: Compile, on_load: Callable[[Load], None]) -> None:
        self.evictions = 0
        self._pools = pools
        self._compile = compile_artifact
        self._on_load = on_load
        self._resident: OrderedDict[str, Slot] = OrderedDict()  # least recently used first
        self._evicted: list[Slot] = []  # whose rows the loading thread may give to others
        self._wanted: OrderedDict[str, Artifact] = OrderedDict()  # first come, first loaded
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="adapter-loader", daemon=True)
        self._thread.start()

    def request(self, artifact: Artifact) -> None:
        """Has the program loaded unless it is resident or on its way."""
        with self._changed:
            if artifact.digest not in self._resident and artifact.digest not in self._wanted:
                self._wanted[artifact.digest] = artifact
                self._changed.notify_all()

    def abandon(self, digest: str) -> None:
        """Takes a request back: a load that has not ended yet comes to nothing."""
        with self._changed:
            if self._wanted.pop(digest, None):
                self._changed.notify_all()

    def acquire(self, digest: str) -> bool:
        """Pins a resident program; False when it isn't resident yet, or has to make room first."""
        with self._changed:
            slot = self._resident.get(digest)
            if slot is None or slot.doomed:
                return False
            slot.pins += 1
            self._resident.move_to_end(digest)
            return True

    def release(self, digest: str) -> None:
        """Undoes one `acquire`."""
        with self._changed:
            slot = self._resident[digest]
            slot.pins -= 1
            if slot.pins == 0:
                if slot.doomed:
                    self._evict(digest)
                self._changed.notify_all()

    def forget(self, digest: str) -> None:
        """Frees a program that nothing names any more: now, or at its last release."""
        self.abandon(digest)
        with self._changed:
            slot = self._resident.get(digest)
            if slot is not None:
                slot.doomed = True
                if slot.pins == 0:
                    self._evict(digest)
                    self._changed.notify_all()

    def __getitem__(self, digest: str) -> Slot:
        """The slot of an acquired program."""
        return self._resident[digest]

    def __len__(self) -> int:
        """Resident programs."""
        return len(self._resident)

    @property
    def bytes(self) -> int:
        """What the pools take."""
        return self._pools.bytes

    def close(self) -> None:
        """Ends the loading thread, after the load that it is at; one that waits for room is given up."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        # A team of threads of its own would take the cores from the step's: with more threads than cores, OpenMP puts
        # them to sleep between any two operations, and a step takes twice its time, also when nothing is loaded.
        with threadpool_limits(1, user_api="openmp"):
            self._load_wanted()

    def _load_wanted(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._wanted or self._closed)
                if self._closed:
                    return
                artifact = next(iter(self._wanted.values()))
            start = time.monotonic()
            try:
                error = self._load(artifact)
            except _Abandoned:
                continue
            with self._changed:
                self._wanted.pop(artifact.digest, None)
            self._on_load(Load(artifact, time.monotonic() - start, error))

    def _load(self, artifact: Artifact) -> str | None:
        """Makes the program resident, or says in a sentence why not."""
        try:
            pieces = self._compile(artifact)
            self._make_room(artifact.digest, pieces)
            self._settle(artifact, self._pools.place(pieces))
        except HatrackError as error:
            return f"its adapter can't be loaded: {error.message}"
        except _Abandoned:
            raise
        except Exception:  # one artifact's fault must not end the thread that loads all others
            logger.exception("loading %s failed", artifact.digest)
            return "its adapter can't be loaded"
        return None

    def _settle(self, artifact: Artifact, places: Places) -> None:
        with self._changed:
            if artifact.digest in self._wanted:
                self._resident[artifact.digest] = Slot(places, artifact.soft_tokens)
                return
        self._pools.free(places)
        raise _Abandoned

    def _make_room(self, digest: str, pieces: Pieces) -> None:
        """Waits until the pieces fit: free rows go first, then idle programs, oldest first.

        While every program is pinned the oldest may not be pinned again, or busy ones would keep the others out for
        good.
        """
        needed = self._pools.size(pieces)
        if needed > self._pools.budget:
            raise GenerationFailed(f"it takes {needed} bytes, the server's adapter memory holds {self._pools.budget}")
        while not self._pools.fits(pieces):
            if self._reclaim() or (self._pools.would_fit(pieces) and self._compact()):
                continue
            with self._changed:
                if self._closed or digest not in self._wanted:
                    raise _Abandoned
                if not self._evicted and not self._evict_oldest():
                    self._doom_oldest()
                    self._changed.wait()

    def _reclaim(self) -> bool:
        """Frees the rows of what was evicted; False if nothing was."""
        with self._changed:
            evicted, self._evicted = self._evicted, []
        for slot in evicted:
            self._pools.free(slot.places)
        return bool(evicted)

    def _compact(self) -> bool:
        """Gives the memory of free rows back, where no pinned program lies behind them; False if that gave nothing."""
        with self._changed:
            digests = list(self._resident)
        for digest in digests:
            self._move_down(digest)
        self._reclaim()
        return self._pools.trim()

    def _move_down(self, digest: str) -> None:
        """Puts an idle program into lower rows; steps that begin meanwhile read it where it is."""
        with self._changed:
            old = self._resident.get(digest)
            if old is None or old.pins:
                return
            old.pins += 1  # ours: it can't be evicted under the copy
        new = Slot(self._pools.copy_lower(old.places), old.soft_tokens)
        with self._changed:
            moved = old.pins == 1 and not old.doomed
            if moved:
                self._resident[digest] = new  # where the old one stood in age
        kept, given_up = (new, old) if moved else (old, new)
        self._pools.free(set(given_up.places).difference(kept.places))
        if not moved:
            self.release(digest)

    def _evict_oldest(self) -> bool:
        for digest, slot in self._resident.items():
            if slot.pins == 0:
                self._evict(digest)
                self.evictions += 1
                return True
        return False

    def _doom_oldest(self) -> None:
        slots = self._resident.values()
        if not any(slot.doomed for slot in slots):
            next(iter(slots)).doomed = True
            self.evictions += 1

    def _evict(self, digest: str) -> None:
        self._evicted.append(self._resident.pop(digest))
