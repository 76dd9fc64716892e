"""TRL's SFTTrainer, set up for one adapter on the frozen base."""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from hatrack_server.model.load import prepare_for_training
from hatrack_trainer.config import TrainConfig
from hatrack_trainer.data import Example
from hatrack_trainer.errors import TrainingStopped
from hatrack_trainer.methods import Method

OnStep = Callable[[int, int, float], None]
"""Called after each optimizer step with its number from 1, the number of all steps, and the loss."""


def make_trainer(
    config: TrainConfig,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: list[Example],
    evaluation: list[Example] | None = None,
    on_step: OnStep | None = None,
) -> SFTTrainer:
    """Wraps `base` with a new adapter, drawn from the seed, and returns the trainer that will fit it.

    Only the adapter can train. The base's layers are changed to keep their gradients (see `prepare_for_training`).
    Raises ValueError, from PEFT, when no module has one of the target names.
    """
    prepare_for_training(base)
    with tempfile.TemporaryDirectory() as unused, warnings.catch_warnings():
        # PEFT still asks transformers by the old name.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        trainer = SFTTrainer(
            model=base,
            args=_arguments(config, unused, cuda=base.device.type == "cuda"),
            train_dataset=_dataset(train),
            eval_dataset=_dataset(evaluation) if evaluation else None,
            processing_class=tokenizer,
            peft_config=config.adapter.peft_config(),
            callbacks=callbacks(config.adapter, on_step),
        )
    trainer.remove_callback(PrinterCallback)
    prepare_adapter(trainer.model, config.adapter)
    return trainer


def callbacks(adapter: Method, on_step: OnStep | None) -> list[TrainerCallback]:
    """What watches a run, and does what its method needs besides steps."""
    # The watch comes first: a method may add to gradients, and so hide that the loss gave none.
    return [GradientWatch(adapter), *adapter.callbacks(), Progress(on_step)]


def prepare_adapter(model: PeftModel, adapter: Method) -> None:
    """Makes what TRL has wrapped fit to be trained: in float32, and as its method needs it."""
    # TRL rounds adapters on a quantised base to bfloat16, where an update below 1/256 of a weight is lost.
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    adapter.prepare(model)


class GradientWatch(TrainerCallback):
    """Stops a run in which a part of the adapter learns nothing, which its loss would not show.

    What is multiplied by a factor that begins at zero has no gradient in the first step; nor in the second, where the
    learning rate begins at zero, too. In the third, everything should have had one.
    """

    STEPS = 3

    def __init__(self, adapter: Method) -> None:
        self._exempt = adapter.may_lack_gradients
        self._silent: set[str] = set()

    def on_train_begin(self, _args: Any, _state: Any, _control: Any, *, model: PeftModel, **_: Any) -> None:
        """Called by the trainer."""
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._silent = {name for name in trainable if not any(part in name for part in self._exempt)}

    def on_pre_optimizer_step(self, _args: Any, state: Any, _control: Any, *, model: PeftModel, **_: Any) -> None:
        """Called by the trainer; raises TrainingStopped."""
        if not self._silent or state.global_step >= self.STEPS:
            return
        for name, parameter in model.named_parameters():
            if name in self._silent and parameter.grad is not None and parameter.grad.any():
                self._silent.remove(name)
        if self._silent and state.global_step + 1 == self.STEPS:
            raise TrainingStopped(
                f"parts of the adapter get no gradient, so they would learn nothing: {_some(sorted(self._silent))}"
            )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


class Progress(TrainerCallback):
    """Reports each step, and stops the run as soon as its loss or gradient is not a number."""

    def __init__(self, on_step: OnStep | None) -> None:
        self._on_step = on_step

    def on_log(self, _args: Any, state: Any, _control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Called by the trainer; raises TrainingStopped."""
        if logs is None or "loss" not in logs:
            return
        for name in ("loss", "grad_norm"):
            if not math.isfinite(logs.get(name, 0.0)):
                word = "loss" if name == "loss" else "gradient"
                raise TrainingStopped(
                    f"the {word} is not finite at step {state.global_step}: try a lower train.learning_rate"
                )
        if self._on_step is not None:
            self._on_step(state.global_step, state.max_steps, logs["loss"])


def _dataset(examples: list[Example]) -> Dataset:
    return Dataset.from_dict({"input_ids": [e.input_ids for e in examples], "labels": [e.labels for e in examples]})


def _arguments(config: TrainConfig, folder: str, *, cuda: bool) -> SFTConfig:
    train = config.train
    return SFTConfig(
        output_dir=folder,
        dataset_kwargs={"skip_prepare_dataset": True},
        num_train_epochs=train.epochs,
        max_steps=train.max_steps or -1,
        per_device_train_batch_size=train.batch_size,
        per_device_eval_batch_size=train.batch_size,
        gradient_accumulation_steps=train.gradient_accumulation,
        activation_checkpointing=train.activation_checkpointing,
        learning_rate=config.learning_rate,
        lr_scheduler_type="constant_with_warmup" if train.schedule == "constant" else train.schedule,
        warmup_steps=train.warmup_steps,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        optim=train.optimizer if cuda else "adamw_torch",
        seed=train.seed,
        use_cpu=not cuda,
        bf16=cuda and torch.cuda.is_bf16_supported(),
        dataloader_pin_memory=cuda,
        logging_steps=1,
        # Else a loss that is not a number would be logged as the mean of those before.
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
