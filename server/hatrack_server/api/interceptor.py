"""One interceptor for all that surrounds a call: an async context manager entered with the call's context."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import grpc

Context = grpc.aio.ServicerContext[Any, Any]
Behaviour = Callable[[Any, Context], Awaitable[Any]]

OWN_SERVICES = "/hatrack.v1."
KINDS = {
    (False, False): "unary_unary",
    (False, True): "unary_stream",
    (True, False): "stream_unary",
    (True, True): "stream_stream",
}


class Around(grpc.aio.ServerInterceptor):
    """Runs every call of Hatrack's own services inside `guard(context)`; health and reflection stay open.

    Our handlers are coroutines, streams too (they `await context.write()`): a cancel then reaches their `finally` at
    once, while a generator that waits at a `yield` would learn of it when it is collected.
    """

    def __init__(self, guard: Callable[[Context], AbstractAsyncContextManager[None]]) -> None:
        self._guard = guard

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """The next handler, wrapped where it is ours; None, which is UNIMPLEMENTED, stays None."""
        handler: Any = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith(OWN_SERVICES):
            return handler
        kind = KINDS[handler.request_streaming, handler.response_streaming]
        return handler._replace(**{kind: self._wrap(getattr(handler, kind))})

    def _wrap(self, behaviour: Behaviour) -> Behaviour:
        async def wrapped(request: Any, context: Context) -> Any:
            async with self._guard(context):
                return await behaviour(request, context)

        return wrapped
