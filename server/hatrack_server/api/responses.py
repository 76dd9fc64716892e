"""What a client gets: pieces and their end as messages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import timedelta

from hatrack.manifest import BaseIdentity
from hatrack.v1 import adapters_pb2, inference_pb2
from hatrack_server.api.transcript import Piece
from hatrack_server.catalog import AdapterRecord, VersionRecord, gate
from hatrack_server.types import FinishReason, TokenLogprobs

FINISH_REASONS = {
    FinishReason.STOP: inference_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
}


def delta_message(piece: Piece) -> inference_pb2.StreamGenerateResponse:
    """One piece of a stream."""
    delta = inference_pb2.CompletionDelta(
        text=piece.text, token_ids=piece.tokens, logprobs=_logprobs(piece.tokens, piece.logprobs)
    )
    return inference_pb2.StreamGenerateResponse(delta=delta)


def whole_message(pieces: Sequence[Piece], end: inference_pb2.GenerateEnd) -> inference_pb2.GenerateResponse:
    """All pieces of one completion with its end."""
    completion = inference_pb2.Completion(
        text="".join(piece.text for piece in pieces),
        token_ids=[token for piece in pieces for token in piece.tokens],
        logprobs=[entry for piece in pieces for entry in _logprobs(piece.tokens, piece.logprobs)],
        finish_reason=end.finish_reasons[0],
    )
    return inference_pb2.GenerateResponse(
        completions=[completion],
        usage=end.usage,
        adapter=end.adapter,
        adapter_version=end.adapter_version,
        adapter_digest=end.adapter_digest,
        timing=end.timing,
    )


def timing_message(*, queue: float, first_token: float, total: float) -> inference_pb2.Timing:
    """Seconds as durations."""
    return inference_pb2.Timing(
        queue=timedelta(seconds=queue), first_token=timedelta(seconds=first_token), total=timedelta(seconds=total)
    )


def adapter_message(record: AdapterRecord, served: BaseIdentity) -> adapters_pb2.Adapter:
    """An adapter with its versions, newest first, as seen from the base that is served."""
    return adapters_pb2.Adapter(
        name=record.name,
        live_version=record.live_version,
        versions=[_version(version, served) for version in record.versions],
        etag=record.etag,
        version=record.version,
    )


def _version(record: VersionRecord, served: BaseIdentity) -> adapters_pb2.AdapterVersion:
    warnings = gate.warnings(record.trained_on, served)
    return adapters_pb2.AdapterVersion(
        version=record.version,
        digest=record.digest,
        state=f"ADAPTER_STATE_{record.state.value}",
        method=record.method,
        rank=record.rank,
        parameters=record.parameters,
        size_bytes=record.size_bytes,
        verified=not warnings,
        warnings=warnings,
        create_time=record.create_time,
    )


def _logprobs(tokens: Iterable[int], logprobs: Sequence[TokenLogprobs]) -> list[inference_pb2.TokenLogprobs]:
    if not logprobs:
        return []
    return [
        inference_pb2.TokenLogprobs(
            chosen=inference_pb2.TokenLogprob(token_id=token, logprob=entry.chosen),
            top=[inference_pb2.TokenLogprob(token_id=other, logprob=value) for other, value in entry.top],
        )
        for token, entry in zip(tokens, logprobs, strict=True)
    ]
