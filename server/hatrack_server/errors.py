"""Every error that a user can cause or meet, with a stable reason; `api/status.py` maps each to a gRPC status.

HatrackError
├── InvalidRequest          a field of a request is wrong                     field, reason
│   └── InvalidArtifact     an uploaded adapter is wrong                      field: a file, key or tensor
├── NotFound                absent, or another tenant's: the same answer
├── Conflict                the thing changed meanwhile: read it again
├── FailedPrecondition      the thing's state forbids the call, however often it is made
├── Unauthenticated         no key, or not one of ours
├── Overloaded              the queue is full                                 retry_after
├── DeadlinePassed          too late to start, or to go on
├── Unavailable             the engine starts, died or drains; at the start: `hatrack serve` exits with 1
├── GenerationFailed        this completion alone could not go on
└── StartupError            the server can't start: `hatrack serve` prints it and exits with 2
"""

from __future__ import annotations


class HatrackError(Exception):
    """The root. `message` is a sentence for the user, without paths of the server or stack traces."""

    reason = "INTERNAL"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class InvalidRequest(HatrackError):
    """A field of a request is wrong; `field` is its path, e.g. `sampling.temperature`."""

    reason = "INVALID_REQUEST"

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class InvalidArtifact(InvalidRequest):
    """An uploaded adapter is wrong; `field` names the file, config key or tensor."""

    reason = "INVALID_ARTIFACT"


class NotFound(HatrackError):
    """The thing is absent or another tenant's; both give the same answer."""

    reason = "NOT_FOUND"


class Conflict(HatrackError):
    """The thing changed meanwhile: a stale etag."""

    reason = "CONFLICT"


class FailedPrecondition(HatrackError):
    """The thing's state forbids the call: trying again can't help before that state is another."""

    reason = "FAILED_PRECONDITION"


class Unauthenticated(HatrackError):
    """No key, or not one of ours."""

    reason = "UNAUTHENTICATED"


class Overloaded(HatrackError):
    """The queue is full; `retry_after` is in seconds."""

    reason = "OVERLOADED"

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlinePassed(HatrackError):
    """The request's deadline passed before it was started or finished."""

    reason = "DEADLINE_PASSED"


class Unavailable(HatrackError):
    """The engine is starting, died or drains."""

    reason = "UNAVAILABLE"


class GenerationFailed(HatrackError):
    """One completion could not go on, e.g. its adapter gives non-finite logits."""

    reason = "GENERATION_FAILED"


class StartupError(HatrackError):
    """The server can't start as it was asked to."""

    reason = "STARTUP"
