"""Graphs without a GPU: a recorded pass is run again, on what a graph would read, into what it would write."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from inprocess import InProcess
from torch import Tensor

from hatrack_server.adapters import pools
from hatrack_server.engine.graphs import DecodeGraphs


class Recorder:
    """What a CudaRecorder is on a GPU."""

    def __init__(self) -> None:
        self.recorded = 0
        self.replayed = 0

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """See Record."""
        out = run()
        self.recorded += 1

        @torch.inference_mode()
        def replay() -> Tensor:
            self.replayed += 1
            return out.copy_(run())

        return replay


def by_graphs(engine: InProcess, record: Callable[[Callable[[], Tensor]], Callable[[], Tensor]]) -> None:
    """Makes an engine on the CPU run its passes by graphs; its pools must be `as_on_a_device`."""
    engine.engine._graphs = DecodeGraphs(engine.engine.model, record)


def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes all pools copy when they grow."""
    init = pools.Pools.__init__

    def dense(self: pools.Pools, *args: object, **options: object) -> None:
        init(self, *args, **{**options, "lazy": False})  # type: ignore[arg-type]

    monkeypatch.setattr(pools.Pools, "__init__", dense)
