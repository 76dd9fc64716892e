"""AdapterService: what a tenant's adapters are called, and which version is live."""

from __future__ import annotations

from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import asdict, replace
from typing import Any

import grpc
import structlog
from google.protobuf.empty_pb2 import Empty

from hatrack.manifest import WEIGHTS_FILE
from hatrack.v1 import adapters_pb2 as pb
from hatrack.v1 import adapters_pb2_grpc as pb_grpc
from hatrack_server.api.auth import tenant
from hatrack_server.api.responses import adapter_message
from hatrack_server.api.threads import entered, in_pool, in_thread
from hatrack_server.catalog import Catalog, DeclaredFile, Upload, gate
from hatrack_server.engine.client import EngineClient
from hatrack_server.errors import GenerationFailed, InvalidArtifact, InvalidRequest, NotFound
from hatrack_server.metrics import Metrics
from hatrack_server.text.codec import TextCodec
from hatrack_server.types import Artifact, BaseInfo, Sampling

MAX_CHUNK_BYTES = 2**20
UPLOAD_THREADS = 4
CANARY_TEXT = "The quick brown fox jumps over the lazy dog."
CANARY_SAMPLING = Sampling(temperature=0.0, max_tokens=1)

log = structlog.get_logger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]


class AdapterService(pb_grpc.AdapterServiceServicer):
    """Uploads, lists, promotes and deletes the adapters of the caller's tenant, and says what base they are for."""

    def __init__(
        self, engine: EngineClient, catalog: Catalog, codec: TextCodec, metrics: Metrics, *, max_rank: int
    ) -> None:
        self._engine = engine
        self._catalog = catalog
        self._codec = codec
        self._metrics = metrics
        self._max_rank = max_rank
        self._uploading = ThreadPoolExecutor(UPLOAD_THREADS, thread_name_prefix="uploading")

    async def UploadAdapter(  # noqa: N802
        self,
        requests: AsyncIterator[pb.UploadAdapterRequest],
        context: Context,  # noqa: ARG002
    ) -> pb.Adapter:
        """Answers once the version is durable, checked and has generated a token; else nothing of it is left."""
        base = self._engine.base  # while there is none, no byte is taken
        parts = aiter(requests)
        header = _header(await anext(parts, None))
        files = [DeclaredFile(file.name, file.size, file.sha256) for file in header.files]
        async with entered(self._catalog.begin_upload, tenant(), header.name, files, stage=header.stage) as upload:
            async for part in parts:
                await in_pool(self._uploading, upload.write, _chunk(part))
            message = await self._admit(upload, base)
        log.info("upload", tenant=tenant(), adapter=message.name, version=message.version)
        return message

    async def _admit(self, upload: Upload, base: BaseInfo) -> pb.Adapter:
        artifact = await in_pool(self._uploading, upload.finish)
        checked = await in_pool(self._uploading, gate.check, artifact, base, max_rank=self._max_rank)
        spec = checked.spec
        artifact = replace(artifact, soft_tokens=spec.soft_tokens, prefix_tokens=spec.prefix_tokens)
        try:
            await self._try_out(artifact, base)
            record = await in_pool(self._uploading, self._catalog.commit, upload, checked, base.identity)
        except BaseException:
            self._engine.forget(artifact.digest)  # if another version has this content, it is loaded again
            raise
        return adapter_message(record, base.identity)

    async def _try_out(self, artifact: Artifact, base: BaseInfo) -> None:
        """One token, generated like any other request's; raises InvalidArtifact when the adapter can't."""
        left = base.max_model_len - artifact.virtual_tokens - CANARY_SAMPLING.max_tokens
        prompt = self._codec.encode(CANARY_TEXT)[:left]
        deltas = self._engine.generate(
            tenant=tenant(),
            salt=await in_thread(self._catalog.salt, tenant()),
            artifact=artifact,
            prompt=tuple(prompt),
            sampling=CANARY_SAMPLING,
            trial=True,
        )
        try:
            async with aclosing(deltas):
                async for _ in deltas:
                    pass
        except GenerationFailed as error:
            raise InvalidArtifact(WEIGHTS_FILE, f"a trial generation failed: {error.message}") from None

    async def GetAdapter(self, request: pb.GetAdapterRequest, context: Context) -> pb.Adapter:  # noqa: N802, ARG002
        """One adapter with all of its versions."""
        served = self._engine.base.identity
        return adapter_message(await in_thread(self._catalog.get, tenant(), request.name), served)

    async def ListAdapters(  # noqa: N802
        self,
        request: pb.ListAdaptersRequest,
        context: Context,  # noqa: ARG002
    ) -> pb.ListAdaptersResponse:
        """One page, ordered by name."""
        served = self._engine.base.identity
        records, token = await in_thread(
            self._catalog.list, tenant(), page_size=request.page_size, page_token=request.page_token
        )
        return pb.ListAdaptersResponse(
            adapters=[adapter_message(record, served) for record in records], next_page_token=token
        )

    async def UpdateAdapter(  # noqa: N802
        self,
        request: pb.UpdateAdapterRequest,
        context: Context,  # noqa: ARG002
    ) -> pb.Adapter:
        """Makes another version the live one."""
        served = self._engine.base.identity
        if list(request.update_mask.paths) != ["live_version"]:
            raise InvalidRequest("update_mask", "update_mask must be live_version: nothing else can be updated yet")
        adapter = request.adapter
        record = await in_thread(
            self._catalog.set_live, tenant(), adapter.name, adapter.live_version, etag=adapter.etag
        )
        log.info("promote", tenant=tenant(), adapter=record.name, version=record.live_version)
        return adapter_message(record, served)

    async def DeleteAdapter(self, request: pb.DeleteAdapterRequest, context: Context) -> Empty:  # noqa: N802, ARG002
        """One version, or the name with all of them; requests in flight finish on theirs."""
        await in_thread(self._catalog.delete, tenant(), request.name)
        name = request.name.partition("@")[0]
        try:
            await in_thread(self._catalog.get, tenant(), name)
        except NotFound:
            self._metrics.forget_adapter(tenant(), name)
        log.info("delete", tenant=tenant(), adapter=request.name)
        return Empty()

    async def GetBase(self, request: pb.GetBaseRequest, context: Context) -> pb.Base:  # noqa: N802, ARG002
        """Which base is served."""
        return pb.Base(**asdict(self._engine.base.identity))


def _header(part: pb.UploadAdapterRequest | None) -> pb.UploadHeader:
    if part is None or part.WhichOneof("part") != "header":
        raise InvalidRequest("header", "the first message must be the header")
    return part.header


def _chunk(part: pb.UploadAdapterRequest) -> bytes:
    if part.WhichOneof("part") != "chunk":
        raise InvalidRequest("chunk", "every message after the header must be a chunk")
    if len(part.chunk) > MAX_CHUNK_BYTES:
        raise InvalidRequest("chunk", f"a chunk has at most {MAX_CHUNK_BYTES} bytes (got {len(part.chunk)})")
    return part.chunk
