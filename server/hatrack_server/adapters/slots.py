"""Which programs are resident: loaded by a thread beside the step loop, pinned by running sequences, evicted by age."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass

from hatrack_server.adapters.pieces import Pieces
from hatrack_server.adapters.pools import LowRankPool, Place, Pools
from hatrack_server.errors import GenerationFailed, HatrackError, Unavailable
from hatrack_server.types import Artifact

logger = logging.getLogger(__name__)

Compile = Callable[[Artifact], Pieces]


@dataclass(slots=True, eq=False)
class Slot:
    """A resident program: its places by layer, and how many running sequences pin it."""

    number: int  # in the order of loading: neighbours in number tend to be neighbours in the pools
    places: dict[str, Place]
    pins: int = 0
    doomed: bool = False  # not to be pinned again, and freed at the last release


@dataclass(frozen=True, slots=True)
class Load:
    """How one load ended."""

    artifact: Artifact
    seconds: float
    error: str | None = None


class ProgramSlots:
    """Resident programs within the pools' budget, least recently used first out.

    `request` never blocks: the loading thread reads, compiles and copies; `on_load` is called there when a load has
    ended. A load waits for room while every resident program is pinned; loads end in the order of their requests.
    """

    def __init__(self, pools: Pools, compile_artifact: Compile, on_load: Callable[[Load], None]) -> None:
        self.evictions = 0
        self._pools = pools
        self._compile = compile_artifact
        self._on_load = on_load
        self._resident: OrderedDict[str, Slot] = OrderedDict()  # least recently used first
        self._queue: deque[Artifact] = deque()
        self._loading: set[str] = set()  # queued ones included
        self._loaded = 0
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="adapter-loader", daemon=True)
        self._thread.start()

    def request(self, artifact: Artifact) -> None:
        """Starts loading unless the program is resident or on its way. Never blocks."""
        with self._changed:
            if artifact.digest not in self._resident and artifact.digest not in self._loading:
                self._loading.add(artifact.digest)
                self._queue.append(artifact)
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
        with self._changed:
            slot = self._resident.get(digest)
            if slot is None:
                return
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
        """Ends the loading thread after the load it is at."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if self._closed:
                    return
                artifact = self._queue.popleft()
            start = time.monotonic()
            error = self._load(artifact)
            with self._changed:
                self._loading.discard(artifact.digest)
            self._on_load(Load(artifact, time.monotonic() - start, error))

    def _load(self, artifact: Artifact) -> str | None:
        """Makes the program resident, or says in a sentence why not."""
        try:
            self._place(artifact.digest, self._compile(artifact))
        except HatrackError as error:
            return f"its adapter can't be loaded: {error.message}"
        except Exception:  # one artifact's fault must not end the thread that loads all others
            logger.exception("loading %s failed", artifact.digest)
            return "its adapter can't be loaded"
        return None

    def _place(self, digest: str, pieces: Pieces) -> None:
        pools = {layer: self._pools.of(layer, piece.rank) for layer, piece in pieces.items()}
        self._make_room(list(pools.values()))
        # Only this thread grows and writes pools; a step goes on reading the old stacks meanwhile.
        self._pools.grow(list(pools.values()))
        with self._changed:
            slot = Slot(self._loaded, {layer: Place(pool, pool.take()) for layer, pool in pools.items()})
        try:
            for layer, place in slot.places.items():
                place.pool.write(place.row, pieces[layer])
        except Exception:
            with self._changed:
                self._free(slot)
            raise
        with self._changed:
            self._resident[digest] = slot
            self._loaded += 1

    def _make_room(self, pools: list[LowRankPool]) -> None:
        """Waits until one more row in each of `pools` fits: free rows go first, then idle programs, oldest first.

        While every program is pinned the oldest may not be pinned again, or busy ones would keep the others out for
        good.
        """
        needed = sum(pool.row_bytes for pool in pools)
        if needed > self._pools.budget:
            raise GenerationFailed(f"it takes {needed} bytes, the server's adapter memory holds {self._pools.budget}")
        with self._changed:
            while not self._pools.fits(pools):
                if self._closed:
                    raise Unavailable("the engine stops")
                if self._pools.would_fit(pools) and self._compact():
                    continue
                if not self._evict_oldest():
                    self._doom_oldest()
                    self._changed.wait()

    def _compact(self) -> bool:
        """Gives the memory of free rows back, where no pinned program lies behind them; False if that gave nothing."""
        for digest, slot in self._resident.items():
            if slot.pins == 0:
                # A new slot, because a step's effects may be kept for the old one.
                places = {layer: Place(place.pool, place.pool.lower(place.row)) for layer, place in slot.places.items()}
                self._resident[digest] = Slot(slot.number, places)
        return self._pools.trim()

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
        self._free(self._resident.pop(digest))

    def _free(self, slot: Slot) -> None:
        for place in slot.places.values():
            place.pool.free(place.row)
