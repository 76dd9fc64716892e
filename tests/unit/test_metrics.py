from __future__ import annotations

import shutil
import subprocess
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client import generate_latest

from hatrack_server.errors import StartupError
from hatrack_server.metrics import MAX_ADAPTER_SERIES, OTHER, Metrics, MetricsEndpoint
from hatrack_server.types import EngineStats


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def endpoint(metrics: Metrics) -> Iterator[MetricsEndpoint]:
    endpoint = MetricsEndpoint(metrics, "127.0.0.1", 0)
    yield endpoint
    endpoint.close()


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def fill(metrics: Metrics) -> None:
    """Touches everything, so that every series is there."""
    metrics.started(queue=0.1, first_token=0.2)
    metrics.went_on(seconds=0.3, tokens=3)
    metrics.completed("acme", "tone", 5)
    metrics.failed("NOT_FOUND")
    metrics.set_ready(True)
    metrics.observe(EngineStats(steps=2, running=1, adapter_loads=(0.5,), adapters_per_step=(0, 3)))


def test_totals_become_counters_that_survive_a_restart(metrics: Metrics) -> None:
    metrics.observe(EngineStats(steps=10, completion_tokens=70))
    metrics.observe(EngineStats(steps=12, completion_tokens=80))
    metrics.worker_restarted()
    metrics.observe(EngineStats(steps=15, completion_tokens=3))
    assert value(metrics, "hatrack_steps_total") == 27
    assert value(metrics, "hatrack_completion_tokens_total") == 83
    assert value(metrics, "hatrack_worker_restarts_total") == 1


def test_gauges_and_histograms_follow_the_snapshot(metrics: Metrics) -> None:
    metrics.observe(EngineStats(running=4, waiting=2, kv_blocks_used=5, kv_blocks_total=9, adapter_loads=(0.2, 0.4)))
    metrics.observe(EngineStats(running=1, kv_blocks_total=9, adapters_per_step=(0, 1, 2)))
    assert value(metrics, "hatrack_requests_running") == 1
    assert value(metrics, "hatrack_requests_waiting") == 0
    assert value(metrics, "hatrack_kv_blocks") == 9
    assert value(metrics, "hatrack_adapter_load_seconds_sum") == pytest.approx(0.6)
    assert value(metrics, "hatrack_step_adapters_bucket", le="1.0") == 2


def test_joined_tokens_count_one_by_one(metrics: Metrics) -> None:
    metrics.went_on(seconds=0.3, tokens=3)
    assert value(metrics, "hatrack_inter_token_seconds_count") == 3
    assert value(metrics, "hatrack_inter_token_seconds_sum") == pytest.approx(0.3)


def test_adapter_series_are_capped_and_go_with_their_adapter(metrics: Metrics) -> None:
    name = "hatrack_adapter_completion_tokens_total"
    for i in range(MAX_ADAPTER_SERIES + 2):
        metrics.completed("acme", f"a{i}", 5)
    assert value(metrics, name, tenant="acme", adapter="a0") == 5
    assert value(metrics, name, tenant="acme", adapter=f"a{MAX_ADAPTER_SERIES}") is None
    assert value(metrics, name, tenant=OTHER, adapter=OTHER) == 10
    metrics.forget_adapter("acme", "a0")
    metrics.forget_adapter("acme", "never-seen")
    assert value(metrics, name, tenant="acme", adapter="a0") is None
    metrics.completed("acme", "new", 7)
    assert value(metrics, name, tenant="acme", adapter="new") == 7


def test_served_over_http(metrics: Metrics, endpoint: MetricsEndpoint) -> None:
    fill(metrics)
    with urllib.request.urlopen(f"http://127.0.0.1:{endpoint.port}/metrics") as answer:
        assert b"hatrack_ready 1.0" in answer.read()


def test_a_port_in_use_is_a_sentence(metrics: Metrics, endpoint: MetricsEndpoint) -> None:
    with pytest.raises(StartupError, match=f"127.0.0.1:{endpoint.port}"):
        MetricsEndpoint(metrics, "127.0.0.1", endpoint.port)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_has_nothing_to_say(metrics: Metrics) -> None:
    fill(metrics)
    lint = subprocess.run(
        ["promtool", "check", "metrics"], input=generate_latest(metrics.registry), capture_output=True, check=False
    )
    assert (lint.returncode, lint.stdout, lint.stderr) == (0, b"", b"")
