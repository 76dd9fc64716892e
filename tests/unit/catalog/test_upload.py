"""Uploads: what a header may declare, bytes in any chunks, and nothing left of one that fails."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from loras import declared, digest_of, lora_files, stored_digests

from hatrack.manifest import CONFIG_FILE, MANIFEST_FILE, WEIGHTS_FILE
from hatrack_server.catalog import Catalog, DeclaredFile
from hatrack_server.errors import InvalidArtifact, InvalidRequest

FILES = lora_files()
LIMIT = 4_000_000


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    catalog = Catalog(tmp_path, max_upload_bytes=LIMIT)
    yield catalog
    catalog.close()
    stored_digests(tmp_path)  # nothing is staged


def field_of(catalog: Catalog, files: list[DeclaredFile], name: str = "tone") -> str:
    with pytest.raises(InvalidRequest) as caught:
        catalog.begin_upload("default", name, files, stage=False)
    return caught.value.field


@pytest.mark.parametrize("size", [1, 7, 100_000])
def test_bytes_come_in_chunks_of_any_size(catalog: Catalog, size: int) -> None:
    content = b"".join(FILES.values())
    with catalog.begin_upload("default", "tone", declared(FILES), stage=False) as upload:
        for start in range(0, len(content), size):
            upload.write(content[start : start + size])
        artifact = upload.finish()
        assert artifact.digest == digest_of(FILES)
        assert {path.name: path.read_bytes() for path in artifact.path.iterdir()} == FILES


@pytest.mark.parametrize(
    "name", ["", "..", "../x", "a/b", "/etc", "A", "-a", ".a", "a" * 65, "a\x00", "a\n", "a@1", "ä", "a b"]
)
def test_names_that_are_none(catalog: Catalog, name: str) -> None:
    assert field_of(catalog, declared(FILES), name) == "header.name"


@pytest.mark.parametrize("name", ["../adapter_config.json", "/adapter_config.json", "weights.bin", "", "a\x00"])
def test_only_the_artifacts_own_file_names(catalog: Catalog, name: str) -> None:
    files = declared(FILES)
    files.append(DeclaredFile(name, 1, "0" * 64))
    assert field_of(catalog, files) == "header.files[2].name"


@pytest.mark.parametrize(
    ("index", "change", "field"),
    [
        (0, {"size": 0}, "header.files[0].size"),
        (1, {"size": -1}, "header.files[1].size"),
        (0, {"size": (1 << 20) + 1}, "header.files[0].size"),
        (1, {"size": LIMIT + 1}, "header.files[1].size"),
        (1, {"size": LIMIT}, "header.files"),
        (0, {"sha256": "0" * 63}, "header.files[0].sha256"),
        (0, {"sha256": "A" * 64}, "header.files[0].sha256"),
        (1, {"sha256": "0" * 64 + "\n"}, "header.files[1].sha256"),
        (1, {"name": CONFIG_FILE}, "header.files[1].name"),
        (0, {"name": MANIFEST_FILE}, "header.files"),
        (1, {"name": MANIFEST_FILE}, "header.files"),
    ],
)
def test_what_a_header_may_not_declare(catalog: Catalog, index: int, change: dict[str, Any], field: str) -> None:
    files = declared(FILES)
    files[index] = dataclasses.replace(files[index], **change)
    assert field_of(catalog, files) == field


def test_missing_bytes_name_their_file(catalog: Catalog) -> None:
    with catalog.begin_upload("default", "tone", declared(FILES), stage=False) as upload:
        with pytest.raises(InvalidArtifact) as caught:
            upload.finish()
        assert caught.value.field == CONFIG_FILE
        upload.write(b"".join(FILES.values())[:-1])
        with pytest.raises(InvalidArtifact) as caught:
            upload.finish()
        assert caught.value.field == WEIGHTS_FILE


def test_more_bytes_than_declared_are_refused(catalog: Catalog) -> None:
    with (
        catalog.begin_upload("default", "tone", declared(FILES), stage=False) as upload,
        pytest.raises(InvalidArtifact, match="more bytes"),
    ):
        upload.write(b"".join(FILES.values()) + b"x")


def test_damaged_bytes_name_their_file(catalog: Catalog) -> None:
    content = bytearray(b"".join(FILES.values()))
    content[-1] ^= 1
    with catalog.begin_upload("default", "tone", declared(FILES), stage=False) as upload:
        upload.write(bytes(content))
        with pytest.raises(InvalidArtifact, match="sha256") as caught:
            upload.finish()
        assert caught.value.field == WEIGHTS_FILE


def test_abort_is_idempotent_and_leaves_nothing(catalog: Catalog, tmp_path: Path) -> None:
    upload = catalog.begin_upload("default", "tone", declared(FILES), stage=False)
    upload.write(b"part")
    assert list((tmp_path / "staging").iterdir())
    upload.abort()
    upload.abort()
    assert stored_digests(tmp_path) == set()
