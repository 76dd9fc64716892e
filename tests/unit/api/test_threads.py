from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from hatrack_server.api import threads


async def test_what_was_entered_is_left_though_the_call_is_cancelled_while_no_thread_is_free() -> None:
    events: list[str] = []
    done = threading.Event()

    @contextmanager
    def held() -> Iterator[None]:
        events.append("entered")
        yield
        events.append("left")
        done.set()

    busy = threading.Event()
    leave = asyncio.Event()

    async def call() -> None:
        async with threads.entered(held):
            await leave.wait()

    task = asyncio.create_task(call())
    while not events:
        await asyncio.sleep(0.001)
    blocked = [asyncio.create_task(threads.in_thread(busy.wait)) for _ in range(threads._SHORT_CALLS._max_workers)]
    await asyncio.sleep(0.01)
    leave.set()
    await asyncio.sleep(0.01)  # the leaving is queued
    for _ in range(2):
        task.cancel()
        await asyncio.sleep(0.01)
    busy.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.gather(*blocked)
    assert done.wait(5)
    assert events == ["entered", "left"]
