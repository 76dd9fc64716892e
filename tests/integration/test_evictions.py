"""Where programs come and go beside rows that decode, each answer is the one that its request gets alone, to the bit.

In bfloat16 on packed layers, where kernels hold on to the addresses of what a batch reads.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from inprocess import InProcess, tokens
from oracle import Oracle, make_adapter
from recording import Recorder, as_on_a_device, by_graphs
from tiny import make_checkpoint

from hatrack_server.adapters import pools
from hatrack_server.config import EngineConfig
from hatrack_server.kernels.native import native
from hatrack_server.model.paged import PagedModel
from hatrack_server.types import Sampling

REQUESTS = 300
MOST_TOKENS = 10
TARGETS = [["q_proj", "v_proj"], ["k_proj", "down_proj"], ["o_proj", "up_proj", "gate_proj"]]

Answers = dict[Path | None, list[int]]


def config(base: Path, adapter_gb: float, *, ahead: bool = False) -> EngineConfig:
    return EngineConfig(
        model=base, device="cpu", dtype="bfloat16", kv_cache_gb=0.004, adapter_gb=adapter_gb, host_adapter_gb=0.0001,
        prefix_cache=False, max_rows=6, async_scheduling=ahead,
    )  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 8, "head_dim": 16}
    return make_checkpoint(tmp_path_factory.mktemp("base") / "base", "llama", num_key_value_heads=2, **sizes)


@pytest.fixture(scope="module")
def model(base: Path) -> PagedModel:
    library = native()
    if library is None or not library.has_nf4_product:
        pytest.skip("no product in C, which alone is the same to the bit whatever the batch")
    return PagedModel(config(base, 0.1))


@pytest.fixture(scope="module")
def alone(base: Path, model: PagedModel, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    folder = tmp_path_factory.mktemp("adapters")
    frozen = Oracle(base, quantization="nf4", dtype=torch.float32, packed=False).base
    adapters: list[Path | None] = [
        make_adapter(frozen, folder / f"a{n}", seed=n, r=[1, 3, 8][n % 3], lora_alpha=16, target_modules=TARGETS[n % 3])
        for n in range(9)
    ]
    engine = InProcess(model, config(base, 0.1))
    answers = {}
    for adapter in [None, *adapters]:
        generation = engine.submit([1, 2, 3, 4], adapter, sampling=sampling(MOST_TOKENS))
        answers[adapter] = tokens(engine.run()[generation])
    engine.close()
    assert len({tuple(answer) for answer in answers.values()}) == len(answers)
    return answers


@pytest.fixture(
    params=["in place", "by copies", "as on a device", "as on a device, ahead", "as on a device, by graphs"]
)
def engine(
    request: pytest.FixtureRequest, base: Path, model: PagedModel, monkeypatch: pytest.MonkeyPatch
) -> Iterator[InProcess]:
    """With room for about three programs, whose pools grow in one of their ways."""
    if request.param == "by copies":
        grow = pools.Pool.grow
        monkeypatch.setattr(pools.Pool, "grow", lambda self, rows, _=0: grow(self, rows))
    if "device" in request.param:
        as_on_a_device(monkeypatch)
    engine = InProcess(model, config(base, 0.00008, ahead="ahead" in request.param))
    if "graphs" in request.param:
        by_graphs(engine, Recorder())
    yield engine
    engine.close()


def sampling(count: int) -> Sampling:
    return Sampling(temperature=0.0, max_tokens=count, ignore_eos=True)


def test_answers_beside_evictions_are_those_of_requests_alone(alone: Answers, engine: InProcess) -> None:
    source = random.Random(0)
    waiting = [(source.choice(list(alone)), source.randint(1, MOST_TOKENS)) for _ in range(REQUESTS)]
    running: dict[int, tuple[Path | None, int, list[int]]] = {}
    while waiting or running:
        while waiting and len(running) < 8:
            adapter, count = waiting.pop()
            running[engine.submit([1, 2, 3, 4], adapter, sampling=sampling(count))] = adapter, count, []
        before = engine.engine.steps
        for delta in engine.step():
            adapter, count, found = running[delta.id]
            found += delta.tokens
            if delta.finish:
                assert delta.error is None
                assert found == alone[adapter][:count]
                del running[delta.id]
        if engine.engine.steps == before:
            time.sleep(0.001)  # for a load
    assert engine.engine.stats(stepped=False).evictions > 30
