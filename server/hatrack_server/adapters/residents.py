"""Which programs are resident: pinned by running sequences, kept for waiting ones, else evicted by age."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from hatrack_server.adapters.pools import Places

# How long a program is kept for those who asked for it. They take it or say that they don't want it any more; this is
# for whoever does neither.
AWAITED_SECONDS = 10.0


@dataclass(slots=True, eq=False)
class Slot:
    """A resident program: where it lies, and how many running sequences pin it."""

    places: Places
    soft_tokens: int = 0  # see Artifact
    pins: int = 0
    awaited_until: float = 0.0  # kept for who asked for it
    doomed: bool = False  # not to be pinned again, and evicted at the last release
    forgotten: bool = False  # doomed, because nothing names it any more

    @property
    def order(self) -> tuple[int, int]:
        """Where its first piece lies: programs that are neighbours in it tend to be neighbours in all pools."""
        return (self.places[0].pool.number, self.places[0].row) if self.places else (-1, 0)


class Residents:
    """The table of slots by digest, least recently used first; to be used under its owner's lock."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.slots: OrderedDict[str, Slot] = OrderedDict()
        self.evicted: list[tuple[str, Slot]] = []  # whose rows may be given to others
        self.forgotten: list[str] = []  # of which nothing may stay
        self.once_evicted: set[str] = set()  # since they were last forgotten
        self.evictions = 0  # that made room
        self._clock = clock

    def pinned(self, digest: str) -> bool:
        """Whether running sequences use the program."""
        slot = self.slots.get(digest)
        return slot is not None and slot.pins > 0

    def keep(self, digest: str) -> None:
        """Keeps a resident program until it is next pinned: somebody waits for it."""
        self.slots[digest].awaited_until = self._clock() + AWAITED_SECONDS

    def acquire(self, digest: str) -> bool:
        """Pins a program; False when it isn't resident, or has to make room first."""
        slot = self.slots.get(digest)
        if slot is None or slot.doomed:
            return False
        slot.pins += 1
        slot.awaited_until = 0.0
        self.slots.move_to_end(digest)
        return True

    def release(self, digest: str) -> None:
        """Undoes one `acquire`."""
        slot = self.slots[digest]
        slot.pins -= 1
        if slot.pins == 0 and slot.doomed:
            self._evict(digest)

    def abandon(self, digest: str) -> None:
        """Nobody waits for the program any more."""
        if digest in self.slots:
            self.slots[digest].awaited_until = 0.0

    def forget(self, digest: str) -> None:
        """Evicts a program that nothing names any more: now, or at its last release."""
        self.forgotten.append(digest)
        self.once_evicted.discard(digest)
        slot = self.slots.get(digest)
        if slot is not None:
            slot.doomed = slot.forgotten = True
            if slot.pins == 0:
                self._evict(digest)

    def take_evicted(self) -> tuple[list[tuple[str, Slot]], list[str]]:
        """What was evicted and what was forgotten since the last call."""
        taken = self.evicted, self.forgotten
        self.evicted, self.forgotten = [], []
        return taken

    def oldest_idle(self) -> str | None:
        """The program to be evicted next, if any may be."""
        now = self._clock()
        return next((d for d, slot in self.slots.items() if slot.pins == 0 and slot.awaited_until <= now), None)

    def evict_oldest(self) -> bool:
        """Evicts it; False where there is none."""
        digest = self.oldest_idle()
        if digest is None:
            return False
        self._evict(digest)
        self.evictions += 1
        return True

    def doom_oldest(self) -> None:
        """Sees to it that the longest unused of the pinned programs ends, unless another already will.

        Else busy ones could keep the others out for good.
        """
        pinned = [slot for slot in self.slots.values() if slot.pins]
        if pinned and not any(slot.doomed for slot in pinned):
            pinned[0].doomed = True
            self.evictions += 1

    def _evict(self, digest: str) -> None:
        slot = self.slots.pop(digest)
        self.evicted.append((digest, slot))
        if not slot.forgotten:
            self.once_evicted.add(digest)
