"""VeRA (Kopiczko et al. 2023, arXiv:2310.11454): random matrices that all layers share, and learned scales of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from hatrack_trainer.methods import CAUSAL_LM, Targeted
from hatrack_trainer.section import Rank, Real

if TYPE_CHECKING:
    from peft import PeftConfig


class Vera(Targeted):
    """y += λ_b ⊙ B(λ_d ⊙ (Ax)), of which the vectors λ are trained.

    A and B are saved beside them, lest they be drawn otherwise elsewhere. From 7 B parameters on, try a fifth of the
    default learning rate.
    """

    method: Literal["vera"] = "vera"
    default_learning_rate: ClassVar[float] = 2e-2

    rank: Rank = 256
    """Costs few parameters, so higher than LoRA's; a server's `--max-rank` (256) bounds it."""
    dropout: Real = Field(default=0.0, ge=0, le=0.9)
    initial_scale: Real = Field(default=0.1, gt=0, le=1000)
    """What λ_d begins at; λ_b begins at 0."""

    def peft_config(self) -> PeftConfig:
        """See Method."""
        from peft import VeraConfig

        return VeraConfig(
            task_type=CAUSAL_LM,
            r=self.rank,
            vera_dropout=self.dropout,
            d_initial=self.initial_scale,
            target_modules=self.target_modules,
        )
