"""InferenceService: a request's way from the wire to the engine and back."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, aclosing, nullcontext
from typing import Any

import grpc
import structlog

from hatrack.v1 import inference_pb2 as pb
from hatrack.v1 import inference_pb2_grpc as pb_grpc
from hatrack_server.api.auth import tenant
from hatrack_server.api.requests import check_supported, fit, read_prompt, read_sampling, read_stops
from hatrack_server.api.responses import FINISH_REASONS, delta_message, whole_message
from hatrack_server.api.threads import entered, in_pool, in_thread
from hatrack_server.api.timing import Stopwatch
from hatrack_server.api.transcript import Piece, Transcript
from hatrack_server.catalog import Catalog, Lease
from hatrack_server.engine.client import EngineClient
from hatrack_server.errors import DeadlinePassed, FailedPrecondition, Unavailable
from hatrack_server.metrics import Metrics
from hatrack_server.text.codec import TextCodec
from hatrack_server.text.stops import StopStrings
from hatrack_server.types import BaseInfo, Sampling

TOKENISING_THREADS = 2

log = structlog.get_logger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
Emit = Callable[[Piece], Awaitable[None]]


class InferenceService(pb_grpc.InferenceServiceServicer):
    """Generates with one adapter version, or with the base alone, per call."""

    def __init__(self, engine: EngineClient, catalog: Catalog, codec: TextCodec, metrics: Metrics) -> None:
        self._engine = engine
        self._catalog = catalog
        self._codec = codec
        self._metrics = metrics
        # Prompts wait for one another here, so that long ones hold up no authentication, lease or upload.
        self._tokenising = ThreadPoolExecutor(TOKENISING_THREADS, thread_name_prefix="tokenising")

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:  # noqa: N802
        """Answers once, when the completion is finished."""
        pieces: list[Piece] = []

        async def keep(piece: Piece) -> None:
            pieces.append(piece)

        end = await self._complete(request, context, keep)
        return whole_message(pieces, end)

    async def StreamGenerate(self, request: pb.GenerateRequest, context: Context) -> None:  # noqa: N802
        """Writes deltas as they come, then the end. A slow reader only waits for itself: the engine coalesces."""

        async def send(piece: Piece) -> None:
            await context.write(delta_message(piece))

        end = await self._complete(request, context, send)
        await context.write(pb.StreamGenerateResponse(end=end))

    async def _complete(self, request: pb.GenerateRequest, context: Context, emit: Emit) -> pb.GenerateEnd:
        """One completion; emits its pieces. The adapter version stays leased until it has ended, however it ends."""
        stopwatch, deadline, base = Stopwatch(self._metrics), _deadline(context), self._engine.base
        check_supported(request)
        sampling, stops = read_sampling(request.sampling, base), read_stops(request.sampling)
        async with self._lease(request.adapter, base) as lease:
            _check_template(request, lease, base)
            count_tokens = None if lease is None else self._metrics.token_count(tenant(), lease.name)
            prompt = await self._prompt(request, base)
            virtual_tokens = lease.artifact.virtual_tokens if lease else 0
            sampling = fit(sampling, request, len(prompt), virtual_tokens, base)
            if deadline is not None and time.monotonic() >= deadline:
                raise DeadlinePassed("the deadline passed before the request was started")
            detokenizer = self._codec.detokenizer(prompt)
            transcript = Transcript(detokenizer, StopStrings(stops), min_tokens=sampling.min_tokens)
            try:
                await self._generate(lease, prompt, sampling, deadline, transcript, stopwatch, emit)
            finally:
                if count_tokens is not None:
                    count_tokens(transcript.token_count)
                self._account(request, lease, len(prompt), transcript, stopwatch)
            return _end(lease, len(prompt), transcript, stopwatch)

    async def _prompt(self, request: pb.GenerateRequest, base: BaseInfo) -> tuple[int, ...]:
        if request.HasField("token_ids"):  # nothing to tokenise: it need not wait for those that have
            return await in_thread(read_prompt, request, self._codec, base)
        return await in_pool(self._tokenising, read_prompt, request, self._codec, base)

    async def _generate(
        self,
        lease: Lease | None,
        prompt: tuple[int, ...],
        sampling: Sampling,
        deadline: float | None,
        transcript: Transcript,
        stopwatch: Stopwatch,
        emit: Emit,
    ) -> None:
        """Runs the completion to its end; closing the engine's generator cancels what is left of it at once."""
        deltas = self._engine.generate(
            tenant=tenant(),
            salt=await in_thread(self._catalog.salt, tenant()),
            artifact=lease.artifact if lease else None,
            prompt=prompt,
            sampling=sampling,
            deadline=deadline,
        )
        async with aclosing(deltas):
            async for delta in deltas:
                stopwatch.see(delta)
                if piece := transcript.add(delta):
                    await emit(piece)
                if transcript.finish is not None:
                    return
        raise Unavailable("the engine ended the completion early")

    def _lease(self, reference: str, base: BaseInfo) -> AbstractAsyncContextManager[Lease | None]:
        """Pins the version that answers; nothing for the base alone."""
        if not reference:
            return nullcontext()
        return entered(self._catalog.lease, tenant(), reference, base.identity)

    def _account(
        self,
        request: pb.GenerateRequest,
        lease: Lease | None,
        prompt_tokens: int,
        transcript: Transcript,
        stopwatch: Stopwatch,
    ) -> None:
        log.info(
            "generate",
            request_id=request.request_id,
            tenant=tenant(),
            adapter=lease and lease.name,
            version=lease and lease.version,
            prompt_tokens=prompt_tokens,
            completion_tokens=transcript.token_count,
            finish=transcript.finish and transcript.finish.value,
            seconds=round(stopwatch.seconds, 4),
        )


def _deadline(context: Context) -> float | None:
    """The client's deadline on time.monotonic(); None without one."""
    remaining: float | None = context.time_remaining()
    return None if remaining is None else time.monotonic() + remaining


def _check_template(request: pb.GenerateRequest, lease: Lease | None, base: BaseInfo) -> None:
    """Raises FailedPrecondition for a chat that would be rendered otherwise than those that the adapter learned."""
    if lease is None or lease.trained_on is None or not request.HasField("chat"):
        return
    if lease.trained_on.chat_template != base.identity.chat_template:
        raise FailedPrecondition(
            f"{lease.name}@{lease.version} was trained with another chat template than this server's: send a prompt, "
            "or train it again"
        )


def _end(lease: Lease | None, prompt_tokens: int, transcript: Transcript, stopwatch: Stopwatch) -> pb.GenerateEnd:
    assert transcript.finish is not None
    usage = pb.Usage(
        prompt_tokens=prompt_tokens,
        cached_tokens=stopwatch.cached_tokens,
        completion_tokens=transcript.token_count,
    )
    end = pb.GenerateEnd(finish_reasons=[FINISH_REASONS[transcript.finish]], usage=usage, timing=stopwatch.timing())
    if lease is not None:
        end.adapter, end.adapter_version, end.adapter_digest = lease.name, lease.version, lease.artifact.digest
    return end
