"""Work beside the step loop that leaves it the cores: short bursts with pauses in between."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch.overrides import TorchFunctionMode

BURST_SECONDS = 0.0005
PAUSE = 5.0  # times the burst before it: this thread takes a sixth of a core, and a load six times as long


class Paced(TorchFunctionMode):
    """Makes its thread pause between torch's operations while `beside_steps()`.

    On a CPU a step's products have every core, and each waits at its end for the slowest of its threads. Another thread
    that never sleeps makes one of them wait for the operating system's whole time slice, again and again: a step takes
    three to five times as long. One that sleeps is scheduled at once and soon gone again.
    """

    def __init__(self, beside_steps: Callable[[], bool]) -> None:
        super().__init__()
        self._beside_steps = beside_steps
        self._rested: float | None = None  # the thread's own time when it last paused; None while no step runs

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Runs the operation, then pauses if the burst has lasted long enough."""
        result = func(*args, **(kwargs or {}))
        if self._beside_steps():
            self._pause()
        else:
            self._rested = None  # no clock is read: a load has thousands of operations
        return result

    def _pause(self) -> None:
        if self._rested is None:
            self._rested = time.thread_time()
        worked = time.thread_time() - self._rested
        if worked >= BURST_SECONDS:
            time.sleep(PAUSE * worked)
            self._rested = time.thread_time()
