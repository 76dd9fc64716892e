"""The composition root: configuration in, processes up, calls served, drained and stopped."""

from __future__ import annotations

import asyncio
import gc
import signal
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import structlog
from rich.console import Console

from hatrack_server.api.server import ApiServer
from hatrack_server.catalog import Catalog
from hatrack_server.config import ServerConfig
from hatrack_server.engine.client import EngineClient
from hatrack_server.errors import StartupError
from hatrack_server.logs import configure_logging
from hatrack_server.metrics import Metrics, MetricsEndpoint
from hatrack_server.startup import LoadingProgress
from hatrack_server.tenancy.keys import KeyStore
from hatrack_server.text.codec import TextCodec

SIGNALS = (signal.SIGTERM, signal.SIGINT)

T = TypeVar("T")
log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where a started server listens; the ports are the real ones, also where 0 was asked for."""

    host: str
    port: int
    metrics_host: str
    metrics_port: int


async def serve(config: ServerConfig, *, announce: Callable[[Addresses], None]) -> None:
    """Serves until SIGTERM or SIGINT, then drains; a second signal ends the process as if there were no handler.

    Listens while the base loads, so that calls get UNAVAILABLE and health checks NOT_SERVING; calls `announce` once
    they are served. Raises StartupError when the server can't start as it was asked to, and Unavailable when the
    engine's process dies before the base is loaded.
    """
    configure_logging()
    async with AsyncExitStack() as stack:
        stopped = stack.enter_context(_stop_on_signals())
        metrics = Metrics()
        endpoint = stack.enter_context(closing(MetricsEndpoint(metrics, config.metrics_host, config.metrics_port)))
        keys = stack.enter_context(closing(KeyStore(config.data_dir)))
        if not config.loopback and not keys.any_keys():
            raise StartupError(f"host {config.host} is not loopback and there is no key: make one with hatrack keys")
        progress = LoadingProgress(Console(stderr=True))
        engine = _engine(config, metrics, progress)
        stack.push_async_callback(engine.stop)
        # The base takes minutes, so whatever else may be wrong shows before: the data directory, port or certificate.
        catalog = stack.enter_context(closing(_catalog(config, engine)))
        codec = await asyncio.to_thread(TextCodec, config.engine.model)
        api = ApiServer(config, engine=engine, catalog=catalog, keys=keys, codec=codec, metrics=metrics)
        port = await api.start()
        stack.push_async_callback(_drain, api, config.drain_seconds)
        base = await _until(stopped, progress.follow(engine.start()))
        if base is None:
            return
        log.info("base loaded", architecture=base.architecture, device=base.device, memory=base.memory)
        # Else Python's collector would look through all that was imported, every now and then, and hold every stream up
        # for a tenth of a second.
        gc.collect()
        gc.freeze()
        await api.refresh_health()
        announce(Addresses(config.host, port, config.metrics_host, endpoint.port))
        await stopped.wait()
        log.info("draining", seconds=config.drain_seconds)


async def _drain(api: ApiServer, seconds: float) -> None:
    if left := await api.stop(seconds):
        log.warning("calls cut off", calls=left)


def _engine(config: ServerConfig, metrics: Metrics, progress: LoadingProgress) -> EngineClient:
    return EngineClient(
        config.engine,
        on_stats=metrics.observe,
        on_progress=progress.update,
        on_restart=metrics.worker_restarted,
    )


def _catalog(config: ServerConfig, engine: EngineClient) -> Catalog:
    # The catalog learns in whatever thread it works that a digest is unused; the engine lives on the event loop.
    loop = asyncio.get_running_loop()
    return Catalog(
        config.data_dir,
        max_upload_bytes=config.max_upload_bytes,
        on_unused=lambda digest: _call(loop, engine.forget, digest),
    )


def _call(loop: asyncio.AbstractEventLoop, function: Callable[[str], None], digest: str) -> None:
    loop.call_soon_threadsafe(function, digest)


@contextmanager
def _stop_on_signals() -> Iterator[asyncio.Event]:
    """An event that the first signal sets; the handlers go with it, or with the context."""
    stopped, loop = asyncio.Event(), asyncio.get_running_loop()

    def remove() -> None:
        for number in SIGNALS:
            loop.remove_signal_handler(number)

    def stop() -> None:
        stopped.set()
        remove()

    for number in SIGNALS:
        loop.add_signal_handler(number, stop)
    try:
        yield stopped
    finally:
        remove()


async def _until(stopped: asyncio.Event, work: Coroutine[Any, Any, T]) -> T | None:
    """The work's result; None, with the work cancelled, when the stop comes first."""
    task, stop = asyncio.create_task(work), asyncio.create_task(stopped.wait())
    await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
    stop.cancel()
    if not task.done():
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return None
    return task.result()
