"""How many calls are in flight, and how a server that goes down refuses new ones."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import grpc

from hatrack_server.errors import Unavailable

Context = grpc.aio.ServicerContext[Any, Any]


class DrainGuard:
    """Counts the calls of Hatrack's own services.

    gRPC's own grace can't be used for this: it waits for health watches, which never end.
    """

    def __init__(self) -> None:
        self._in_flight = 0
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    @asynccontextmanager
    async def __call__(self, context: Context) -> AsyncIterator[None]:  # noqa: ARG002
        """Counts one call; raises Unavailable once draining."""
        if self._draining:
            raise Unavailable("the server is going down")
        self._in_flight += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()

    async def drain(self, seconds: float) -> int:
        """Refuses new calls and waits up to `seconds` for those in flight; returns how many are left."""
        self._draining = True
        with suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), seconds)
        return self._in_flight
