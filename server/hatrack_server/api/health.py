"""grpc.health.v1, which follows what the engine really does."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio

POLL_SECONDS = 0.2


class Health:
    """Keeps the status of "" and of every service: SERVING only while `ready()` says so, and tells `report`."""

    def __init__(self, services: Sequence[str], ready: Callable[[], bool], report: Callable[[bool], None]) -> None:
        self.servicer = aio.HealthServicer()
        self._services = ("", *services)
        self._ready = ready
        self._report = report

    async def refresh(self) -> None:
        """Asks once; watchers hear of a change at once."""
        ready = self._ready()
        status = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
        self._report(ready)
        for service in self._services:
            await self.servicer.set(service, status)

    async def follow(self) -> None:
        """Asks again and again, until cancelled."""
        while True:
            await self.refresh()
            await asyncio.sleep(POLL_SECONDS)

    async def shut_down(self) -> None:
        """NOT_SERVING from now on, whatever the engine says."""
        self._report(False)
        await self.servicer.enter_graceful_shutdown()
