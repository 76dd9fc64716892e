"""The wire's requests from Python's values; what can be seen to be wrong here raises InvalidArgument."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message as Protobuf

from hatrack.v1 import adapters_pb2, inference_pb2
from hatrack_client.errors import FailedPrecondition, InvalidArgument
from hatrack_client.types import Adapter, AdapterState, Message


def generate_request(
    adapter: str,
    *,
    prompt: str | None,
    messages: Sequence[Message] | None,
    token_ids: Iterable[int] | None,
    request_id: str,
    sampling: Mapping[str, object],
) -> inference_pb2.GenerateRequest:
    """Exactly one of `prompt`, `messages` and `token_ids` must be given."""
    if sum(given is not None for given in (prompt, messages, token_ids)) != 1:
        raise InvalidArgument("give exactly one of prompt, messages and token_ids", field="input")
    request = inference_pb2.GenerateRequest()
    fields: dict[str, object] = {
        "adapter": adapter,
        "prompt": prompt,
        "chat": None if messages is None else {"messages": messages},
        "token_ids": None if token_ids is None else {"ids": token_ids},
        "request_id": request_id,
    }
    for name, value in fields.items():
        _set(request, name, value)
    for name, value in sampling.items():
        _set(request.sampling, name, [value] if name == "stop" and isinstance(value, str) else value, "sampling.")
    return request


def _set(message: Protobuf, name: str, value: object, prefix: str = "") -> None:
    """Sets one field alone, so that the error can name it."""
    try:
        message.MergeFrom(type(message)(**{name: value}))
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"{prefix}{name}: {error}", field=f"{prefix}{name}") from None


def set_live_version(name: str, version: int, etag: str = "") -> adapters_pb2.UpdateAdapterRequest:
    """With an `etag`, the server answers ABORTED if the adapter has changed since it was read."""
    return adapters_pb2.UpdateAdapterRequest(
        adapter=adapters_pb2.Adapter(name=name, live_version=version, etag=etag),
        update_mask=FieldMask(paths=["live_version"]),
    )


def previous_version(adapter: Adapter) -> int:
    """The newest ready version below the live one; raises FailedPrecondition when there is none."""
    for version in adapter.versions:
        if version.version < adapter.live_version and version.state is AdapterState.READY:
            return version.version
    raise FailedPrecondition(f"{adapter.name} has no ready version below {adapter.live_version}")
