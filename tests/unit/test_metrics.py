from __future__ import annotations

import shutil
import subprocess
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client import generate_latest

from hatrack.names import is_adapter_name
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
    metrics.token_count("acme", "tone")(5)
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


def test_loads_are_told_by_where_programs_came_from(metrics: Metrics) -> None:
    metrics.observe(EngineStats(disk_loads=3, host_loads=1, reloads=1))
    metrics.observe(EngineStats(disk_loads=3, host_loads=5, reloads=5))
    assert value(metrics, "hatrack_adapter_loads_total", tier="disk") == 3
    assert value(metrics, "hatrack_adapter_loads_total", tier="host") == 5
    assert value(metrics, "hatrack_adapter_reloads_total") == 5


def test_what_an_alert_on_thrashing_compares(metrics: Metrics) -> None:
    metrics.observe(EngineStats(working_set_bytes=70, adapter_budget_bytes=50, host_bytes=20))
    assert value(metrics, "hatrack_adapter_working_set_bytes") == 70
    assert value(metrics, "hatrack_adapter_budget_bytes") == 50
    assert value(metrics, "hatrack_host_program_bytes") == 20


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


def tokens(metrics: Metrics, adapter: str) -> float | None:
    tenant = OTHER if adapter == OTHER else "acme"
    return value(metrics, "hatrack_adapter_completion_tokens_total", tenant=tenant, adapter=adapter)


def fill_series(metrics: Metrics, each: int) -> None:
    """Adapters a0, a1, … take every place there is, a0 with `each` tokens and the others with one more."""
    for i in range(MAX_ADAPTER_SERIES):
        metrics.token_count("acme", f"a{i}")(each + (i > 0))


def test_adapter_series_are_capped_and_go_with_their_adapter(metrics: Metrics) -> None:
    fill_series(metrics, 5)
    metrics.token_count("acme", "late")(5)
    metrics.token_count("acme", "later")(5)
    assert (tokens(metrics, "a0"), tokens(metrics, "late"), tokens(metrics, OTHER)) == (5, None, 10)
    metrics.forget_adapter("acme", "a0")
    metrics.forget_adapter("acme", "never-seen")
    assert tokens(metrics, "a0") is None
    metrics.token_count("acme", "new")(7)
    assert tokens(metrics, "new") == 7


def test_a_request_that_outlives_its_adapter_does_not_bring_the_series_back(metrics: Metrics) -> None:
    shown, unseen = metrics.token_count("acme", "tone"), metrics.token_count("acme", "voice")
    shown(3)
    for name in ("tone", "voice"):
        metrics.forget_adapter("acme", name)
    shown(4)
    unseen(5)
    assert (tokens(metrics, "tone"), tokens(metrics, "voice"), tokens(metrics, OTHER)) == (None, None, 9)
    metrics.token_count("acme", "tone")(2)  # another adapter, pushed under the name
    shown(1)
    assert (tokens(metrics, "tone"), tokens(metrics, OTHER)) == (2, 10)


def test_a_far_busier_adapter_takes_the_least_busy_one_s_place_and_no_series_goes_down(metrics: Metrics) -> None:
    fill_series(metrics, 9)
    late = metrics.token_count("acme", "late")
    late(10)
    late(8)
    assert (tokens(metrics, "late"), tokens(metrics, "a0"), tokens(metrics, OTHER)) == (None, 9, 18)
    late(1)
    assert (tokens(metrics, "late"), tokens(metrics, "a0"), tokens(metrics, OTHER)) == (1, None, 18)
    metrics.token_count("acme", "a0")(2)
    assert (tokens(metrics, "a0"), tokens(metrics, OTHER)) == (None, 20)
    metrics.token_count("acme", "a0")(20)
    assert (tokens(metrics, "a0"), tokens(metrics, OTHER)) == (29, 20)


def test_an_adapter_called_other_is_not_the_others(metrics: Metrics) -> None:
    metrics.token_count("other", "other")(3)
    assert value(metrics, "hatrack_adapter_completion_tokens_total", tenant="other", adapter="other") == 3
    assert tokens(metrics, OTHER) == 0
    assert not is_adapter_name(OTHER)


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
