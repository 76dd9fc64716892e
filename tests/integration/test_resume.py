"""A run that is cut short and resumed ends, bit for bit, as one that was not."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tiny import make_checkpoint

from hatrack_client.cli import run as hatrack
from hatrack_trainer.checkpoints import Checkpoints
from hatrack_trainer.config import TrainConfig
from hatrack_trainer.errors import TrainerError, TrainingStopped, UsageError
from hatrack_trainer.methods import methods
from hatrack_trainer.run import TrainingResult, resume, train
from hatrack_trainer.unfinished import claimed, read_beginning

# PEFT takes what AdaLoRA has pruned to rank 0 for a shard that was not gathered.
pytestmark = pytest.mark.filterwarnings("ignore:Adapter 'default'. .* LoRA tensor.s. have invalid shape")

# Small, and with dropout where there is any.
KEYS: dict[str, dict[str, Any]] = {
    "adalora": {"rank": 2, "initial_rank": 4, "dropout": 0.1},
    "bottleneck": {"rank": 4},
    "dora": {"rank": 2, "dropout": 0.1},
    "llama_adapter": {"layers": 1, "tokens": 4},
    "loha": {"rank": 2, "rank_dropout": 0.2},
    "lokr": {"rank": 2, "rank_dropout": 0.2},
    "lora": {"rank": 2, "dropout": 0.1},
    "partial": {"parts": ["norms"], "last_layers": 1},
    "p_tuning": {"tokens": 4},
    "prefix_tuning": {"tokens": 4},
    "prompt_tuning": {"tokens": 4},
    "rslora": {"rank": 2, "dropout": 0.1},
    "vera": {"rank": 8, "dropout": 0.1},
}
STEPS, CUT = 7, 5  # of 3 steps an epoch: the checkpoint of step 4 lies within the second


PARTS = [
    "optimizer.pt",
    "rng_state.pth",
    "run.json",
    "scheduler.pt",
    "sha256.json",
    "trained.safetensors",
    "trainer_state.json",
]
LINE = "goes on from it, with --learning-rate at another rate"


class Cut(Exception):
    """What stops a run in process."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("base"), num_hidden_layers=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [{"prompt": f"say {n}:", "completion": f" it is {n}"} for n in range(6)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def configure(checkpoint: Path, data: Path, out: Path, method: str = "lora", /, **sections: Any) -> TrainConfig:
    raw: dict[str, dict[str, Any]] = {
        "base": {"model": str(checkpoint)},
        "adapter": {"method": method, **KEYS.get(method, {})},
        "data": {"train": str(data)},
        "train": {"max_steps": STEPS, "batch_size": 2},
        "eval": {},
        "output": {"dir": str(out), "checkpoint_every": 2},
    }
    return TrainConfig.model_validate({name: keys | sections.get(name, {}) for name, keys in raw.items()})


def cut_short(config: TrainConfig, at: int = CUT) -> None:
    def cut(step: int, _total: int, _loss: float) -> None:
        if step == at:
            raise Cut

    with pytest.raises(Cut):
        train(config, on_step=cut)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def checkpoints(folder: Path) -> list[str]:
    return sorted(file.name for file in (folder / "training" / "checkpoints").iterdir())


@pytest.mark.parametrize("method", methods())
def test_every_method_ends_as_if_it_had_not_stopped(checkpoint: Path, data: Path, tmp_path: Path, method: str) -> None:
    accumulation = {"train": {"gradient_accumulation": 2, "epochs": 4, "max_steps": None, "batch_size": 1}}
    whole, cut = tmp_path / "whole", tmp_path / "cut"

    def leave(step: int, *_: Any) -> None:  # what a kill would leave
        if step == CUT:
            shutil.copytree(whole, cut)

    config = configure(checkpoint, data, whole, method, **accumulation if method == "lora" else {})
    digest = train(config, on_step=leave).digest
    assert checkpoints(cut) == ["checkpoint-2", "checkpoint-4"]
    assert resume(cut).digest == digest
    assert contents(cut) == contents(whole)


HARD = """
import os, signal, sys
from pathlib import Path
from hatrack_trainer.run import train
from test_resume import configure

def killed_at_the_second(step, *_):
    if step == 3:
        os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)

train(configure(*map(Path, sys.argv[1:4])), on_step=killed_at_the_second)
"""


