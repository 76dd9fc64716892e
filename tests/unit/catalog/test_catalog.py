"""Names, versions and leases over a real database and store."""

from __future__ import annotations

import dataclasses
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from loras import BASE, CHECKED, digest_of, lora_files, stored_digests, upload

from hatrack.manifest import MANIFEST_FILE, WEIGHTS_FILE
from hatrack_server.catalog import AdapterRecord, AdapterState, Catalog
from hatrack_server.errors import Conflict, FailedPrecondition, InvalidRequest, NotFound, StartupError

IDENTITY = BASE.identity
TENANT = "default"
ONE, TWO, THREE = (lora_files(seed=seed) for seed in (1, 2, 3))


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    catalog = open_catalog(tmp_path)
    yield catalog
    catalog.close()


def open_catalog(data_dir: Path) -> Catalog:
    return Catalog(data_dir, max_upload_bytes=4_000_000)


def push(
    catalog: Catalog, name: str, files: dict[str, bytes], *, tenant: str = TENANT, stage: bool = False
) -> AdapterRecord:
    return catalog.commit(upload(catalog, name, files, tenant=tenant, stage=stage), CHECKED, IDENTITY)


def versions(record: AdapterRecord) -> list[int]:
    return [version.version for version in record.versions]


def test_an_upload_of_a_known_name_makes_its_next_version_and_lives(catalog: Catalog) -> None:
    first, second = push(catalog, "tone", ONE), push(catalog, "tone", TWO)
    assert (first.version, first.live_version) == (1, 1)
    assert (second.version, second.live_version, versions(second)) == (2, 2, [2, 1])
    assert first.etag != second.etag
    newest = second.versions[0]
    assert (newest.digest, newest.state, newest.method, newest.rank) == (digest_of(TWO), AdapterState.READY, "LORA", 2)
    assert newest.size_bytes == sum(map(len, TWO.values()))
    assert newest.trained_on == IDENTITY


def test_the_catalog_survives_a_restart(tmp_path: Path) -> None:
    catalog = open_catalog(tmp_path)
    pushed = push(catalog, "tone", ONE)
    salt = catalog.salt(TENANT)
    catalog.close()
    catalog = open_catalog(tmp_path)
    assert catalog.get(TENANT, "tone") == dataclasses.replace(pushed, version=0)
    assert catalog.salt(TENANT) == salt
    assert len(salt) == 16
    assert catalog.salt("other") != salt
    catalog.close()


def test_a_staged_version_waits_but_the_first_lives(catalog: Catalog) -> None:
    assert push(catalog, "tone", ONE, stage=True).live_version == 1
    assert push(catalog, "tone", TWO, stage=True).live_version == 1
    with catalog.lease(TENANT, "tone", IDENTITY) as lease:
        assert (lease.version, lease.artifact.digest) == (1, digest_of(ONE))
    with catalog.lease(TENANT, "tone@2", IDENTITY) as lease:
        assert (lease.version, lease.artifact.digest) == (2, digest_of(TWO))


def test_content_that_is_there_gives_its_version(catalog: Catalog) -> None:
    push(catalog, "tone", ONE)
    push(catalog, "tone", TWO)
    staged = push(catalog, "tone", ONE, stage=True)
    assert (staged.version, staged.live_version, versions(staged)) == (1, 2, [2, 1])
    live = push(catalog, "tone", ONE)
    assert (live.version, live.live_version, versions(live)) == (1, 1, [2, 1])
    assert push(catalog, "tone", THREE).version == 3


def test_promote_and_roll_back(catalog: Catalog) -> None:
    push(catalog, "tone", ONE)
    record = push(catalog, "tone", TWO)
    back = catalog.set_live(TENANT, "tone", 1, etag=record.etag)
    assert (back.live_version, back.version) == (1, 1)
    with pytest.raises(Conflict):
        catalog.set_live(TENANT, "tone", 2, etag=record.etag)
    assert catalog.set_live(TENANT, "tone", 2, etag="").live_version == 2
    for name, version in (("tone", 3), ("tone", 0), ("tone@1", 1), ("other", 1)):
        with pytest.raises(NotFound):
            catalog.set_live(TENANT, name, version, etag="")


def test_an_exact_reference_says_which_version_it_named(catalog: Catalog) -> None:
    push(catalog, "tone", ONE)
    assert catalog.get(TENANT, "tone").version == 0
    assert catalog.get(TENANT, "tone@1").version == 1


def test_foreign_and_absent_adapters_give_the_same_answer(catalog: Catalog) -> None:
    push(catalog, "tone", ONE, tenant="other")
    calls = (
        lambda name: catalog.get(TENANT, name),
        lambda name: catalog.lease(TENANT, name, IDENTITY),
        lambda name: catalog.delete(TENANT, name),
        lambda name: catalog.set_live(TENANT, name, 1, etag=""),
    )
    for call in calls:
        with pytest.raises(NotFound) as foreign:
            call("tone")
        with pytest.raises(NotFound) as absent:
            call("none")
        assert foreign.value.message.replace("tone", "none") == absent.value.message
    assert catalog.list(TENANT, page_size=0, page_token="") == ([], "")


