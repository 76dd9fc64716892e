"""Every error of the client, and the one table from gRPC status to error.

HatrackClientError          message, reason, field, retry_after
├── InvalidArgument         a field of the request or a file of an adapter is wrong: `field` names it
├── Unauthenticated         no key, or not one of the server's
├── PermissionDenied        the key may not do this
├── NotFound                absent, or another tenant's
├── FailedPrecondition      the thing's state forbids the call
├── Aborted                 the thing changed meanwhile: read it again
├── ResourceExhausted       a queue or quota is full: try again after `retry_after` seconds
├── DeadlineExceeded        the call's timeout passed
├── Cancelled               the call was cancelled
├── Unavailable             the server can't be reached, starts, drains or has just failed: try again
└── ServerError             anything else, a fault of the server's
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status


class HatrackClientError(Exception):
    """The root. `message` is a sentence for the user; what the server did not say is empty or None."""

    def __init__(self, message: str, *, reason: str = "", field: str = "", retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason
        """The server's stable word for the cause, e.g. `OVERLOADED`."""
        self.field = field
        """The path of the field, or the name of the file, that is wrong."""
        self.retry_after = retry_after
        """Seconds."""

    def __str__(self) -> str:
        """The sentence, after the field where it does not name it itself."""
        return self.message if self.field in self.message else f"{self.field}: {self.message}"


class InvalidArgument(HatrackClientError):
    """A field of the request, or a file of an adapter, is wrong; `field` names it."""


class Unauthenticated(HatrackClientError):
    """No key, or not one of the server's."""


class PermissionDenied(HatrackClientError):
    """The key is valid but may not do this."""


class NotFound(HatrackClientError):
    """The thing is absent or another tenant's; both give the same answer."""


class FailedPrecondition(HatrackClientError):
    """The thing's state forbids the call."""


class Aborted(HatrackClientError):
    """The thing changed meanwhile: read it again and decide anew."""


class ResourceExhausted(HatrackClientError):
    """A queue or quota is full; `retry_after` says when to try again, if the server knows."""


class DeadlineExceeded(HatrackClientError):
    """The call's timeout passed."""


class Cancelled(HatrackClientError):
    """The call was cancelled, by this side or the other."""


class Unavailable(HatrackClientError):
    """The server can't be reached, starts, drains or has just failed."""


class ServerError(HatrackClientError):
    """A fault of the server's."""


_ERROR_OF_STATUS: dict[grpc.StatusCode, type[HatrackClientError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgument,
    grpc.StatusCode.OUT_OF_RANGE: InvalidArgument,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: FailedPrecondition,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPrecondition,
    grpc.StatusCode.ABORTED: Aborted,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhausted,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
}


@contextmanager
def typed_errors() -> Iterator[None]:
    """Turns a `grpc.RpcError` inside into the HatrackClientError that it means."""
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc_error(error) from error


def from_rpc_error(error: grpc.RpcError) -> HatrackClientError:
    """The typed error of a failed call, with what its google.rpc details say."""
    kind = _ERROR_OF_STATUS.get(error.code(), ServerError)
    message = error.details() or error.code().name
    details = _read_details(error)
    # Without details it was not a Hatrack server that answered, most often nobody did.
    if kind is Unavailable and details == _Details():
        message = f"the server can't be reached: {message}"
    return kind(message, reason=details.reason, field=details.field, retry_after=details.retry_after)


@dataclass(slots=True)
class _Details:
    reason: str = ""
    field: str = ""
    retry_after: float | None = None


def _read_details(call: grpc.RpcError) -> _Details:
    found = _Details()
    for detail in _status(call).details:
        info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            found.reason = info.reason
        elif detail.Unpack(bad) and bad.field_violations:
            found.field = bad.field_violations[0].field
        elif detail.Unpack(retry):
            found.retry_after = retry.retry_delay.ToTimedelta().total_seconds()
    return found


def _status(call: grpc.RpcError) -> status_pb2.Status:
    """The call's google.rpc.Status; an empty one when it has none, or one that a proxy has garbled."""
    try:
        return rpc_status.from_call(call) or status_pb2.Status()
    except (ValueError, DecodeError):
        return status_pb2.Status()
