"""Writing what was trained: PEFT's own two files, Hatrack's manifest beside them, and what tells people of the run."""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError

from hatrack.manifest import (
    CONFIG_FILE,
    MANIFEST_FILE,
    BaseIdentity,
    Manifest,
    folder_digest,
)
from hatrack_trainer.errors import TrainerError, UsageError
from hatrack_trainer.log import LogEntry, as_json_lines
from hatrack_trainer.loss_plot import draw_losses
from hatrack_trainer.model_card import model_card

RECORD = "training"  # the folder of the log and its plot


def check_output_folder(folder: Path, option: str = "output.dir") -> None:
    """Raises UsageError, naming the option, if nothing can be written there: something is there, or the disk refuses.

    Leaves no trace.
    """
    target = folder.resolve()
    try:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise UsageError(f"{option}: {folder} exists already; name a new folder")
        existing = next(parent for parent in target.parents if parent.exists())
        # Only trying tells: permissions say nothing of a disk that is read-only, nor to root.
        tempfile.TemporaryDirectory(dir=existing, prefix=f".{target.name}").cleanup()
    except OSError as error:
        raise UsageError(f"{option}: {folder} can't be made: {error.strerror}") from None


def write_artifact(
    model: PeftModel,
    folder: Path,
    *,
    base_name: str,
    base: BaseIdentity,
    training: dict[str, Any],
    log: Sequence[LogEntry],
) -> str:
    """Writes everything to `folder`, or nothing, and returns the artifact's digest.

    `base_name` is what adapter_config.json will call the base: the name the user gave, not where it was loaded from.
    """
    config = model.peft_config["default"]
    config.base_model_name_or_path = base_name
    with all_or_nothing(folder, "output.dir") as partial:
        digest = _write_adapter(model, partial)
        manifest = Manifest(artifact=digest, base=base, method=config.peft_type.value, training=training)
        (partial / MANIFEST_FILE).write_text(manifest.to_json())
        (partial / "README.md").write_text(model_card(base_name, manifest))  # in place of PEFT's
        _write_record(partial / RECORD, log)
    return digest


@contextmanager
def all_or_nothing(folder: Path, option: str) -> Iterator[Path]:
    """A folder to be filled, which becomes `folder` in the end; whatever goes wrong, nothing of it is left.

    `folder` must not exist, or be empty, then too. Raises TrainerError, naming the option, when it can't be written.
    """
    folder = folder.resolve()
    missing = [parent for parent in folder.parents if not parent.exists()]
    partial = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Another process may be writing to the same place: each has a name of its own.
        partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        partial.chmod(0o755)  # temporary folders are for their owner alone
        yield partial
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    except BaseException as error:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):
            for parent in missing:
                parent.rmdir()
        if isinstance(error, OSError | SafetensorError):
            raise TrainerError(f"{option}: {folder} can't be written: {error}") from None
        raise


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
