"""TRL's SFTTrainer, set up for one adapter on the frozen base."""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch.nn import Parameter
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from hatrack_server.model.load import prepare_for_training
from hatrack_trainer.checkpoints import Resumable
from hatrack_trainer.config import TrainConfig
from hatrack_trainer.data import Example
from hatrack_trainer.distributed import found_by_any, own_share, prepare_sharding
from hatrack_trainer.errors import NotFinite, TrainingStopped, UsageError
from hatrack_trainer.methods import Method
from hatrack_trainer.objective import learning_rate
from hatrack_trainer.optimizers import runnable
from hatrack_trainer.packing import PackedCollator, check_documents_apart, pack
from hatrack_trainer.schedule import Rate, Schedule
from hatrack_trainer.wording import some

OnStep = Callable[[int, int, float], None]
"""Called after each optimizer step with its number from 1, the number of all steps, and the loss."""


class RowTrainer(Resumable, SFTTrainer):
    """TRL's, whose runs can be resumed."""


def make_trainer(
    config: TrainConfig,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: list[Example],
    evaluation: list[Example] | None = None,
    on_step: OnStep | None = None,
) -> RowTrainer:
    """Wraps `base` with a new adapter, drawn from the seed, and returns the trainer that will fit it.

    Only the adapter can train. The base's layers are changed to keep their gradients (see `prepare_for_training`).
    Raises ValueError, from PEFT, when no module has one of the target names.
    """
    prepare_for_training(base)
    rows, collator = _dataset(train), None
    if config.train.packing:
        check_documents_apart(base)
        rows, collator = pack(rows, config.data.max_length), PackedCollator()
    with construction() as unused:
        arguments = training_arguments(config, unused, base)
        trainer = RowTrainer(
            model=base,
            args=SFTConfig(**arguments, dataset_kwargs={"skip_prepare_dataset": True}),
            data_collator=collator,
            train_dataset=rows,
            eval_dataset=_dataset(evaluation) if evaluation else None,
            processing_class=tokenizer,
            peft_config=config.adapter.peft_config(),
            callbacks=callbacks(config.adapter, on_step),
        )
    finish(trainer, config)
    return trainer


@contextmanager
def construction() -> Iterator[str]:
    """What a trainer is made in: a folder that it writes nothing to, and quiet."""
    with tempfile.TemporaryDirectory() as unused, without_old_names():
        yield unused


@contextmanager
def without_old_names() -> Iterator[None]:
    """Keeps from the user that PEFT and TRL still ask transformers for checkpointing by its old name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def finish(trainer: Resumable, config: TrainConfig) -> None:
    """Makes of what TRL has made the trainer that the configuration means.

    Raises UsageError where transformers would look for the embeddings in vain (integrations/neftune.py).
    """
    if config.train.neftune_alpha is not None and not hasattr(trainer.model.base_model, "model"):
        raise UsageError(f"train.neftune_alpha: does not work with adapter.method {config.adapter.method} on this base")
    trainer.method = config.adapter
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Rate())
    trainer.add_callback(Schedule(config))
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback):
            callback.logging_dir = str(config.train.logging_dir)
    prepare_sharding(trainer)
    prepare_adapter(trainer.model, config.adapter)
    if trainer.args.bf16:
        share_inputs(trainer.model)


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


def share_inputs(model: PeftModel) -> None:
    """Under autocast, lets LoRA read what its layer reads: PEFT would make a copy, and the backward pass keep it.

    Other layers beside the same input, as q_proj, k_proj and v_proj are, would each have one of their own.
    """
    for module in model.modules():
        if isinstance(module, LoraLayer) and not module.lora_variant:
            module.cast_input_dtype_enabled = False


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
        heard = {name for name, each in model.named_parameters() if name in self._silent and _has_gradient(each)}
        self._silent -= found_by_any(heard)
        if self._silent and state.global_step + 1 == self.STEPS:
            raise TrainingStopped(
                f"parts of the adapter get no gradient, so they would learn nothing: {some(sorted(self._silent), 3)}"
            )


def _has_gradient(parameter: Parameter) -> bool:
    return parameter.grad is not None and bool(own_share(parameter.grad).any())


class Progress(TrainerCallback):
    """Reports each step, and stops the run as soon as a loss or a gradient is not a number."""

    def __init__(self, on_step: OnStep | None) -> None:
        self._on_step = on_step

    def on_log(self, _args: Any, state: Any, _control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Called by the trainer; raises TrainingStopped."""
        logs = logs or {}
        for name, word in (("loss", "loss"), ("grad_norm", "gradient"), ("eval_loss", "held-out loss")):
            if not math.isfinite(logs.get(name, 0.0)):
                stop = TrainingStopped if name == "eval_loss" else NotFinite
                raise stop(f"the {word} is not finite at step {state.global_step}: try a lower train.learning_rate")
        if self._on_step is not None and "loss" in logs:
            self._on_step(state.global_step, state.max_steps, logs["loss"])


def _dataset(examples: list[Example]) -> Dataset:
    return Dataset.from_dict({"input_ids": [e.input_ids for e in examples], "labels": [e.labels for e in examples]})


def autocasts(dtype: torch.dtype, *, cuda: bool) -> bool:
    """Whether matrices are multiplied in bfloat16: on GPUs that have it, on a CPU if the base's `dtype` is that."""
    return torch.cuda.is_bf16_supported() if cuda else dtype == torch.bfloat16


def training_arguments(
    config: TrainConfig, folder: str, base: PreTrainedModel, *, pairs: bool = False
) -> dict[str, Any]:
    """What TRL's configurations share; `pairs`: for preference pairs."""
    train, cuda = config.train, base.device.type == "cuda"
    return {
        "output_dir": folder,
        "num_train_epochs": train.epochs,
        "max_steps": train.max_steps or -1,
        "per_device_train_batch_size": train.batch_size,
        "per_device_eval_batch_size": train.batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation,
        "activation_checkpointing": train.activation_checkpointing,
        "learning_rate": learning_rate(config, pairs=pairs),
        "lr_scheduler_type": "constant_with_warmup" if train.schedule == "constant" else train.schedule,
        "warmup_steps": train.warmup_steps,
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.max_grad_norm,
        "optim": runnable(train.optimizer, cuda=cuda),
        "neftune_noise_alpha": train.neftune_alpha,
        "seed": train.seed,
        "use_cpu": not cuda,
        "ddp_find_unused_parameters": False,  # what gets no gradient stops the run anyway
        "bf16": autocasts(base.dtype, cuda=cuda),
        "dataloader_pin_memory": cuda,
        "logging_steps": 1,
        # Else a loss that is not a number would be logged as the mean of those before.
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": train.trackers,
        "disable_tqdm": True,
    }
