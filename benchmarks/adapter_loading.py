"""How long an adapter takes to become resident, by where it comes from, and what a neighbour feels of it.

    python benchmarks/adapter_loading.py
    python benchmarks/adapter_loading.py --shape tiny --tokens 40   # a quick check; its figures mean nothing

The adapters are LoRAs of rank 16 on all linear layers; the server's memory holds three, so that going round eight of
them loads one with each request. Tiers: `page cache` (the file was read before), `disk` (the kernel was told to drop
the file), `host` (kept compiled when it was evicted). Per tier:
- `load_ms`: the server's own `hatrack_adapter_load_seconds`, one load at a time: reading, compiling, placing;
- `first_token_ms`: what the request waited for, beside `resident_first_token_ms`: the same once it is resident;
- `neighbour`: times between the tokens of another completion, alone (`quiet`), while a request for a resident adapter
  comes with every fourth of its tokens (`resident`), and while each such request has its adapter loaded (`loads`). The
  `ratio` is of `loads` over `quiet`; `over_resident`, of `loads` over `resident`, tells the loads' own part: prompts of
  requests take their time either way, and now and then a step has two.

The table goes to standard error; the last line of standard output is one JSON document.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from hatrack_system import Server, arrivals, serving
from rich.console import Console
from rich.table import Table
from setting import Document, as_document, device_options, make_inputs, options, print_document
from traffic import gaps, percentiles
from workload import RANK, Inputs, prompt

from hatrack_client import AsyncClient, Delta

ADAPTERS = 8
RESIDENT = 3
ROUNDS = 3
PROMPT_TOKENS = 4  # of the requests that want a load: short, so that little but the load is measured
EVERY = 4  # of the neighbour's tokens, for one request
TURNS = 3
NEIGHBOUR_BAR = 2.0

Request = Callable[[], Coroutine[Any, Any, float]]


@dataclass(frozen=True, slots=True)
class Tier:
    """Where programs come from."""

    name: str
    cold: bool = False
    """Whether the file is dropped from the page cache before each load."""
    kept: int = 0
    """Evicted programs that stay in the host's memory."""


TIERS = (Tier("page cache"), Tier("disk", cold=True), Tier("host", kept=2 * ADAPTERS))


def main() -> None:
    """Measures, prints the table and the JSON document."""
    parser = options(__doc__)
    parser.add_argument("--tokens", type=int, default=64, help="of each of the neighbour's completions")
    args = parser.parse_args()
    inputs, console = make_inputs(args, "--adapters", str(ADAPTERS)), Console(stderr=True)
    results = []
    for tier in TIERS:
        with console.status(tier.name):
            results.append(measure_tier(args, inputs, tier))
    console.print(as_table(args.shape, results))
    protocol = {"rank": RANK, "adapter_bytes": inputs.adapter_bytes("a0"), "neighbour_tokens": args.tokens}
    print_document(as_document("adapter_loading", args, protocol | {"tiers": results, "bar": NEIGHBOUR_BAR}))


def measure_tier(args: argparse.Namespace, inputs: Inputs, tier: Tier) -> Document:
    """One tier on a fresh server."""
    program = inputs.adapter_bytes("a0") / 1e9
    limits = ["--adapter-gb", f"{RESIDENT * program:.6f}", "--host-adapter-gb", f"{tier.kept * program:.6f}"]
    with serving(inputs.base, [*device_options(args), *limits]) as server:
        return asyncio.run(_measure(server, inputs, tier, args.tokens))


async def _measure(server: Server, inputs: Inputs, tier: Tier, tokens: int) -> Document:
    async with AsyncClient(server.address) as client:
        loading = Loading(server, client, tier, await push(server, client, inputs))
        return {"tier": tier.name} | await loading.alone() | {"neighbour": await beside(loading, tokens)}


async def push(server: Server, client: AsyncClient, inputs: Inputs) -> dict[str, Path]:
    """Every adapter's weights in the server's store, by name."""
    stored = {}
    for name in (f"a{number}" for number in range(ADAPTERS)):
        version = (await client.push_adapter(name, inputs.adapter(name))).versions[0]
        stored[name] = server.data_dir / "artifacts" / version.digest / "adapter_model.safetensors"
    return stored


