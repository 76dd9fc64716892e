"""An adapter's folder as the messages of one upload."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from hatrack.manifest import ARTIFACT_FILES, MANIFEST_FILE, WEIGHTS_FILE, file_sha256
from hatrack.v1 import adapters_pb2
from hatrack_client.errors import InvalidArgument

CHUNK_BYTES = 512 * 1024

Progress = Callable[[int, int], None]
"""Called with the bytes handed to gRPC so far and their total; by a thread of gRPC's in the synchronous client."""


class Upload:
    """The files of `folder`, hashed once at construction and read again while they are sent.

    Raises InvalidArgument, naming the file, when the folder is not a readable PEFT adapter saved as safetensors.
    """

    def __init__(self, name: str, folder: Path, *, stage: bool, progress: Progress | None) -> None:
        self._paths = _adapter_files(folder)
        self._progress = progress
        self._files = list(map(_describe, self._paths))
        self._header = adapters_pb2.UploadHeader(name=name, files=self._files, stage=stage)

    def messages(self) -> Iterator[adapters_pb2.UploadAdapterRequest]:
        """The header, then every file's bytes in the header's order."""
        sent, total = 0, sum(file.size for file in self._files)
        yield adapters_pb2.UploadAdapterRequest(header=self._header)
        for path in self._paths:
            for chunk in _chunks(path):
                yield adapters_pb2.UploadAdapterRequest(chunk=chunk)
                sent += len(chunk)
                if self._progress is not None:
                    self._progress(sent, total)


def _adapter_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise InvalidArgument(f"{folder} is not a folder", field="folder")
    for name in ARTIFACT_FILES:
        if not (folder / name).is_file():
            raise InvalidArgument(f"{folder} has no {name}{_pickle_hint(folder, name)}", field=name)
    return [folder / name for name in (*ARTIFACT_FILES, MANIFEST_FILE) if (folder / name).is_file()]


def _describe(path: Path) -> adapters_pb2.UploadFile:
    try:
        return adapters_pb2.UploadFile(name=path.name, size=path.stat().st_size, sha256=file_sha256(path))
    except OSError as error:
        raise InvalidArgument(f"{path} can't be read: {error.strerror}", field=path.name) from error


def _pickle_hint(folder: Path, missing: str) -> str:
    if missing == WEIGHTS_FILE and (folder / "adapter_model.bin").exists():
        return "; adapter_model.bin is a pickle, which is never accepted: save it again with safe_serialization=True"
    return ""


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk
