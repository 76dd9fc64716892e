"""AdaLoRA (Zhang et al. 2023, arXiv:2303.10512): low rank, spread over the layers by what each turns out to need."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from hatrack_trainer.distributed import shards_base
from hatrack_trainer.errors import UsageError
from hatrack_trainer.methods import CAUSAL_LM, Targeted
from hatrack_trainer.section import Alpha, Rank, Real

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import Tensor
    from transformers import PretrainedConfig, TrainerCallback


class AdaLora(Targeted):
    """y += alpha/initial_rank · B(E ⊙ (Ax)), whose least important directions are pruned while it learns.

    From 7 B parameters on, try a fifth of the default learning rate.
    """

    method: Literal["adalora"] = "adalora"
    default_learning_rate: ClassVar[float] = 1e-2
    # What is pruned, E's zeros keep from the others; E itself always has a gradient.
    may_lack_gradients: ClassVar[tuple[str, ...]] = (".lora_A.", ".lora_B.")

    rank: Rank = 8
    """The average over all layers in the end."""
    initial_rank: Rank = 12
    """Every layer's at first."""
    alpha: Alpha = 32
    dropout: Real = Field(default=0.0, ge=0, le=0.9)
    prune_from: Real = Field(default=0.1, ge=0, lt=1)
    """The share of the steps after which pruning begins …"""
    prune_until: Real = Field(default=0.7, gt=0, le=1)
    """… and after which the ranks stay as they are."""
    orthogonality: Real = Field(default=0.5, ge=0, le=1000)
    """How strongly A's rows and B's columns are drawn towards an orthonormal basis; no part of the reported loss."""

    @model_validator(mode="after")
    def _shrinks(self) -> Self:
        if self.initial_rank <= self.rank:
            raise ValueError("initial_rank must be more than rank")
        if self.prune_until <= self.prune_from:
            raise ValueError("prune_until must be more than prune_from")
        return self

    def refuse(self, base: PretrainedConfig) -> None:  # noqa: ARG002 -- any base
        """Raises UsageError under FSDP: PEFT's rank allocator takes a share of a tensor for the whole."""
        if shards_base():
            raise UsageError(
                "adapter.method: adalora can't be trained with FSDP; without, several processes can train it"
            )

    def peft_config(self) -> PeftConfig:
        """See Method."""
        from peft import AdaLoraConfig

        return AdaLoraConfig(
            task_type=CAUSAL_LM,
            target_r=self.rank,
            init_r=self.initial_rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            orth_reg_weight=self.orthogonality,
            target_modules=self.target_modules,
            total_step=1,  # PEFT asks for one now; RankAllocation knows it when training begins
        )

    def prepare(self, model: PeftModel) -> None:
        """Freezes the divisor of the scale, which is not saved: on a base in 16 bits PEFT makes it trainable."""
        for name, parameter in model.named_parameters():
            if ".ranknum." in name:
                parameter.requires_grad_(False)

    def callbacks(self) -> list[TrainerCallback]:
        """See Method."""
        from hatrack_trainer.tuners.adalora import RankAllocation

        return [RankAllocation(self.prune_from, self.prune_until)]

    def state(self, model: PeftModel) -> dict[str, Tensor]:
        """The importance of the directions, and which of them are left."""
        from hatrack_trainer.tuners.adalora import allocation

        return allocation(model)

    def load_state(self, model: PeftModel, state: dict[str, Tensor]) -> None:
        """See Method."""
        from hatrack_trainer.tuners.adalora import load_allocation

        load_allocation(model, state)
