"""One training run, from a configuration to an artifact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, Trainer

from hatrack.manifest import BaseIdentity
from hatrack_server.model.checkpoint import identify, loading
from hatrack_server.model.load import load_base, read_config
from hatrack_trainer.artifact import (
    check_logging_folder,
    check_output_folder,
    check_temporary_folder,
    write_artifact,
    writing,
)
from hatrack_trainer.base import find_base
from hatrack_trainer.checkpoints import Checkpoints, Resumable
from hatrack_trainer.config import TrainConfig
from hatrack_trainer.context import within_context
from hatrack_trainer.data import Example
from hatrack_trainer.data.lines import check_data_file
from hatrack_trainer.data.read import Data, ExampleSet, read_data
from hatrack_trainer.data.remarks import format_remark, warnings
from hatrack_trainer.distributed import from_first, gather_adapter, nf4_storage, own_device, processes, shards_base
from hatrack_trainer.dpo import make_pair_trainer
from hatrack_trainer.errors import NoEstimate, TrainingStopped, UsageError
from hatrack_trainer.estimate.memory import check_memory
from hatrack_trainer.log import log_entries, losses, mean_loss
from hatrack_trainer.objective import check_objective, objective_remark
from hatrack_trainer.optimizers import PagingReport, fallback_remark, paged_states
from hatrack_trainer.packing import packing_remark
from hatrack_trainer.progress import without_other_bars
from hatrack_trainer.sft import OnStep, make_trainer
from hatrack_trainer.targets import check_adapter
from hatrack_trainer.trackers import check_trackers
from hatrack_trainer.unfinished import Beginning, data_digests, read_beginning, write_beginning

LIBRARIES = ("hatrack", "torch", "transformers", "peft", "trl", "bitsandbytes")


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """What a finished run left behind."""

    folder: Path
    digest: str
    steps: int
    loss: float  # mean over all steps
    eval_loss: float | None  # of the adapter that is written
    best_step: int | None  # the step that adapter is from, if `eval.every` looked for the best


def train(
    config: TrainConfig,
    *,
    on_step: OnStep | None = None,
    say: Callable[[str], None] = lambda _: None,
    check_base: Callable[[BaseIdentity], None] | None = None,
) -> TrainingResult:
    """Trains one adapter and writes its artifact to `config.output.dir`; on an error only checkpoints are left.

    `say` gets sentences that the user should see; `check_base` may refuse the base by raising, before it is loaded.
    Sets torch's thread count for the whole process if the configuration names one. Raises UsageError, TrainingStopped,
    or the server's StartupError for the base.
    """
    # The cheapest checks come first: a mistake should not cost a download, nor the loading of the base.
    check_output_folder(config.output.dir)
    return _run(config, None, on_step, say, check_base)


def resume(
    folder: Path,
    *,
    learning_rate: float | None = None,
    on_step: OnStep | None = None,
    say: Callable[[str], None] = lambda _: None,
    check_base: Callable[[BaseIdentity], None] | None = None,
) -> TrainingResult:
    """Goes on with the unfinished run in a folder from its last checkpoint, to the artifact that it would have had.

    Another `learning_rate` is the one from now on; the rest is as in `train`. Raises UsageError where there is no such
    run, or where its data or its base have changed.
    """
    beginning = read_beginning(folder)
    if learning_rate is not None:
        beginning = beginning.at_rate(learning_rate)
    return _run(beginning.config, beginning, on_step, say, check_base)


def _run(
    config: TrainConfig,
    began: Beginning | None,
    on_step: OnStep | None,
    say: Callable[[str], None],
    check_base: Callable[[BaseIdentity], None] | None,
) -> TrainingResult:
    check_trackers(config.train.trackers)
    if config.train.logging_dir is not None:
        check_logging_folder(config.train.logging_dir)
    check_temporary_folder()
    for file in filter(None, (config.data.train, config.data.eval)):
        check_data_file(file)
    checkpoint = find_base(config.base.model)
    check_adapter(config.adapter, checkpoint)
    architecture = read_config(checkpoint)
    for remark in config.adapter.remarks(architecture):
        say(remark)
    config = within_context(config, checkpoint, say)
    data = _read(config, checkpoint, say)
    identity = identify(checkpoint, config.base.quantization)
    if check_base is not None:
        check_base(identity)
    beginning = Beginning(config, identity, data_digests(config.data))
    if began is not None:
        began.check_same(beginning)
        Checkpoints(beginning).check_latest()
    if fallback := fallback_remark(config.train.optimizer, cuda=own_device() != "cpu"):
        say(fallback)
    _check_memory(config, checkpoint, data.train, say)
    if began is not None:
        with writing(config.output.dir, "output.dir", UsageError):
            from_first(lambda: write_beginning(beginning))
    make = make_pair_trainer if data.train.pairs else make_trainer
    trainer = load_trainer(
        make, config, checkpoint, data.train.examples, data.held_out.examples if data.held_out else None, on_step
    )
    if config.train.packing:
        say(packing_remark(trainer.train_dataset, config.data.max_length))
    trainer.add_callback(PagingReport(say))
    trainer.checkpoints = checkpoints = Checkpoints(beginning)
    with trainer.telling(say):
        result = _fit(trainer, checkpoints.latest if began else None, say)
        gather_adapter(trainer.model)
        digest = from_first(
            lambda: write_artifact(
                trainer.model,
                config.output.dir,
                base_name=config.base.model,
                base=identity,
                training=_record(beginning, trainer, data.train, result),
                log=log_entries(trainer.state.log_history),
            )
        )
    return TrainingResult(config.output.dir, digest, **result)


def load_trainer(
    make: Callable[..., Resumable],
    config: TrainConfig,
    checkpoint: Path,
    train: list[Example],
    evaluation: list[Example] | None,
    on_step: OnStep | None,
) -> Resumable:
    """Loads the base and makes the trainer, by `make_trainer` or `make_pair_trainer`; as `train` does."""
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    with without_other_bars():
        base = load_base(
            checkpoint,
            quantization=config.base.quantization,
            dtype=None,
            device=own_device(),
            storage=nf4_storage(),
            unquantised=config.adapter.unquantised(read_config(checkpoint)),
        )
    with loading(checkpoint):
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True, trust_remote_code=False)
    try:
        return make(config, base, tokenizer, train, evaluation, on_step)
    except ValueError as error:
        raise UsageError(f"the trainer can't be set up: {str(error).splitlines()[0]}") from None


def _check_memory(config: TrainConfig, checkpoint: Path, train_set: ExampleSet, say: Callable[[str], None]) -> None:
    if shards_base():  # each process has a part of it
        return
    try:
        check_memory(config, checkpoint, train_set, cuda=own_device() != "cpu")
    except NoEstimate as error:
        say(str(error))


def _read(config: TrainConfig, checkpoint: Path, say: Callable[[str], None]) -> Data:
    data = read_data(config.data, checkpoint)
    check_objective(config, data.train)
    remarks = [*map(format_remark, data.files), *warnings(data, config.data.max_length)]
    for sentence in filter(None, [*remarks, objective_remark(config, data.train)]):
        say(sentence)
    return data


def _fit(trainer: Resumable, checkpoint: Path | None, say: Callable[[str], None]) -> dict[str, Any]:
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        best = trainer.keep_best(say)
        if best is None and trainer.eval_dataset is not None:
            trainer.evaluate()
    except torch.OutOfMemoryError:
        raise TrainingStopped(
            "out of GPU memory: lower train.batch_size or data.max_length, or set train.activation_checkpointing"
        ) from None
    entries = log_entries(trainer.state.log_history)
    return {
        "steps": trainer.state.global_step,
        "loss": mean_loss(entries),  # transformers' own is that of the steps since it went on
        "eval_loss": min((loss for _, loss in losses(entries, "eval_loss")), default=None),
        "best_step": best,
    }


def _record(beginning: Beginning, trainer: Trainer, train_set: ExampleSet, result: dict[str, Any]) -> dict[str, Any]:
    """The manifest's training record: enough to run it again, and no path of this machine."""
    config = beginning.config
    return {
        **result,
        "data": {
            "file": config.data.train.name,
            "sha256": beginning.data["train"],
            "rows": len(train_set.lines),
            "format": train_set.format.name,
            "loss": config.data.loss,
            "max_length": config.data.max_length,
        },
        # The optimizer that really ran, which isn't the configured one on the CPU; and what an absent rate meant.
        "settings": {
            **config.train.model_dump(exclude={"threads", "logging_dir"}),
            "optimizer": str(trainer.args.optim.value),
            "paged": str(paged_states(trainer.optimizer)),
            "learning_rate": trainer.args.learning_rate,
        },
        "processes": processes(),
        "libraries": {name: version(name) for name in LIBRARIES},
    }
