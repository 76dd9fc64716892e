"""The catalog's rows: each function is one statement or two, within a transaction that the caller holds."""

from __future__ import annotations

import dataclasses
import json
import secrets
import sqlite3
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import NamedTuple

from hatrack.manifest import BaseIdentity
from hatrack_server.catalog.gate import Checked
from hatrack_server.catalog.records import AdapterRecord, AdapterState, VersionRecord

READY = AdapterState.READY.value
DELETING = AdapterState.DELETING.value
SALT_BYTES = 16


class AdapterRow(NamedTuple):
    """One row of `adapters`."""

    id: int
    name: str
    live_version: int
    last_version: int
    revision: int

    @property
    def etag(self) -> str:
        """Changes with every change of the adapter, and never comes again."""
        return f"{self.id}-{self.revision}"


class ServedVersion(NamedTuple):
    """What a request needs to know of a version."""

    base_weights: str  # of the base that it was checked against
    base_quantization: str
    soft_tokens: int  # see Artifact
    prefix_tokens: int
    trained_on: BaseIdentity | None  # as its manifest says; None without one


def find_salt(sql: sqlite3.Connection, tenant: str) -> bytes | None:
    """The tenant's salt, if it has one yet."""
    row = sql.execute("SELECT salt FROM tenants WHERE tenant = ?", (tenant,)).fetchone()
    return row[0] if row else None


def insert_salt(sql: sqlite3.Connection, tenant: str) -> bytes:
    """Gives a tenant without a salt a new one."""
    salt = secrets.token_bytes(SALT_BYTES)
    sql.execute("INSERT INTO tenants VALUES (?, ?)", (tenant, salt))
    return salt


_ADAPTER_COLUMNS = "id, name, live_version, last_version, revision"


def find_adapter(sql: sqlite3.Connection, tenant: str, name: str) -> AdapterRow | None:
    """The tenant's adapter of this name, unless it is deleted."""
    query = f"SELECT {_ADAPTER_COLUMNS} FROM adapters WHERE tenant = ? AND name = ? AND live_version > 0"  # noqa: S608
    found = sql.execute(query, (tenant, name)).fetchone()
    return AdapterRow(*found) if found else None


def adapters_after(sql: sqlite3.Connection, tenant: str, name: str, limit: int) -> list[AdapterRow]:
    """The tenant's adapters whose names follow `name`, in order."""
    query = (
        f"SELECT {_ADAPTER_COLUMNS} FROM adapters"  # noqa: S608
        " WHERE tenant = ? AND name > ? AND live_version > 0 ORDER BY name LIMIT ?"
    )
    return [AdapterRow(*row) for row in sql.execute(query, (tenant, name, limit))]


def insert_adapter(sql: sqlite3.Connection, tenant: str, name: str) -> AdapterRow:
    """An adapter without versions, new or back from its deletion; the caller gives it one in the same transaction."""
    query = (
        "INSERT INTO adapters (tenant, name, live_version, last_version, revision) VALUES (?, ?, 0, 0, 0)"  # noqa: S608
        f" ON CONFLICT (tenant, name) DO UPDATE SET live_version = 0 RETURNING {_ADAPTER_COLUMNS}"
    )
    return AdapterRow(*sql.execute(query, (tenant, name)).fetchone())


def update_adapter(sql: sqlite3.Connection, adapter: AdapterRow, *, live_version: int, last_version: int) -> None:
    """Sets both numbers, and changes the etag."""
    sql.execute(
        "UPDATE adapters SET live_version = ?, last_version = ?, revision = revision + 1 WHERE id = ?",
        (live_version, last_version, adapter.id),
    )


def delete_adapter(sql: sqlite3.Connection, adapter_id: int) -> None:
    """Removes all versions of an adapter; of itself only its last version's number is kept."""
    sql.execute("DELETE FROM versions WHERE adapter_id = ?", (adapter_id,))
    sql.execute("UPDATE adapters SET live_version = 0 WHERE id = ?", (adapter_id,))


