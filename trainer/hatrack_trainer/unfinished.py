"""What is in the folder of a run that is not finished: how it began, beside its checkpoints. Costs no torch."""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hatrack.manifest import WEIGHTS_FILE, BaseIdentity, file_sha256
from hatrack_trainer.config import DataSection, TrainConfig
from hatrack_trainer.errors import UsageError

RECORD = "training"  # the folder of all that is no part of the artifact
RUN_FILE = "run.json"
CHECKPOINTS = "checkpoints"
UNREADABLE = (ValueError, KeyError, TypeError, RecursionError)
"""What comes of JSON that is none, or holds something else."""


@dataclass(frozen=True, slots=True)
class Beginning:
    """What a run must find again when it goes on."""

    config: TrainConfig
    base: BaseIdentity
    data: dict[str, str]  # sha256 of each file that the section data names, by its key there

    def to_json(self) -> str:
        """The file's text; paths in it are absolute."""
        config = self.config.model_dump(mode="json")
        for name, section in self.config:
            config[name] |= {key: str(value.absolute()) for key, value in section if isinstance(value, Path)}
        if Path(self.config.base.model).is_dir():
            config["base"]["model"] = str(Path(self.config.base.model).absolute())
        return json.dumps({"config": config, "base": asdict(self.base), "data": self.data}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, folder: Path) -> Beginning:
        """Of the run in `folder`, which may have been moved. Raises one of UNREADABLE."""
        raw: dict[str, Any] = json.loads(text)
        raw["config"]["output"]["dir"] = str(folder)
        config, data = TrainConfig.model_validate(raw["config"]), dict(raw["data"])
        if data.keys() != data_files(config.data).keys():
            raise ValueError("data: must name the files of config.data, and no others")
        return cls(config, BaseIdentity(**raw["base"]), data)

    def at_rate(self, learning_rate: float) -> Beginning:
        """As if it had begun with another learning rate. Raises UsageError for one that is none."""
        if not 0 < learning_rate < math.inf:
            raise UsageError("--learning-rate: must be a positive number")
        train = self.config.train.model_copy(update={"learning_rate": learning_rate})
        return replace(self, config=self.config.model_copy(update={"train": train}))

    def check_settings(self, other: Beginning) -> None:
        """Raises UsageError, naming the key, when `other` has a setting that its checkpoints can't go on with."""
        own, others = self._settings(), other._settings()
        for key in own | others:
            if own.get(key) != others.get(key):
                was, now = (json.dumps(settings.get(key)) for settings in (own, others))
                raise UsageError(f"{key}: was {was} when the run began, and can't become {now}")

    def _settings(self) -> dict[str, Any]:
        """All that decides what is learned, but for the learning rate, which may change; with its sections' names."""
        free = {"learning_rate", "trackers", "logging_dir", "threads", "activation_checkpointing"}
        config = self.config.model_dump(
            mode="json",
            exclude={"base": {"model"}, "data": {"train", "eval"}, "train": free, "output": True, "registration": True},
        )
        return {f"{name}.{key}": value for name, section in config.items() for key, value in section.items()}

    def check_same(self, other: Beginning) -> None:
        """Raises UsageError, naming the key, when `other` has other data or another base."""
        for key, digest in self.data.items():
            if other.data[key] != digest:
                raise UsageError(f"data.{key}: {getattr(self.config.data, key)} has changed since the run began")
        if other.base != self.base:
            raise UsageError(f"base.model: {self.config.base.model} has changed since the run began")


def data_files(section: DataSection) -> dict[str, Path]:
    """The files that are read, by their keys."""
    return {"train": section.train} | ({"eval": section.eval} if section.eval else {})


def data_digests(section: DataSection) -> dict[str, str]:
    """sha256 of each."""
    return {key: file_sha256(file) for key, file in data_files(section).items()}


def is_unfinished(folder: Path) -> bool:
    """Whether a run can go on there."""
    return (folder / RECORD / RUN_FILE).is_file() and not _is_finished(folder)


def read_beginning(folder: Path) -> Beginning:
    """How the unfinished run in a folder began.

    Raises UsageError where there is none; where one is finished, after removing what a kill at its very end has left.
    """
    file = folder / RECORD / RUN_FILE
    try:
        beginning = Beginning.from_json(file.read_text(), folder)
    except FileNotFoundError:
        if _is_finished(folder):
            raise UsageError(f"{folder}: the run is finished") from None
        raise UsageError(f"{folder}: holds no unfinished run; `hatrack train run` begins one") from None
    except (OSError, *UNREADABLE) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{file}: can't be read: {reason}") from None
    if _is_finished(folder):
        forget(folder)
        raise UsageError(f"{folder}: the run is finished; its checkpoints, which a kill had left, are removed")
    return beginning


def write_beginning(beginning: Beginning) -> None:
    """Puts it in place of what is there, whole."""
    file = beginning.config.output.dir / RECORD / RUN_FILE
    partial = file.with_suffix(".partial")
    partial.write_text(beginning.to_json())
    partial.replace(file)


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Keeps the run in a folder from other processes; raises UsageError where another has it."""
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(folder / RECORD))
        except BlockingIOError:
            raise UsageError(f"{folder}: another process is at this run") from None
        yield


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes from locking a folder, until this one ends in whatever way.

    Raises BlockingIOError where another has locked it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def forget(folder: Path) -> None:
    """Removes all that makes a run unfinished, and what is empty then."""
    # The file goes last: as long as it is there, what a kill leaves of the rest is known to be a run's.
    shutil.rmtree(folder / RECORD / CHECKPOINTS, ignore_errors=True)
    (folder / RECORD / RUN_FILE).unlink(missing_ok=True)
    with suppress(OSError):
        (folder / RECORD).rmdir()
        folder.rmdir()


def _is_finished(folder: Path) -> bool:
    return (folder / WEIGHTS_FILE).is_file()