def test_equal_content_is_stored_once_and_stays_while_anyone_names_it(catalog: Catalog, tmp_path: Path) -> None:
    push(catalog, "tone", ONE)
    push(catalog, "hers", ONE, tenant="other")
    assert stored_digests(tmp_path) == {digest_of(ONE)}
    assert catalog.delete(TENANT, "tone") == []
    with catalog.lease("other", "hers", IDENTITY) as lease:
        assert (lease.artifact.path / WEIGHTS_FILE).read_bytes() == ONE[WEIGHTS_FILE]
    assert catalog.delete("other", "hers") == [digest_of(ONE)]
    assert stored_digests(tmp_path) == set()


def test_the_store_keeps_no_tenants_manifest(catalog: Catalog) -> None:
    push(catalog, "tone", lora_files(manifest=IDENTITY))
    with catalog.lease(TENANT, "tone", IDENTITY) as lease:
        assert not (lease.artifact.path / MANIFEST_FILE).exists()


def test_a_file_of_the_first_version_is_brought_up(tmp_path: Path) -> None:
    catalog = open_catalog(tmp_path)
    pushed = push(catalog, "tone", ONE)
    catalog.close()
    with closing(sqlite3.connect(tmp_path / "catalog.sqlite3")) as sql, sql:
        for column in ("trained_on", "soft_tokens", "prefix_tokens"):
            sql.execute(f"ALTER TABLE versions DROP COLUMN {column}")
        sql.execute("ALTER TABLE versions ADD COLUMN verified INTEGER NOT NULL DEFAULT 1")
        sql.execute("ALTER TABLE versions ADD COLUMN warnings TEXT NOT NULL DEFAULT '[]'")
        sql.execute("PRAGMA user_version = 1")
    catalog = open_catalog(tmp_path)
    [version] = catalog.get(TENANT, "tone").versions
    assert version == dataclasses.replace(pushed.versions[0], trained_on=None)
    assert push(catalog, "tone", ONE).versions == pushed.versions
    catalog.close()


def test_pages(catalog: Catalog) -> None:
    for name in ("b", "a", "c"):
        push(catalog, name, ONE)
    push(catalog, "aa", ONE, tenant="other")
    page, token = catalog.list(TENANT, page_size=2, page_token="")
    assert [record.name for record in page] == ["a", "b"]
    page, token = catalog.list(TENANT, page_size=2, page_token=token)
    assert ([record.name for record in page], token) == (["c"], "")
    assert len(catalog.list(TENANT, page_size=5000, page_token="")[0]) == 3