def put_version(
    sql: sqlite3.Connection,
    adapter_id: int,
    version: int,
    digest: str,
    size_bytes: int,
    checked: Checked,
    base: BaseIdentity,
) -> None:
    """Adds a ready version, or renews what the gate found in the one that is there."""
    spec = checked.spec
    sql.execute(
        "INSERT INTO versions VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
        " ON CONFLICT (adapter_id, version) DO UPDATE SET trained_on = excluded.trained_on,"
        " base_weights = excluded.base_weights, base_quantization = excluded.base_quantization",
        (adapter_id, version, digest, READY, spec.method, spec.rank, spec.parameters, size_bytes, base.weights,
         base.quantization, datetime.now(UTC).isoformat(),
         checked.trained_on and json.dumps(dataclasses.asdict(checked.trained_on)), spec.soft_tokens,
         spec.prefix_tokens),
    )  # fmt: skip


def ready_versions(sql: sqlite3.Connection, adapter_id: int) -> dict[int, str]:
    """The digests of an adapter's ready versions, by number."""
    query = "SELECT version, digest FROM versions WHERE adapter_id = ? AND state = ?"
    return dict(sql.execute(query, (adapter_id, READY)).fetchall())


def served_version(sql: sqlite3.Connection, adapter_id: int, version: int) -> ServedVersion:
    """What a request needs to know of a version that is there."""
    query = (
        "SELECT base_weights, base_quantization, soft_tokens, prefix_tokens, trained_on"
        " FROM versions WHERE adapter_id = ? AND version = ?"
    )
    weights, quantization, soft, prefix, trained_on = sql.execute(query, (adapter_id, version)).fetchone()
    return ServedVersion(weights, quantization, soft, prefix, _identity(trained_on))


def mark_deleting(sql: sqlite3.Connection, adapter_id: int, version: int) -> None:
    """Takes a version from new requests."""
    sql.execute("UPDATE versions SET state = ? WHERE adapter_id = ? AND version = ?", (DELETING, adapter_id, version))


def delete_retiring(sql: sqlite3.Connection, adapter_id: int, version: int) -> None:
    """Removes a version that is being deleted; a ready one stays."""
    sql.execute(
        "DELETE FROM versions WHERE adapter_id = ? AND version = ? AND state = ?", (adapter_id, version, DELETING)
    )


def delete_all_retiring(sql: sqlite3.Connection) -> None:
    """Finishes the deletions that an earlier run left unfinished."""
    sql.execute("DELETE FROM versions WHERE state = ?", (DELETING,))


def is_named(sql: sqlite3.Connection, digest: str) -> bool:
    """Whether a ready version of any tenant has this content."""
    query = "SELECT 1 FROM versions WHERE digest = ? AND state = ? LIMIT 1"
    return sql.execute(query, (digest, READY)).fetchone() is not None


def all_digests(sql: sqlite3.Connection) -> frozenset[str]:
    """The digests of all versions of all tenants."""
    return frozenset(digest for (digest,) in sql.execute("SELECT DISTINCT digest FROM versions"))


def record(sql: sqlite3.Connection, adapter: AdapterRow, *, version: int = 0) -> AdapterRecord:
    """What the API shows of an adapter."""
    rows = sql.execute(
        "SELECT version, digest, state, method, rank, parameters, size_bytes, create_time, trained_on"
        " FROM versions WHERE adapter_id = ? ORDER BY version DESC",
        (adapter.id,),
    )
    return AdapterRecord(adapter.name, adapter.live_version, tuple(_versions(rows)), adapter.etag, version)


def _versions(rows: Iterable[tuple[int, str, str, str, int, int, int, str, str | None]]) -> Iterable[VersionRecord]:
    for version, digest, state, method, rank, parameters, size, created, trained_on in rows:
        yield VersionRecord(
            version, digest, AdapterState(state), method, rank, parameters, size, datetime.fromisoformat(created),
            _identity(trained_on),
        )  # fmt: skip


def _identity(column: str | None) -> BaseIdentity | None:
    return BaseIdentity(**json.loads(column)) if column else None
