"""The same engine on a CUDA device: skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from inprocess import InProcess, tokens
from oracle import Oracle, make_adapter
from tiny import make_checkpoint

from hatrack_server.config import EngineConfig
from hatrack_server.model.paged import PagedModel
from hatrack_server.types import Sampling

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def check_graphs(run: InProcess) -> None:
    """Some were recorded, and all gave what the passes gave that they stand for."""
    graphs = run.engine._graphs
    assert graphs is not None
    assert graphs._graphs
    assert not graphs._refused


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_a_mixed_batch_gives_the_cpus_tokens(family: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "base", family)
    base = Oracle(checkpoint, quantization="none", dtype=torch.float32, packed=False).base
    adapters = [None] + [
        make_adapter(base, tmp_path / f"r{rank}", seed=rank, r=rank, target_modules="all-linear") for rank in (4, 8, 64)
    ]
    answers = []
    for device in ("cpu", "cuda"):
        config = EngineConfig(
            model=checkpoint, quantization="none", dtype="float32", device=device, kv_cache_gb=0.01, max_step_tokens=64
        )
        run = InProcess(PagedModel(config), config)
        ids = [run.submit([(31 * n + 7 * i) % 256 for i in range(30 + n)], adapters[n % 4]) for n in range(8)]
        deltas = run.run()
        answers.append([tokens(deltas[i]) for i in ids])
        if device == "cuda":
            check_graphs(run)
        run.close()
    assert answers[0] == answers[1]


def test_nf4_is_served_on_cuda(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "base")
    config = EngineConfig(model=checkpoint, device="cuda", kv_cache_gb=0.01)
    run = InProcess(PagedModel(config), config)  # the probe compares it with transformers' own attention
    generation = run.submit(list(range(40)))
    assert len(tokens(run.run()[generation])) == 8
    check_graphs(run)
    run.close()


def test_a_step_ahead_waits_for_nothing_but_the_last_ones_tokens(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "base")
    base = Oracle(checkpoint, quantization="nf4", dtype=torch.float32, packed=False).base
    adapter = make_adapter(base, tmp_path / "a", seed=0, r=8, target_modules="all-linear")
    config = EngineConfig(model=checkpoint, device="cuda", kv_cache_gb=0.01)
    run = InProcess(PagedModel(config), config)
    run.load([adapter])
    samplings = (
        Sampling(temperature=0.0, max_tokens=40, ignore_eos=True),
        Sampling(temperature=0.8, top_p=0.9, max_tokens=40, ignore_eos=True, logprobs=3),
        Sampling(temperature=0.8, max_tokens=40, min_tokens=40),
    )
    for n, sampling in enumerate(samplings):
        run.submit([1, 2, 3 + n], adapter if n else None, sampling=sampling)
    for _ in range(8):
        run.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(8):  # an event is waited for, the device is not
            assert len(run.step()) == len(samplings)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    run.run()
    run.close()
