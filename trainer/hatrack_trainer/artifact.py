"""Writing what was trained: PEFT's own two files, Hatrack's manifest beside them, and what tells people of the run."""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from os.path import islink, realpath
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError

from hatrack.manifest import (
    CONFIG_FILE,
    MANIFEST_FILE,
    WEIGHTS_FILE,
    BaseIdentity,
    Manifest,
    folder_digest,
)
from hatrack_trainer.errors import TrainerError, UsageError
from hatrack_trainer.log import LogEntry, as_json_lines
from hatrack_trainer.loss_plot import draw_losses
from hatrack_trainer.model_card import model_card
from hatrack_trainer.unfinished import CHECKPOINTS, RECORD, forget, is_unfinished, locked

PARTIAL = ".hatrack-partial-"
"""In the hidden name of a folder that is being filled, which nobody else would give one."""


def check_output_folder(folder: Path, option: str = "output.dir") -> None:
    """Raises UsageError, naming the option, if nothing can be written there: something is there, or the disk refuses.

    Leaves no trace; what a kill within has left is removed by the next call for the same `folder`.
    """
    target = resolved(folder, option)
    try:
        if is_unfinished(target):
            raise UsageError(
                f"{option}: {folder} holds an unfinished run: `hatrack train resume {folder}` goes on with it"
            )
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise UsageError(f"{option}: {folder} exists already; name a new folder")
        existing = next(parent for parent in target.parents if parent.exists())
        # Only trying tells: permissions say nothing of a disk that is read-only, nor to root.
        prefix = f".{target.name}{PARTIAL}"
        _sweep(existing, prefix)
        tempfile.TemporaryDirectory(dir=existing, prefix=prefix).cleanup()
    except OSError as error:
        raise UsageError(f"{option}: {folder} can't be made: {error.strerror}") from None


def check_logging_folder(folder: Path, option: str = "train.logging_dir") -> None:
    """Raises UsageError, naming the option, if files can't be written to a folder, which may be there. No trace."""
    target = resolved(folder, option)
    try:
        existing = next(path for path in (target, *target.parents) if path.exists())
        tempfile.TemporaryDirectory(dir=existing).cleanup()
    except OSError as error:
        raise UsageError(f"{option}: {folder} can't be written to: {error.strerror}") from None


def check_temporary_folder() -> None:
    """Raises UsageError when there is no room for temporary files, of which the libraries want some. No trace."""
    try:
        tempfile.TemporaryDirectory().cleanup()
    except OSError as error:
        raise UsageError(f"TMPDIR: no temporary folder can be made: {error.strerror}") from None


def resolved(folder: Path, option: str) -> Path:
    """The folder that links lead to. Raises UsageError, naming the option, where they lead in a circle."""
    target = Path(realpath(folder))
    if any(map(islink, (target, *target.parents))):  # realpath leaves what it can't follow
        raise UsageError(f"{option}: {folder} is made of links that lead in a circle")
    return target


def write_artifact(
    model: PeftModel,
    folder: Path,
    *,
    base_name: str,
    base: BaseIdentity,
    training: dict[str, Any],
    log: Sequence[LogEntry],
) -> str:
    """Writes everything to `folder`, or nothing, and returns the artifact's digest. A run's checkpoints there go.

    `base_name` is the name that the user gave; adapter_config.json and the card tell its public part.
    """
    config = model.peft_config["default"]
    config.base_model_name_or_path = base_name = public_name(base_name)
    with (finishing if is_unfinished(folder) else all_or_nothing)(folder, "output.dir") as partial:
        digest = _write_adapter(model, partial)
        manifest = Manifest(artifact=digest, base=base, method=config.peft_type.value, training=training)
        (partial / MANIFEST_FILE).write_text(manifest.to_json())
        (partial / "README.md").write_text(model_card(base_name, manifest))  # in place of PEFT's
        _write_record(partial / RECORD, log)
    return digest


def public_name(base: str) -> str:
    """What others may read of a base's name: a hub id as it is, of a path of this machine the folder's name alone."""
    return Path(base).resolve().name if Path(base).is_dir() else base


@contextmanager
def all_or_nothing(folder: Path, option: str) -> Iterator[Path]:
    """A folder to be filled, which becomes `folder` in the end; whatever goes wrong, nothing of it is left.

    What a kill has left is removed by the next call for the same `folder`.

    `folder` must not exist, or be empty, then too. Raises TrainerError, naming the option, when it can't be written.
    """
    folder = folder.resolve()
    missing = [parent for parent in folder.parents if not parent.exists()]
    partial = None
    with writing(folder, option):
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            prefix = f".{folder.name}{PARTIAL}"
            _sweep(folder.parent, prefix)
            # Another process may be writing to the same place: each has a name of its own.
            partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=prefix))
            partial.chmod(0o755)  # temporary folders are for their owner alone
            with locked(partial):
                yield partial
                if folder.exists():
                    folder.rmdir()
                partial.rename(folder)
        except BaseException:
            if partial is not None:
                shutil.rmtree(partial, ignore_errors=True)
            with suppress(OSError):
                for parent in missing:
                    parent.rmdir()
            raise


def _sweep(parent: Path, prefix: str) -> None:
    """Removes what killed processes have left: all that is named so and that no living one has locked."""
    for left in parent.iterdir():
        if left.name.startswith(prefix):
            with suppress(OSError), locked(left):
                shutil.rmtree(left)


@contextmanager
def writing(folder: Path, option: str, kind: type[TrainerError] = TrainerError) -> Iterator[None]:
    """Raises an error of a kind, naming the option, when what is done within can't write to `folder`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise kind(f"{option}: {folder} can't be written: {error}") from None


@contextmanager
def finishing(folder: Path, option: str) -> Iterator[Path]:
    """A folder to be filled, whose files go to `folder` in the end, where the run's checkpoints make room for them.

    The weights go last, by one rename: without them there is no artifact, and the run can go on.
    """
    partial = folder / RECORD / CHECKPOINTS / ".artifact"  # so it goes with them, even after a kill
    with writing(folder, option):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            files = [file for file in partial.rglob("*") if file.is_file()]
            for file in sorted(files, key=lambda file: file.name == WEIGHTS_FILE):
                target = folder / file.relative_to(partial)
                target.parent.mkdir(exist_ok=True)
                file.replace(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    forget(folder)


def _write_adapter(model: PeftModel, folder: Path) -> str:
    """PEFT's two files; the artifact's digest."""
    # PEFT would otherwise ask the hub whether the vocabulary was resized.
    with warnings.catch_warnings():
        # PEFT takes what AdaLoRA has pruned to rank 0 for a shard that was not gathered.
        warnings.filterwarnings("ignore", "Adapter 'default': .* invalid shape", UserWarning)
        model.save_pretrained(str(folder), save_embedding_layers=False)
    _sort_config(folder / CONFIG_FILE)
    return folder_digest(folder)


def _write_record(folder: Path, log: Sequence[LogEntry]) -> None:
    folder.mkdir()
    (folder / "log.jsonl").write_text(as_json_lines(log))
    draw_losses(log, folder / "loss")


def _sort_config(file: Path) -> None:
    """PEFT writes sets in hash order; sorted, equal adapters have equal digests."""
    config = json.loads(file.read_text())
    for key in ("target_modules", "feedforward_modules"):
        if isinstance(config.get(key), list):
            config[key].sort()
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
