"""Blocking work beside the event loop, which a cancel can't leave half done."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

# For what every call needs, e.g. its tenant: what takes longer has a pool of its own, so that nobody queues behind it.
_SHORT_CALLS = ThreadPoolExecutor(32, thread_name_prefix="short-calls")


async def in_thread(function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Runs a short `function` in a thread, as `in_pool` does."""
    return await in_pool(_SHORT_CALLS, function, *args, **kwargs)


async def in_pool(pool: Executor, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Runs `function` in a thread of `pool`; raises what it raises.

    A cancel drops what has not begun, and else is raised only once the thread is through: a caller that cleans up
    files must not race with one that still writes them.
    """
    work = pool.submit(function, *args, **kwargs)
    result = asyncio.wrap_future(work)
    try:
        return await asyncio.shield(result)
    except asyncio.CancelledError:
        if not work.cancel():
            await asyncio.gather(result, return_exceptions=True)
        raise


@asynccontextmanager
async def entered(
    context: Callable[P, AbstractContextManager[T]], *args: P.args, **kwargs: P.kwargs
) -> AsyncIterator[T]:
    """Makes, enters and leaves a blocking context manager in threads; a cancel leaves it too, even while it is made."""
    held = ExitStack()

    def enter() -> T:
        return held.enter_context(context(*args, **kwargs))

    try:
        yield await in_thread(enter)
    finally:
        # Not dropped by a cancel, even before it has begun: what was entered would be held for ever.
        await asyncio.shield(asyncio.wrap_future(_SHORT_CALLS.submit(held.close)))
