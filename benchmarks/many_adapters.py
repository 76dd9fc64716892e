"""Many adapters registered on one server: what their number costs, and what it costs when memory holds half of them.

    python benchmarks/many_adapters.py                               # the comparisons; 4.5 GB on disk
    python benchmarks/many_adapters.py --shape tiny --adapters 40 --fit 8 --requests 60 --clients 8   # a quick check
    python benchmarks/many_adapters.py --popularity zipf --rate 1.5  # one measurement: Poisson arrivals, per second
    python benchmarks/many_adapters.py --popularity uniform          # one measurement: closed loop

Adapters have rank 8 on q_proj and v_proj. Each request has 32 prompt tokens and 32 new ones. The comparisons:
- `many_over_few`: all adapters, zipf(1.0), beside the first five of them; closed loop.
- `twice_over_fitting`: uniform over twice as many adapters as the server's memory holds, beside as many as it holds;
  throughput in a closed loop, the first token's time with Poisson arrivals at half of the rate that the latter reached.

Before each measurement its most popular adapters are asked for once. An adapter is made, pushed and deleted: the disk
holds one copy, the server's, which the work directory keeps for the next time. The table goes to standard error; the
last line of standard output is one JSON document.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass

from hatrack_system import Server, arrivals, serving
from register import register
from rich.console import Console
from rich.table import Table
from setting import Document, as_document, device_options, make_inputs, options, print_document
from traffic import (
    Popularity,
    Served,
    closed_loop,
    draw,
    first_token_ms,
    inter_token_ms,
    open_loop,
    poisson_arrivals,
    throughput,
)
from workload import PROMPT_TOKENS, SMALL, Inputs, prompt

from hatrack_client import AsyncClient

FEW = 5
NEW_TOKENS = 32
WARM_ADAPTERS = 512  # asked for before a measurement, at most
LOAD = 0.5  # of the open loop, in what the closed one reached
BARS = {"many_over_few": {"throughput": 0.9}, "twice_over_fitting": {"throughput": 0.6, "first_token_p95": 3.0}}


@dataclass(frozen=True, slots=True)
class Phase:
    """Traffic to the first `adapters` of those registered."""

    name: str
    adapters: int
    popularity: Popularity
    requests: int
    clients: int
    """Of a closed loop."""
    rate: float | None = None
    """Requests per second, of an open loop instead."""


@dataclass(frozen=True, slots=True)
class Rack:
    """A server with all adapters registered."""

    server: Server
    client: AsyncClient
    names: list[str]

    async def measure(self, phase: Phase) -> Document:
        """One phase, and what it did to the server's memory."""
        names = self.names[: phase.adapters]
        wanted = draw(names, phase.popularity, phase.requests, phase.name)
        # Backwards: the most popular are the ones last used, as they would be after a while.
        await closed_loop([(name, 1, f"{phase.name} warm-up") for name in names[:WARM_ADAPTERS][::-1]], 8, self._send)
        before = self.server.metrics()
        served = await self._run(phase, [(name, NEW_TOKENS, f"{phase.name} {i}") for i, name in enumerate(wanted)])
        after = self.server.metrics()
        return (
            asdict(phase)
            | found(served)
            | {
                "distinct": len(set(wanted)),
                "resident_programs": int(after["hatrack_resident_programs"]),
                "evictions": int(after["hatrack_adapter_evictions_total"] - before["hatrack_adapter_evictions_total"]),
            }
        )

    async def _run(self, phase: Phase, requests: list[tuple[str, int, str]]) -> list[Served]:
        if phase.rate is None:
            return await closed_loop(requests, phase.clients, self._send)
        return await open_loop(requests, poisson_arrivals(phase.rate, len(requests), phase.name), self._send)

    async def _send(self, request: tuple[str, int, str]) -> list[float]:
        adapter, tokens, seed = request
        return await arrivals(self.client, adapter, prompt(f"{seed} {adapter}"), tokens)


def main() -> None:
    """Measures, prints the table and the JSON document."""
    args = parse_arguments()
    inputs = make_inputs(args, "--adapters", "0", "--small")
    results = asyncio.run(one_phase(args, inputs) if args.popularity else comparisons(args, inputs))
    Console(stderr=True).print(as_table(args.shape, results["phases"]))
    print_document(as_document("many_adapters", args, protocol(args, inputs) | results))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = options(__doc__)
    parser.add_argument("--adapters", type=int, default=2000, help="registered")
    parser.add_argument("--adapter-gb", type=float, default=1.0, help="the server's memory for them")
    parser.add_argument("--host-adapter-gb", type=float, default=1.0, help="and for those that had to leave it")
    parser.add_argument("--fit", type=int, default=64, help="how many the memory holds in the second comparison")
    parser.add_argument("--requests", type=int, default=320, help="per measurement")
    parser.add_argument("--clients", type=int, default=32, help="of a closed loop")
    parser.add_argument("--popularity", choices=("zipf", "uniform"), help="one measurement instead of the comparisons")
    parser.add_argument("--rate", type=float, help="of that one: an open loop of so many requests per second")
    args = parser.parse_args()
    if not args.popularity and args.adapters < 2 * args.fit:
        parser.error(f"--adapters {args.adapters} is less than twice --fit {args.fit}")
    if args.requests <= args.clients:
        parser.error(f"--requests {args.requests} must be more than --clients {args.clients}")
    return args


