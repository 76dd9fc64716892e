"""API keys: who a caller is. Kept in their own SQLite file, so that `hatrack keys` works beside a running server.

A key is `hk_<id>_<secret>`. Only the sha256 of the secret is stored; a slow password hash would add nothing, because
the secret has 256 random bits and can't be guessed from its hash at any speed.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from hatrack_server.database import Database
from hatrack_server.errors import InvalidRequest, NotFound, StartupError, Unauthenticated

SCHEMAS = (
    """
CREATE TABLE keys (
    id TEXT PRIMARY KEY,
    tenant TEXT NOT NULL,
    secret_sha256 BLOB NOT NULL,
    create_time TEXT NOT NULL
) STRICT
""",
    # A revoked key's row stays: a server whose last key is revoked must not be open to everybody again.
    "ALTER TABLE keys ADD COLUMN revoke_time TEXT",
)

_TENANT = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}", re.ASCII)
_KEY = re.compile(r"hk_([0-9a-f]{12})_([0-9a-f]{64})", re.ASCII)


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """A key as it is listed: everything but the secret."""

    id: str
    tenant: str
    create_time: datetime  # UTC


class KeyStore:
    """The keys of one data directory. Thread-safe, and for any number of processes at once."""

    def __init__(self, data_dir: Path) -> None:
        """Opens or creates `data_dir`'s keys; raises StartupError when they can't be used."""
        try:
            data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise StartupError(f"data directory {data_dir} can't be used: {error.strerror}") from None
        self._database = Database(data_dir / "keys.sqlite3", SCHEMAS)

    def close(self) -> None:
        """Closes the file; nothing may be called after."""
        self._database.close()

    def create_key(self, tenant: str) -> str:
        """A new key of `tenant`: the only time that its secret is seen. Raises InvalidRequest("tenant")."""
        if not _TENANT.fullmatch(tenant):
            message = "must be 1 to 64 of a-z, 0-9, '-', '_' and '.', starting with a letter or a digit"
            raise InvalidRequest("tenant", message)
        key_id, secret = secrets.token_hex(6), secrets.token_hex(32)
        with self._database.transaction() as sql:
            row = (key_id, tenant, _hash(secret), _now())
            sql.execute("INSERT INTO keys (id, tenant, secret_sha256, create_time) VALUES (?, ?, ?, ?)", row)
        return f"hk_{key_id}_{secret}"

    def list_keys(self) -> list[KeyRecord]:
        """Every key that is valid, ordered by tenant and age."""
        query = "SELECT id, tenant, create_time FROM keys WHERE revoke_time IS NULL ORDER BY tenant, create_time, id"
        with self._database.reading() as sql:
            found = sql.execute(query).fetchall()
        return [KeyRecord(key_id, tenant, datetime.fromisoformat(created)) for key_id, tenant, created in found]

    def revoke_key(self, key_id: str) -> None:
        """Ends a key at once, in running servers too; raises NotFound when there is none of that id."""
        with self._database.transaction() as sql:
            query = "UPDATE keys SET revoke_time = ? WHERE id = ? AND revoke_time IS NULL"
            if sql.execute(query, (_now(), key_id)).rowcount == 0:
                raise NotFound(f"key {key_id!r} was not found")

    def authenticate(self, key: str) -> str:
        """The tenant that `key` belongs to; raises Unauthenticated, alike for every reason."""
        parsed = _KEY.fullmatch(key)
        if parsed is None:
            raise Unauthenticated("the API key is not valid")
        key_id, secret = parsed.groups()
        query = "SELECT tenant, secret_sha256 FROM keys WHERE id = ? AND revoke_time IS NULL"
        with self._database.reading() as sql:
            row = sql.execute(query, (key_id,)).fetchone()
        tenant, stored = row or ("", b"")
        # Compared even when there is no such key, and in constant time: nothing is learnt from how long it takes.
        if not hmac.compare_digest(_hash(secret), stored):
            raise Unauthenticated("the API key is not valid")
        return str(tenant)

    def any_keys(self) -> bool:
        """Whether a key was ever made, even if it is revoked by now."""
        with self._database.reading() as sql:
            return sql.execute("SELECT 1 FROM keys LIMIT 1").fetchone() is not None


def _now() -> str:
    return datetime.now(UTC).isoformat()


def _hash(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()
