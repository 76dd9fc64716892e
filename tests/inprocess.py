"""The engine without its process: what a test drives step by step."""

from __future__ import annotations

import json
import queue
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hatrack.manifest import CONFIG_FILE, folder_digest
from hatrack_server.config import EngineConfig
from hatrack_server.engine.step import Engine
from hatrack_server.engine.worker import build_engine, describe_base
from hatrack_server.model.paged import PagedModel
from hatrack_server.types import Artifact, Delta, Generation, Sampling

GREEDY = Sampling(temperature=0.0, max_tokens=8, ignore_eos=True)
PATIENCE_SECONDS = 30.0


def artifact_at(path: Path) -> Artifact:
    """The artifact in `path`, with its digest and its virtual tokens, which the gate would find."""
    try:
        config = json.loads((path / CONFIG_FILE).read_text())
    except ValueError:  # damaged since it passed the gate
        config = {}
    virtual = config.get("num_virtual_tokens", 0)
    prefix = virtual if config.get("peft_type") == "PREFIX_TUNING" else 0
    digest = folder_digest(path)
    return Artifact(digest, path, virtual - prefix, prefix)


class InProcess:
    """An engine with numbered generations; loads reach it as they reach the worker."""

    def __init__(self, model: PagedModel, config: EngineConfig) -> None:
        self.config = config
        self.loads: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.engine: Engine = build_engine(config, model, describe_base(config, model), self.loads)
        self._next = 0

    def submit(self, prompt: list[int], adapter: Path | None = None, **options: Any) -> int:
        """Queues a generation; returns its id."""
        self._next += 1
        artifact = artifact_at(adapter) if adapter else None
        tenant = options.pop("tenant", "t")
        salt = options.pop("salt", b"salt")
        sampling = options.pop("sampling", GREEDY)
        self.engine.submit(Generation(self._next, tenant, salt, artifact, tuple(prompt), sampling, **options))
        return self._next

    def load(self, adapters: Iterable[Path]) -> None:
        """Makes programs resident, so that what follows doesn't depend on how fast they are loaded."""
        for adapter in adapters:
            self.engine.slots.preload(artifact_at(adapter))
            assert self.loads.get(timeout=PATIENCE_SECONDS).error is None

    def step(self) -> list[Delta]:
        """One step, after whatever the loading thread has brought."""
        deltas: list[Delta] = []
        while not self.loads.empty():
            load = self.loads.get()
            if load.error:
                deltas += self.engine.load_failed(load.artifact, load.error)
        return deltas + self.engine.step()

    def run(self) -> dict[int, list[Delta]]:
        """Steps until nothing is left to do; the deltas of each generation."""
        deltas: dict[int, list[Delta]] = {}
        end = time.monotonic() + PATIENCE_SECONDS
        while self.engine.has_work:
            assert time.monotonic() < end, "the engine makes no progress"
            steps = self.engine.steps
            for delta in self.step():
                deltas.setdefault(delta.id, []).append(delta)
            if self.engine.steps == steps:
                time.sleep(0.001)  # every sequence waits for its program
        self.engine.scheduler.check()
        return deltas

    def close(self) -> None:
        """Ends the loading thread."""
        self.engine.slots.close()


def tokens(deltas: list[Delta]) -> list[int]:
    """All tokens of one generation; asserts that it did not fail."""
    assert deltas[-1].error is None, deltas[-1].error
    return [token for delta in deltas for token in delta.tokens]
