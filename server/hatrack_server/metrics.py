"""Prometheus metrics of one server: `hatrack_*`, base units, on a port of their own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from hatrack_server.errors import StartupError
from hatrack_server.types import EngineStats

MAX_ADAPTER_SERIES = 200
OTHER = "_other"  # which no tenant and no adapter can be called

FIRST_TOKEN_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
INTER_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
QUEUE_SECONDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60)
LOAD_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
STEP_ADAPTERS = (0, 1, 2, 3, 4, 8, 16, 32, 64, 128, 256)

# What a snapshot holds, by metric; totals count from the worker's start, gauges are as they are.
TOTALS = {
    "steps": ("hatrack_steps", "Forward passes."),
    "prompt_tokens": ("hatrack_prompt_tokens", "Prompt tokens of admitted requests."),
    "cached_tokens": ("hatrack_cached_prompt_tokens", "Prompt tokens found in the prefix cache."),
    "completion_tokens": ("hatrack_completion_tokens", "Tokens generated."),
    "preemptions": ("hatrack_preemptions", "Sequences that gave up their KV blocks and were computed again."),
    "evictions": ("hatrack_adapter_evictions", "Adapter programs that made room for others."),
    "reloads": ("hatrack_adapter_reloads", "Loads of adapter programs that had been evicted."),
}
GAUGES = {
    "running": ("hatrack_requests_running", "Sequences in the batch."),
    "waiting": ("hatrack_requests_waiting", "Sequences that wait for admission."),
    "kv_blocks_used": ("hatrack_kv_blocks_used", "KV blocks that running sequences hold."),
    "kv_blocks_total": ("hatrack_kv_blocks", "KV blocks there are."),
    "resident_programs": ("hatrack_resident_programs", "Adapter programs in the engine's memory."),
    "resident_bytes": ("hatrack_resident_program_bytes", "Memory of resident adapter programs."),
    "host_bytes": ("hatrack_host_program_bytes", "Memory of evicted adapter programs that are kept on the host."),
    # More than the budget, for long: programs evict one another, and requests wait for loads.
    "working_set_bytes": (
        "hatrack_adapter_working_set_bytes",
        "Memory that the adapter programs asked for within the last minute take, resident or not.",
    ),
    "adapter_budget_bytes": ("hatrack_adapter_budget_bytes", "Memory that resident adapter programs may take."),
}
LOADS_BY_TIER = {"disk": "disk_loads", "host": "host_loads"}  # from where


class Metrics:
    """Everything that is measured. Its methods never block, and may be called from any thread."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._last = EngineStats()
        self._totals = {key: Counter(*named, registry=registry) for key, named in TOTALS.items()}
        loads = Counter("hatrack_adapter_loads", "Adapter programs made resident.", ["tier"], registry=registry)
        self._totals |= {key: loads.labels(tier) for tier, key in LOADS_BY_TIER.items()}
        self._gauges = {key: Gauge(*named, registry=registry) for key, named in GAUGES.items()}
        self._first_token = _histogram(
            registry, "hatrack_time_to_first_token_seconds", "Arrival to first token.", FIRST_TOKEN_SECONDS
        )
        self._inter_token = _histogram(
            registry, "hatrack_inter_token_seconds", "Time between tokens of one completion.", INTER_TOKEN_SECONDS
        )
        self._queue = _histogram(registry, "hatrack_queue_seconds", "Arrival to admission.", QUEUE_SECONDS)
        self._loads = _histogram(
            registry, "hatrack_adapter_load_seconds", "Reading and compiling one adapter.", LOAD_SECONDS
        )
        self._step_adapters = _histogram(
            registry, "hatrack_step_adapters", "Distinct adapters in one step.", STEP_ADAPTERS
        )
        self._errors = Counter("hatrack_errors", "Calls that failed.", ["reason"], registry=registry)
        self._restarts = Counter("hatrack_worker_restarts", "Times the worker came up again.", registry=registry)
        self._ready = Gauge("hatrack_ready", "1 while requests can be served.", registry=registry)
        self._by_adapter = AdapterTokens()
        registry.register(self._by_adapter)

    def started(self, *, queue: float, first_token: float) -> None:
        """A request got its first token; seconds since its arrival."""
        self._queue.observe(queue)
        self._first_token.observe(first_token)

    def went_on(self, *, seconds: float, tokens: int) -> None:
        """A request got `tokens` more, `seconds` after the ones before."""
        for _ in range(tokens):
            self._inter_token.observe(seconds / tokens)

    def token_count(self, tenant: str, adapter: str) -> Callable[[int], None]:
        """What a request that has got hold of an adapter calls when it ends, with the tokens that it generated."""
        return self._by_adapter.count(tenant, adapter)

    def forget_adapter(self, tenant: str, adapter: str) -> None:
        """An adapter is gone, and its series with it; what its last requests generate yet counts under `_other`."""
        self._by_adapter.forget(tenant, adapter)

    def failed(self, reason: str) -> None:
        """A call ended with an error of this reason."""
        self._errors.labels(reason).inc()

    def worker_restarted(self) -> None:
        """The worker died; its successor counts from zero again."""
        self._restarts.inc()
        self._last = EngineStats()
        self.observe(EngineStats())

    def set_ready(self, ready: bool) -> None:
        """Whether requests can be served now."""
        self._ready.set(ready)

    def observe(self, stats: EngineStats) -> None:
        """Takes in a snapshot of the worker; counters grow by what its totals grew since the one before."""
        for key, counter in self._totals.items():
            counter.inc(getattr(stats, key) - getattr(self._last, key))
        for key, gauge in self._gauges.items():
            gauge.set(getattr(stats, key))
        for seconds in stats.adapter_loads:
            self._loads.observe(seconds)
        for adapters in stats.adapters_per_step:
            self._step_adapters.observe(adapters)
        self._last = stats


