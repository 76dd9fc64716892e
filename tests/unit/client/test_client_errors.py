from __future__ import annotations

import socket
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2

import hatrack_client
from hatrack_client import (
    Aborted,
    AsyncClient,
    Client,
    FailedPrecondition,
    HatrackClientError,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    ServerError,
    Unauthenticated,
    Unavailable,
)


def generate(server: Any) -> HatrackClientError:
    with Client(server.address) as client, pytest.raises(HatrackClientError) as caught:
        client.generate(prompt="hi")
    return caught.value


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, InvalidArgument),
        (grpc.StatusCode.UNAUTHENTICATED, Unauthenticated),
        (grpc.StatusCode.PERMISSION_DENIED, PermissionDenied),
        (grpc.StatusCode.NOT_FOUND, NotFound),
        (grpc.StatusCode.FAILED_PRECONDITION, FailedPrecondition),
        (grpc.StatusCode.ABORTED, Aborted),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, ResourceExhausted),
        (grpc.StatusCode.UNAVAILABLE, Unavailable),
        (grpc.StatusCode.INTERNAL, ServerError),
        (grpc.StatusCode.UNIMPLEMENTED, ServerError),
    ],
)
def test_every_status_has_its_error(server: Any, code: grpc.StatusCode, kind: type[HatrackClientError]) -> None:
    server.fail(code, "no hat fits", error_details_pb2.ErrorInfo(domain="hatrack", reason="WHY"))
    error = generate(server)
    assert type(error) is kind
    assert (error.message, error.reason) == ("no hat fits", "WHY")


def test_details_name_the_field_and_the_wait(server: Any) -> None:
    violation = error_details_pb2.BadRequest.FieldViolation(field="sampling.top_p", description="too high")
    bad = error_details_pb2.BadRequest(field_violations=[violation])
    server.fail(grpc.StatusCode.INVALID_ARGUMENT, "too high", bad)
    error = generate(server)
    assert error.field == "sampling.top_p"
    assert str(error) == "sampling.top_p: too high"
    retry = error_details_pb2.RetryInfo(retry_delay=Duration(seconds=1, nanos=500_000_000))
    server.fail(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", retry)
    assert generate(server).retry_after == 1.5


async def test_the_asyncio_client_reads_details_too(server: Any) -> None:
    server.fail(grpc.StatusCode.ABORTED, "changed", error_details_pb2.ErrorInfo(reason="CONFLICT"))
    async with AsyncClient(server.address) as client:
        with pytest.raises(Aborted) as unary:
            await client.generate(prompt="hi")
        with pytest.raises(Aborted) as streamed:
            await anext(client.stream(prompt="hi"))
    assert unary.value.reason == streamed.value.reason == "CONFLICT"


def test_nobody_listening_is_said_so() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with Client(f"127.0.0.1:{unused.getsockname()[1]}") as client, pytest.raises(Unavailable) as caught:
            client.get_adapter("tone")
    assert "can't be reached" in caught.value.message


def test_exports_are_exactly_the_public_names() -> None:
    public = {
        name
        for name, value in vars(hatrack_client).items()
        if not name.startswith("_")
        and (name.isupper() or getattr(value, "__module__", "").startswith("hatrack_client"))
    }
    assert sorted(public) == sorted(hatrack_client.__all__)
    errors = {name for name, value in vars(hatrack_client.errors).items() if _is_error(value)}
    assert errors <= public


def _is_error(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, HatrackClientError)
