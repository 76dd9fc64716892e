"""Sends messages over a pipe from a thread of its own, so that a slow reader never holds the sender up."""

from __future__ import annotations

import queue
import threading
from multiprocessing.connection import Connection
from typing import Generic, TypeVar

M = TypeVar("M")


class Outbox(Generic[M]):
    """One end of a pipe, for sending. Messages for a reader that has died are lost; its own pipe end tells of that."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._queue: queue.SimpleQueue[M | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._send, name="outbox", daemon=True)
        self._thread.start()

    def put(self, message: M) -> None:
        """Queues a message; never blocks."""
        self._queue.put(message)

    def close(self) -> None:
        """Sends what is queued, then ends. Blocks while the reader lives and does not read."""
        self._queue.put(None)
        self._thread.join()

    def _send(self) -> None:
        while (message := self._queue.get()) is not None:
            try:
                self._connection.send(message)
            except OSError:
                return
