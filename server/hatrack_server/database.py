"""One SQLite file, opened so that what a transaction wrote is on disk before it returns."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hatrack_server.errors import StartupError

BUSY_SECONDS = 10.0  # how long one process waits for another's transaction


class Database:
    """One connection and its lock: thread-safe, WAL, foreign keys held, every commit synced.

    `lock` is reentrant and public, so that a caller can join what it keeps in memory to a transaction.
    """

    def __init__(self, path: Path, schemas: Sequence[str]) -> None:
        """Opens or creates `path`; raises StartupError when it can't be used, or a newer Hatrack has written it.

        `schemas` are scripts: the first makes an empty file's tables, each other one brings them to the next version.
        """
        self.lock = threading.RLock()
        try:
            self._sql = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        except sqlite3.Error as error:
            raise StartupError(f"{path} can't be opened: {error}") from None
        try:
            self._sql.execute("PRAGMA journal_mode = WAL")
            self._sql.execute("PRAGMA synchronous = FULL")
            self._sql.execute("PRAGMA foreign_keys = ON")
            self._migrate(path, schemas)
        except sqlite3.Error as error:
            self._sql.close()
            raise StartupError(f"{path} can't be used: {error}") from None
        except StartupError:
            self._sql.close()
            raise

    def _migrate(self, path: Path, schemas: Sequence[str]) -> None:
        with self.transaction() as sql:
            (found,) = sql.execute("PRAGMA user_version").fetchone()
            if found > len(schemas):
                raise StartupError(
                    f"{path} has schema version {found}, of a newer Hatrack: this one knows {len(schemas)}"
                )
            for schema in schemas[found:]:
                for statement in schema.split(";"):  # executescript would commit first
                    sql.execute(statement)
            sql.execute(f"PRAGMA user_version = {len(schemas)}")

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """The connection, under the lock, for statements that write nothing."""
        with self.lock:
            yield self._sql

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """One write transaction, under the lock: committed and synced at the end, undone when the block raises."""
        with self.lock:
            self._sql.execute("BEGIN IMMEDIATE")
            try:
                yield self._sql
                self._sql.execute("COMMIT")
            except BaseException:
                # A failing COMMIT (a full disk) leaves the transaction open, or has rolled it back already.
                if self._sql.in_transaction:
                    self._sql.execute("ROLLBACK")
                raise

    def close(self) -> None:
        """Closes the file; nothing may be called after."""
        with self.lock:
            self._sql.close()