class Loading:
    """Requests for one token each, whose adapters must be loaded first, or not."""

    def __init__(self, server: Server, client: AsyncClient, tier: Tier, stored: dict[str, Path]) -> None:
        self.client = client
        self.neighbour, *self._others = stored  # the neighbour's is pinned, so the others share what is left
        self._server = server
        self._tier = tier
        self._stored = stored
        self._next: Iterator[str] = cycle(self._others)
        self._last = self._others[0]

    async def alone(self) -> Document:
        """One load after another; each adapter is asked for again once it is resident."""
        loads, first, resident = [], [], []
        for _ in range(ROUNDS * len(self._others)):
            count, seconds = self._loads()
            first.append(await self.another())
            later, total = self._loads()
            assert later == count + 1, "the adapter was resident already"
            loads.append(total - seconds)
            resident.append(await self.again())
        found = {"load_ms": loads, "first_token_ms": first, "resident_first_token_ms": resident}
        return {"loads": len(loads)} | {name: percentiles(seconds) for name, seconds in found.items()}

    async def another(self) -> float:
        """Asks for the adapter that was longest unused; seconds to its token."""
        self._last = next(self._next)
        if self._tier.cold:
            drop(self._stored[self._last])
        return await self.again()

    async def again(self) -> float:
        """Asks for the adapter that was asked for last; seconds to its token."""
        start = time.perf_counter()
        times = await arrivals(self.client, self._last, prompt(str(start))[:PROMPT_TOKENS], 1)
        return times[0] - start

    def _loads(self) -> tuple[float, float]:
        metrics = self._server.metrics()
        return metrics["hatrack_adapter_load_seconds_count"], metrics["hatrack_adapter_load_seconds_sum"]


def drop(file: Path) -> None:
    """Out of the page cache; what was never written to the disk would stay, but the store syncs what it takes."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


async def beside(loading: Loading, tokens: int) -> Document:
    """A completion of so many tokens, alone, beside requests, and beside requests whose adapters are loaded."""
    requests: dict[str, Request | None] = {"quiet": None, "resident": loading.again, "loads": loading.another}
    seconds: dict[str, list[float]] = {name: [] for name in requests}
    for _ in range(TURNS):  # a machine that slows down meets all three
        for name, request in requests.items():
            seconds[name] += await neighbour(loading, tokens, request)
    found = {name: percentiles(each) for name, each in seconds.items()}
    return found | {
        "ratio": ratio(found["loads"], found["quiet"]),
        "over_resident": ratio(found["loads"], found["resident"]),
    }


def ratio(times: dict[str, float], others: dict[str, float]) -> dict[str, float]:
    """Of what counts for a neighbour."""
    return {key: round(times[key] / others[key], 2) for key in ("p95", "max")}


async def neighbour(loading: Loading, tokens: int, request: Request | None) -> list[float]:
    """Seconds between a completion's tokens; one request goes out with every few of them."""
    times: list[float] = []
    requests: list[asyncio.Task[float]] = []
    stream = loading.client.stream(
        loading.neighbour, token_ids=prompt(str(time.perf_counter())), temperature=0, max_tokens=tokens, ignore_eos=True
    )
    async for item in stream:
        if not isinstance(item, Delta):
            break
        times += [time.perf_counter()] * len(item.token_ids)
        if request and len(times) >= EVERY * (1 + len(requests)):
            requests.append(asyncio.create_task(request()))
    await asyncio.gather(*requests)
    return gaps(times)


def as_table(shape: str, results: list[Document]) -> Table:
    """The results for people."""
    table = Table(title=f"{shape}: loading one adapter", title_justify="left")
    for column in ("tier", "load, ms", "first token, ms", "if resident", "neighbour p95", "max", "ratio p95", "max"):
        table.add_column(column, justify="right")
    for result in results:
        medians = (result[key]["p50"] for key in ("load_ms", "first_token_ms", "resident_first_token_ms"))
        beside = result["neighbour"]
        times = (f"{beside['quiet'][key]:.0f} → {beside['loads'][key]:.0f}" for key in ("p95", "max"))
        table.add_row(result["tier"], *(f"{each:.1f}" for each in medians), *times, *map(str, beside["ratio"].values()))
    return table


if __name__ == "__main__":
    main()
