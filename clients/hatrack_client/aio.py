"""The asyncio client; method for method the synchronous one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
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
    from grpc.aio import UnaryStreamCall

    from hatrack.v1 import inference_pb2


class AsyncClient:
    """A connection to one Hatrack server for one event loop; every call may raise HatrackClientError.

    The arguments are those of `Client`. Cancelling a task cancels its call on the server too.
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
        self._channel = connection.open_aio()
        self._metadata = connection.metadata
        self._timeout = timeout
        self._inference = InferenceServiceStub(self._channel)
        self._adapters = AdapterServiceStub(self._channel)

    async def close(self) -> None:
        """Ends the connection; calls in flight are cancelled."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def generate(
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
        """One completion, when it is finished; the arguments are those of `Client.generate`."""
        request = generate_request(
            adapter, prompt=prompt, messages=messages, token_ids=token_ids, request_id=request_id, sampling=sampling
        )
        with typed_errors():
            response = await self._inference.Generate(
                request, timeout=timeout or self._timeout, metadata=self._metadata
            )
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
    ) -> AsyncGenerationStream:
        """Like `generate`, but gives deltas as they come, and as its last item the whole Generation."""
        request = generate_request(
            adapter, prompt=prompt, messages=messages, token_ids=token_ids, request_id=request_id, sampling=sampling
        )
        call = self._inference.StreamGenerate(request, timeout=timeout or self._timeout, metadata=self._metadata)
        return AsyncGenerationStream(call)

    async def push_adapter(
        self, name: str, folder: str | PathLike[str], *, stage: bool = False, progress: Progress | None = None
    ) -> Adapter:
        """Uploads a folder as `Client.push_adapter` does; files are hashed and read beside the event loop."""
        upload = await asyncio.to_thread(Upload, name, Path(folder), stage=stage, progress=progress)
        with typed_errors():
            response = await self._adapters.UploadAdapter(
                _beside_the_loop(upload), timeout=self._timeout, metadata=self._metadata
            )
        return read_adapter(response)

    async def get_adapter(self, name: str) -> Adapter:
        """The adapter "name"; for "name@2" `version` is 2. Raises NotFound."""
        request = adapters_pb2.GetAdapterRequest(name=name)
        with typed_errors():
            return read_adapter(
                await self._adapters.GetAdapter(request, timeout=self._timeout, metadata=self._metadata)
            )

    async def list_adapters(self, *, page_size: int = 50) -> AsyncIterator[Adapter]:
        """All adapters of the key's tenant, by name; asks for a page when the one before is used up."""
        request = adapters_pb2.ListAdaptersRequest(page_size=page_size)
        while True:
            with typed_errors():
                page = await self._adapters.ListAdapters(request, timeout=self._timeout, metadata=self._metadata)
            for adapter in page.adapters:
                yield read_adapter(adapter)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def promote(self, name: str, version: int) -> Adapter:
        """Makes `version` the live one; requests in flight finish on theirs. Raises NotFound."""
        return await self._update(set_live_version(name, version))

    async def rollback(self, name: str) -> Adapter:
        """Makes the newest ready version below the live one live again; raises as `Client.rollback` does."""
        adapter = await self.get_adapter(name)
        return await self._update(set_live_version(name, previous_version(adapter), adapter.etag))

    async def delete_adapter(self, name: str) -> None:
        """Deletes "name" with all of its versions, or only "name@2", which must not be the live one."""
        request = adapters_pb2.DeleteAdapterRequest(name=name)
        with typed_errors():
            await self._adapters.DeleteAdapter(request, timeout=self._timeout, metadata=self._metadata)

    async def get_base(self) -> BaseIdentity:
        """The base that is served: an adapter that was trained on the same four is served as it was trained."""
        request = adapters_pb2.GetBaseRequest()
        with typed_errors():
            return read_base(await self._adapters.GetBase(request, timeout=self._timeout, metadata=self._metadata))

    async def _update(self, request: adapters_pb2.UpdateAdapterRequest) -> Adapter:
        with typed_errors():
            return read_adapter(
                await self._adapters.UpdateAdapter(request, timeout=self._timeout, metadata=self._metadata)
            )


async def _beside_the_loop(upload: Upload) -> AsyncIterator[adapters_pb2.UploadAdapterRequest]:
    messages = upload.messages()
    while (message := await asyncio.to_thread(next, messages, None)) is not None:
        yield message


class AsyncGenerationStream(AsyncIterator[Delta | Generation]):
    """Deltas as they come, then the whole Generation. Closing it before its end cancels the call."""

    def __init__(
        self, call: UnaryStreamCall[inference_pb2.GenerateRequest, inference_pb2.StreamGenerateResponse]
    ) -> None:
        self._call = call
        self._events = aiter(call)
        self._reader = StreamReader()
        self._closed = False

    async def __anext__(self) -> Delta | Generation:
        if self._closed:
            raise StopAsyncIteration
        with typed_errors():
            return self._reader.read(await anext(self._events))

    async def aclose(self) -> None:
        """Cancels what is still to come; the server frees its memory by its next step. Harmless when finished."""
        self._closed = True
        self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()
