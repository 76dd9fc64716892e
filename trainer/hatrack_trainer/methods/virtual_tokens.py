"""Learned tokens before the text: prompt tuning (Lester et al. 2021, arXiv:2104.08691), P-tuning (Liu et al. 2021,
arXiv:2103.10385) and prefix tuning (Li and Liang 2021, arXiv:2101.00190). They count in the context when served.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from hatrack_trainer.methods import CAUSAL_LM, Method
from hatrack_trainer.section import VirtualTokenCount

if TYPE_CHECKING:
    from peft import PeftConfig


class VirtualTokens(Method):
    """What the three share."""

    # They stand before a row's first document only, and PEFT forgets where the others begin.
    allows_packing: ClassVar[bool] = False

    tokens: VirtualTokenCount = 20

    @property
    def virtual_tokens(self) -> int:
        """See Method."""
        return self.tokens


class PromptTuning(VirtualTokens):
    """Embeddings. From 7 B parameters on, try a third of the default learning rate."""

    method: Literal["prompt_tuning"] = "prompt_tuning"
    default_learning_rate: ClassVar[float] = 1e-1

    init: Literal["vocabulary", "random"] = "vocabulary"
    """What they begin as: embeddings of tokens drawn from the vocabulary, or noise, which learns worse."""

    def peft_config(self) -> PeftConfig:
        """See Method."""
        from peft import PromptTuningConfig, PromptTuningInit

        init = PromptTuningInit.SAMPLE_VOCAB if self.init == "vocabulary" else PromptTuningInit.RANDOM
        return PromptTuningConfig(task_type=CAUSAL_LM, num_virtual_tokens=self.tokens, prompt_tuning_init=init)


class PTuning(VirtualTokens):
    """Embeddings that a small network makes, which is no part of the artifact.

    From 7 B parameters on, try a tenth of the default learning rate.
    """

    method: Literal["p_tuning"] = "p_tuning"
    default_learning_rate: ClassVar[float] = 5e-3

    hidden_size: int | None = Field(default=None, ge=1, le=2**16)
    """The network's width; absent: the base's."""

    def peft_config(self) -> PeftConfig:
        """See Method."""
        from peft import PromptEncoderConfig

        return PromptEncoderConfig(
            task_type=CAUSAL_LM, num_virtual_tokens=self.tokens, encoder_hidden_size=self.hidden_size
        )


class PrefixTuning(VirtualTokens):
    """Keys and values in every layer. From 7 B parameters on, try a third of the default learning rate."""

    method: Literal["prefix_tuning"] = "prefix_tuning"
    default_learning_rate: ClassVar[float] = 3e-2
    # They come as a filled cache, which layers that compute twice go without.
    allows_checkpointing: ClassVar[bool] = False

    def peft_config(self) -> PeftConfig:
        """See Method."""
        from peft import PrefixTuningConfig

        return PrefixTuningConfig(task_type=CAUSAL_LM, num_virtual_tokens=self.tokens)
