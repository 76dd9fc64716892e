"""Requests as users send them: which adapters they want, when they come, and what they waited for.

Pure but for the two loops that send; what one request does is the caller's.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

Popularity = Literal["zipf", "uniform"]
Percentiles = dict[str, float]

SHARES = (50, 95, 99)

T = TypeVar("T")
Send = Callable[[T], Awaitable[list[float]]]
"""Makes one request; when each of its tokens came, in seconds of `time.perf_counter`."""


@dataclass(frozen=True, slots=True)
class Served:
    """One request, in seconds of one clock."""

    sent: float
    arrivals: Sequence[float]
    """Of its tokens."""


def draw(adapters: Sequence[str], popularity: Popularity, count: int, seed: str) -> list[str]:
    """So many of the adapters, with repetition: all alike, or the nth as often as 1/n (Zipf's law, exponent 1)."""
    weights = [1 / rank if popularity == "zipf" else 1.0 for rank in range(1, len(adapters) + 1)]
    return random.Random(seed).choices(adapters, weights, k=count)


def poisson_arrivals(rate: float, count: int, seed: str) -> list[float]:
    """Seconds from the start at which so many independent requests come, `rate` per second."""
    source = random.Random(seed)
    return list(itertools.accumulate(source.expovariate(rate) for _ in range(count)))


async def open_loop(requests: Sequence[T], times: Sequence[float], send: Send[T]) -> list[Served]:
    """Sends each request at its time, in seconds from now, however many are unanswered by then."""
    start = time.perf_counter()

    async def at(seconds: float, request: T) -> Served:
        due = start + seconds
        await asyncio.sleep(due - time.perf_counter())
        return Served(due, await send(request))  # a client that is late itself counts, too

    return await asyncio.gather(*map(at, times, requests))


async def closed_loop(requests: Iterable[T], clients: int, send: Send[T]) -> list[Served]:
    """So many clients take the requests in turn; each sends its next when its last is answered."""
    left = iter(requests)

    async def client() -> list[Served]:
        return [await timed(request, send) for request in left]

    return list(itertools.chain(*await asyncio.gather(*(client() for _ in range(clients)))))


async def timed(request: T, send: Send[T]) -> Served:
    """One request from when it was sent."""
    sent = time.perf_counter()
    return Served(sent, await send(request))


def throughput(served: Sequence[Served]) -> float:
    """Tokens per second while requests kept coming: what the last ones get alone is left out."""
    start, end = min(each.sent for each in served), max(each.sent for each in served)
    tokens = sum(arrival <= end for each in served for arrival in each.arrivals)
    return tokens / (end - start)


def first_token_ms(served: Iterable[Served]) -> Percentiles:
    """Percentiles over requests, from sending to first token."""
    return percentiles([each.arrivals[0] - each.sent for each in served])


def inter_token_ms(served: Iterable[Served]) -> Percentiles:
    """Percentiles over all tokens but the first ones, from the token before."""
    return percentiles([gap for each in served for gap in gaps(each.arrivals)])


def gaps(arrivals: Sequence[float]) -> list[float]:
    """Seconds between tokens."""
    return [after - before for before, after in itertools.pairwise(arrivals)]


def percentiles(seconds: Iterable[float]) -> Percentiles:
    """Of nearest rank, and the greatest, in milliseconds."""
    ordered = sorted(seconds)
    found = {f"p{share}": ordered[math.ceil(share / 100 * len(ordered)) - 1] for share in SHARES} | {"max": ordered[-1]}
    return {name: round(value * 1e3, 2) for name, value in found.items()}
