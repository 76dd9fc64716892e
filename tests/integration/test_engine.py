"""Scheduling must not show: whatever happens to a sequence, its tokens are those of the same request alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from inprocess import GREEDY, PATIENCE_SECONDS, InProcess, tokens
from oracle import Oracle, make_adapter, save_adapter
from peft import PrefixTuningConfig, PromptTuningConfig
from recording import Recorder, as_on_a_device, by_graphs
from tiny import FAMILIES, make_checkpoint

from hatrack_server.adapters.pieces import Pieces
from hatrack_server.config import EngineConfig
from hatrack_server.engine import step
from hatrack_server.engine.sampler import Drawn, Sample
from hatrack_server.engine.sequence import PENDING, Sequence
from hatrack_server.model.paged import PagedModel
from hatrack_server.types import Artifact, FinishReason, Sampling

FAMILY_SAMPLE = ("llama", "mistral", "gemma2")  # full attention, windows, and both with soft-capping
LONG = Sampling(temperature=0.0, max_tokens=40, ignore_eos=True)


class Bench:
    """One base, a few adapters, and engines of any configuration over it."""

    def __init__(self, folder: Path, family: str) -> None:
        self.checkpoint = make_checkpoint(folder / "base", family)
        base = Oracle(self.checkpoint, quantization="nf4", dtype=torch.float32, packed=False).base
        self.adapters = [
            make_adapter(base, folder / f"a{i}", seed=i, r=r, lora_alpha=2 * r, target_modules=t)
            for i, (r, t) in enumerate([(4, ["q_proj", "v_proj"]), (8, "all-linear"), (64, ["k_proj", "q_proj"])])
        ]
        # Virtual tokens that fill whole blocks of 16 and a part of one.
        for name, virtual in (
            ("prompt", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=19)),
            ("prefix", PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=37)),
        ):
            self.adapters.append(save_adapter(base, folder / name, virtual, seed=9, noise=1.0))
        self._models: dict[float, PagedModel] = {}

    def engine(self, **settings: Any) -> InProcess:
        """An engine with an ample cache unless `settings` say otherwise."""
        defaults = {"kv_cache_gb": 0.004, "max_rows": 16, "max_step_tokens": 256}
        config = EngineConfig(
            model=self.checkpoint, dtype="float32", packed=False, device="cpu", **{**defaults, **settings}
        )
        if config.kv_cache_gb not in self._models:
            self._models[config.kv_cache_gb] = PagedModel(config)
        model = self._models[config.kv_cache_gb]
        model.clear_kv()
        return InProcess(model, config)

    def requests(self, count: int) -> list[tuple[list[int], Path | None]]:
        """Prompts of different lengths, over all adapters and the base in turn."""
        who: list[Path | None] = [None, *self.adapters]
        return [([(31 * n + 7 * i) % 256 for i in range(17 + 5 * n)], who[n % len(who)]) for n in range(count)]


@pytest.fixture(scope="module", params=FAMILY_SAMPLE)
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    assert request.param in FAMILIES
    return Bench(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def alone(bench: Bench) -> list[list[int]]:
    """What eight requests give, each in an engine of its own."""
    answers = []
    for prompt, adapter in bench.requests(8):
        run = bench.engine(prefix_cache=False)
        generation = run.submit(prompt, adapter, sampling=LONG)
        answers.append(tokens(run.run()[generation]))
        run.close()
    return answers


@pytest.fixture(params=["in step", "ahead", "ahead, by graphs"])
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def engine(
    bench: Bench, mode: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[InProcess]:
    if "graphs" in mode:
        as_on_a_device(monkeypatch)
    run = bench.engine(async_scheduling="ahead" in mode, **getattr(request, "param", {}))
    if "graphs" in mode:
        by_graphs(run, Recorder())
    yield run
    run.close()


def all_at_once(run: InProcess, bench: Bench) -> list[list[int]]:
    ids = [run.submit(prompt, adapter, sampling=LONG) for prompt, adapter in bench.requests(8)]
    deltas = run.run()
    return [tokens(deltas[i]) for i in ids]


@pytest.mark.parametrize("engine", [{}, {"max_step_tokens": 16}, {"max_rows": 3}], indirect=True, ids=str)
def test_batched_and_chunked_equal_alone(engine: InProcess, bench: Bench, alone: list[list[int]]) -> None:
    assert all_at_once(engine, bench) == alone


@pytest.mark.parametrize("engine", [{"kv_cache_gb": 0.0001 * 1.2}], indirect=True, ids=str)
def test_preempted_equal_alone(
    engine: InProcess, bench: Bench, alone: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = engine.engine.scheduler
    preempt = scheduler._preempt

    def known(sequence: Sequence) -> None:
        assert PENDING not in sequence.tokens
        preempt(sequence)

    monkeypatch.setattr(scheduler, "_preempt", known)
    assert all_at_once(engine, bench) == alone
    assert engine.engine.scheduler.preemptions > 0


def test_prefix_cached_equal_alone(engine: InProcess, bench: Bench, alone: list[list[int]]) -> None:
    assert all_at_once(engine, bench) == alone
    assert engine.engine.stats(stepped=True).cached_tokens == 0
    assert all_at_once(engine, bench) == alone
    assert engine.engine.stats(stepped=True).cached_tokens > 0


def test_evicted_programs_are_loaded_again(bench: Bench, alone: list[list[int]]) -> None:
    one_at_a_time = bench.engine(adapter_gb=0.00012)
    assert all_at_once(one_at_a_time, bench) == alone
    assert one_at_a_time.engine.slots.evictions > 0
    assert one_at_a_time.engine.slots.bytes <= 120_000
    one_at_a_time.close()


def test_the_cache_never_crosses_tenants_or_adapters(engine: InProcess, bench: Bench) -> None:
    prompt = bench.requests(8)[7][0]
    for salt, adapter in ((b"a", None), (b"b", None), (b"a", bench.adapters[0]), (b"a", bench.adapters[1])):
        engine.submit(prompt, adapter, salt=salt)
        engine.run()
    assert engine.engine.stats(stepped=True).cached_tokens == 0
    engine.submit(prompt, None, salt=b"a")
    engine.run()
    assert engine.engine.stats(stepped=True).cached_tokens > 0


def test_ahead_the_next_pass_is_started_before_the_last_is_waited_for(
    engine: InProcess, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "graphs" in mode:
        pytest.skip("more passes than steps")
    events: list[str] = []
    forward, read = engine.engine.model.forward, Sample.read

    def started(*args: Any) -> torch.Tensor:
        events.append("start")
        return forward(*args)

    def waited(sample: Sample) -> list[Drawn | None]:
        events.append("wait")
        return read(sample)

    monkeypatch.setattr(engine.engine.model, "forward", started)
    monkeypatch.setattr(Sample, "read", waited)
    engine.submit([1, 2, 3])
    engine.run()
    between = ["start", "wait"] if mode == "ahead" else ["wait", "start"]
    assert events == ["start", *between * (GREEDY.max_tokens - 1), "wait"]


def test_a_stop_that_nobody_foresaw(bench: Bench, alone: list[list[int]], engine: InProcess) -> None:
    """Rows that end at a token of their own, beside others, leave nothing behind and give nothing more."""
    requests = [(*request, answer) for request, answer in zip(bench.requests(8), alone, strict=True)]
    for _ in range(2):  # the second time from the prefix cache
        ids, wanted = [], []
        for n, (prompt, adapter, answer) in enumerate(requests):
            stop = answer[7 * n % 20]
            wanted.append(answer[: answer.index(stop) + 1])
            sampling = replace(LONG, stop_token_ids=frozenset({stop}))
            ids.append(engine.submit(prompt, adapter, sampling=sampling))
        deltas = engine.run()
        assert [tokens(deltas[i]) for i in ids] == wanted
        assert all(deltas[i][-1].finish is FinishReason.STOP for i in ids)
    assert all_at_once(engine, bench) == alone
    assert engine.engine.blocks.used == 0


def test_cancelling_frees_blocks_and_slot_at_once(engine: InProcess, bench: Bench) -> None:
    prompt, _ = bench.requests(1)[0]
    kept, cancelled = (engine.submit(prompt, bench.adapters[n], sampling=LONG) for n in (0, 1))
    while len(engine.engine.scheduler.running) < 2:
        engine.step()
    before = engine.engine.blocks.used
    engine.engine.cancel(cancelled)
    assert engine.engine.blocks.used < before
    assert [s.id for s in engine.engine.scheduler.running] == [kept]
    engine.engine.cancel(cancelled)  # twice does no harm: it may cross the last delta
    assert len(tokens(engine.run()[kept])) > 0
    assert engine.engine.blocks.used == 0


def test_a_program_is_not_loaded_for_those_that_left(engine: InProcess, bench: Bench) -> None:
    compiled = threading.Event()
    compile_artifact = engine.engine.slots._compile

    def held_back(artifact: Artifact) -> Pieces:
        assert compiled.wait(PATIENCE_SECONDS)
        return compile_artifact(artifact)

    engine.engine.slots._compile = held_back
    first, second, other = (engine.submit([1, 2, 3], bench.adapters[n]) for n in (0, 0, 1))
    engine.engine.cancel(first)
    engine.engine.cancel(other)
    compiled.set()
    assert len(tokens(engine.run()[second])) == GREEDY.max_tokens  # somebody was left who wanted it
    assert len(engine.engine.slots) == 1


def test_a_bad_adapter_ends_alone(engine: InProcess, bench: Bench, alone: list[list[int]], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    (tmp_path / "adapter_config.json").write_text((bench.adapters[1] / "adapter_config.json").read_text())
    weights = {
        k: torch.full_like(v, float("nan"))
        for k, v in load_file(bench.adapters[1] / "adapter_model.safetensors").items()
    }
    save_file(weights, tmp_path / "adapter_model.safetensors")
    bad = engine.submit(bench.requests(1)[0][0], tmp_path, sampling=LONG)
    ids = [engine.submit(prompt, adapter, sampling=LONG) for prompt, adapter in bench.requests(8)]
    deltas = engine.run()
    assert deltas[bad][-1].error == "its logits are not finite"
    assert [tokens(deltas[i]) for i in ids] == alone


def test_a_row_that_cannot_be_computed_ends_alone(engine: InProcess, bench: Bench, alone: list[list[int]]) -> None:
    ids = [engine.submit(prompt, adapter, sampling=LONG) for prompt, adapter in bench.requests(8)]
    bad = engine.submit([5, 100_000, 6])  # outside of the embedding: the API refuses it, the engine must survive it
    deltas = engine.run()
    assert deltas[bad][-1].error == "its computation failed"
    assert [tokens(deltas[i]) for i in ids] == alone
    alone_again = engine.submit([100_000])
    assert engine.run()[alone_again][-1].error == "its computation failed"


def test_a_row_may_end_while_its_next_pass_fails(engine: InProcess, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if mode == "in step":
        pytest.skip("no pass is started before")
    first = engine.submit([1, 2, 3])
    [token, *_] = tokens(engine.run()[first])
    generation = engine.submit([1, 2, 3], sampling=replace(GREEDY, stop_token_ids=frozenset({token})), salt=b"other")
    deltas = engine.step()
    with monkeypatch.context() as failing:
        failing.setattr(engine.engine, "_batch", lambda _: 1 / 0)
        deltas += engine.step()
    assert [(d.id, d.tokens, d.finish) for d in deltas] == [(generation, (token,), FinishReason.STOP)]
    assert not engine.engine.has_work


def test_an_answer_that_is_complete_is_not_too_late(engine: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(step.time, "monotonic", lambda: now)
    generation = engine.submit([1, 2, 3], sampling=replace(GREEDY, max_tokens=1), deadline=101.0)
    deltas = engine.step()
    now = 102.0
    deltas += engine.step()
    assert [(d.id, d.finish) for d in deltas] == [(generation, FinishReason.LENGTH)]


def test_a_lost_device_ends_the_engine_even_with_one_row(
    engine: InProcess, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: object) -> torch.Tensor:
        raise RuntimeError("CUDA error: device-side assert triggered")

    failed = engine.submit([1, 2, 3])
    with monkeypatch.context() as failing:
        failing.setattr(engine.engine.model, "forward", lost)
        assert engine.run()[failed][-1].error == "its computation failed"  # the device still computes
        engine.submit([1, 2, 3])
        failing.setattr(engine.engine.model, "check_device", lost)
        with pytest.raises(RuntimeError):
            engine.run()


def test_an_unreadable_artifact_fails_its_requests_only(engine: InProcess, bench: Bench, tmp_path: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((bench.adapters[0] / name).read_bytes()[:-9])
    bad = engine.submit([1, 2, 3], tmp_path)
    good = engine.submit([1, 2, 3], bench.adapters[0])
    deltas = engine.run()
    assert deltas[bad][-1].finish is FinishReason.ERROR
    assert str(tmp_path) not in (deltas[bad][-1].error or "")
    assert len(tokens(deltas[good])) == GREEDY.max_tokens


def test_sampling_does_not_depend_on_the_batch(engine: InProcess, bench: Bench) -> None:
    sampling = Sampling(temperature=1.0, top_p=0.9, max_tokens=20, seed=7, ignore_eos=True)
    prompt, _ = bench.requests(1)[0]
    first = engine.submit(prompt, sampling=sampling)
    by_itself = tokens(engine.run()[first])
    others = [engine.submit(p, a, sampling=LONG) for p, a in bench.requests(8)]
    second = engine.submit(prompt, sampling=sampling)
    deltas = engine.run()
    assert tokens(deltas[second]) == by_itself
    assert all(deltas[i][-1].finish is FinishReason.LENGTH for i in others)


def test_a_passed_deadline_is_never_started(engine: InProcess) -> None:
    late = engine.submit([1, 2, 3], deadline=0.0)
    deltas = engine.run()
    assert [d.finish for d in deltas[late]] == [FinishReason.ERROR]
    assert engine.engine.steps == 0


def test_min_tokens_holds_the_end_back(engine: InProcess) -> None:
    stops = frozenset(range(0, 320, 2))
    free = engine.submit([1, 2, 3], sampling=Sampling(temperature=0.0, max_tokens=9, stop_token_ids=stops))
    held = engine.submit(
        [1, 2, 3], sampling=Sampling(temperature=0.0, max_tokens=9, min_tokens=5, stop_token_ids=stops)
    )
    deltas = engine.run()
    assert not set(tokens(deltas[held])[:5]) & stops
    assert deltas[free][-1].finish is not FinishReason.ERROR
    assert sum(t in stops for t in tokens(deltas[free])) <= 1
