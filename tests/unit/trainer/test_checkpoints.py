from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer, TrainerControl, TrainerState

from hatrack.manifest import BaseIdentity
from hatrack_trainer.artifact import finishing
from hatrack_trainer.checkpoints import Checkpoints, Resumable
from hatrack_trainer.config import TrainConfig
from hatrack_trainer.errors import TrainerError, UsageError
from hatrack_trainer.schedule import Schedule
from hatrack_trainer.unfinished import Beginning, is_unfinished, read_beginning, write_beginning

BASE = BaseIdentity("0" * 64, "none", "1" * 64, "")


def beginning(out: Path, **sections: dict[str, Any]) -> Beginning:
    raw: dict[str, dict[str, Any]] = {
        "base": {"model": "some/model"},
        "data": {"train": "rows.jsonl", "eval": "held-out.jsonl"},
        "output": {"dir": str(out)},
    }
    config = TrainConfig.model_validate(raw | sections)
    return Beginning(config, BASE, {"train": "2" * 64, "eval": "3" * 64})


def checkpoints(out: Path, **output: Any) -> Checkpoints:
    return Checkpoints(beginning(out, output={"dir": str(out), **output}))


def add(to: Checkpoints, step: int, error: BaseException | None = None) -> None:
    with to.adding(step) as folder:
        (folder / to.of(step).name).mkdir(parents=True)
        if error is not None:
            raise error
        (folder / to.of(step).name / "file").write_text(str(step))


def names(found: Checkpoints) -> list[str]:
    return sorted(each.name for each in found.folder.iterdir())


class TestCheckpoints:
    def test_the_first_brings_the_record_of_how_the_run_began(self, tmp_path: Path) -> None:
        own = checkpoints(tmp_path / "out")
        assert own.latest is None
        add(own, 5)
        assert own.latest == tmp_path / "out" / "training" / "checkpoints" / "checkpoint-5"
        assert is_unfinished(tmp_path / "out")
        assert read_beginning(tmp_path / "out").base == BASE

    @pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError()])
    def test_a_first_that_fails_leaves_nothing(self, tmp_path: Path, error: BaseException) -> None:
        with pytest.raises(type(error)):
            add(checkpoints(tmp_path / "out"), 5, error)
        assert not any(tmp_path.iterdir())

    def test_a_later_one_that_fails_leaves_those_before(self, tmp_path: Path) -> None:
        own = checkpoints(tmp_path / "out")
        add(own, 5)
        with pytest.raises(TrainerError, match=r"^output\.dir: .*out can't be written: full$"):
            add(own, 10, OSError("full"))
        assert names(own) == ["checkpoint-5"]
        add(own, 10)
        assert names(own) == ["checkpoint-10", "checkpoint-5"]

    def test_the_newest_and_the_best_are_kept(self, tmp_path: Path) -> None:
        own = checkpoints(tmp_path / "out", keep_checkpoints=2)
        for step in (5, 10, 15, 20):
            add(own, step)
        own.rotate(best=10)
        assert names(own) == ["checkpoint-10", "checkpoint-20"]
        own.rotate(best=None)
        add(own, 100)
        own.rotate(best=None)
        assert names(own) == ["checkpoint-100", "checkpoint-20"]

    def test_a_run_goes_with_its_only_one(self, tmp_path: Path) -> None:
        own = checkpoints(tmp_path / "out")
        add(own, 1)
        add(own, 2)
        own.drop(2)
        assert names(own) == ["checkpoint-1"]
        own.drop(1)
        assert not (tmp_path / "out").exists()

    def test_the_artifact_takes_their_place(self, tmp_path: Path) -> None:
        out = tmp_path / "out"
        add(checkpoints(out), 1)
        with finishing(out, "output.dir") as partial:
            (partial / "training").mkdir()
            for name in ("adapter_model.safetensors", "README.md", "training/log.jsonl"):
                (partial / name).touch()
        found = sorted(str(file.relative_to(out)) for file in out.rglob("*"))
        assert found == ["README.md", "adapter_model.safetensors", "training", "training/log.jsonl"]
        assert not is_unfinished(out)
        with pytest.raises(UsageError, match=r"out: the run is finished$"):
            read_beginning(out)

    def test_an_artifact_that_can_not_be_written_leaves_them(self, tmp_path: Path) -> None:
        add(checkpoints(tmp_path / "out"), 1)
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(TrainerError, match=r"^output\.dir: .*out can't be written: full$"):
            self.half_written(tmp_path / "out")
        assert sorted(tmp_path.rglob("*")) == before

    def test_a_kill_after_the_weights_leaves_a_finished_run_and_what_is_removed(self, tmp_path: Path) -> None:
        out, killed = tmp_path / "out", tmp_path / "killed"
        add(checkpoints(out), 1)
        with finishing(out, "output.dir") as partial:
            (partial / "half").touch()
            shutil.copytree(out, killed)
        (killed / "adapter_model.safetensors").touch()  # the last to come
        for swept in ("; its checkpoints, which a kill had left, are removed", ""):
            with pytest.raises(UsageError) as caught:
                read_beginning(killed)
            assert str(caught.value) == f"{killed}: the run is finished{swept}"
            assert [file.name for file in killed.rglob("*")] == ["adapter_model.safetensors"]

    def test_a_kill_while_the_only_one_is_dropped_leaves_a_run_that_begins_again(self, tmp_path: Path) -> None:
        own = checkpoints(tmp_path / "out")
        add(own, 1)
        shutil.rmtree(own.folder)
        assert read_beginning(tmp_path / "out").data == own.beginning.data
        add(own, 2)
        assert names(own) == ["checkpoint-2"]

    def half_written(self, folder: Path) -> None:
        with finishing(folder, "output.dir") as partial:
            (partial / "adapter_model.safetensors").touch()
            raise OSError("full")


