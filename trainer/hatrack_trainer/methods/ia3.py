"""(IA)³ (Liu et al. 2022, arXiv:2205.05638): learned scales of activations, the fewest parameters of all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import model_validator

from hatrack_trainer.errors import UsageError
from hatrack_trainer.methods import CAUSAL_LM, LayerNames, Method

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import Tensor
    from transformers import PretrainedConfig


class IA3(Method):
    """y ⊙ l after each target, l ⊙ x before it where it is one of `feedforward_modules`.

    From 7 B parameters on, try a fifth of the default learning rate.
    """

    method: Literal["ia3"] = "ia3"
    default_learning_rate: ClassVar[float] = 5e-2

    target_modules: LayerNames | None = None
    """Absent: two of attention's projections and the feed-forward block's last one, as PEFT has them for the base."""
    feedforward_modules: list[str] | None = None
    """Absent: the feed-forward block's last projection. Each must be one of `target_modules`."""

    @model_validator(mode="after")
    def _are_targets(self) -> Self:
        for name in self.feedforward_modules or ():
            if name not in (self.target_modules or ()):
                raise ValueError(f"feedforward_modules: {name} is not in target_modules")
        return self

    def named_layers(self) -> list[str]:
        """See Method."""
        return self.target_modules or []

    def refuse(self, base: PretrainedConfig) -> None:
        """Raises UsageError when the base is one that PEFT has no table for."""
        from peft.utils import (
            TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING,
            TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
        )

        tables = {
            "target_modules": TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
            "feedforward_modules": TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING,
        }
        for key, table in tables.items():
            if getattr(self, key) is None and base.model_type not in table:
                raise UsageError(f"adapter.{key}: must be given, since the layers of {base.model_type} are not known")

    def peft_config(self) -> PeftConfig:
        """See Method."""
        from peft import IA3Config

        return IA3Config(
            task_type=CAUSAL_LM,
            target_modules=self.target_modules,
            feedforward_modules=self.feedforward_modules,
        )

    def prepare(self, model: PeftModel) -> None:
        """On NF4, PEFT's layers give float32 whatever they get, which attention in 16 bits refuses."""
        from peft.tuners.ia3 import IA3Layer

        for layer in model.modules():
            if isinstance(layer, IA3Layer):
                layer.register_forward_hook(_in_the_dtype_of_the_input)


def _in_the_dtype_of_the_input(_layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output.to(inputs[0].dtype)
