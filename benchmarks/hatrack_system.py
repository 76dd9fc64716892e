"""Measures Hatrack as a client sees it: `hatrack serve` in a child process, adapters pushed, completions streamed."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from workload import DECODE_STEPS, PREFILL_NEW_TOKENS, WARM_UP_NEW_TOKENS, Case, Inputs, Measurement

from hatrack_client import AsyncClient, Delta

ANNOUNCEMENT = "hatrack: serving on "
STOP_SECONDS = 30
# Early rows decode while late ones are still prefilled: so that all are there for DECODE_STEPS, they go on longer.
LEAD = 16


def measure_hatrack(inputs: Inputs, cases: Sequence[Case], run: int, options: Sequence[str]) -> list[Measurement]:
    """Every case on one fresh server; raises RuntimeError with the server's last words when it does not start."""
    with _serving(inputs.base, options) as address:
        return asyncio.run(_measure_all(address, inputs, cases, run))


@contextmanager
def _serving(base: Path, options: Sequence[str]) -> Iterator[str]:
    command = [sys.executable, "-m", "hatrack_client", "serve", "--model", str(base), *options]
    with tempfile.TemporaryDirectory() as data, Path(data, "stderr").open("w+") as log:
        ports = ["--port", "0", "--metrics-port", "0", "--data-dir", f"{data}/server"]
        with subprocess.Popen([*command, *ports], stdout=subprocess.PIPE, stderr=log, text=True) as server:
            try:
                yield _address(server, Path(log.name))
            finally:
                _stop(server)


def _address(server: subprocess.Popen[str], log: Path) -> str:
    assert server.stdout is not None
    for line in server.stdout:
        if line.startswith(ANNOUNCEMENT):
            return line.removeprefix(ANNOUNCEMENT).partition(",")[0]
    raise RuntimeError(f"hatrack serve did not start:\n{log.read_text()[-2000:]}")


def _stop(server: subprocess.Popen[str]) -> None:
    server.terminate()
    try:
        server.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        server.kill()


async def _measure_all(address: str, inputs: Inputs, cases: Sequence[Case], run: int) -> list[Measurement]:
    async with AsyncClient(address) as client:
        for name in sorted({name for case in cases for name in case.adapters() if name}):
            await client.push_adapter(name, inputs.adapter(name))
        return [await _measure(client, case, run) for case in cases]


async def _measure(client: AsyncClient, case: Case, run: int) -> Measurement:
    await _generate(client, case, case.prompts(run, "warm-up"), WARM_UP_NEW_TOKENS)
    start = time.perf_counter()
    await _generate(client, case, case.prompts(run, "prefill"), PREFILL_NEW_TOKENS)
    prefill = time.perf_counter() - start
    rows = await _generate(client, case, case.prompts(run, "decode"), 1 + DECODE_STEPS + LEAD)
    return Measurement(step_ms=decode_seconds(rows) / DECODE_STEPS * 1e3, prefill_s=prefill)


async def _generate(client: AsyncClient, case: Case, prompts: list[list[int]], tokens: int) -> list[list[float]]:
    """The arrival time of every token of every row, in seconds."""
    rows = zip(case.adapters(), prompts, strict=True)
    return await asyncio.gather(*(_arrivals(client, adapter, prompt, tokens) for adapter, prompt in rows))


async def _arrivals(client: AsyncClient, adapter: str, prompt: list[int], tokens: int) -> list[float]:
    arrivals: list[float] = []
    stream = client.stream(adapter, token_ids=prompt, temperature=0.0, max_tokens=tokens, ignore_eos=True)
    async for item in stream:
        if isinstance(item, Delta):
            arrivals += [time.perf_counter()] * len(item.token_ids)
    assert len(arrivals) == tokens
    return arrivals


def decode_seconds(rows: Sequence[Sequence[float]]) -> float:
    """From when every row has its first token until every row has DECODE_STEPS more than it had then."""
    start = max(row[0] for row in rows)
    ends = []
    for row in rows:
        before = sum(arrival <= start for arrival in row)
        ends.append(row[min(before + DECODE_STEPS, len(row)) - 1])
    return max(ends) - start
