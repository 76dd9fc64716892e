"""References to versions that requests in flight hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple, Self, TypeVar

from hatrack.manifest import BaseIdentity
from hatrack_server.types import Artifact

Key = TypeVar("Key")


class Held(NamedTuple):
    """What one lease counts for: a version, and its content, which other versions may share."""

    adapter_id: int
    version: int
    digest: str


class Lease:
    """One request's hold on one version: its files stay until `release`. A context manager that releases."""

    def __init__(
        self,
        name: str,
        version: int,
        artifact: Artifact,
        trained_on: BaseIdentity | None,  # as its manifest says; None without one
        release: Callable[[], None],
    ) -> None:
        self.name = name
        self.version = version
        self.artifact = artifact
        self.trained_on = trained_on
        self._release: Callable[[], None] | None = release

    def release(self) -> None:
        """Gives the version back; does nothing the second time. The last one of a deleted version removes it."""
        release, self._release = self._release, None
        if release is not None:
            release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class References:
    """How many leases hold each version and each content. Not locked: the catalog calls it under its own lock."""

    def __init__(self) -> None:
        self._versions: Counter[tuple[int, int]] = Counter()
        self._digests: Counter[str] = Counter()

    def take(self, held: Held) -> None:
        """Counts one more."""
        self._versions[held[:2]] += 1
        self._digests[held.digest] += 1

    def drop(self, held: Held) -> bool:
        """Counts one less; whether that was the version's last."""
        _decrement(self._versions, held[:2])
        _decrement(self._digests, held.digest)
        return not self.holds_version(held.adapter_id, held.version)

    def holds_version(self, adapter_id: int, version: int) -> bool:
        """Whether a lease holds this version."""
        return self._versions[adapter_id, version] > 0

    def holds_digest(self, digest: str) -> bool:
        """Whether a lease holds this content, under any name."""
        return self._digests[digest] > 0


def _decrement(counter: Counter[Key], key: Key) -> None:
    counter[key] -= 1
    if not counter[key]:  # or it grows with every version ever served
        del counter[key]
