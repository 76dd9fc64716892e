"""LoHa (Hyeon-Woo et al. 2021, arXiv:2108.06098) and LoKr (Yeh et al. 2023, arXiv:2309.14859): changes of weights made
of small matrices whose ranks multiply.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, field_validator

from hatrack_trainer.methods import CAUSAL_LM, Targeted
from hatrack_trainer.section import Alpha, Rank, Real

if TYPE_CHECKING:
    from peft import PeftConfig


class Lycoris(Targeted):
    """What both share. From 7 B parameters on, try a tenth of the default learning rate."""

    default_learning_rate: ClassVar[float] = 1e-2

    rank: Rank = 8
    alpha: Alpha = 8
    """The change is scaled by alpha/rank."""
    rank_dropout: Real = Field(default=0.0, ge=0, le=0.9)
    """Which share of the change's rows is left out, others in each step."""


class LoHa(Lycoris):
    """ΔW = alpha/rank · (W1a W1b) ⊙ (W2a W2b), of rank rank²: that is what a server's `--max-rank` (256) bounds."""

    method: Literal["loha"] = "loha"

    def peft_config(self) -> PeftConfig:
        """See Method."""
        from peft import LoHaConfig

        import hatrack_trainer.tuners.lycoris  # noqa: F401  PEFT can't do it on NF4 without

        return LoHaConfig(
            task_type=CAUSAL_LM,
            r=self.rank,
            alpha=self.alpha,
            rank_dropout=self.rank_dropout,
            target_modules=self.target_modules,
        )


class LoKr(Lycoris):
    """ΔW = alpha/rank · W1 ⊗ W2: the fewest parameters of all that change weights."""

    method: Literal["lokr"] = "lokr"

    decompose_both: bool = False
    """W1 is a product of rank `rank`, too, where that is smaller; W2 always is."""
    decompose_factor: int = -1
    """W1's size, or the nearest below it that divides the layer's; -1: the most balanced."""

    @field_validator("decompose_factor")
    @classmethod
    def _is_a_size(cls, factor: int) -> int:
        if factor < 1 and factor != -1:
            raise ValueError("must be positive, or -1")
        return factor

    def peft_config(self) -> PeftConfig:
        """See Method."""
        from peft import LoKrConfig

        import hatrack_trainer.tuners.lycoris  # noqa: F401  PEFT can't do it on NF4 without

        return LoKrConfig(
            task_type=CAUSAL_LM,
            r=self.rank,
            alpha=self.alpha,
            rank_dropout=self.rank_dropout,
            rank_dropout_scale=True,
            decompose_both=self.decompose_both,
            decompose_factor=self.decompose_factor,
            target_modules=self.target_modules,
        )
