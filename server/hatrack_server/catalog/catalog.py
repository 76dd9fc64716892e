"""The catalog: tenants' adapters by name, their versions, and the leases of requests in flight.

One lock covers database, store and leases, so that a name resolves to a version and counts as used in one step. Files
are on disk before the transaction that names them, and go after the one that forgets them; whatever a crash leaves
between the two, the next start sweeps.
"""

from __future__ import annotations

import builtins
import contextlib
import fcntl
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from importlib import resources
from pathlib import Path

from hatrack.manifest import BaseIdentity
from hatrack_server.catalog import rows
from hatrack_server.catalog.gate import Checked
from hatrack_server.catalog.leases import Held, Lease, References
from hatrack_server.catalog.names import check_name, not_found, parse_reference
from hatrack_server.catalog.pages import decode_token, encode_token, page_limit
from hatrack_server.catalog.records import AdapterRecord
from hatrack_server.catalog.store import Store
from hatrack_server.catalog.upload import DeclaredFile, Upload, check_declared
from hatrack_server.database import Database
from hatrack_server.errors import Conflict, FailedPrecondition, StartupError
from hatrack_server.types import Artifact

# What a manifest said is kept, so that it can be held against whatever base is served later.
SECOND_SCHEMA = """
ALTER TABLE versions DROP COLUMN verified;
ALTER TABLE versions DROP COLUMN warnings;
ALTER TABLE versions ADD COLUMN trained_on TEXT;
ALTER TABLE versions ADD COLUMN soft_tokens INTEGER NOT NULL DEFAULT 0;
ALTER TABLE versions ADD COLUMN prefix_tokens INTEGER NOT NULL DEFAULT 0
"""


