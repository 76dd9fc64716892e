"""How much memory the programs take that are asked for: more than there is, and loads never end."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

WINDOW_SECONDS = 60.0


class WorkingSet:
    """The distinct programs that were used of late, resident or not, and what they take.

    A program counts from its first load on, which tells its size. Each call takes constant time on the average.
    """

    def __init__(self, pinned: Callable[[str], bool]) -> None:
        """`pinned` tells which programs are in use, however long ago they were asked for."""
        self._pinned = pinned
        self._used: OrderedDict[str, float] = OrderedDict()  # when; the longest ago first
        self._sizes: dict[str, int] = {}
        self._bytes = 0  # of the used ones

    def use(self, digest: str, now: float) -> None:
        """Somebody wants the program."""
        if digest not in self._used:
            self._bytes += self._sizes.get(digest, 0)
        self._used[digest] = now
        self._used.move_to_end(digest)

    def measure(self, digest: str, size: int) -> None:
        """What the program takes."""
        if digest in self._used:
            self._bytes += size - self._sizes.get(digest, 0)
        self._sizes[digest] = size

    def size(self, digest: str) -> int | None:
        """What the program takes, if it was ever loaded."""
        return self._sizes.get(digest)

    def forget(self, digest: str) -> None:
        """The program is gone."""
        size = self._sizes.pop(digest, 0)
        if self._used.pop(digest, None) is not None:
            self._bytes -= size

    def bytes(self, now: float) -> int:
        """What the programs take that were used within the last WINDOW_SECONDS or are pinned."""
        while self._used and next(iter(self._used.values())) < now - WINDOW_SECONDS:
            digest, _ = self._used.popitem(last=False)
            if self._pinned(digest):
                self._used[digest] = now
            else:
                self._bytes -= self._sizes.get(digest, 0)
        return self._bytes
