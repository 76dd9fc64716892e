from __future__ import annotations

import time

import pytest
import torch

from hatrack_server.adapters.pace import BURST_SECONDS, PAUSE, Paced


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    taken: list[float] = []
    monkeypatch.setattr(time, "sleep", taken.append)
    return taken


def work(operations: int) -> float:
    """Does that many operations; the thread's own seconds that it took."""
    start = time.thread_time()
    for _ in range(operations):
        torch.ones(64, 64).exp()
    return time.thread_time() - start


def test_pauses_are_in_proportion_to_the_work(pauses: list[float]) -> None:
    with Paced(lambda: True):
        worked = work(3000)
    assert min(pauses) >= PAUSE * BURST_SECONDS
    assert worked - BURST_SECONDS - 0.01 <= sum(pauses) / PAUSE <= worked + 0.01


def test_no_pause_while_no_step_runs(pauses: list[float]) -> None:
    with Paced(lambda: False):
        work(3000)
    assert not pauses


def test_operations_give_what_they_give() -> None:
    with Paced(lambda: True):
        total = torch.arange(4).view(2, 2).sum(dim=1).tolist()
    assert total == [1, 5]


def test_what_was_done_while_no_step_ran_is_not_paused_for(pauses: list[float]) -> None:
    steps: list[str] = []
    with Paced(lambda: bool(steps)):
        worked = work(3000)
        steps.append("one")
        work(1)
    assert sum(pauses) < PAUSE * worked / 2
