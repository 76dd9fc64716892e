from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from hatrack.manifest import BaseIdentity
from hatrack_client import AsyncClient, Client, Delta, Generation, InvalidArgument, NotFound


@pytest.fixture
async def client(server: Any) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.address, api_key="hat-1") as client:
        yield client


async def test_both_clients_give_the_same_generation(server: Any, client: AsyncClient) -> None:
    with Client(server.address) as synchronous:
        expected = await asyncio.to_thread(synchronous.generate, "tone", prompt="hi", seed=1)
    assert await client.generate("tone", prompt="hi", seed=1) == expected
    assert server.requests[0] == server.requests[1]
    assert server.metadata["authorization"] == "Bearer hat-1"


async def test_stream_gives_deltas_then_the_whole(client: AsyncClient) -> None:
    items = [item async for item in client.stream("tone", prompt="hi")]
    assert [item.text for item in items if isinstance(item, Delta)] == ["two ", "hats"]
    assert isinstance(items[-1], Generation)
    assert items[-1].text == "two hats"


async def test_closing_a_stream_cancels_the_call(server: Any, client: AsyncClient) -> None:
    server.endless = True
    async with client.stream(prompt="hi") as stream:
        await anext(stream)
    assert await asyncio.to_thread(server.cancelled.wait, 5)
    assert [item async for item in stream] == []


async def test_cancelling_the_task_cancels_the_call(server: Any, client: AsyncClient) -> None:
    server.endless = True
    started = asyncio.Event()

    async def read() -> None:
        async for _ in client.stream(prompt="hi"):
            started.set()

    task = asyncio.create_task(read())
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(server.cancelled.wait, 5)


async def test_push_sends_every_byte(server: Any, client: AsyncClient, folder: Path) -> None:
    steps: list[tuple[int, int]] = []
    adapter = await client.push_adapter("tone", folder, stage=True, progress=lambda *step: steps.append(step))
    assert (adapter.name, adapter.version) == ("tone", 1)
    assert steps[-1] == (21 + 256 * 5000,) * 2
    with pytest.raises(InvalidArgument, match="not a folder"):
        await client.push_adapter("tone", folder / "nowhere")


async def test_the_base_is_told_by_its_four_digests(client: AsyncClient) -> None:
    assert await client.get_base() == BaseIdentity("w", "nf4-double-64", "t", "c")


async def test_adapters_are_listed_changed_and_deleted(server: Any, client: AsyncClient) -> None:
    for name in ("c", "a", "b"):
        server.hang(name, live=1, versions=2)
    assert [adapter.name async for adapter in client.list_adapters(page_size=2)] == ["a", "b", "c"]
    assert (await client.promote("a", 2)).live_version == 2
    assert (await client.rollback("a")).live_version == 1
    await client.delete_adapter("a")
    with pytest.raises(NotFound):
        await client.get_adapter("a")
