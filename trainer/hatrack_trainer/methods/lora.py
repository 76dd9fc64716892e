"""LoRA (Hu et al. 2021, arXiv:2106.09685); with scales for high ranks: rsLoRA (Kalajdzievski 2023, arXiv:2312.03732);
with magnitudes apart from directions: DoRA (Liu et al. 2024, arXiv:2402.09353).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from hatrack_trainer.methods import CAUSAL_LM, Targeted
from hatrack_trainer.section import Alpha, Rank, Real

if TYPE_CHECKING:
    from peft import PeftConfig


class LowRank(Targeted):
    """y += alpha/rank · B(Ax) beside each target.

    From 7 B parameters on, 2e-4 is the usual learning rate; from 30 B on, 1e-4 (QLoRA, Dettmers et al. 2023).
    """

    default_learning_rate: ClassVar[float] = 1e-3
    dora: ClassVar[bool] = False

    rank: Rank = 16
    alpha: Alpha = 32
    rslora: bool = False
    """Scale by alpha/√rank instead, so that high ranks learn as fast as low ones."""
    dropout: Real = Field(default=0.0, ge=0, le=0.9)

    def peft_config(self) -> PeftConfig:
        """See Method."""
        from peft import LoraConfig

        return LoraConfig(
            task_type=CAUSAL_LM,
            r=self.rank,
            lora_alpha=self.alpha,
            use_rslora=self.rslora,
            use_dora=self.dora,
            lora_dropout=self.dropout,
            target_modules=self.target_modules,
        )


class Lora(LowRank):
    """Low-rank adaptation."""

    method: Literal["lora"] = "lora"


class RsLora(LowRank):
    """The same as `lora` with `rslora: true`."""

    method: Literal["rslora"] = "rslora"
    rslora: Literal[True] = True


class Dora(LowRank):
    """y = m ⊙ (W + alpha/rank · BA) x / ‖W + alpha/rank · BA‖, by rows; m is learned, too. Slower than LoRA."""

    method: Literal["dora"] = "dora"
    dora: ClassVar[bool] = True
