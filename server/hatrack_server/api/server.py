"""The gRPC server: services, interceptors, health, reflection and TLS put together."""

from __future__ import annotations

import asyncio
import contextlib

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from hatrack.v1 import adapters_pb2, adapters_pb2_grpc, inference_pb2, inference_pb2_grpc
from hatrack_server.api.adapters import AdapterService
from hatrack_server.api.auth import KeyGuard
from hatrack_server.api.drain import DrainGuard
from hatrack_server.api.health import Health
from hatrack_server.api.inference import InferenceService
from hatrack_server.api.interceptor import Around, Decoding
from hatrack_server.api.status import StatusGuard
from hatrack_server.api.tls import credentials
from hatrack_server.catalog import Catalog
from hatrack_server.config import ServerConfig
from hatrack_server.engine.client import EngineClient
from hatrack_server.errors import StartupError
from hatrack_server.metrics import Metrics
from hatrack_server.tenancy.keys import KeyStore
from hatrack_server.text.codec import TextCodec

SERVICES = tuple(
    file.services_by_name[name].full_name
    for file, name in ((inference_pb2.DESCRIPTOR, "InferenceService"), (adapters_pb2.DESCRIPTOR, "AdapterService"))
)
OPTIONS = (
    # Two servers on one port would share its calls without a word.
    ("grpc.so_reuseport", 0),
    # A client whose machine vanished must not hold an upload or a slot until TCP notices.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
)
# What calls that outlived the drain get to see their UNAVAILABLE, and health watches to be closed.
STOP_SECONDS = 1.0


class ApiServer:
    """Owns the listening socket and every call on it."""

    def __init__(
        self,
        config: ServerConfig,
        *,
        engine: EngineClient,
        catalog: Catalog,
        keys: KeyStore,
        codec: TextCodec,
        metrics: Metrics,
    ) -> None:
        self._config = config
        self._drain = DrainGuard()
        self._health = Health(SERVICES, lambda: engine.ready, metrics.set_ready)
        self._follow: asyncio.Task[None] | None = None
        guards = (
            StatusGuard(metrics.failed),
            self._drain,
            KeyGuard(keys, open_without_keys=config.loopback),
        )
        self._server = grpc.aio.server(interceptors=[*(Around(guard) for guard in guards), Decoding()], options=OPTIONS)
        inference = InferenceService(engine, catalog, codec, metrics)
        adapters = AdapterService(engine, catalog, codec, metrics, max_rank=config.engine.max_rank)
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(inference, self._server)
        adapters_pb2_grpc.add_AdapterServiceServicer_to_server(adapters, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health.servicer, self._server)
        names = (*SERVICES, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)

    async def start(self) -> int:
        """Listens, and returns the port; raises StartupError when it can't."""
        port = self._bind()
        await self.refresh_health()
        await self._server.start()
        self._follow = asyncio.create_task(self._health.follow())
        return port

    async def refresh_health(self) -> None:
        """Lets health checks see at once whether the engine is ready; without it, they do a little later."""
        await self._health.refresh()

    async def stop(self, drain_seconds: float) -> int:
        """Says NOT_SERVING, refuses new calls, waits for those in flight, closes; returns how many were cut off."""
        if self._follow is not None:
            self._follow.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._follow
        await self._health.shut_down()
        left = await self._drain.drain(drain_seconds)
        await self._server.stop(STOP_SECONDS)
        # Those cut off still give back their leases and uploads.
        await self._drain.drain(STOP_SECONDS)
        return left

    def _bind(self) -> int:
        config = self._config
        host = f"[{config.host}]" if ":" in config.host else config.host
        address = f"{host}:{config.port}"
        try:
            if config.tls_cert is None or config.tls_key is None:
                return self._server.add_insecure_port(address)
            return self._server.add_secure_port(address, credentials(config.tls_cert, config.tls_key))
        except RuntimeError:
            why = "it is in use, or no address of this machine"
            if config.tls_cert is not None:
                why += f", or {config.tls_cert} and {config.tls_key} are no certificate with its key"
            raise StartupError(f"can't listen on {address}: {why}") from None
