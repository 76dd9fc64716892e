"""Checkpoints of a run, written whole and loaded exactly: what goes on from one ends as if it had never stopped."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints, sort_checkpoints

from hatrack.manifest import file_sha256
from hatrack_trainer.artifact import all_or_nothing, writing
from hatrack_trainer.distributed import from_first, is_first, shared_like, whole
from hatrack_trainer.errors import NotFinite, TrainerError, TrainingStopped, UsageError
from hatrack_trainer.log import best_step, log_entries, losses
from hatrack_trainer.methods import Method
from hatrack_trainer.unfinished import (
    CHECKPOINTS,
    RECORD,
    RUN_FILE,
    UNREADABLE,
    Beginning,
    claimed,
    forget,
    is_unfinished,
)

TENSORS = "trained.safetensors"
DIGESTS = "sha256.json"
"""Of every file of a checkpoint: transformers goes on without some of them, otherwise than before."""
PROBE_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """The checkpoints in `<output.dir>/training/checkpoints`, beside `training/run.json`; the first brings both."""

    beginning: Beginning

    @property
    def folder(self) -> Path:
        """Where they are; absent before the first."""
        return self.beginning.config.output.dir / RECORD / CHECKPOINTS

    @property
    def latest(self) -> Path | None:
        """The newest: all that are there are whole."""
        found = sort_checkpoints(str(self.folder))
        return Path(found[-1]) if found else None

    def check_latest(self) -> None:
        """Raises UsageError when the newest, if there is any, was damaged since, or is of a run with other settings."""
        latest = self.latest
        if latest is None:
            return
        with _undamaged(latest, DIGESTS) as file:
            digests = dict(json.loads(file.read_text()))
        for name in digests or [DIGESTS]:
            with _undamaged(latest, name) as file:
                if file_sha256(file) != digests[name]:
                    raise ValueError("changed")
        with _undamaged(latest, RUN_FILE) as file:
            began = Beginning.from_json(file.read_text(), latest)
        began.check_settings(self.beginning)

    def of(self, step: int) -> Path:
        """The one after a step."""
        return self.folder / f"{PREFIX_CHECKPOINT_DIR}-{step}"

    @contextmanager
    def adding(self, step: int) -> Iterator[Path]:
        """A folder in which transformers writes the checkpoint of a step, which then becomes one of these.

        Raises TrainerError when it can't be written.
        """
        output = self.beginning.config.output.dir
        if not is_unfinished(output):
            with all_or_nothing(output, "output.dir") as partial:
                yield partial / RECORD / CHECKPOINTS
                (partial / RECORD / RUN_FILE).write_text(self.beginning.to_json())
                self.seal(partial / RECORD / CHECKPOINTS / self.of(step).name)
                _sync(partial / RECORD)
            return
        with writing(output, "output.dir"):
            partial = self.folder / ".partial"
            shutil.rmtree(partial, ignore_errors=True)  # what a kill has left
            try:
                yield partial
                self.seal(partial / self.of(step).name)
                _sync(partial)
                (partial / self.of(step).name).rename(self.of(step))
            finally:  # of a disk that is full, even the run that goes on needs some room
                shutil.rmtree(partial, ignore_errors=True)

    def seal(self, checkpoint: Path) -> None:
        """Adds to a checkpoint how the run began, and by what damage is found."""
        (checkpoint / RUN_FILE).write_text(self.beginning.to_json())
        files = [file for file in checkpoint.rglob("*") if file.is_file()]
        digests = {str(file.relative_to(checkpoint)): file_sha256(file) for file in files}
        (checkpoint / DIGESTS).write_text(json.dumps(digests, indent=2) + "\n")

    def rotate(self, best: int | None) -> None:
        """Removes the oldest beyond how many are wanted, but not the newest, nor that of the step `best`."""
        protected = str(self.of(best)) if best is not None and self.of(best).exists() else None
        rotate_checkpoints(str(self.folder), self.beginning.config.output.keep_checkpoints, protected)

    def drop(self, step: int) -> None:
        """Removes the one after a step, if it is there, for it is not good; and the run, if it was the only one."""
        shutil.rmtree(self.of(step), ignore_errors=True)
        if self.folder.exists() and self.latest is None:
            forget(self.beginning.config.output.dir)

    def way_on(self, *, slower: bool) -> list[str]:
        """A sentence for the user whose run has stopped; none before the first checkpoint.

        `slower`: whether another learning rate may be of use.
        """
        if self.latest is None:
            return []
        command = f"hatrack train resume {self.beginning.config.output.dir}"
        step = self.latest.name.rpartition("-")[2]
        rate = ", with --learning-rate at another rate" if slower else ""
        return [f"the checkpoint of step {step} is kept: `{command}` goes on from it{rate}"]


class Resumable(Trainer):
    """What makes a TRL trainer's checkpoints exact: to be named before that trainer among a class's bases.

    PEFT's loading rounds tensors, forgets what an allocator knows, and not every method has one. No public hook of
    transformers stands in for `_save_checkpoint` and `_load_from_checkpoint` (trainer.py, as of 5.23): callbacks come
    after both. A test tells when they are renamed.
    """

    method: Method
    checkpoints: Checkpoints
    _claims: ExitStack
    _claimed = False

    def load_tensors(self, checkpoint: Path) -> None:
        """Puts what is trained, and what its method goes by, back to what it was; raises UsageError if damaged."""
        trained = self._trained()
        with _undamaged(checkpoint, TENSORS) as file:
            tensors = load_file(file)
            if any(tensors[name].shape != parameter.shape for name, parameter in trained.items()):
                raise ValueError("other shapes, which would be broadcast")
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(shared_like(tensors.pop(name), parameter))
        self.method.load_state(self.model, tensors)

    @contextmanager
    def telling(self, say: Callable[[str], None]) -> Iterator[None]:
        """What stops the run within tells the user how it can go on; meanwhile no other process can."""
        with ExitStack() as self._claims:
            self._claim()
            with self._telling(say):
                yield

    @contextmanager
    def _telling(self, say: Callable[[str], None]) -> Iterator[None]:
        try:
            yield
        except UsageError:  # the user has to do something else first
            raise
        except TrainerError as error:
            if isinstance(error, NotFinite) and is_first():
                self.checkpoints.drop(self.state.global_step - 1)
            way_on = self.checkpoints.way_on(slower=isinstance(error, TrainingStopped))
            raise type(error)("; ".join([str(error), *way_on])) from None
        except KeyboardInterrupt:
            for sentence in self.checkpoints.way_on(slower=True):
                say(f"interrupted; {sentence}")
            raise

    def keep_best(self, say: Callable[[str], None]) -> int | None:
        """After the last step, goes back to the one with the lowest held-out loss; None if `eval.every` is absent."""
        section = self.checkpoints.beginning.config.eval
        if section.every is None:
            return None
        entries = log_entries(self.state.log_history)
        best = best_step(entries)
        assert best is not None
        if best < self.state.global_step:
            self.load_tensors(self.checkpoints.of(best))
        taken = losses(entries, "eval_loss")
        say(
            f"the adapter of step {best} is kept: its held-out loss is the lowest of {len(taken)}, "
            f"the last of step {taken[-1][0]}"
        )
        return best

    def _claim(self) -> None:
        output = self.checkpoints.beginning.config.output.dir
        if is_first() and not self._claimed and self.checkpoints.folder.exists():
            self._claims.enter_context(claimed(output))
            self._claimed = True

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        adding = self.checkpoints.adding(self.state.global_step)
        with ExitStack() as stack:
            folder = from_first(lambda: stack.enter_context(adding))
            self.args.output_dir = str(folder)
            try:
                Trainer._save_checkpoint(self, model, trial)  # TRL's own writes a model card, too
            except RuntimeError as error:  # torch's of a full disk, which hides the system's
                _check_disk(folder)
                raise OSError(str(error).splitlines()[0]) from None
            self.accelerator.wait_for_everyone()
        self._claim()
        if is_first():
            self.checkpoints.rotate(best_step(log_entries(self.state.log_history)))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves what is trained, and what its method goes by, to a checkpoint's folder. Called by the trainer."""
        assert output_dir is not None
        tensors = {name: whole(parameter).contiguous() for name, parameter in self._trained().items()}
        if is_first():
            Path(output_dir).mkdir(parents=True, exist_ok=True)  # another process may have come first
            save_file(tensors | self.method.state(self.model), Path(output_dir) / TENSORS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:  # noqa: ARG002
        self.load_tensors(Path(resume_from_checkpoint))

    def _trained(self) -> dict[str, nn.Parameter]:
        if self.is_fsdp_enabled:
            self.model.state_dict()  # makes FSDP take back what its last forward left whole
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}


@contextmanager
def _undamaged(checkpoint: Path, name: str) -> Iterator[Path]:
    """A file of a checkpoint; raises UsageError when what is done within can't read it, or finds it changed."""
    file = checkpoint / name
    try:
        yield file
    except (OSError, SafetensorError, *UNREADABLE):
        raise UsageError(
            f"{file}: is damaged; without {checkpoint.name} the run goes on from the checkpoint before"
        ) from None


def _check_disk(folder: Path) -> None:
    """Raises the system's own OSError if a file in there can't grow: only trying tells of quotas, too."""
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(PROBE_BYTES))


def _sync(folder: Path) -> None:
    """Waits until the files in it are on the disk: a rename may get there before them."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
