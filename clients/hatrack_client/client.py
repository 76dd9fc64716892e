"""The synchronous client."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self, Unpack

from hatrack.manifest import BaseIdentity
from hatrack.v1 import adapters_pb2
from hatrack.v1.adapters_pb2_grpc import AdapterServiceStub
from hatrack.v1.inference_pb2_grpc import InferenceServiceStub
from hatrack_client._connection import DEFAULT_SERVER, Connection
from hatrack_client._requests import generate_request, previous_version, set_live_version
from hatrack_client._responses import StreamReader, read_adapter, read_base, read_generation
from hatrack_client._upload import Progress, Upload
from hatrack_client.errors import typed_errors
from hatrack_client.types import Adapter, Delta, Generation, Message, Sampling

if TYPE_CHECKING:
    from grpc import _CallIterator

    from hatrack.v1 import inference_pb2


class Client:
    """A connection to one Hatrack server. Safe to share between threads; every call may raise HatrackClientError.

    `server` is HOST:PORT. `tls_ca` is a PEM file to trust instead of the system's certificates, and implies `tls`.
    `timeout` is in seconds for each call; None: no deadline. Nothing is sent before the first call.
    """

    def __init__(
        self,
        server: str = DEFAULT_SERVER,
        *,
        api_key: str | None = None,
        tls: bool = False,
        tls_ca: Path | None = None,
        timeout: float | None = None,
    ) -> None:
        connection = Connection(server, api_key, tls, tls_ca)
        self._channel = connection.open()
        self._metadata = connection.metadata
        self._timeout = timeout
        self._inference = InferenceServiceStub(self._channel)
        self._adapters = AdapterServiceStub(self._channel)

    def close(self) -> None:
        """Ends the connection; calls in flight are cancelled."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def generate(
        self,
        adapter: str = "",
        *,
        prompt: str | None = None,
        messages: Sequence[Message] | None = None,
        token_ids: Sequence[int] | None = None,
        request_id: str = "",
        timeout: float | None = None,
        **sampling: Unpack[Sampling],
    ) -> Generation:
        """One completion, when it is finished.

        `adapter` is "" for the base alone, "name" for the live version or "name@2" for exactly that one. Give one of
        `prompt` (text as it is), `messages` (rendered with the model's chat template) and `token_ids` (as they are).
        """
        request = generate_request(
            adapter, prompt=prompt, messages=messages, token_ids=token_ids, request_id=request_id, sampling=sampling
        )
        with typed_errors():
            response = self._inference.Generate(request, timeout=timeout or self._timeout, metadata=self._metadata)
        return read_generation(response)

    def stream(
        self,
        adapter: str = "",
        *,
        prompt: str | None = None,
        messages: Sequence[Message] | None = None,
        token_ids: Sequence[int] | None = None,
        request_id: str = "",
        timeout: float | None = None,
        **sampling: Unpack[Sampling],
    ) -> GenerationStream:
        """Like `generate`, but gives deltas as they come, and as its last item the whole Generation."""
        request = generate_request(
            adapter, prompt=prompt, messages=messages, token_ids=token_ids, request_id=request_id, sampling=sampling
        )
        call = self._inference.StreamGenerate(request, timeout=timeout or self._timeout, metadata=self._metadata)
        return GenerationStream(call)

    def push_adapter(
        self, name: str, folder: str | PathLike[str], *, stage: bool = False, progress: Progress | None = None
    ) -> Adapter:
        """Uploads a folder in PEFT's format as the next version of `name`, and says which in `version`.

        The new version becomes the live one unless `stage`. Content that a version of the name holds already gives
        that version. `progress(sent, total)` counts bytes. Raises InvalidArgument when a file is missing or refused.
        """
        upload = Upload(name, Path(folder), stage=stage, progress=progress)
        with typed_errors():
            response = self._adapters.UploadAdapter(upload.messages(), timeout=self._timeout, metadata=self._metadata)
        return read_adapter(response)

    def get_adapter(self, name: str) -> Adapter:
        """The adapter "name"; for "name@2" `version` is 2. Raises NotFound."""
        request = adapters_pb2.GetAdapterRequest(name=name)
        with typed_errors():
            return read_adapter(self._adapters.GetAdapter(request, timeout=self._timeout, metadata=self._metadata))

    def list_adapters(self, *, page_size: int = 50) -> Iterator[Adapter]:
        """All adapters of the key's tenant, by name; asks for a page when the one before is used up."""
        request = adapters_pb2.ListAdaptersRequest(page_size=page_size)
        while True:
            with typed_errors():
                page = self._adapters.ListAdapters(request, timeout=self._timeout, metadata=self._metadata)
            yield from map(read_adapter, page.adapters)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def promote(self, name: str, version: int) -> Adapter:
        """Makes `version` the live one; requests in flight finish on theirs. Raises NotFound."""
        return self._update(set_live_version(name, version))

    def rollback(self, name: str) -> Adapter:
        """Makes the newest ready version below the live one live again.

        Raises FailedPrecondition when there is none, and Aborted when the adapter changes meanwhile.
        """
        adapter = self.get_adapter(name)
        return self._update(set_live_version(name, previous_version(adapter), adapter.etag))

    def delete_adapter(self, name: str) -> None:
        """Deletes "name" with all of its versions, or only "name@2", which must not be the live one."""
        request = adapters_pb2.DeleteAdapterRequest(name=name)
        with typed_errors():
            self._adapters.DeleteAdapter(request, timeout=self._timeout, metadata=self._metadata)

    def get_base(self) -> BaseIdentity:
        """The base that is served: an adapter that was trained on the same four is served as it was trained."""
        request = adapters_pb2.GetBaseRequest()
        with typed_errors():
            return read_base(self._adapters.GetBase(request, timeout=self._timeout, metadata=self._metadata))

    def _update(self, request: adapters_pb2.UpdateAdapterRequest) -> Adapter:
        with typed_errors():
            return read_adapter(self._adapters.UpdateAdapter(request, timeout=self._timeout, metadata=self._metadata))


class GenerationStream(Iterator[Delta | Generation]):
    """Deltas as they come, then the whole Generation. Closing it before its end cancels the call."""

    def __init__(self, call: _CallIterator[inference_pb2.StreamGenerateResponse]) -> None:
        self._call = call
        self._reader = StreamReader()
        self._closed = False

    def __next__(self) -> Delta | Generation:
        if self._closed:
            raise StopIteration
        with typed_errors():
            return self._reader.read(next(self._call))

    def close(self) -> None:
        """Cancels what is still to come; the server frees its memory by its next step. Harmless when finished."""
        self._closed = True
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
