"""What surrounds every call: guards entered with the call's context, and inside of them the decoding of requests."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from hatrack_server.errors import InvalidRequest

Context = grpc.aio.ServicerContext[Any, Any]
Behaviour = Callable[[Any, Context], Awaitable[Any]]

OWN_SERVICES = "/hatrack.v1."
KINDS = {
    (False, False): "unary_unary",
    (False, True): "unary_stream",
    (True, False): "stream_unary",
    (True, True): "stream_stream",
}


class _OwnServices(grpc.aio.ServerInterceptor):
    """Changes the handlers of Hatrack's own services; health and reflection stay as they are."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """The next handler, changed where it is ours; None, which is UNIMPLEMENTED, stays None."""
        handler: Any = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith(OWN_SERVICES):
            return handler
        return self._change(handler)

    @abstractmethod
    def _change(self, handler: Any) -> Any:
        """The handler to call in place of this one."""


class Around(_OwnServices):
    """Runs every call inside `guard(context)`.

    Our handlers are coroutines, streams too (they `await context.write()`): a cancel then reaches their `finally` at
    once, while a generator that waits at a `yield` would learn of it when it is collected.
    """

    def __init__(self, guard: Callable[[Context], AbstractAsyncContextManager[None]]) -> None:
        self._guard = guard

    def _change(self, handler: Any) -> Any:
        return _wrapped(handler, self._wrap)

    def _wrap(self, behaviour: Behaviour) -> Behaviour:
        async def wrapped(request: Any, context: Context) -> Any:
            async with self._guard(context):
                return await behaviour(request, context)

        return wrapped


class Decoding(_OwnServices):
    """Decodes requests inside the guards, so it must be the last interceptor.

    gRPC decodes before any handler runs: bytes that are no message would end as UNKNOWN, with an exception's name.
    """

    def _change(self, handler: Any) -> Any:
        decode = handler.request_deserializer
        decoded = _each_decoded if handler.request_streaming else _decoded

        def wrap(behaviour: Behaviour) -> Behaviour:
            async def wrapped(raw: Any, context: Context) -> Any:
                return await behaviour(decoded(raw, decode), context)

            return wrapped

        return _wrapped(handler, wrap)._replace(request_deserializer=None)


def _wrapped(handler: Any, wrap: Callable[[Behaviour], Behaviour]) -> Any:
    kind = KINDS[handler.request_streaming, handler.response_streaming]
    return handler._replace(**{kind: wrap(getattr(handler, kind))})


def _decoded(raw: bytes, decode: Callable[[bytes], Any]) -> Any:
    try:
        return decode(raw)
    except DecodeError:
        raise InvalidRequest("request", "the bytes are not a message of this method's type") from None


async def _each_decoded(raws: AsyncIterator[bytes], decode: Callable[[bytes], Any]) -> AsyncIterator[Any]:
    async for raw in raws:
        yield _decoded(raw, decode)