@pytest.mark.parametrize("token", ["x", "!!!!", "w6Q=", "Li4vLi4", "ä"])
def test_page_tokens_that_are_none(catalog: Catalog, token: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        catalog.list(TENANT, page_size=1, page_token=token)
    assert caught.value.field == "page_token"


def test_a_negative_page_size_is_refused(catalog: Catalog) -> None:
    with pytest.raises(InvalidRequest) as caught:
        catalog.list(TENANT, page_size=-1, page_token="")
    assert caught.value.field == "page_size"


def test_a_version_checked_against_another_base_is_not_leased(catalog: Catalog) -> None:
    push(catalog, "tone", ONE)
    for change in ({"weights": "x"}, {"quantization": "none"}):
        other = dataclasses.replace(IDENTITY, **change)
        with pytest.raises(FailedPrecondition):
            catalog.lease(TENANT, "tone", other)
    catalog.lease(TENANT, "tone", dataclasses.replace(IDENTITY, tokenizer="x", chat_template="x")).release()
    # Uploading it again checks it again.
    assert catalog.commit(upload(catalog, "tone", ONE), CHECKED, other).version == 1
    catalog.lease(TENANT, "tone", other).release()


def test_a_deleted_name_drains_and_starts_again(catalog: Catalog, tmp_path: Path) -> None:
    unused: list[str] = []
    catalog.on_unused = unused.append
    push(catalog, "tone", ONE)
    first, second = (catalog.lease(TENANT, "tone", IDENTITY) for _ in range(2))
    assert catalog.delete(TENANT, "tone") == [digest_of(ONE)]
    with pytest.raises(NotFound):
        catalog.lease(TENANT, "tone", IDENTITY)
    again = push(catalog, "tone", TWO)
    assert (again.version, versions(again)) == (2, [2])
    first.release()
    first.release()
    assert stored_digests(tmp_path) == {digest_of(ONE), digest_of(TWO)}
    assert unused == []
    second.release()
    assert stored_digests(tmp_path) == {digest_of(TWO)}
    assert unused == [digest_of(ONE)]


def test_a_deleted_name_is_gone_but_its_numbers_never_come_again(tmp_path: Path) -> None:
    catalog = open_catalog(tmp_path)
    push(catalog, "tone", ONE)
    etag = push(catalog, "tone", TWO).etag
    catalog.delete(TENANT, "tone")
    catalog.close()
    catalog = open_catalog(tmp_path)
    assert catalog.list(TENANT, page_size=0, page_token="") == ([], "")
    calls = (catalog.get, catalog.delete, lambda *call: catalog.lease(*call, IDENTITY))
    for call in calls:
        for reference in ("tone", "tone@1", "tone@2"):
            with pytest.raises(NotFound):
                call(TENANT, reference)
    with pytest.raises(NotFound):
        catalog.set_live(TENANT, "tone", 1, etag="stale")
    again = push(catalog, "tone", ONE, stage=True)
    assert (again.version, again.live_version, versions(again)) == (3, 3, [3])
    assert again.etag != etag
    assert push(catalog, "tone", TWO, tenant="other").version == 1
    catalog.close()


def test_a_salt_is_read_while_the_disk_is_busy(catalog: Catalog, tmp_path: Path) -> None:
    salt = catalog.salt(TENANT)
    with closing(sqlite3.connect(tmp_path / "catalog.sqlite3", isolation_level=None)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        assert catalog.salt(TENANT) == salt


def test_a_deleted_version_is_seen_draining_and_its_number_never_comes_again(catalog: Catalog, tmp_path: Path) -> None:
    push(catalog, "tone", ONE)
    push(catalog, "tone", TWO, stage=True)
    before = catalog.get(TENANT, "tone").etag
    lease = catalog.lease(TENANT, "tone@2", IDENTITY)
    assert catalog.delete(TENANT, "tone@2") == [digest_of(TWO)]
    record = catalog.get(TENANT, "tone")
    assert record.etag != before
    assert [version.state for version in record.versions] == [AdapterState.DELETING, AdapterState.READY]
    for call in (catalog.get, catalog.delete):
        with pytest.raises(NotFound):
            call(TENANT, "tone@2")
    # The same content again, while its first version drains, is a new version over the same files.
    assert push(catalog, "tone", TWO, stage=True).version == 3
    lease.release()
    assert versions(catalog.get(TENANT, "tone")) == [3, 1]
    assert stored_digests(tmp_path) == {digest_of(ONE), digest_of(TWO)}


def test_the_live_version_goes_only_with_its_name(catalog: Catalog, tmp_path: Path) -> None:
    push(catalog, "tone", ONE)
    push(catalog, "tone", TWO)
    with pytest.raises(FailedPrecondition):
        catalog.delete(TENANT, "tone@2")
    assert catalog.delete(TENANT, "tone@1") == [digest_of(ONE)]
    assert catalog.delete(TENANT, "tone@2") == [digest_of(TWO)]
    with pytest.raises(NotFound):
        catalog.get(TENANT, "tone")
    assert stored_digests(tmp_path) == set()


def test_a_drain_that_a_restart_interrupts_is_finished(tmp_path: Path) -> None:
    catalog = open_catalog(tmp_path)
    push(catalog, "tone", ONE)
    push(catalog, "tone", TWO, stage=True)
    catalog.lease(TENANT, "tone@2", IDENTITY)
    catalog.delete(TENANT, "tone@2")
    catalog.close()
    catalog = open_catalog(tmp_path)
    assert versions(catalog.get(TENANT, "tone")) == [1]
    assert stored_digests(tmp_path) == {digest_of(ONE)}
    assert push(catalog, "tone", THREE).version == 3
    catalog.close()


def test_a_commit_that_fails_leaves_nothing(catalog: Catalog, tmp_path: Path) -> None:
    unsaid = dataclasses.replace(IDENTITY, weights=None)  # type: ignore[arg-type]  # violates NOT NULL
    with pytest.raises(Exception, match="NOT NULL"):
        catalog.commit(upload(catalog, "tone", ONE), CHECKED, unsaid)
    assert stored_digests(tmp_path) == set()
    with pytest.raises(NotFound):
        catalog.get(TENANT, "tone")
    assert push(catalog, "tone", ONE).version == 1


def test_threads_uploading_equal_content_make_one_version(catalog: Catalog, tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        records = list(pool.map(lambda _: push(catalog, "tone", ONE), range(16)))
    assert {record.version for record in records} == {1}
    assert stored_digests(tmp_path) == {digest_of(ONE)}


def test_threads_that_lease_push_and_delete_leave_a_whole_catalog(catalog: Catalog, tmp_path: Path) -> None:
    def use(seed: int) -> None:
        for _ in range(10):
            push(catalog, "tone", lora_files(seed=seed % 3))
            try:
                with catalog.lease(TENANT, "tone", IDENTITY) as lease:
                    if seed % 2:
                        catalog.delete(TENANT, "tone")
                    assert (lease.artifact.path / WEIGHTS_FILE).stat().st_size
            except NotFound:
                continue

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(use, range(6)))
    page, _ = catalog.list(TENANT, page_size=0, page_token="")
    assert stored_digests(tmp_path) == {version.digest for record in page for version in record.versions}


def test_one_server_per_data_directory(catalog: Catalog, tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="another server"):
        open_catalog(tmp_path)
    catalog.close()
    open_catalog(tmp_path).close()


def test_a_directory_that_cannot_be_used_is_a_startup_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StartupError):
        open_catalog(tmp_path / "file")
    (tmp_path / "catalog.sqlite3").write_text("not a database, but long enough to look like a file with a header" * 9)
    with pytest.raises(StartupError):
        open_catalog(tmp_path)
