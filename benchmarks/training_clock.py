"""When each step of a training run ended, and how much memory it took at most: both systems keep the same clock."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # proc(5)


@dataclass(frozen=True, slots=True)
class TrainingMeasurement:
    """One system's run, whose first step only warms up."""

    steps_s: list[float]
    """Each step after the first."""
    steps_peak_bytes: int
    """While they ran: resident pages of the process on a CPU, allocated memory on a GPU."""
    peak_bytes: int
    """The same from the process's start to its end: the base is loaded, the adapter written."""
    losses: list[float]
    """Of every step; a check that both systems learn the same."""


@dataclass(slots=True)
class Clock:
    """Told of every step."""

    ends: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    start_peak: int = 0
    steps_peak: int = 0

    def step(self, loss: float) -> None:
        """A step has ended; its loss was read from the device, so nothing of it is still under way."""
        self.ends.append(time.perf_counter())
        self.losses.append(loss)
        if len(self.ends) == 1:
            self.start_peak = peak_bytes()
            reset_peak()
        self.steps_peak = peak_bytes()

    def found(self) -> dict[str, Any]:
        """A TrainingMeasurement as JSON has it."""
        steps = [after - before for before, after in pairwise(self.ends)]
        return asdict(TrainingMeasurement(steps, self.steps_peak, max(peak_bytes(), self.start_peak), self.losses))


def peak_bytes() -> int:
    """The most memory since the start or the last reset."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def reset_peak() -> None:
    """From here on, the peak is a new one."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        CLEAR.write_text(RESET_PEAK)
