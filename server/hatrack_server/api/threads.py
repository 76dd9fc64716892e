"""Blocking work beside the event loop, which a cancel can't leave half done."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager
from functools import partial
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


async def in_thread(function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Runs `function` in a thread; raises what it raises.

    A cancel is raised only once the thread is through: a caller that cleans up files must not race with one that
    still writes them.
    """
    work = asyncio.ensure_future(asyncio.to_thread(function, *args, **kwargs))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.gather(work, return_exceptions=True)
        raise


async def in_pool(pool: Executor, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Runs `function` in a thread of `pool`; for what may take long, so that short calls need not queue behind it."""
    return await asyncio.get_running_loop().run_in_executor(pool, partial(function, *args, **kwargs))


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
        await in_thread(held.close)