def test_killed_while_it_writes_a_checkpoint_it_goes_on_from_the_one_before(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(data.parent)
    whole = train(configure(checkpoint, Path(data.name), tmp_path / "whole"))
    arguments = [checkpoint, data.name, tmp_path / "cut"]
    paths = {"PYTHONPATH": str(Path(__file__).parent) + ":" + str(Path(__file__).parents[1])}
    child = subprocess.run([sys.executable, "-c", HARD, *map(str, arguments)], env=os.environ | paths, check=False)
    assert child.returncode == -signal.SIGKILL
    assert checkpoints(tmp_path / "cut") == [".partial", "checkpoint-2"]

    monkeypatch.chdir(tmp_path)  # the data's path was relative
    assert hatrack(["train", "resume", "cut"]) == 0
    assert capsys.readouterr().out == f"cut: 7 steps, loss {whole.loss:.4f}, digest {whole.digest}\n"
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert hatrack(["train", "resume", "cut"]) == 2
    assert capsys.readouterr().err == "hatrack: cut: the run is finished\n"


# A learning rate at which the loss of other rows soon rises.
RISING: dict[str, Any] = {
    "adapter": {"dropout": 0.0},
    "train": {"learning_rate": 0.03, "schedule": "constant", "warmup_steps": 2, "max_steps": 20},
    "eval": {"every": 1, "patience": 3},
    "output": {"keep_checkpoints": 1},
}


def rising(checkpoint: Path, data: Path, out: Path, **more: Any) -> TrainConfig:
    held_out = data.with_name("held-out.jsonl")
    held_out.write_text("".join(f'{{"prompt": "Who is {name}?", "completion": "{name * 3}"}}\n' for name in "xyzw"))
    return configure(checkpoint, data, out, "lora", **RISING | {"data": {"eval": str(held_out)}} | more)


@pytest.fixture(scope="module")
def stopped(checkpoint: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainingResult:
    return train(rising(checkpoint, data, tmp_path_factory.mktemp("rising") / "whole"))


def test_without_improvement_it_stops_early_and_keeps_the_best(
    checkpoint: Path, data: Path, tmp_path: Path, stopped: TrainingResult
) -> None:
    log = [json.loads(line) for line in (stopped.folder / "training" / "log.jsonl").read_text().splitlines()]
    losses = {entry["step"]: entry["eval_loss"] for entry in log if "eval_loss" in entry}
    assert list(losses) == list(range(1, stopped.steps + 1))
    assert stopped.best_step == min(losses, key=lambda step: losses[step])
    assert stopped.steps == stopped.best_step + 3 < 20
    assert stopped.eval_loss == losses[stopped.best_step]
    manifest = json.loads((stopped.folder / "manifest.json").read_text())
    assert manifest["training"]["best_step"] == stopped.best_step

    until = {"train": RISING["train"] | {"max_steps": stopped.best_step}, "eval": {}}
    assert train(rising(checkpoint, data, tmp_path / "until", **until)).digest == stopped.digest


def test_it_does_so_when_it_was_cut_short_between(
    checkpoint: Path, data: Path, tmp_path: Path, stopped: TrainingResult
) -> None:
    said: list[str] = []
    cut_short(rising(checkpoint, data, tmp_path / "cut"), at=stopped.steps)
    assert f"checkpoint-{stopped.best_step}" in checkpoints(tmp_path / "cut")
    resume(tmp_path / "cut", say=said.append)
    assert contents(tmp_path / "cut") == contents(stopped.folder)
    assert said[-1] == (
        f"the adapter of step {stopped.best_step} is kept: its held-out loss is the lowest of {stopped.steps}, "
        f"the last of step {stopped.steps}"
    )


def test_a_run_that_went_wrong_goes_on_at_another_rate(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    # The first step's rate is zero; the second's ruins the weights, which the third finds.
    train_section = {"warmup_steps": 2, "learning_rate": 1e30}
    often = {"output": {"checkpoint_every": 1}}
    sentence = rf"^the (loss|gradient) is not finite at step 3: .*; the checkpoint of step 1 is kept: .* {LINE}$"
    with pytest.raises(TrainingStopped, match=sentence):
        train(configure(checkpoint, data, tmp_path / "wrong", **often, train=train_section))
    assert checkpoints(tmp_path / "wrong") == ["checkpoint-1"]
    resumed = resume(tmp_path / "wrong", learning_rate=1e-3)
    right = train(configure(checkpoint, data, tmp_path / "right", train=train_section | {"learning_rate": 1e-3}))
    assert resumed.digest == right.digest
    manifest = json.loads((tmp_path / "wrong" / "manifest.json").read_text())
    assert manifest["training"]["settings"]["learning_rate"] == 1e-3


def test_an_interrupted_run_says_how_it_goes_on(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    def interrupt(step: int, _total: int, _loss: float) -> None:
        if step == 3:
            raise KeyboardInterrupt

    said: list[str] = []
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        train(configure(checkpoint, data, out), on_step=interrupt, say=said.append)
    assert said[-1] == f"interrupted; the checkpoint of step 2 is kept: `hatrack train resume {out}` {LINE}"


def test_a_disk_that_takes_no_more_is_told_in_its_own_words(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    """The optimizer's file is larger than the tensors': torch, which writes it, hides what the system says."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(step: int, *_: Any) -> None:
        if step == 3:
            [size] = {file.stat().st_size for file in (tmp_path / "out").rglob("trained.safetensors")}
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

    whole = train(configure(checkpoint, data, tmp_path / "whole"))
    try:
        with pytest.raises(TrainerError) as caught:
            train(configure(checkpoint, data, tmp_path / "out"), on_step=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    out = tmp_path / "out"
    assert str(caught.value) == (
        f"output.dir: {out} can't be written: [Errno 27] File too large; "
        f"the checkpoint of step 2 is kept: `hatrack train resume {out}` goes on from it"
    )
    assert checkpoints(out) == ["checkpoint-2"]
    assert resume(out).digest == whole.digest


class TestRefusals:
    @pytest.fixture
    def own(self, data: Path, tmp_path: Path) -> Path:
        file = tmp_path / "own.jsonl"
        file.write_text(data.read_text())
        return file

    @pytest.fixture
    def unfinished(self, checkpoint: Path, own: Path, tmp_path: Path) -> Path:
        cut_short(configure(checkpoint, own, tmp_path / "out"), at=3)
        return tmp_path / "out"

    def test_a_new_run_in_its_place(self, checkpoint: Path, own: Path, unfinished: Path) -> None:
        with pytest.raises(UsageError) as caught:
            train(configure(checkpoint, own, unfinished))
        assert str(caught.value) == (
            f"output.dir: {unfinished} holds an unfinished run: `hatrack train resume {unfinished}` goes on with it"
        )

    def test_other_data(self, own: Path, unfinished: Path) -> None:
        own.write_text(own.read_text().replace("it is 3", "it was 3"))
        with pytest.raises(UsageError) as caught:
            resume(unfinished)
        assert str(caught.value) == f"data.train: {own} has changed since the run began"

    def test_a_run_that_never_was(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError) as caught:
            resume(tmp_path)
        assert str(caught.value) == f"{tmp_path}: holds no unfinished run; `hatrack train run` begins one"

    @pytest.mark.parametrize(
        ("section", "key", "was", "now"),
        [("adapter", "rank", 2, 4), ("adapter", "method", "lora", "ia3"), ("train", "batch_size", 2, 3)],
    )
    def test_other_settings(self, unfinished: Path, section: str, key: str, was: object, now: object) -> None:
        file = unfinished / "training" / "run.json"
        run = json.loads(file.read_text())
        run["config"][section] = {key: now} if key == "method" else run["config"][section] | {key: now}
        file.write_text(json.dumps(run))
        with pytest.raises(UsageError) as caught:
            resume(unfinished)
        was, now = json.dumps(was), json.dumps(now)
        assert str(caught.value) == f"{section}.{key}: was {was} when the run began, and can't become {now}"

    def test_a_checkpoint_that_was_damaged(self, unfinished: Path) -> None:
        checkpoint = unfinished / "training" / "checkpoints" / "checkpoint-2"
        assert sorted(file.name for file in checkpoint.iterdir()) == PARTS
        for file in checkpoint.iterdir():
            before = file.read_bytes()
            for damaged in (before[:100], b"", b"{}", None):
                file.unlink()
                if damaged is not None:
                    file.write_bytes(damaged)
                with pytest.raises(UsageError) as caught:
                    resume(unfinished)
                assert str(caught.value) == (
                    f"{file}: is damaged; without checkpoint-2 the run goes on from the checkpoint before"
                )
                file.touch()
            file.write_bytes(before)
        assert resume(unfinished).steps == STEPS

    @pytest.mark.parametrize("rows", [None, 1])
    def test_tensors_of_another_adapter(self, unfinished: Path, rows: int | None) -> None:
        checkpoint = unfinished / "training" / "checkpoints" / "checkpoint-2"
        file = checkpoint / "trained.safetensors"
        tensors = load_file(file)
        name = next(iter(tensors))
        cut = tensors.pop(name)[:rows].contiguous()
        save_file(tensors | ({name: cut} if rows else {}), file)
        (checkpoint / "sha256.json").unlink()
        Checkpoints(read_beginning(unfinished)).seal(checkpoint)
        with pytest.raises(UsageError) as caught:
            resume(unfinished)
        assert str(caught.value) == (
            f"{file}: is damaged; without checkpoint-2 the run goes on from the checkpoint before"
        )

    def test_a_run_that_another_process_is_at(self, unfinished: Path) -> None:
        before = contents(unfinished)
        with claimed(unfinished), pytest.raises(UsageError) as caught:
            resume(unfinished)
        assert str(caught.value) == f"{unfinished}: another process is at this run"
        assert contents(unfinished) == before

    def test_a_folder_that_takes_nothing_more(self, unfinished: Path) -> None:
        (unfinished / "training" / "run.partial").mkdir()
        with pytest.raises(UsageError, match=r"^output\.dir: .* can't be written: "):
            resume(unfinished)


def test_nobody_else_goes_on_with_a_run_that_still_runs(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    refusals: list[str] = []

    def intrude(step: int, *_: Any) -> None:
        if step == 3:
            with pytest.raises(UsageError) as caught, claimed(tmp_path / "out"):
                pass
            refusals.append(str(caught.value))

    assert train(configure(checkpoint, data, tmp_path / "out"), on_step=intrude).steps == STEPS
    assert refusals == [f"{tmp_path / 'out'}: another process is at this run"]
