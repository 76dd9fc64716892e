"""Which passes run by graphs, and what happens when one can't be recorded, answers wrong, or has lost its adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from inprocess import InProcess, tokens
from oracle import Oracle, make_adapter, save_adapter
from peft import IA3Config
from recording import Recorder, as_on_a_device, by_graphs
from tiny import make_checkpoint
from torch import Tensor

from hatrack_server.adapters.apply import ModuleEffects
from hatrack_server.config import EngineConfig
from hatrack_server.engine import graphs
from hatrack_server.engine.graphs import Bucket
from hatrack_server.model.batch import Chunk, build_batch
from hatrack_server.model.paged import PagedModel
from hatrack_server.types import Sampling

SAMPLING = Sampling(temperature=0.0, max_tokens=30, ignore_eos=True)
PROMPT = [3, 1, 4, 1, 5]
STEPS = SAMPLING.max_tokens - 1 - graphs.WORTH_RECORDING  # that are replayed when one request is alone

Launch = Callable[[], Tensor]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("base") / "base")
    return EngineConfig(model=checkpoint, dtype="float32", packed=False, device="cpu", kv_cache_gb=0.004)


@pytest.fixture(scope="module")
def model(config: EngineConfig) -> PagedModel:
    return PagedModel(config)


@pytest.fixture(scope="module")
def adapters(config: EngineConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base, folder = Oracle(config.model, quantization="nf4", dtype=torch.float32, packed=False).base, None
    folder = tmp_path_factory.mktemp("adapters")
    found = {
        name: make_adapter(base, folder / name, seed=seed, r=rank, target_modules=targets)
        for seed, (name, rank, targets) in enumerate(
            [("q4", 4, ["q_proj"]), ("other q4", 4, ["q_proj"]), ("v4", 4, ["v_proj"]), ("q16", 16, ["q_proj"])]
        )
    }
    scales = IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    return {**found, "scales": save_adapter(base, folder / "scales", scales, seed=9)}


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def engine(
    model: PagedModel, config: EngineConfig, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> Iterator[InProcess]:
    as_on_a_device(monkeypatch)
    model.clear_kv()
    engine = InProcess(model, config)
    by_graphs(engine, recorder)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def plain(model: PagedModel, config: EngineConfig, adapters: dict[str, Path]) -> dict[str | None, list[int]]:
    """What each adapter answers without graphs."""
    engine = InProcess(model, config)
    answers = {name: answer(engine, path) for name, path in [(None, None), *adapters.items()]}
    engine.close()
    return answers


def answer(engine: InProcess, adapter: Path | None = None) -> list[int]:
    generation = engine.submit(PROMPT, adapter, sampling=SAMPLING, salt=b"%d" % engine._next)
    return tokens(engine.run()[generation])


def spoil(engine: InProcess) -> None:
    """Overwrites what the pass that runs now has written for the only sequence."""
    [sequence] = engine.engine.scheduler.running
    block, place = divmod(sequence.computed, engine.config.block_size)
    engine.engine.model._kv.values[0][sequence.blocks[block] * engine.config.block_size + place] = 7.0


def test_decodes_of_one_bucket_share_a_graph(
    engine: InProcess, recorder: Recorder, adapters: dict[str, Path], plain: dict[str | None, list[int]]
) -> None:
    assert answer(engine) == plain[None]
    assert (recorder.recorded, recorder.replayed) == (1, 1 + STEPS)  # once to try it
    for n, name in enumerate(("q4", "other q4")):
        engine.load([adapters[name]])
        assert answer(engine, adapters[name]) == plain[name]
        assert recorder.recorded == 2 + n  # the second one made the pool grow
    replayed = recorder.replayed
    for name in ("q4", "other q4"):
        assert answer(engine, adapters[name]) == plain[name]
    assert recorder.recorded == 3
    assert recorder.replayed == replayed + 2 * (SAMPLING.max_tokens - 1)


def test_a_bucket_takes_all_numbers_of_rows_up_to_its_own(
    engine: InProcess, recorder: Recorder, adapters: dict[str, Path], plain: dict[str | None, list[int]]
) -> None:
    engine.load([adapters["q4"], adapters["other q4"]])
    names = ["q4", None, "other q4", "q4"]
    for rows in (4, 3, 4):
        ids = [
            engine.submit(PROMPT, adapters[name] if name else None, sampling=SAMPLING, salt=b"%d%d" % (rows, n))
            for n, name in enumerate(names[:rows])
        ]
        deltas = engine.run()
        assert [tokens(deltas[i]) for i in ids] == [plain[name] for name in names[:rows]]
    assert recorder.recorded == 1


def test_an_adapter_in_other_pools_has_them_recorded_too(
    engine: InProcess, recorder: Recorder, adapters: dict[str, Path], plain: dict[str | None, list[int]]
) -> None:
    for recorded, name in enumerate(("q4", "v4", "q16"), 1):
        engine.load([adapters[name]])
        assert answer(engine, adapters[name]) == plain[name]
        assert recorder.recorded == recorded
    assert answer(engine, adapters["q4"]) == plain["q4"]  # of a rank whose graph knows both modules
    assert recorder.recorded == 3


def test_other_pieces_run_as_they_come(
    engine: InProcess, recorder: Recorder, adapters: dict[str, Path], plain: dict[str | None, list[int]]
) -> None:
    assert answer(engine, adapters["scales"]) == plain["scales"]
    assert recorder.recorded == 0


def test_a_graph_that_gives_something_else_is_never_used(
    engine: InProcess, plain: dict[str | None, list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    tried: list[Launch] = []

    def wrong(run: Launch) -> Launch:
        tried.append(run)
        out = run()

        @torch.inference_mode()
        def replay() -> Tensor:
            spoil(engine)
            return out.neg()

        return replay

    by_graphs(engine, wrong)
    for _ in range(2):
        assert answer(engine) == plain[None]
    assert len(tried) == 1
    assert caplog.text.count("other logits") == 1


def test_a_graph_that_always_gives_the_same_is_never_used(
    engine: InProcess, plain: dict[str | None, list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    def constant(run: Launch) -> Launch:
        out = run()
        return lambda: out

    by_graphs(engine, constant)
    assert answer(engine) == plain[None]
    assert caplog.text.count("other logits") == 1


@pytest.mark.parametrize("fails", ["recording", "replaying"])
def test_what_cannot_be_recorded_is_given_up(
    engine: InProcess, plain: dict[str | None, list[int]], fails: str, caplog: pytest.LogCaptureFixture
) -> None:
    tried: list[Launch] = []

    def record(run: Launch) -> Launch:
        tried.append(run)
        if fails == "recording":
            raise RuntimeError("operation not permitted when stream is capturing")
        return lambda: 1 / 0  # type: ignore[return-value]

    by_graphs(engine, record)
    for _ in range(3):
        assert answer(engine) == plain[None]
    assert len(tried) == graphs.MOST_FAILURES
    assert caplog.text.count("no CUDA graph") == graphs.MOST_FAILURES


def test_graphs_that_work_go_on_when_no_more_are_recorded(
    engine: InProcess, recorder: Recorder, plain: dict[str | None, list[int]]
) -> None:
    assert answer(engine) == plain[None]
    engine.engine._graphs._record = lambda _: 1 / 0  # type: ignore[assignment, return-value]
    for turn in range(3):
        ids = [engine.submit(PROMPT, sampling=SAMPLING, salt=b"%d%d" % (turn, n)) for n in range(2)]
        deltas = engine.run()
        assert [tokens(deltas[i]) for i in ids] == [plain[None]] * 2
    assert engine.engine._graphs._failures == graphs.MOST_FAILURES
    replayed = recorder.replayed
    assert answer(engine) == plain[None]
    assert recorder.replayed == replayed + SAMPLING.max_tokens - 1


def test_a_graph_that_fails_later_is_lost_and_its_batch_is_not(
    engine: InProcess, plain: dict[str | None, list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    replayed: list[Launch] = []

    def record(run: Launch) -> Launch:
        def replay() -> Tensor:
            replayed.append(run)
            if len(replayed) == graphs.TRIALS + 3:
                raise RuntimeError("CUDA error: out of memory")
            return run()

        return replay

    by_graphs(engine, record)
    assert answer(engine) == plain[None]
    assert len(set(replayed)) == 2  # another was recorded
    assert caplog.text.count("failed") == 1


def test_what_failed_once_is_recorded_later(
    engine: InProcess, recorder: Recorder, plain: dict[str | None, list[int]]
) -> None:
    tried: list[Launch] = []

    def record(run: Launch) -> Launch:
        tried.append(run)
        if len(tried) == 1:
            raise RuntimeError("CUDA out of memory")
        return recorder(run)

    by_graphs(engine, record)
    assert answer(engine) == plain[None]
    assert recorder.recorded == 1
    assert recorder.replayed > graphs.TRIALS


def test_a_pool_that_moves_meanwhile(
    engine: InProcess, recorder: Recorder, adapters: dict[str, Path], plain: dict[str | None, list[int]]
) -> None:
    """What was recorded is not kept, and what was computed on the way may be anything."""
    tried: list[Launch] = []

    @torch.inference_mode()
    def record(run: Launch) -> Launch:
        tried.append(run)
        if len(tried) > 1:
            return recorder(run)
        run()
        [sequence] = engine.engine.scheduler.running
        for place in engine.engine.slots[sequence.digest].places:
            place.pool.grow(1)
        spoil(engine)
        return run

    by_graphs(engine, record)
    engine.load([adapters["q4"]])
    assert answer(engine, adapters["q4"]) == plain["q4"]
    assert len(tried) == 2
    assert recorder.replayed > graphs.TRIALS


def test_a_bad_adapter_costs_the_others_no_graph(
    engine: InProcess, recorder: Recorder, adapters: dict[str, Path], plain: dict[str | None, list[int]]
) -> None:
    engine.load([adapters["q4"], adapters["other q4"]])
    bad, good = (engine.submit(PROMPT, adapters[name], sampling=SAMPLING) for name in ("other q4", "q4"))
    for _ in range(graphs.WORTH_RECORDING):
        engine.step()
    slot = next(engine.engine.slots[s.digest] for s in engine.engine.scheduler.running if s.id == bad)
    for place in slot.places:
        place.pool.stacks[0][place.row] = torch.nan
    deltas = engine.run()
    assert deltas[bad][-1].error == "its logits are not finite"
    assert tokens(deltas[good]) == plain["q4"][-len(tokens(deltas[good])) :]
    ids = [engine.submit(PROMPT, adapters["q4"], sampling=SAMPLING, salt=b"%d" % n) for n in range(2)]
    deltas = engine.run()
    assert [tokens(deltas[i]) for i in ids] == [plain["q4"]] * 2
    assert recorder.replayed > 0
    assert not engine.engine._graphs._wrong


def test_padding_points_at_zeros_whatever_a_longer_batch_has_left(
    engine: InProcess, recorder: Recorder, plain: dict[str | None, list[int]]
) -> None:
    engine.submit([5] * 25, sampling=SAMPLING)
    engine.run()
    generation = engine.submit(PROMPT, sampling=SAMPLING)
    first = engine.step()
    [sequence] = engine.engine.scheduler.running
    others = set(range(1, engine.engine.blocks.total + 1)).difference(sequence.blocks)
    for pool in engine.engine.model._kv.keys + engine.engine.model._kv.values:
        pool.view(-1, engine.config.block_size, *pool.shape[1:])[list(others)] = torch.nan
    assert tokens(first + engine.run()[generation]) == plain[None]
    assert recorder.recorded == 1


def test_an_idle_engine_holds_nothing_of_those_that_left(engine: InProcess, adapters: dict[str, Path]) -> None:
    answer(engine, adapters["scales"])
    assert not engine.engine._effects._effects


def test_only_so_many_are_kept_the_longest_unused_goes(
    engine: InProcess, recorder: Recorder, plain: dict[str | None, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 2)
    recorded = []
    for turn, rows in enumerate((1, 2, 1, 4, 1, 2)):
        ids = [engine.submit(PROMPT, sampling=SAMPLING, salt=b"%d%d" % (turn, n)) for n in range(rows)]
        deltas = engine.run()
        assert [tokens(deltas[i]) for i in ids] == [plain[None]] * rows
        recorded.append(recorder.recorded)
    assert recorded == [1, 2, 2, 3, 3, 4]
    assert {bucket.rows for bucket in engine.engine._graphs._graphs} == {1, 2}


@pytest.mark.parametrize(
    ("rows", "keys", "bucket"),
    [
        (1, 1, (1, 64)),
        (3, 64, (4, 64)),
        (5, 65, (8, 128)),
        (8, 200, (8, 256)),
        (9, 4096, (16, 4096)),
        (33, 2, (48, 64)),
    ],
)
def test_buckets(rows: int, keys: int, bucket: tuple[int, int]) -> None:
    batch = build_batch([Chunk([1], keys - 1, torch.arange(keys))] * rows, torch.device("cpu"))
    assert Bucket.of(batch, ModuleEffects()) == (*bucket, frozenset())


@pytest.mark.parametrize(
    "chunks", [[(1, 4097)], [(1, 4096)] * 17, [(2, 2)], [(1, 5), (2, 2)], [(1, 10), (1, 600)]], ids=str
)
def test_batches_that_no_graph_serves(chunks: list[tuple[int, int]]) -> None:
    parts = [Chunk([1] * count, keys - count, torch.arange(keys)) for count, keys in chunks]
    assert Bucket.of(build_batch(parts, torch.device("cpu")), ModuleEffects()) is None
