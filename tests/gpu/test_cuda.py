"""The same engine on a CUDA device: skipped where there is none."""

from __future__ import annotations

from dataclasses import replace
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


LONG = Sampling(temperature=0.0, max_tokens=40, ignore_eos=True)


def check_graphs(run: InProcess) -> None:
    """Some were recorded, and all gave what the passes gave that they stand for."""
    graphs = run.engine._graphs
    assert graphs is not None
    assert graphs._graphs
    assert not graphs._wrong
    assert not graphs._failures


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
        assert run.engine._ahead == (device == "cuda")
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


def test_graphs_are_recorded_again_after_the_last_one_was_lost(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "base")
    base = Oracle(checkpoint, quantization="nf4", dtype=torch.float32, packed=False).base
    config = EngineConfig(model=checkpoint, device="cuda", kv_cache_gb=0.01)
    run = InProcess(PagedModel(config), config)
    for seed in range(4):  # each makes the pools move
        adapter = make_adapter(base, tmp_path / f"a{seed}", seed=seed, r=8, target_modules="all-linear")
        run.load([adapter])
        generation = run.submit([1, 2, 3], adapter, sampling=LONG)
        assert len(tokens(run.run()[generation])) == LONG.max_tokens
        check_graphs(run)
    run.close()


def test_a_step_ahead_waits_for_nothing_but_the_last_ones_tokens(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "base")
    base = Oracle(checkpoint, quantization="nf4", dtype=torch.float32, packed=False).base
    adapter = make_adapter(base, tmp_path / "a", seed=0, r=8, target_modules="all-linear")
    config = EngineConfig(model=checkpoint, device="cuda", kv_cache_gb=0.05, max_step_tokens=4096)
    run = InProcess(PagedModel(config), config)
    run.load([adapter])
    samplings = (
        LONG,
        replace(LONG, temperature=0.8, top_p=0.9, logprobs=3),
        replace(LONG, temperature=0.8, ignore_eos=False, min_tokens=LONG.max_tokens),
    )
    rows, prompt = 60, list(range(150))  # so many that what is copied to the device is more than CUDA takes at once
    for n in range(rows):
        run.submit([n, *prompt], adapter if n % 2 else None, sampling=samplings[n % 3])
    while len(run.step()) < rows:
        pass
    for _ in range(8):  # until its graph is recorded
        run.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(8):
            torch.cuda._sleep(10**9)  # behind the last pass, before the next: half a second or so
            slept = torch.cuda.Event()
            slept.record()
            assert len(run.step()) == rows
            assert not slept.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    run.run()
    run.close()
