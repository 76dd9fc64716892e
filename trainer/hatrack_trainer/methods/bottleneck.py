"""Bottleneck adapters (Houlsby et al. 2019, arXiv:1902.00751; Pfeiffer et al. 2021, arXiv:2005.00247)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from hatrack_trainer.errors import UsageError
from hatrack_trainer.methods import CAUSAL_LM, LayerNames, Method
from hatrack_trainer.section import Rank

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PretrainedConfig


class Bottleneck(Method):
    """h + U act(D h) where blocks end. Stock PEFT does not load it: import hatrack_trainer.tuners.bottleneck first.

    From 7 B parameters on, try a fifth of the default learning rate.
    """

    method: Literal["bottleneck"] = "bottleneck"
    default_learning_rate: ClassVar[float] = 5e-3

    rank: Rank = 64
    """Width of the bottleneck."""
    activation: Literal["relu", "gelu", "silu"] = "relu"
    placement: Literal["houlsby", "pfeiffer"] = "pfeiffer"
    """After attention and feed-forward, or after feed-forward alone."""
    target_modules: LayerNames | None = None
    """Absent: the projections that end those blocks."""

    def named_layers(self) -> list[str]:
        """See Method."""
        return self.target_modules or []

    def refuse(self, base: PretrainedConfig) -> None:
        """Raises UsageError when it is not known where the base's blocks end."""
        from hatrack_trainer.tuners.bottleneck import BLOCK_ENDS

        if self.target_modules is None and base.model_type not in BLOCK_ENDS:
            raise UsageError(
                f"adapter.target_modules: must be given, since the blocks of {base.model_type} are not known"
            )

    def peft_config(self) -> PeftConfig:
        """See Method."""
        from hatrack_trainer.tuners.bottleneck import BottleneckConfig

        return BottleneckConfig(
            task_type=CAUSAL_LM,
            r=self.rank,
            activation=self.activation,
            placement=self.placement,
            target_modules=self.target_modules,
        )
