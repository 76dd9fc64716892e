"""The engine's process as the front process meets it: real children, really killed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch
from inprocess import artifact_at
from safetensors.torch import save_file

from hatrack_server.config import EngineConfig
from hatrack_server.engine.client import EngineClient, _WorkerProcess
from hatrack_server.errors import DeadlinePassed, GenerationFailed, Overloaded, StartupError, Unavailable
from hatrack_server.types import Artifact, Delta, EngineStats, Sampling

PROMPT = tuple(range(20))
ENDLESS = Sampling(temperature=0.0, max_tokens=400, ignore_eos=True)
SHORT = Sampling(temperature=0.0, max_tokens=5, ignore_eos=True)


def config(checkpoint: Path, **settings: object) -> EngineConfig:
    return EngineConfig.model_validate(
        {"model": checkpoint, "device": "cpu", "threads": 1, "kv_cache_gb": 0.004, "max_rows": 4, "max_waiting": 2}
        | settings
    )


@pytest.fixture(scope="module")
async def client(tiny_llama: Path) -> AsyncIterator[EngineClient]:
    engine = EngineClient(config(tiny_llama))
    await engine.start()
    yield engine
    await engine.stop()


@pytest.fixture
async def engine(client: EngineClient) -> EngineClient:
    """The shared engine, up again if the last test killed its worker."""
    await until(lambda: client.ready)
    return client


async def until(condition: object, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "waited in vain"
        await asyncio.sleep(0.01)


def generate(engine: EngineClient, sampling: Sampling = SHORT, **options: object) -> AsyncIterator[Delta]:
    arguments = {"tenant": "t", "salt": b"s", "artifact": None, "prompt": PROMPT} | options
    return engine.generate(sampling=sampling, **arguments)  # type: ignore[arg-type]


def lora_files_of(path: Path) -> Artifact:
    """An adapter of the tiny base that changes nothing."""
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file({f"{module}.lora_A.weight": torch.zeros(2, 64), f"{module}.lora_B.weight": torch.zeros(64, 2)},
              path / "adapter_model.safetensors")  # fmt: skip
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["model.layers.0.self_attn.q_proj"]}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return artifact_at(path)


async def tokens(deltas: AsyncIterator[Delta]) -> list[int]:
    return [token async for delta in deltas for token in delta.tokens]


async def test_generates(engine: EngineClient) -> None:
    assert len(await tokens(generate(engine))) == SHORT.max_tokens
    assert engine.in_flight == 0


async def test_a_killed_worker_ends_its_streams_at_once_and_comes_back(engine: EngineClient) -> None:
    expected = await tokens(generate(engine))
    stream = generate(engine, ENDLESS)
    await anext(stream)
    pid = engine.worker_pid
    assert pid
    os.kill(pid, signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(Unavailable):
        await tokens(stream)
    assert time.monotonic() - start < 2
    assert not engine.ready
    with pytest.raises(Unavailable):
        await tokens(generate(engine))
    await until(lambda: engine.ready)
    assert engine.worker_pid != pid
    assert await tokens(generate(engine)) == expected


async def test_a_hung_worker_is_not_ready_then_killed_and_replaced(
    engine: EngineClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hatrack_server.engine.client.STALL_SECONDS", 0.5)
    monkeypatch.setattr("hatrack_server.engine.client.HUNG_SECONDS", 1.5)
    stream = generate(engine, ENDLESS)
    await anext(stream)
    pid = engine.worker_pid
    assert pid
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(Unavailable):
        await tokens(stream)
    await until(lambda: engine.ready)
    assert engine.worker_pid != pid
    assert len(await tokens(generate(engine))) == SHORT.max_tokens


async def test_a_reader_of_a_dead_worker_is_no_work_of_the_next(
    engine: EngineClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = generate(engine, ENDLESS)
    await anext(stream)  # and then reads no more
    assert engine.worker_pid
    os.kill(engine.worker_pid, signal.SIGKILL)
    await until(lambda: not engine.ready)
    await until(lambda: engine.ready)
    monkeypatch.setattr("hatrack_server.engine.client.STALL_SECONDS", 0.1)
    monkeypatch.setattr("hatrack_server.engine.client.HUNG_SECONDS", 0.2)
    pid = engine.worker_pid
    await asyncio.sleep(0.6)
    assert (engine.ready, engine.worker_pid, engine.in_flight) == (True, pid, 0)
    with pytest.raises(Unavailable):
        await tokens(stream)


async def test_a_trial_is_not_tried_again_by_the_next_worker(engine: EngineClient, tmp_path: Path) -> None:
    files = lora_files_of(tmp_path)
    assert len(await tokens(generate(engine, artifact=files, trial=True))) == SHORT.max_tokens
    assert files.digest not in engine._programs
    assert len(await tokens(generate(engine, artifact=files))) == SHORT.max_tokens
    assert files.digest in engine._programs
    engine.forget(files.digest)


async def test_a_worker_without_work_may_be_silent(engine: EngineClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hatrack_server.engine.client.HUNG_SECONDS", 0.2)
    await tokens(generate(engine))
    pid = engine.worker_pid
    await asyncio.sleep(0.6)
    assert (engine.ready, engine.worker_pid) == (True, pid)


async def test_a_process_that_cannot_be_started_is_tried_again(
    engine: EngineClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, failures = _WorkerProcess.__init__, 2

    def no_memory(self: _WorkerProcess, *arguments: Any) -> None:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise OSError("Cannot allocate memory")
        real(self, *arguments)

    monkeypatch.setattr(_WorkerProcess, "__init__", no_memory)
    assert engine.worker_pid
    os.kill(engine.worker_pid, signal.SIGKILL)
    await until(lambda: not engine.ready)
    await until(lambda: engine.ready)
    assert failures < 0
    assert len(await tokens(generate(engine))) == SHORT.max_tokens


async def test_a_worker_killed_while_it_loads_is_not_the_users_mistake(tiny_llama: Path) -> None:
    engine = EngineClient(config(tiny_llama))
    starting = asyncio.create_task(engine.start())
    await until(lambda: engine.worker_pid)
    assert engine.worker_pid
    os.kill(engine.worker_pid, signal.SIGKILL)
    with pytest.raises(Unavailable):
        await starting
    await engine.stop()


async def test_a_closed_stream_is_cancelled_in_the_worker(tiny_llama: Path) -> None:
    seen: list[EngineStats] = []
    engine = EngineClient(config(tiny_llama), on_stats=seen.append)
    await engine.start()
    stream = generate(engine, ENDLESS)
    await anext(stream)
    await stream.aclose()  # type: ignore[attr-defined]
    await until(lambda: seen[-1].running == 0)
    assert seen[-1].kv_blocks_used == 0
    assert seen[-1].completion_tokens < ENDLESS.max_tokens
    await engine.stop()


async def test_a_slow_reader_gets_everything_joined(engine: EngineClient) -> None:
    stream = generate(engine, ENDLESS)
    first = await anext(stream)
    await until(lambda: engine.in_flight == 0)  # ended in the worker, though nobody has read it
    second = await anext(stream)
    assert len(first.tokens) + len(second.tokens) == ENDLESS.max_tokens
    assert second.finish


async def test_a_full_queue_is_refused_and_harms_nobody(engine: EngineClient) -> None:
    streams = [generate(engine, ENDLESS) for _ in range(6)]
    running = [asyncio.create_task(tokens(stream)) for stream in streams]
    await until(lambda: engine.in_flight == 6)
    with pytest.raises(Overloaded):
        await tokens(generate(engine))
    assert {len(answer) for answer in await asyncio.gather(*running)} == {ENDLESS.max_tokens}


async def test_errors_of_one_generation(engine: EngineClient, tmp_path: Path) -> None:
    with pytest.raises(GenerationFailed) as failed:
        await tokens(generate(engine, artifact=Artifact("0" * 64, tmp_path)))
    assert str(tmp_path) not in str(failed.value)
    with pytest.raises(DeadlinePassed):
        await tokens(generate(engine, deadline=time.monotonic() - 1))
    assert len(await tokens(generate(engine))) == SHORT.max_tokens


@pytest.mark.parametrize(
    ("settings", "word"), [({"kv_cache_gb": 1e-9}, "kv_cache_gb"), ({"max_model_len": 100_000}, "max_model_len")]
)
async def test_a_base_that_cannot_be_served_is_refused_in_a_sentence(
    tiny_llama: Path, settings: dict[str, object], word: str
) -> None:
    with pytest.raises(StartupError, match=word):
        await EngineClient(config(tiny_llama, **settings)).start()


def test_the_worker_dies_with_its_parent(tiny_llama: Path) -> None:
    script = """
import asyncio, sys
from pathlib import Path
from hatrack_server.config import EngineConfig
from hatrack_server.engine.client import EngineClient

async def main():
    engine = EngineClient(EngineConfig(model=Path(sys.argv[1]), device="cpu", threads=1, kv_cache_gb=0.004))
    await engine.start()
    print(engine.worker_pid, flush=True)
    await asyncio.sleep(60)

if __name__ == "__main__":
    asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", script, str(tiny_llama)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        worker = int(parent.stdout.readline())
        parent.kill()
    end = time.monotonic() + 10
    while Path(f"/proc/{worker}").exists() and Path(f"/proc/{worker}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < end, "the worker outlived its parent"
        time.sleep(0.05)
