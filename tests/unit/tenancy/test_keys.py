"""API keys over a real file, shared by two openers as by a server and `hatrack keys`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hatrack_server.errors import InvalidRequest, NotFound, Unauthenticated
from hatrack_server.tenancy import KeyStore


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
    offline.close()


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