class Catalog:
    """Thread-safe, for one process: calls read and write the disk, so an event loop makes them in a thread.

    `on_unused` is called, outside of the lock, with each digest that nothing names or uses any more; its files are
    gone by then. The same content may be uploaded anew meanwhile.
    """

    def __init__(
        self, data_dir: Path, *, max_upload_bytes: int, on_unused: Callable[[str], None] = lambda _: None
    ) -> None:
        """Opens or creates `data_dir`, and clears away what an interrupted run left over.

        Raises StartupError when the directory can't be used, or another server uses it.
        """
        self.on_unused = on_unused
        self._max_upload_bytes = max_upload_bytes
        self._references = References()
        with contextlib.ExitStack() as undo:
            undo.callback(os.close, _lock_directory(data_dir))
            first = resources.files(__package__).joinpath("schema.sql").read_text()
            self._database = Database(data_dir / "catalog.sqlite3", (first, SECOND_SCHEMA))
            undo.callback(self._database.close)
            try:
                self._store = Store(data_dir)
                with self._database.transaction() as sql:
                    rows.delete_all_retiring(sql)
                    named = rows.all_digests(sql)
                self._store.sweep(named)
            except (OSError, sqlite3.Error) as error:
                raise StartupError(f"data directory {data_dir} can't be used: {error}") from None
            self._closing = undo.pop_all()

    def close(self) -> None:
        """Closes the database and lets another server have the directory; nothing may be called after."""
        self._closing.close()

    def salt(self, tenant: str) -> bytes:
        """The tenant's 16 random bytes, made at its first call and kept: they part its caches from others'."""
        with self._database.reading() as sql:
            salt = rows.find_salt(sql, tenant)
        if salt is not None:  # as for every request but the first: it need not wait for the disk
            return salt
        with self._database.transaction() as sql:
            return rows.find_salt(sql, tenant) or rows.insert_salt(sql, tenant)

    def begin_upload(self, tenant: str, name: str, files: Sequence[DeclaredFile], *, stage: bool) -> Upload:
        """Opens an upload; the caller finishes and commits it, or aborts it.

        Raises InvalidRequest (InvalidArtifact for the files) naming the header's field that is wrong.
        """
        check_name(name, "header.name")
        check_declared(files, self._max_upload_bytes)
        return Upload(tenant, name, files, self._store.new_staging(), stage=stage)

    def commit(self, upload: Upload, checked: Checked, base: BaseIdentity) -> AdapterRecord:
        """Makes a finished upload the next version of its name; it is on disk before this returns.

        The version becomes the live one unless `upload.stage`; the first always does. Content that a ready version of
        the name holds already gives that version, with the gate's findings renewed. On an error nothing is left over.
        """
        assert upload.artifact is not None, "commit follows finish"
        digest = upload.artifact.digest
        with upload, self._database.lock:
            try:
                self._store.adopt(upload.artifact.path, digest)
                with self._database.transaction() as sql:
                    return _add_version(sql, upload, digest, checked, base)
            except BaseException:
                self._drop_unused([digest])
                raise

    def get(self, tenant: str, reference: str) -> AdapterRecord:
        """The adapter that `name` or `name@2` names; raises NotFound when the tenant has none such."""
        wanted = parse_reference(reference)
        with self._database.reading() as sql:
            adapter, version, _ = _resolve(sql, tenant, reference)
            return rows.record(sql, adapter, version=version if wanted.version else 0)

    def list(self, tenant: str, *, page_size: int, page_token: str) -> tuple[builtins.list[AdapterRecord], str]:
        """A page of the tenant's adapters ordered by name, and the next page's token, "" at the end.

        Raises InvalidRequest("page_size") or InvalidRequest("page_token").
        """
        limit, after = page_limit(page_size), decode_token(page_token)
        with self._database.reading() as sql:
            found = rows.adapters_after(sql, tenant, after, limit + 1)
            page = [rows.record(sql, adapter) for adapter in found[:limit]]
        return page, encode_token(page[-1].name) if len(found) > limit else ""

    def set_live(self, tenant: str, name: str, version: int, *, etag: str) -> AdapterRecord:
        """Makes `version` the one that the bare name means; an empty `etag` doesn't ask what changed meanwhile.

        Raises NotFound for an absent name or version, Conflict when the adapter changed since `etag`.
        """
        with self._database.transaction() as sql:
            adapter = rows.find_adapter(sql, tenant, name)
            if adapter is None:
                raise not_found(name)
            if etag not in ("", adapter.etag):
                raise Conflict(f"adapter {name!r} changed meanwhile: get it again, and use its new etag")
            if version not in rows.ready_versions(sql, adapter.id):
                raise not_found(f"{name}@{version}")
            rows.update_adapter(sql, adapter, live_version=version, last_version=adapter.last_version)
            return _record_of(sql, tenant, adapter.name, version)

    def delete(self, tenant: str, reference: str) -> builtins.list[str]:
        """Deletes one version, or a name with all of its versions, for every request that comes after.

        Requests in flight keep what they lease; files go with their last lease, or at once. Returns the digests that
        no version names any more. Raises NotFound, and FailedPrecondition for the live version while the name has
        others. A version's number never comes again, even after its name's deletion.
        """
        wanted = parse_reference(reference)
        with self._database.lock:
            with self._database.transaction() as sql:
                adapter, version, digest = _resolve(sql, tenant, reference)
                ready = rows.ready_versions(sql, adapter.id)
                if not wanted.version or len(ready) == 1:
                    digests = set(ready.values())
                    rows.delete_adapter(sql, adapter.id)
                elif version == adapter.live_version:
                    raise FailedPrecondition(
                        f"{reference} is the live version: make another one live, or delete {wanted.name}"
                    )
                else:
                    digests = {digest}
                    self._delete_version(sql, adapter, version)
                unnamed = sorted(digest for digest in digests if not rows.is_named(sql, digest))
            removed = self._drop_unused(unnamed)
        self._tell_unused(removed)
        return unnamed

    def lease(self, tenant: str, reference: str, base: BaseIdentity) -> Lease:
        """Resolves `reference` and holds the version it gives until the lease is released.

        Raises NotFound, and FailedPrecondition when that version was checked against another base than `base`.
        """
        with self._database.reading() as sql:
            adapter, version, digest = _resolve(sql, tenant, reference)
            served = rows.served_version(sql, adapter.id, version)
            if (served.base_weights, served.base_quantization) != (base.weights, base.quantization):
                raise FailedPrecondition(f"{adapter.name}@{version} was checked against another base: upload it again")
            held = Held(adapter.id, version, digest)
            self._references.take(held)
        artifact = Artifact(digest, self._store.path(digest), served.soft_tokens, served.prefix_tokens)
        return Lease(adapter.name, version, artifact, served.trained_on, lambda: self._release(held))

    def _release(self, held: Held) -> None:
        with self._database.lock:
            if not self._references.drop(held):
                return
            with self._database.reading() as sql:
                if held.version in rows.ready_versions(sql, held.adapter_id):
                    return
            with self._database.transaction() as sql:
                rows.delete_retiring(sql, held.adapter_id, held.version)
            removed = self._drop_unused([held.digest])
        self._tell_unused(removed)

    def _delete_version(self, sql: sqlite3.Connection, adapter: rows.AdapterRow, version: int) -> None:
        rows.mark_deleting(sql, adapter.id, version)
        if not self._references.holds_version(adapter.id, version):
            rows.delete_retiring(sql, adapter.id, version)
        rows.update_adapter(sql, adapter, live_version=adapter.live_version, last_version=adapter.last_version)

    def _drop_unused(self, digests: Iterable[str]) -> builtins.list[str]:
        """Removes the files of those that nothing names or leases; called under the lock, after the transaction."""
        removed = []
        for digest in digests:
            with self._database.reading() as sql:
                wanted = rows.is_named(sql, digest) or self._references.holds_digest(digest)
            if not wanted and self._store.path(digest).exists():
                shutil.rmtree(self._store.retire(digest))
                removed.append(digest)
        return removed

    def _tell_unused(self, digests: Iterable[str]) -> None:
        for digest in digests:
            self.on_unused(digest)


