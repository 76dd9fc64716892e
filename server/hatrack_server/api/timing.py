"""When a request came, was admitted, and got its tokens."""

from __future__ import annotations

import time

from hatrack.v1 import inference_pb2
from hatrack_server.api.responses import timing_message
from hatrack_server.metrics import Metrics
from hatrack_server.types import Delta


class Stopwatch:
    """Starts with the request's arrival, and tells the metrics what it sees. All values are seconds."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._arrival = time.monotonic()
        self._last_tokens: float | None = None
        self._first_token = 0.0
        self._queue = 0.0
        self.cached_tokens = 0

    @property
    def seconds(self) -> float:
        """Since arrival."""
        return time.monotonic() - self._arrival

    def see(self, delta: Delta) -> None:
        """Notes when a delta came, and what the worker says of its queue and prefix cache."""
        self._queue = max(self._queue, delta.queue_seconds)
        self.cached_tokens = max(self.cached_tokens, delta.cached_tokens)
        if not delta.tokens:
            return
        now = time.monotonic()
        if self._last_tokens is None:
            self._first_token = now - self._arrival
            self._metrics.started(queue=self._queue, first_token=self._first_token)
        else:
            self._metrics.went_on(seconds=now - self._last_tokens, tokens=len(delta.tokens))
        self._last_tokens = now

    def timing(self) -> inference_pb2.Timing:
        """What the client is told at the end."""
        return timing_message(queue=self._queue, first_token=self._first_token, total=self.seconds)
