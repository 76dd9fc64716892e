"""What the catalog tells about adapters: plain data."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from datetime import datetime

from hatrack.manifest import BaseIdentity


class AdapterState(enum.Enum):
    """Where a version is in its life. Uploads are checked before they get a version, so none is seen unready."""

    READY = "READY"
    DELETING = "DELETING"  # gone for new requests; requests in flight still use it


@dataclass(frozen=True, slots=True)
class VersionRecord:
    """One immutable version of an adapter, and what the gate found in it."""

    version: int
    digest: str
    state: AdapterState
    method: str
    rank: int
    parameters: int
    size_bytes: int
    create_time: datetime  # UTC
    trained_on: BaseIdentity | None  # as its manifest says; None without one


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """One adapter of one tenant."""

    name: str
    live_version: int
    versions: tuple[VersionRecord, ...]  # newest first
    etag: str  # changes with every change of the adapter
    version: int  # the one that the call made, found or named; 0 otherwise
