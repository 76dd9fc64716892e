"""Hatrack as a client sees it: `hatrack serve` in a child process, adapters pushed, completions streamed."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

from workload import (
    DECODE_NEW_TOKENS,
    PREFILL_NEW_TOKENS,
    WARM_UP_NEW_TOKENS,
    Case,
    Inputs,
    Measurement,
    decode_ms,
)

from hatrack_client import AsyncClient, Delta

ANNOUNCEMENT = re.compile(r"hatrack: serving on (\S+), metrics on (\S+)")
STOP_SECONDS = 30


@dataclass(frozen=True, slots=True)
class Server:
    """A server that runs."""

    address: str
    metrics_url: str
    data_dir: Path
    memory: dict[str, int]
    """Bytes by what they are for, as it said at its start."""

    def metrics(self) -> dict[str, float]:
        """Every sample without labels, by name."""
        with urlopen(self.metrics_url, timeout=STOP_SECONDS) as response:  # noqa: S310
            lines = response.read().decode().splitlines()
        samples = (line.rpartition(" ") for line in lines if line[0] != "#" and "{" not in line)
        return {name: float(value) for name, _, value in samples}


@contextmanager
def serving(base: Path, options: Sequence[str], data_dir: Path | None = None) -> Iterator[Server]:
    """A server from its start to its end; raises RuntimeError with its last words when it does not start.

    `data_dir` keeps what is pushed; without it, that goes with the server.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        kept = data_dir or folder / "server"
        log = stack.enter_context((folder / "stderr").open("w+"))
        command = [sys.executable, "-m", "hatrack_client", "serve", "--model", str(base), *options]
        command += ["--port", "0", "--metrics-port", "0", "--data-dir", str(kept)]
        process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True))
        stack.callback(_stop, process)
        address, metrics_url = _announced(process, Path(log.name))
        yield Server(address, metrics_url, kept, _memory(Path(log.name)))


def _announced(process: subprocess.Popen[str], log: Path) -> tuple[str, str]:
    assert process.stdout is not None
    for line in process.stdout:
        if found := ANNOUNCEMENT.match(line):
            return found[1], found[2]
    raise RuntimeError(f"hatrack serve did not start:\n{log.read_text()[-2000:]}")


def _memory(log: Path) -> dict[str, int]:
    records = (json.loads(line) for line in log.read_text().splitlines() if line.startswith("{"))
    return next(record["memory"] for record in records if "memory" in record)


def _stop(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()


def step_bytes(base: Path, memory: dict[str, int]) -> int:
    """The weights that one step reads: all but the embedding, of which it takes a row for each token."""
    config = json.loads((base / "config.json").read_text())
    embedding = 0 if config.get("tie_word_embeddings") else config["vocab_size"] * config["hidden_size"] * 2
    return sum(size for purpose, size in memory.items() if "weights" in purpose) - embedding


async def arrivals(client: AsyncClient, adapter: str, prompt: Sequence[int], tokens: int) -> list[float]:
    """When each of so many tokens of one completion came, in seconds of `time.perf_counter`."""
    times: list[float] = []
    stream = client.stream(adapter, token_ids=prompt, temperature=0.0, max_tokens=tokens, ignore_eos=True)
    async for item in stream:
        if isinstance(item, Delta):
            times += [time.perf_counter()] * len(item.token_ids)
    assert len(times) == tokens
    return times


async def measure_cases(server: Server, inputs: Inputs, cases: Sequence[Case], run: int) -> list[Measurement]:
    """Pushes the adapters of the cases, and measures one case after another."""
    async with AsyncClient(server.address) as client:
        for name in sorted({name for case in cases for name in case.adapters() if name}):
            await client.push_adapter(name, inputs.adapter(name))
        return [await _measure(client, case, run) for case in cases]


async def _measure(client: AsyncClient, case: Case, run: int) -> Measurement:
    await _generate(client, case, case.prompts(run, "warm-up"), WARM_UP_NEW_TOKENS)
    start = time.perf_counter()
    await _generate(client, case, case.prompts(run, "prefill"), PREFILL_NEW_TOKENS)
    prefill = time.perf_counter() - start
    rows = await _generate(client, case, case.prompts(run, "decode"), DECODE_NEW_TOKENS)
    return Measurement(step_ms=decode_ms(rows), prefill_s=prefill)


async def _generate(client: AsyncClient, case: Case, prompts: list[list[int]], tokens: int) -> list[list[float]]:
    rows = zip(case.adapters(), prompts, strict=True)
    return await asyncio.gather(*(arrivals(client, adapter, prompt, tokens) for adapter, prompt in rows))