def _lock_directory(data_dir: Path) -> int:
    """A descriptor that keeps every other server out of `data_dir` while it is open, even after a `kill -9`."""
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StartupError(f"data directory {data_dir} can't be used: {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        why = (
            "is in use by another server"
            if isinstance(error, BlockingIOError)
            else f"can't be locked: {error.strerror}"
        )
        raise StartupError(f"data directory {data_dir} {why}") from None
    return descriptor


def _add_version(
    sql: sqlite3.Connection, upload: Upload, digest: str, checked: Checked, base: BaseIdentity
) -> AdapterRecord:
    adapter = rows.find_adapter(sql, upload.tenant, upload.name) or rows.insert_adapter(sql, upload.tenant, upload.name)
    same = (version for version, held in rows.ready_versions(sql, adapter.id).items() if held == digest)
    version = next(same, adapter.last_version + 1)
    rows.put_version(sql, adapter.id, version, digest, upload.size_bytes, checked, base)
    live = adapter.live_version if upload.stage and adapter.live_version else version
    rows.update_adapter(sql, adapter, live_version=live, last_version=max(adapter.last_version, version))
    return _record_of(sql, upload.tenant, upload.name, version)


def _resolve(sql: sqlite3.Connection, tenant: str, reference: str) -> tuple[rows.AdapterRow, int, str]:
    """Adapter, version and digest of what `reference` names now; raises NotFound."""
    name, exact = parse_reference(reference)
    adapter = rows.find_adapter(sql, tenant, name)
    if adapter is None:
        raise not_found(reference)
    version = exact or adapter.live_version
    digest = rows.ready_versions(sql, adapter.id).get(version)
    if digest is None:
        raise not_found(reference)
    return adapter, version, digest


def _record_of(sql: sqlite3.Connection, tenant: str, name: str, version: int) -> AdapterRecord:
    adapter = rows.find_adapter(sql, tenant, name)
    assert adapter is not None
    return rows.record(sql, adapter, version=version)
