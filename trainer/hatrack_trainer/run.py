"""One training run, from a configuration to an artifact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer
from trl import SFTTrainer

from hatrack.manifest import file_sha256
from hatrack_server.model.checkpoint import identify, resolve_checkpoint
from hatrack_server.model.load import load_base
from hatrack_trainer.artifact import check_output_folder, write_artifact
from hatrack_trainer.config import DataSection, TrainConfig
from hatrack_trainer.data.lines import check_data_file
from hatrack_trainer.data.read import Data, ExampleSet, check_trainable, read_data
from hatrack_trainer.data.remarks import format_remark, warnings
from hatrack_trainer.errors import TrainingStopped, UsageError
from hatrack_trainer.log import log_entries
from hatrack_trainer.sft import OnStep, make_trainer
from hatrack_trainer.targets import check_adapter

LIBRARIES = ("hatrack", "torch", "transformers", "peft", "trl", "bitsandbytes")


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """What a finished run left behind."""

    folder: Path
    digest: str
    steps: int
    loss: float  # mean over all steps
    eval_loss: float | None


def train(
    config: TrainConfig, *, on_step: OnStep | None = None, say: Callable[[str], None] = lambda _: None
) -> TrainingResult:
    """Trains one adapter and writes its artifact to `config.output.dir`; on an error nothing is written.

    `say` gets sentences that the user should see. Sets torch's thread count for the whole process if the
    configuration names one. Raises UsageError, TrainingStopped, or the server's StartupError for the base.
    """
    # The cheapest checks come first: a mistake should not cost a download, nor the loading of the base.
    check_output_folder(config.output.dir)
    for file in filter(None, (config.data.train, config.data.eval)):
        check_data_file(file)
    checkpoint = resolve_checkpoint(config.base.model)
    check_adapter(config.adapter, checkpoint)
    data = _read(config.data, checkpoint, say)
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        say(f"{config.train.optimizer} needs CUDA: this run uses AdamW in 32 bits, unpaged, on the CPU")
    base = load_base(checkpoint, quantization=config.base.quantization, dtype=None, device=device)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
    try:
        trainer = make_trainer(
            config, base, tokenizer, data.train.examples, data.held_out.examples if data.held_out else None, on_step
        )
    except ValueError as error:
        raise UsageError(f"the trainer can't be set up: {str(error).splitlines()[0]}") from None
    result = _fit(trainer)
    digest = write_artifact(
        trainer.model,
        config.output.dir,
        base_name=config.base.model,
        base=identify(checkpoint, config.base.quantization),
        training=_record(config, trainer, data.train, result),
        log=log_entries(trainer.state.log_history),
    )
    return TrainingResult(config.output.dir, digest, **result)


def _read(section: DataSection, checkpoint: Path, say: Callable[[str], None]) -> Data:
    data = read_data(section, checkpoint)
    check_trainable(data)
    for sentence in [*map(format_remark, data.files), *warnings(data, section.max_length)]:
        say(sentence)
    return data


def _fit(trainer: SFTTrainer) -> dict[str, Any]:
    try:
        output = trainer.train()
        evaluation = trainer.evaluate() if trainer.eval_dataset is not None else {}
    except torch.OutOfMemoryError:
        raise TrainingStopped(
            "out of GPU memory: lower train.batch_size or data.max_length, or set train.activation_checkpointing"
        ) from None
    return {"steps": output.global_step, "loss": output.training_loss, "eval_loss": evaluation.get("eval_loss")}


def _record(config: TrainConfig, trainer: SFTTrainer, train_set: ExampleSet, result: dict[str, Any]) -> dict[str, Any]:
    """The manifest's training record: enough to run it again, and no path of this machine."""
    return {
        **result,
        "data": {
            "file": config.data.train.name,
            "sha256": file_sha256(config.data.train),
            "rows": len(train_set.lines),
            "format": train_set.format.name,
            "loss": config.data.loss,
            "max_length": config.data.max_length,
        },
        # The optimizer that really ran, which isn't the configured one on the CPU; and what an absent rate meant.
        "settings": {
            **config.train.model_dump(exclude={"threads"}),
            "optimizer": str(trainer.args.optim.value),
            "learning_rate": config.learning_rate,
        },
        "libraries": {name: version(name) for name in LIBRARIES},
    }
