"""What is done after which step of a run, and at what learning rate one goes on."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from hatrack_trainer.config import TrainConfig
from hatrack_trainer.log import best_step, log_entries, losses


class Rate(TrainerCallback):
    """Gives a run that goes on its own learning rate: the optimizer and the schedule come with their checkpoint's."""

    def on_train_begin(
        self, args: Any, _state: Any, _control: Any, *, optimizer: Any, lr_scheduler: Any, **_: Any
    ) -> None:
        """Called by the trainer, after it has loaded both."""
        initial, step = args.learning_rate, lr_scheduler.last_epoch
        lr_scheduler.base_lrs = [initial] * len(optimizer.param_groups)
        lr_scheduler._last_lr = [initial * factor(step) for factor in lr_scheduler.lr_lambdas]
        for group, rate in zip(optimizer.param_groups, lr_scheduler._last_lr, strict=True):
            group.update(initial_lr=initial, lr=rate)


class Schedule(TrainerCallback):
    """When a run evaluates, writes a checkpoint, and stops early.

    All is told from the log, which checkpoints keep; of the last step there is none, for the artifact follows it.
    """

    def __init__(self, config: TrainConfig) -> None:
        self._every = config.output.checkpoint_every
        self._eval = config.eval

    def on_step_end(self, _args: Any, state: Any, control: Any, **_: Any) -> None:
        """Called by the trainer."""
        step, last = state.global_step, state.global_step >= state.max_steps
        control.should_save = not last and _divides(self._every, step)
        control.should_evaluate = _divides(self._eval.every, step) or (last and self._eval.every is not None)

    def on_evaluate(self, _args: Any, state: Any, control: Any, **_: Any) -> None:
        """Called by the trainer, also where it evaluates once after all steps."""
        if self._eval.every is None or state.global_step >= state.max_steps:
            return
        found = losses(log_entries(state.log_history), "eval_loss")
        since_best = sum(step > (best_step(log_entries(state.log_history)) or 0) for step, _ in found)
        if since_best == 0:
            control.should_save = True
        elif since_best == self._eval.patience:
            control.should_training_stop, control.should_save = True, False


def _divides(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0
