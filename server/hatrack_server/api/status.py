"""Errors to gRPC statuses: one table, at the edge."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, NoReturn

import grpc
import structlog
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc import StatusCode
from grpc_status import rpc_status

from hatrack_server import errors

DOMAIN = "hatrack"
DEADLINE_SLACK_SECONDS = 0.05  # a client's timer, which cancels the call, may be so far ahead of ours
MAX_TEXT = 500  # characters of a message or field: a status travels in headers, which are bounded
CODES: dict[type[errors.HatrackError], StatusCode] = {
    errors.InvalidRequest: StatusCode.INVALID_ARGUMENT,
    errors.NotFound: StatusCode.NOT_FOUND,
    errors.Conflict: StatusCode.ABORTED,
    errors.FailedPrecondition: StatusCode.FAILED_PRECONDITION,
    errors.Unauthenticated: StatusCode.UNAUTHENTICATED,
    errors.Overloaded: StatusCode.RESOURCE_EXHAUSTED,
    errors.DeadlinePassed: StatusCode.DEADLINE_EXCEEDED,
    errors.Unavailable: StatusCode.UNAVAILABLE,
    # The adapter's state, not the server's: the same call fails again until that adapter is another.
    errors.GenerationFailed: StatusCode.FAILED_PRECONDITION,
}

log = structlog.get_logger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]


class StatusGuard:
    """Ends a failed call with a status; `count` is told the reason of each, and of each that gRPC cancelled.

    Nothing but a HatrackError's own sentence reaches a client; any other error is logged under an id that it gets.
    """

    def __init__(self, count: Callable[[str], None]) -> None:
        self._count = count

    @asynccontextmanager
    async def __call__(self, context: Context) -> AsyncIterator[None]:
        """Runs one call; raises only what ends it towards gRPC."""
        try:
            yield
        except errors.HatrackError as error:
            await self._abort(context, to_status(error), error.reason)
        except asyncio.CancelledError:
            if _cancelled_from_outside():
                self._count(_why_cancelled(context))
                raise
            # gRPC takes any CancelledError for the client's: left alone it would send no status, and a client waits.
            aborted = _status(StatusCode.ABORTED, "the call was cancelled inside the server", "ABORTED")
            await self._abort(context, aborted, "ABORTED")
        except Exception:
            error_id = secrets.token_hex(8)
            log.exception("internal error", error_id=error_id)
            message = f"internal error {error_id}"
            await self._abort(context, _status(StatusCode.INTERNAL, message, "INTERNAL"), "INTERNAL")

    async def _abort(self, context: Context, status: Status, reason: str) -> NoReturn:
        self._count(reason)
        await context.abort_with_status(rpc_status.to_status(status))
        raise AssertionError("abort_with_status raises")


def to_status(error: errors.HatrackError) -> Status:
    """The google.rpc.Status of an error, with its details; a class without a code of its own has its parent's."""
    code = next((CODES[kind] for kind in type(error).__mro__ if kind in CODES), StatusCode.INTERNAL)
    return _status(code, _sentence(error), error.reason, *_details(error))


def _sentence(error: errors.HatrackError) -> str:
    """The message, which names the field for those who don't read the details."""
    if isinstance(error, errors.InvalidRequest) and error.field not in error.message:
        return f"{error.field}: {error.message}"
    return error.message


def _details(error: errors.HatrackError) -> list[Message]:
    if isinstance(error, errors.InvalidRequest):
        violation = BadRequest.FieldViolation(field=_sendable(error.field), description=_sendable(error.message))
        return [BadRequest(field_violations=[violation])]
    if isinstance(error, errors.Overloaded):
        delay = Duration()
        delay.FromNanoseconds(int(error.retry_after * 1e9))
        return [RetryInfo(retry_delay=delay)]
    return []


def _status(code: StatusCode, message: str, reason: str, *details: Message) -> Status:
    status = Status(code=code.value[0], message=_sendable(message))
    for detail in (ErrorInfo(reason=reason, domain=DOMAIN), *details):
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def _sendable(text: str) -> str:
    """Text that may quote whatever a tenant sent: valid UTF-8, and not too long for a header."""
    clean = text.encode(errors="replace").decode()
    return clean if len(clean) <= MAX_TEXT else f"{clean[: MAX_TEXT - 1]}…"


def _why_cancelled(context: Context) -> str:
    """gRPC cancels a call's task alike for a deadline, for a client that gave up, and for a server that is stopped."""
    remaining = context.time_remaining()
    passed = remaining is not None and remaining <= DEADLINE_SLACK_SECONDS
    return errors.DeadlinePassed.reason if passed else "CANCELLED"


def _cancelled_from_outside() -> bool:
    """Whether gRPC cancelled this call's task: the context doesn't know, the task does."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
