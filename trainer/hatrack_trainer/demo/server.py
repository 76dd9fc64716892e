"""The server as the demo sees it: its own process, an address, and the metrics that it counts."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from prometheus_client.parser import text_string_to_metric_families

from hatrack_trainer.errors import TrainerError

READY = re.compile(r"hatrack: serving on (\S+), metrics on (\S+)")
START_SECONDS = 120.0
STOP_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class RunningServer:
    """Where a started server answers."""

    address: str  # HOST:PORT
    metrics_url: str


@dataclass(frozen=True, slots=True)
class Counts:
    """What the server's metrics say of its whole life."""

    steps: int
    mixed_steps: int  # with two distinct adapters or more
    completion_tokens: int


@contextmanager
def serving(base: Path, data_dir: Path, engine: Mapping[str, Any] | None = None) -> Iterator[RunningServer]:
    """Runs `hatrack serve` on free ports while inside, and stops it however that ends.

    `engine` are settings of its engine; its log is kept in `data_dir`. Raises TrainerError when the server ends early
    or isn't ready in START_SECONDS.
    """
    command = [sys.executable, "-c", "from hatrack_client.cli import main; main()", "serve"]
    settings = data_dir / "server.yaml"
    settings.write_text(yaml.safe_dump({"engine": dict(engine or {})}))
    options = {
        "--config": settings,
        "--model": base,
        "--data-dir": data_dir / "server",
        "--port": 0,
        "--metrics-port": 0,
    }
    arguments = [str(part) for option in options.items() for part in option]
    log = data_dir / "server.log"
    with log.open("w") as stderr:
        process = subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, stderr=stderr, text=True)  # noqa: S603
    try:
        yield _wait_until_ready(process, log)
    finally:
        _stop(process)


def _wait_until_ready(process: subprocess.Popen[str], log: Path) -> RunningServer:
    found: list[RunningServer] = []
    ready = threading.Event()

    def read() -> None:
        # To the end, and not only to the line that is waited for: a full pipe would stop the server.
        for line in process.stdout or ():
            if match := READY.search(line):
                found.append(RunningServer(match[1], match[2]))
                ready.set()
        ready.set()

    threading.Thread(target=read, daemon=True).start()
    ready.wait(START_SECONDS)
    if found:
        return found[0]
    process.kill()
    process.wait()
    last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
    raise TrainerError("the demo's server did not start: " + (last[0] if last else "it said nothing"))


def _stop(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


def read_counts(metrics_url: str) -> Counts:
    """Scrapes the server once. Raises OSError when it doesn't answer."""
    with urllib.request.urlopen(metrics_url, timeout=10) as response:  # noqa: S310 -- the URL is our own server's
        return parse_counts(response.read().decode())


def parse_counts(exposition: str) -> Counts:
    """Reads the counts from Prometheus' text format; raises KeyError when one is missing."""
    values: dict[str, float] = {}
    up_to_one = 0.0
    for family in text_string_to_metric_families(exposition):
        for sample in family.samples:
            if sample.name == "hatrack_step_adapters_bucket" and float(sample.labels["le"]) == 1:
                up_to_one = sample.value
            values[sample.name] = values.get(sample.name, 0.0) + sample.value
    return Counts(
        steps=int(values["hatrack_steps_total"]),
        mixed_steps=int(values["hatrack_step_adapters_count"] - up_to_one),
        completion_tokens=int(values["hatrack_completion_tokens_total"]),
    )