class TestBeginning:
    def test_it_is_read_as_it_was_but_for_relative_paths(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        train = {"learning_rate": 0.1 + 0.2, "logging_dir": "events"}
        registration = {"name": "one", "tls_ca": "ca.pem"}
        own = beginning(Path("out"), train=train, adapter={"method": "ia3"}, registration=registration)
        add(Checkpoints(own), 1)
        Path("out").rename("moved")
        read = read_beginning(Path("moved"))
        assert read.config.output.dir == Path("moved")
        assert read.config.data.train == tmp_path / "rows.jsonl"
        assert read.config.train.logging_dir == tmp_path / "events"
        assert read.config.registration.tls_ca == tmp_path / "ca.pem"
        assert read.config.train.learning_rate == own.config.train.learning_rate
        assert read.config.adapter == own.config.adapter
        assert read.config.base == own.config.base
        read.check_same(own)

    @pytest.mark.parametrize("key", ["train", "eval"])
    def test_other_data_is_refused(self, tmp_path: Path, key: str) -> None:
        own, other = beginning(tmp_path), beginning(tmp_path)
        other.data[key] = "f" * 64
        with pytest.raises(UsageError, match=rf"^data\.{key}: .*\.jsonl has changed since the run began$"):
            own.check_same(other)

    def test_another_base_is_refused(self, tmp_path: Path) -> None:
        other = Beginning(beginning(tmp_path).config, BaseIdentity("9" * 64, "none", "1" * 64, ""), {})
        with pytest.raises(UsageError, match=r"^base\.model: some/model has changed since the run began$"):
            Beginning(other.config, BASE, {}).check_same(other)

    def test_another_rate_is_kept(self, tmp_path: Path) -> None:
        own = beginning(tmp_path / "out")
        add(Checkpoints(own), 1)
        write_beginning(own.at_rate(1e-5))
        assert read_beginning(tmp_path / "out").config.train.learning_rate == 1e-5

    @pytest.mark.parametrize("rate", [0.0, -1.0, float("inf"), float("nan")])
    def test_a_rate_that_is_none(self, tmp_path: Path, rate: float) -> None:
        with pytest.raises(UsageError, match=r"^--learning-rate: must be a positive number$"):
            beginning(tmp_path).at_rate(rate)

    @pytest.mark.parametrize(
        ("text", "reason"), [("{", "Expecting property name"), ("[" * 10**6, "maximum recursion depth exceeded")]
    )
    def test_a_file_that_is_broken(self, tmp_path: Path, text: str, reason: str) -> None:
        (tmp_path / "training").mkdir()
        (tmp_path / "training" / "run.json").write_text(text)
        with pytest.raises(UsageError, match=rf"training/run\.json: can't be read: {reason}"):
            read_beginning(tmp_path)

    @pytest.mark.parametrize("change", [{"stray": "4" * 64}, {"eval": None}])
    def test_other_files_than_the_configuration_names(self, tmp_path: Path, change: dict[str, str | None]) -> None:
        raw = json.loads(beginning(tmp_path).to_json())
        raw["data"] = {key: digest for key, digest in (raw["data"] | change).items() if digest}
        (tmp_path / "training").mkdir()
        (tmp_path / "training" / "run.json").write_text(json.dumps(raw))
        with pytest.raises(UsageError, match=r"training/run\.json: can't be read: data: must name the files of config"):
            read_beginning(tmp_path)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("_save_checkpoint", ["self", "model", "trial"]),
        ("_load_from_checkpoint", ["self", "resume_from_checkpoint", "model"]),
    ],
)
def test_transformers_still_calls_what_is_overridden(name: str, parameters: list[str]) -> None:
    assert name in vars(Resumable)
    assert list(inspect.signature(getattr(Trainer, name)).parameters) == parameters
    assert f"self.{name}(" in inspect.getsource(Trainer)


