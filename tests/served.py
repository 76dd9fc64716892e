"""A real `hatrack serve` in its own process."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

ANNOUNCEMENT = re.compile(r"hatrack: serving on (\S+), metrics on (\S+)")


class Served:
    """The server's process from its start to its end; a context manager that kills what is left."""

    def __init__(self, checkpoint: Path, data_dir: Path, *options: str) -> None:
        """Starts it and waits until it serves."""
        command = [
            sys.executable,
            "-m",
            "hatrack_client",
            "serve",
            "--model",
            str(checkpoint),
            "--data-dir",
            str(data_dir),
        ]
        command += ["--port", "0", "--metrics-port", "0", "--device", "cpu", "--threads", "1", "--kv-cache-gb", "0.01"]
        self._log = (data_dir.parent / f"{data_dir.name}.log").open("a")
        self.process = subprocess.Popen(
            [*command, *options], stdout=subprocess.PIPE, stderr=self._log, text=True, start_new_session=True
        )
        assert self.process.stdout
        line = self.process.stdout.readline()
        found = ANNOUNCEMENT.match(line)
        assert found, f"said {line!r}, see {self._log.name}"
        self.address, self.metrics_url = found.groups()

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        """SIGKILL: nothing is drained or flushed."""
        self.process.kill()
        self._reap()

    def terminate(self) -> int:
        """SIGTERM, and the exit status."""
        self.process.terminate()
        return self._reap()

    def _reap(self) -> int:
        status = self.process.wait(30)
        assert self.process.stdout
        self.process.stdout.close()
        self._log.close()
        return status

    def worker_pid(self) -> int:
        """The engine's process."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        spawned = [int(pid) for pid in children if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]
        assert len(spawned) == 1
        return spawned[0]

    def kill_worker(self) -> None:
        """SIGKILL to the engine alone."""
        os.kill(self.worker_pid(), signal.SIGKILL)

    def metrics(self) -> dict[str, float]:
        """Every sample by its name with labels."""
        with urlopen(self.metrics_url, timeout=5) as answer:
            lines = answer.read().decode().splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


def until(condition: object, seconds: float = 30.0) -> None:
    """Waits until `condition()` is true."""
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
