"""An adapter on its way in: what its header declares, and the bytes as they come."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

from hatrack.manifest import ARTIFACT_FILES, CONFIG_FILE, MANIFEST_FILE, WEIGHTS_FILE, artifact_digest
from hatrack_server.errors import InvalidArtifact
from hatrack_server.types import Artifact

MAX_JSON_BYTES = 1 << 20  # of the configuration and of the manifest, each
ALLOWED_FILES = (CONFIG_FILE, WEIGHTS_FILE, MANIFEST_FILE)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)


@dataclass(frozen=True, slots=True)
class DeclaredFile:
    """One file as the upload's header declares it."""

    name: str
    size: int
    sha256: str  # lower-case hexadecimal


def check_declared(files: Sequence[DeclaredFile], max_bytes: int) -> None:
    """Raises InvalidArtifact naming the header's field unless `files` are a whole artifact within its limits."""
    names = [file.name for file in files]
    for i, file in enumerate(files):
        field = f"header.files[{i}]"
        if file.name not in ALLOWED_FILES:
            raise InvalidArtifact(f"{field}.name", f"must be one of {', '.join(ALLOWED_FILES)}")
        if file.name in names[:i]:
            raise InvalidArtifact(f"{field}.name", f"{file.name} is declared twice")
        if not _SHA256.fullmatch(file.sha256):
            raise InvalidArtifact(f"{field}.sha256", "must be 64 lower-case hexadecimal digits")
        limit = max_bytes if file.name == WEIGHTS_FILE else MAX_JSON_BYTES
        if not 1 <= file.size <= limit:
            raise InvalidArtifact(f"{field}.size", f"{file.name} must have 1 to {limit} bytes")
    for name in ARTIFACT_FILES:
        if name not in names:
            raise InvalidArtifact("header.files", f"{name} is missing")
    if sum(file.size for file in files) > max_bytes:
        raise InvalidArtifact("header.files", f"an upload may have at most {max_bytes} bytes")


class Upload:
    """Receives the declared files' bytes, one file after the other, into a staging directory.

    Used by one task at a time. As a context manager it aborts at the end unless the catalog has committed it.
    """

    def __init__(self, tenant: str, name: str, files: Sequence[DeclaredFile], directory: Path, *, stage: bool) -> None:
        """`files` have passed `check_declared`; `directory` is empty and this upload's own."""
        self.tenant = tenant
        self.name = name
        self.stage = stage
        self.size_bytes = sum(file.size for file in files if file.name in ARTIFACT_FILES)
        self.artifact: Artifact | None = None  # once finished
        self._directory = directory
        self._files = tuple(files)
        self._digests: dict[str, str] = {}  # of the files that are whole
        self._file: BinaryIO | None = None
        self._left = 0  # bytes that the open file still needs
        self._hash = hashlib.sha256()

    def write(self, chunk: bytes) -> None:
        """Appends bytes, over file borders; raises InvalidArtifact when more come than the header declares."""
        rest = memoryview(chunk)
        while rest:
            file = self._file or self._open_next()
            part = rest[: self._left]
            file.write(part)
            self._hash.update(part)
            self._left -= len(part)
            rest = rest[len(part) :]
            if not self._left:
                self._close_whole(file)

    def finish(self) -> Artifact:
        """The artifact, lying in staging with its bytes on disk.

        Raises InvalidArtifact naming the file whose bytes are missing or don't have the declared sha256.
        """
        for file in self._files:
            if file.name not in self._digests:
                raise InvalidArtifact(file.name, "the upload ended before all of its bytes had come")
            if self._digests[file.name] != file.sha256:
                raise InvalidArtifact(file.name, "its bytes don't have the sha256 that the header declares")
        self.artifact = Artifact(artifact_digest(self._digests), self._directory)
        return self.artifact

    def abort(self) -> None:
        """Removes every byte of it from disk; does nothing the second time, or after the commit."""
        if self._file:
            self._file.close()
            self._file = None
        shutil.rmtree(self._directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()

    def _open_next(self) -> BinaryIO:
        if len(self._digests) == len(self._files):
            raise InvalidArtifact("chunk", "more bytes came than the header declares")
        current = self._files[len(self._digests)]
        self._left = current.size
        self._hash = hashlib.sha256()
        self._file = (self._directory / current.name).open("xb")
        return self._file

    def _close_whole(self, file: BinaryIO) -> None:
        file.flush()
        os.fsync(file.fileno())
        file.close()
        self._file = None
        self._digests[self._files[len(self._digests)].name] = self._hash.hexdigest()