def test_nothing_else_of_transformers_own_is_overridden() -> None:
    private = {name for name in vars(Resumable) if name.startswith("_") and not name.endswith("__")}
    assert private & vars(Trainer).keys() == {"_save_checkpoint", "_load_from_checkpoint"}


def schedule(step: int, evaluations: dict[int, float], **sections: dict[str, Any]) -> dict[str, bool]:
    """What is decided at a step of 10; the last of the evaluations is that step's own, if it has one."""
    own = Schedule(beginning(Path("out"), **sections).config)
    state, control = TrainerState(global_step=step, max_steps=10), TrainerControl()
    own.on_step_end(None, state, control)
    state.log_history = [{"step": at, "eval_loss": loss} for at, loss in evaluations.items()]
    evaluated = control.should_evaluate
    if evaluated:
        own.on_evaluate(None, state, control)
    return {"save": control.should_save, "evaluate": evaluated, "stop": control.should_training_stop}


EVERY_2 = {"dir": "out", "checkpoint_every": 2}


@pytest.mark.parametrize(
    ("step", "evaluations", "decided"),
    [
        (3, {}, {}),
        (4, {}, {"save"}),
        (5, {5: 1.0}, {"evaluate", "save"}),
        (10, {5: 1.0, 10: 0.9}, {"evaluate"}),
    ],
)
def test_what_is_done_after_a_step(step: int, evaluations: dict[int, float], decided: set[str]) -> None:
    found = schedule(step, evaluations, output=EVERY_2, eval={"every": 5})
    assert {name for name, done in found.items() if done} == set(decided)


@pytest.mark.parametrize(
    ("losses", "decided"),
    [
        ([2.0, 1.5], {"evaluate", "save"}),
        ([2.0, 2.5], {"evaluate", "save"}),
        ([2.0, 2.5, 2.0], {"evaluate"}),
        ([2.0, 2.5, 2.1, 2.2], {"evaluate", "stop"}),
        ([2.0, 2.5, 2.1, 1.9], {"evaluate", "save"}),
    ],
)
def test_when_a_run_stops_early(losses: list[float], decided: set[str]) -> None:
    evaluations = dict(enumerate(losses, start=1))
    found = schedule(len(losses), evaluations, output=EVERY_2, eval={"every": 1, "patience": 3})
    assert {name for name, done in found.items() if done} == decided
