"""Python's values from the wire's responses."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC

from hatrack.manifest import BaseIdentity
from hatrack.v1 import adapters_pb2, inference_pb2
from hatrack_client.types import (
    Adapter,
    AdapterState,
    AdapterVersion,
    Delta,
    FinishReason,
    Generation,
    Timing,
    TokenLogprob,
    TokenLogprobs,
    Usage,
)

_FINISH_REASONS = {
    inference_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    inference_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
}
_STATES = {
    adapters_pb2.ADAPTER_STATE_VALIDATING: AdapterState.VALIDATING,
    adapters_pb2.ADAPTER_STATE_READY: AdapterState.READY,
    adapters_pb2.ADAPTER_STATE_REJECTED: AdapterState.REJECTED,
    adapters_pb2.ADAPTER_STATE_QUARANTINED: AdapterState.QUARANTINED,
    adapters_pb2.ADAPTER_STATE_DELETING: AdapterState.DELETING,
}


def read_generation(response: inference_pb2.GenerateResponse) -> Generation:
    """The one completion of a unary answer."""
    completion = response.completions[0]
    text, tokens, logprobs = completion.text, completion.token_ids, completion.logprobs
    return _generation(Delta(text, tuple(tokens), _logprobs(logprobs)), completion.finish_reason, response)


class StreamReader:
    """Reads a stream's events one by one, and keeps what the final Generation is made of."""

    def __init__(self) -> None:
        self._deltas: list[Delta] = []

    def read(self, event: inference_pb2.StreamGenerateResponse) -> Delta | Generation:
        """The event's delta, or with the last event the whole Generation."""
        if event.WhichOneof("event") == "end":
            whole = Delta(
                "".join(delta.text for delta in self._deltas),
                tuple(token for delta in self._deltas for token in delta.token_ids),
                tuple(entry for delta in self._deltas for entry in delta.logprobs),
            )
            return _generation(whole, event.end.finish_reasons[0], event.end)
        delta = Delta(event.delta.text, tuple(event.delta.token_ids), _logprobs(event.delta.logprobs))
        self._deltas.append(delta)
        return delta


def _generation(
    content: Delta,
    finish_reason: inference_pb2.FinishReason,
    end: inference_pb2.GenerateResponse | inference_pb2.GenerateEnd,
) -> Generation:
    usage, timing = end.usage, end.timing
    return Generation(
        text=content.text,
        token_ids=content.token_ids,
        finish_reason=_FINISH_REASONS.get(finish_reason, FinishReason.UNKNOWN),
        usage=Usage(usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens),
        adapter=end.adapter,
        version=end.adapter_version,
        digest=end.adapter_digest,
        logprobs=content.logprobs,
        timing=Timing(*(d.ToTimedelta().total_seconds() for d in (timing.queue, timing.first_token, timing.total))),
    )


def _logprobs(entries: Iterable[inference_pb2.TokenLogprobs]) -> tuple[TokenLogprobs, ...]:
    return tuple(TokenLogprobs(_logprob(entry.chosen), tuple(map(_logprob, entry.top))) for entry in entries)


def _logprob(entry: inference_pb2.TokenLogprob) -> TokenLogprob:
    return TokenLogprob(entry.token_id, entry.logprob)


def read_adapter(adapter: adapters_pb2.Adapter) -> Adapter:
    """An adapter with its versions, newest first as the server sends them."""
    versions = tuple(map(_version, adapter.versions))
    return Adapter(adapter.name, adapter.live_version, versions, adapter.etag, adapter.version)


def read_base(base: adapters_pb2.Base) -> BaseIdentity:
    """The four digests of the base that is served."""
    return BaseIdentity(base.weights, base.quantization, base.tokenizer, base.chat_template)


def _version(version: adapters_pb2.AdapterVersion) -> AdapterVersion:
    return AdapterVersion(
        version=version.version,
        digest=version.digest,
        state=_STATES.get(version.state, AdapterState.UNKNOWN),
        method=version.method,
        rank=version.rank,
        parameters=version.parameters,
        size_bytes=version.size_bytes,
        verified=version.verified,
        warnings=tuple(version.warnings),
        create_time=version.create_time.ToDatetime(UTC),
    )
