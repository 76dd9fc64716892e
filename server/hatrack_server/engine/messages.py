"""What the front process and the worker tell each other, pickled over a pipe between the two alone."""

from __future__ import annotations

from dataclasses import dataclass

from hatrack_server.types import Artifact, BaseInfo, Delta, EngineStats, Generation

DEADLINE_ERROR = "the deadline passed"  # the one `Delta.error` that the front process tells from the others


@dataclass(frozen=True, slots=True)
class Submit:
    """Front to worker: generate this."""

    generation: Generation


@dataclass(frozen=True, slots=True)
class Cancel:
    """Front to worker: nobody waits for this completion any more."""

    id: int


@dataclass(frozen=True, slots=True)
class Preload:
    """Front to worker, after a restart: make this program resident."""

    artifact: Artifact


@dataclass(frozen=True, slots=True)
class Forget:
    """Front to worker: nothing names this artifact any more."""

    digest: str


@dataclass(frozen=True, slots=True)
class Stop:
    """Front to worker: end."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Worker to front, while starting: what it does, and how far it is from 0 to 1."""

    stage: str
    fraction: float


@dataclass(frozen=True, slots=True)
class Ready:
    """Worker to front: the base is loaded."""

    base: BaseInfo


@dataclass(frozen=True, slots=True)
class Refused:
    """Worker to front: the base can't be served; the worker ends."""

    message: str


@dataclass(frozen=True, slots=True)
class Stepped:
    """Worker to front: what one step brought."""

    deltas: tuple[Delta, ...]
    stats: EngineStats


ToWorker = Submit | Cancel | Preload | Forget | Stop
ToFront = Progress | Ready | Refused | Stepped
