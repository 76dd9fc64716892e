from __future__ import annotations

import asyncio
from collections import Counter
from itertools import pairwise

import pytest
from traffic import (
    Served,
    closed_loop,
    draw,
    first_token_ms,
    inter_token_ms,
    open_loop,
    percentiles,
    poisson_arrivals,
    throughput,
)

NAMES = [f"a{n}" for n in range(100)]


def test_zipf_asks_for_the_nth_as_often_as_one_in_n() -> None:
    counts = Counter(draw(NAMES, "zipf", 50_000, "seed"))
    assert counts["a0"] / counts["a1"] == pytest.approx(2, rel=0.1)
    assert counts["a0"] / counts["a9"] == pytest.approx(10, rel=0.1)


def test_uniform_asks_for_all_alike() -> None:
    counts = Counter(draw(NAMES, "uniform", 50_000, "seed"))
    assert len(counts) == len(NAMES)
    assert max(counts.values()) < 1.3 * min(counts.values())


def test_draws_repeat_with_their_seed() -> None:
    assert draw(NAMES, "zipf", 50, "one") == draw(NAMES, "zipf", 50, "one") != draw(NAMES, "zipf", 50, "two")


def test_poisson_arrivals_have_their_rate_and_its_spread() -> None:
    times = poisson_arrivals(4.0, 20_000, "seed")
    gaps = [after - before for before, after in pairwise(times)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(1 / 4, rel=0.05)
    assert sum((gap - mean) ** 2 for gap in gaps) / len(gaps) == pytest.approx(mean**2, rel=0.1)


async def test_an_open_loop_does_not_wait_for_answers() -> None:
    sent: list[int] = []
    all_sent = asyncio.Event()

    async def send(request: int) -> list[float]:
        sent.append(request)
        if len(sent) == 20:
            all_sent.set()
        await all_sent.wait()
        return []

    await open_loop(range(20), [0.0] * 20, send)
    assert sorted(sent) == list(range(20))


async def test_a_closed_loop_has_as_many_requests_open_as_clients() -> None:
    unanswered, most = 0, 0

    async def send(_: int) -> list[float]:
        nonlocal unanswered, most
        unanswered += 1
        most = max(most, unanswered)
        await asyncio.sleep(0)
        unanswered -= 1
        return []

    assert len(await closed_loop(range(20), 3, send)) == 20
    assert most == 3


def test_percentiles_are_of_nearest_rank_in_milliseconds() -> None:
    hundred = [n / 1000 for n in range(100, 0, -1)]
    assert percentiles(hundred) == {"p50": 50, "p95": 95, "p99": 99, "max": 100}
    assert percentiles([0.002]) == {"p50": 2, "p95": 2, "p99": 2, "max": 2}


def test_throughput_leaves_out_what_comes_after_the_last_request() -> None:
    served = [Served(0.0, [1.0, 2.0, 3.0]), Served(2.0, [2.5, 9.0])]
    assert throughput(served) == 1.0
    assert first_token_ms(served)["max"] == 1000
    assert inter_token_ms(served)["max"] == 6500