@asynccontextmanager
async def rack(args: argparse.Namespace, inputs: Inputs, adapter_gb: float) -> AsyncIterator[Rack]:
    """A fresh server with so much memory for adapters, over the data directory of all."""
    memory = ["--adapter-gb", f"{adapter_gb:.6f}", "--host-adapter-gb", str(args.host_adapter_gb)]
    names = [f"{SMALL}-{number}" for number in range(args.adapters)]
    with serving(inputs.base, [*device_options(args), *memory], inputs.folder / "server") as server:
        async with AsyncClient(server.address) as client:
            await register(client, inputs.adapter(SMALL), names)
            yield Rack(server, client, names)


async def one_phase(args: argparse.Namespace, inputs: Inputs) -> Document:
    """What --popularity and --rate ask for."""
    phase = Phase(f"{args.adapters} adapters", args.adapters, args.popularity, args.requests, args.clients, args.rate)
    async with rack(args, inputs, args.adapter_gb) as full:
        return {"phases": [await full.measure(phase)]}


async def comparisons(args: argparse.Namespace, inputs: Inputs) -> Document:
    """Few adapters beside all; as many as fit beside twice as many."""
    amount = (args.requests, args.clients)
    async with rack(args, inputs, args.adapter_gb) as full:
        few = await full.measure(Phase(f"{FEW} adapters", FEW, "zipf", *amount))
        many = await full.measure(Phase(f"{args.adapters} adapters", args.adapters, "zipf", *amount))
    async with rack(args, inputs, args.fit * inputs.adapter_bytes(SMALL) / 1e9) as tight:
        fits = await tight.measure(Phase("all fit", args.fit, "uniform", *amount))
        twice = await tight.measure(Phase("half fit", 2 * args.fit, "uniform", *amount))
        rate = round(LOAD * fits["tokens_per_s"] / NEW_TOKENS, 3)
        calm = await tight.measure(Phase("all fit, open loop", args.fit, "uniform", *amount, rate))
        calm_twice = await tight.measure(Phase("half fit, open loop", 2 * args.fit, "uniform", *amount, rate))
    ratios = {
        "many_over_few": {"throughput": over(many["tokens_per_s"], few["tokens_per_s"])},
        "twice_over_fitting": {
            "throughput": over(twice["tokens_per_s"], fits["tokens_per_s"]),
            "first_token_p95": over(calm_twice["first_token_ms"]["p95"], calm["first_token_ms"]["p95"]),
        },
    }
    return {"phases": [few, many, fits, twice, calm, calm_twice], "ratios": ratios, "bars": BARS}


def over(one: float, other: float) -> float:
    """Their ratio."""
    return round(one / other, 3)


def found(served: list[Served]) -> Document:
    """What users saw."""
    return {
        "tokens_per_s": round(throughput(served), 1),
        "first_token_ms": first_token_ms(served),
        "inter_token_ms": inter_token_ms(served),
    }


def protocol(args: argparse.Namespace, inputs: Inputs) -> Document:
    """How it was measured."""
    return {
        "registered": args.adapters,
        "adapter_gb": args.adapter_gb,
        "host_adapter_gb": args.host_adapter_gb,
        "adapter_bytes": inputs.adapter_bytes(SMALL),
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS,
    }


def as_table(shape: str, phases: list[Document]) -> Table:
    """The results for people."""
    table = Table(title=f"{shape}: many adapters; p50 | p95 | p99", title_justify="left")
    table.add_column("")
    for column in ("used", "resident", "evictions", "tokens/s", "first token, ms", "inter-token, ms"):
        table.add_column(column, justify="right")
    for phase in phases:
        counts = (str(phase[key]) for key in ("distinct", "resident_programs", "evictions", "tokens_per_s"))
        times = (
            " | ".join(f"{phase[key][p]:.0f}" for p in ("p50", "p95", "p99"))
            for key in ("first_token_ms", "inter_token_ms")
        )
        table.add_row(phase["name"], *counts, *times)
    return table


if __name__ == "__main__":
    main()