@dataclass(eq=False, slots=True)
class _Adapter:
    labels: tuple[str, str]
    tokens: int = 0  # all of them
    named: int = 0  # those that were counted under its name


class AdapterTokens(Collector):
    """Tokens by adapter: the MAX_ADAPTER_SERIES busiest since the start by name, the rest as `_other`.

    A request's tokens count under the label that its adapter has when it ends, and stay there: no series goes down, and
    every rate is right. A series ends when its adapter is deleted, or gives way to one with more than twice its tokens,
    and takes its count along; the sum over all adapters that never ends is `hatrack_completion_tokens_total`.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._adapters: dict[tuple[str, str], _Adapter] = {}  # all that were used and not deleted since
        self._shown: set[_Adapter] = set()
        self._other = 0

    def count(self, tenant: str, adapter: str) -> Callable[[int], None]:
        """Counts tokens for this adapter, not for another that gets its name later."""
        labels = (tenant, adapter)
        with self._lock:
            return partial(self._add, self._adapters.setdefault(labels, _Adapter(labels)))

    def forget(self, tenant: str, adapter: str) -> None:
        """Ends the adapter's series, if it has one."""
        with self._lock:
            gone = self._adapters.pop((tenant, adapter), None)
            if gone is not None:
                self._shown.discard(gone)

    def collect(self) -> Iterator[CounterMetricFamily]:
        """Called for every scrape."""
        name, text = "hatrack_adapter_completion_tokens", "Tokens generated; the busiest adapters by name, then _other."
        family = CounterMetricFamily(name, text, labels=("tenant", "adapter"))
        with self._lock:
            for adapter in self._shown:
                family.add_metric(adapter.labels, adapter.named)
            family.add_metric((OTHER, OTHER), self._other)
        yield family

    def _add(self, adapter: _Adapter, tokens: int) -> None:
        with self._lock:
            adapter.tokens += tokens
            if self._show(adapter):
                adapter.named += tokens
            else:
                self._other += tokens

    def _show(self, adapter: _Adapter) -> bool:
        """Whether the adapter has a series, after giving it one where it may."""
        if adapter in self._shown:
            return True
        if self._adapters.get(adapter.labels) is not adapter:
            return False
        if len(self._shown) == MAX_ADAPTER_SERIES:
            least = min(self._shown, key=lambda shown: shown.tokens)
            # Twice as many: among equals, places would change hands with every request.
            if adapter.tokens <= 2 * least.tokens:
                return False
            self._shown.remove(least)
        self._shown.add(adapter)
        return True


class MetricsEndpoint:
    """`/metrics` over HTTP, answered by a thread of its own."""

    def __init__(self, metrics: Metrics, host: str, port: int) -> None:
        """Listens at once, on a free port for 0; raises StartupError when it can't."""
        self._server: WSGIServer
        try:
            self._server, self._thread = start_http_server(port, addr=host, registry=metrics.registry)
        except OSError as error:
            raise StartupError(f"can't serve metrics on {host}:{port}: {error.strerror}") from None

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return self._server.server_port

    def close(self) -> None:
        """Stops answering and frees the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _histogram(registry: CollectorRegistry, name: str, documentation: str, buckets: tuple[float, ...]) -> Histogram:
    return Histogram(name, documentation, buckets=buckets, registry=registry)
