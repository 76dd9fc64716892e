"""Where a program is must not show: from disk, resident or back from the host, its tokens are the same."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from inprocess import GREEDY, InProcess, artifact_at, tokens
from oracle import Oracle, make_adapter

from hatrack_server.config import EngineConfig
from hatrack_server.model.paged import PagedModel
from hatrack_server.types import Artifact, Generation

PROMPT = list(range(40, 60))


@pytest.fixture
def engine(tiny_llama: Path) -> Iterator[InProcess]:
    """With room for one program of the kind below."""
    config = EngineConfig(
        model=tiny_llama, device="cpu", kv_cache_gb=0.004, adapter_gb=0.00002, dtype="float32", packed=False
    )
    engine = InProcess(PagedModel(config), config)
    yield engine
    engine.close()


@pytest.fixture
def adapters(tiny_llama: Path, tmp_path: Path) -> list[Path]:
    base = Oracle(tiny_llama, quantization="nf4", dtype=torch.float32, packed=False).base
    return [make_adapter(base, tmp_path / f"a{i}", seed=i, r=8, target_modules=["q_proj", "v_proj"]) for i in (0, 1)]


def answer(engine: InProcess, artifact: Artifact) -> list[int]:
    engine.engine.submit(Generation(engine.engine.steps, "t", b"salt", artifact, tuple(PROMPT), GREEDY))
    [deltas] = engine.run().values()
    return tokens(deltas)


def test_an_evicted_program_comes_back_though_its_files_are_gone(engine: InProcess, adapters: list[Path]) -> None:
    first, second = map(artifact_at, adapters)
    before = answer(engine, first)
    assert answer(engine, second) != before
    shutil.rmtree(adapters[0])
    assert answer(engine, first) == before
    stats = engine.engine.stats(stepped=False)
    assert (stats.disk_loads, stats.host_loads, stats.reloads) == (2, 1, 1)
    assert stats.host_bytes > 0
    assert stats.working_set_bytes > stats.adapter_budget_bytes == 20_000
