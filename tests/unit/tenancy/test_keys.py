"""API keys over a real file, shared by two openers as by a server and `hatrack keys`."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from hatrack_server.database import Database
from hatrack_server.errors import InvalidRequest, NotFound, StartupError, Unauthenticated
from hatrack_server.tenancy.keys import SCHEMAS, KeyStore


@pytest.fixture
def keys(tmp_path: Path) -> Iterator[KeyStore]:
    keys = KeyStore(tmp_path / "data")
    yield keys
    keys.close()


def test_a_key_tells_its_tenant(keys: KeyStore) -> None:
    assert not keys.any_keys()
    mine, hers = keys.create_key("mine"), keys.create_key("hers")
    assert keys.any_keys()
    assert keys.authenticate(mine) == "mine"
    assert keys.authenticate(hers) == "hers"
    assert mine.startswith("hk_")
    assert [record.tenant for record in keys.list_keys()] == ["hers", "mine"]


def test_another_process_makes_and_revokes_keys(keys: KeyStore, tmp_path: Path) -> None:
    offline = KeyStore(tmp_path / "data")
    key = offline.create_key("mine")
    assert keys.authenticate(key) == "mine"
    (record,) = offline.list_keys()
    offline.revoke_key(record.id)
    with pytest.raises(Unauthenticated):
        keys.authenticate(key)
    with pytest.raises(NotFound):
        offline.revoke_key(record.id)
    assert offline.list_keys() == []
    assert keys.any_keys()  # else a server would be open to everybody again
    offline.close()


def test_a_file_of_the_first_version_is_brought_up(tmp_path: Path) -> None:
    Database(tmp_path / "keys.sqlite3", SCHEMAS[:1]).close()
    with closing(sqlite3.connect(tmp_path / "keys.sqlite3")) as sql, sql:
        row = ("0" * 12, "mine", hashlib.sha256(b"1" * 64).digest(), "2025-01-01T00:00:00+00:00")
        sql.execute("INSERT INTO keys VALUES (?, ?, ?, ?)", row)
    with closing(KeyStore(tmp_path)) as keys:
        assert keys.authenticate(f"hk_{'0' * 12}_{'1' * 64}") == "mine"
    with pytest.raises(StartupError, match="version 2, of a newer Hatrack"):
        Database(tmp_path / "keys.sqlite3", SCHEMAS[:1])


def test_wrong_keys_all_get_the_same_answer(keys: KeyStore) -> None:
    _, key_id, secret = keys.create_key("mine").split("_")
    other = "0" * 12 if key_id != "0" * 12 else "1" * 12
    wrong = ["", "hk_", f"hk_{key_id}_{secret[:-1]}", f"hk_{other}_{secret}", f"hk_{key_id}_{'0' * 64}", secret, "hk_ä"]
    messages = set()
    for key in [*wrong, f"hk_{key_id}_{secret}\n"]:
        with pytest.raises(Unauthenticated) as caught:
            keys.authenticate(key)
        messages.add(caught.value.message)
    assert len(messages) == 1


def test_no_secret_is_on_disk(keys: KeyStore, tmp_path: Path) -> None:
    secret = keys.create_key("mine").rpartition("_")[2]
    assert not any(secret.encode() in path.read_bytes() for path in (tmp_path / "data").iterdir())


@pytest.mark.parametrize("tenant", ["", "../x", "A", "a b", "-a", "a" * 65, "a\n"])
def test_tenants_that_are_none(keys: KeyStore, tenant: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        keys.create_key(tenant)
    assert caught.value.field == "tenant"
