"""What AdaLoRA (Zhang et al. 2023, arXiv:2303.10512) does besides learning: it prunes, and keeps bases orthonormal."""

from __future__ import annotations

import math
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import TrainerCallback


class RankAllocation(TrainerCallback):
    """Calls PEFT's rank allocator after each optimizer step, with a schedule of this run's own length.

    prune_from, prune_until: the shares of all steps between which ranks are taken away.
    """

    def __init__(self, prune_from: float, prune_until: float) -> None:
        self._prune_from = prune_from
        self._prune_until = prune_until

    def on_train_begin(self, _args: Any, state: Any, _control: Any, *, model: PeftModel, **_: Any) -> None:
        """Called by the trainer."""
        config = model.peft_config["default"]
        config.total_step = state.max_steps
        config.tinit = math.floor(self._prune_from * state.max_steps)
        config.tfinal = state.max_steps - math.ceil(self._prune_until * state.max_steps)

    def on_pre_optimizer_step(self, _args: Any, _state: Any, _control: Any, *, model: PeftModel, **_: Any) -> None:
        """Called by the trainer.

        PEFT adds this to the model's own loss, which TRL does not take: it makes one from the log-probabilities.
        """
        (model.peft_config["default"].orth_reg_weight * skewness(model)).backward()

    def on_optimizer_step(self, _args: Any, state: Any, _control: Any, *, model: PeftModel, **_: Any) -> None:
        """Called by the trainer, with the gradients of the step, which are what importance is taken from."""
        if state.max_steps == 1:  # pruning begins after a step, and PEFT's allocator would end before it began
            return
        model.base_model.update_and_allocate(state.global_step + 1)


IMPORTANCE = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # PEFT's RankAllocator keeps them by the tensors' names
PATTERN = "rank_pattern"


def allocation(model: PeftModel) -> dict[str, Tensor]:
    """How important each direction was so far, and which are left; PEFT saves neither before the end.

    Names are `importance's name/tensor's name`; a pattern is a bool for each of a layer's directions.
    """
    allocator, pattern = model.base_model.rankallocator, model.peft_config["default"].rank_pattern or {}
    found = {f"{kind}/{name}": each for kind in IMPORTANCE for name, each in getattr(allocator, kind).items()}
    return found | {f"{PATTERN}/{name}": torch.tensor(left) for name, left in pattern.items()}


def load_allocation(model: PeftModel, state: dict[str, Tensor]) -> None:
    """Puts back what `allocation` gave."""
    kinds: dict[str, dict[str, Tensor]] = {kind: {} for kind in (*IMPORTANCE, PATTERN)}
    for key, tensor in state.items():
        kind, _, name = key.partition("/")
        kinds[kind][name] = tensor
    pattern = kinds.pop(PATTERN)
    model.peft_config["default"].rank_pattern = {name: left.tolist() for name, left in pattern.items()} or None
    for kind, tensors in kinds.items():
        setattr(model.base_model.rankallocator, kind, {name: each.to(model.device) for name, each in tensors.items()})


def skewness(model: PeftModel) -> Tensor:
    """How far A's rows and B's columns are from being orthonormal: the mean of ‖PPᵀ - I‖ over all of them."""
    grams = []
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            grams.append(parameter @ parameter.T)
        elif ".lora_B." in name:
            grams.append(parameter.T @ parameter)
    return torch.stack([torch.linalg.matrix_norm(gram - torch.eye(len(gram)).to(gram)) for gram in grams]).mean()
