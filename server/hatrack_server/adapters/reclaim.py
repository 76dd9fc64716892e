"""The memory of programs that are no longer resident, for others."""

from __future__ import annotations

import logging
from dataclasses import replace
from threading import Condition

from hatrack_server.adapters.host_tier import HostTier
from hatrack_server.adapters.pools import Places, Pools
from hatrack_server.adapters.residents import Residents

logger = logging.getLogger(__name__)


class Reclaim:
    """What the loading thread does about room; nobody is held up meanwhile, and no pinned program is moved."""

    def __init__(self, pools: Pools, host: HostTier, residents: Residents, changed: Condition) -> None:
        """`changed` is the lock of the residents, and is notified when one is idle again."""
        self._pools = pools
        self._host = host
        self._residents = residents
        self._changed = changed

    def evicted(self) -> bool:
        """Frees the rows of what was evicted, with a copy on the host for next time; False if nothing was."""
        with self._changed:
            evicted, forgotten = self._residents.take_evicted()
        for digest, slot in evicted:
            if not slot.forgotten:
                self._copy_to_host(digest, slot.places)
            self._pools.free(slot.places)
        for digest in forgotten:
            self._host.drop(digest)
        return bool(evicted)

    def compact(self) -> bool:
        """Gives the memory of free rows back, where no pinned program lies behind them; False if that gave nothing."""
        with self._changed:
            digests = list(self._residents.slots)
        for digest in digests:
            self._move_down(digest)
        self.evicted()
        return self._pools.trim()

    def _copy_to_host(self, digest: str, places: Places) -> None:
        try:
            self._host.put(digest, self._pools.read(places))
        except Exception:  # else no row would be freed any more; the program comes from disk next time
            logger.exception("copying %s to the host failed", digest)

    def _move_down(self, digest: str) -> None:
        """Puts an idle program into lower rows; steps that begin meanwhile read it where it is."""
        slots = self._residents.slots
        with self._changed:
            old = slots.get(digest)
            if old is None or old.pins:
                return
            old.pins += 1  # ours: it can't be evicted under the copy
        places = self._pools.copy_lower(old.places)
        with self._changed:
            moved = old.pins == 1 and not old.doomed
            if moved:
                slots[digest] = replace(old, places=places, pins=0)  # where the old one stood in age
            else:
                self._residents.release(digest)
                self._changed.notify_all()
        # After the release: the rows that are given up are those of the copy, which nobody knows.
        kept, given_up = (places, old.places) if moved else (old.places, places)
        self._pools.free(set(given_up).difference(kept))
