"""LLaMA-Adapter (Zhang et al. 2023, arXiv:2303.16199), which PEFT calls adaption prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from hatrack_trainer.errors import UsageError
from hatrack_trainer.methods import CAUSAL_LM, Method
from hatrack_trainer.section import VirtualTokenCount

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PretrainedConfig

BASES = ("llama", "mistral")  # the ones that PEFT 0.21 knows, without GPT-2, whose kind is not served


class LlamaAdapter(Method):
    """Attention of the top layers looks at a learned prompt, too, through a gate that begins closed.

    From 7 B parameters on, try a third of the default learning rate.
    """

    method: Literal["llama_adapter"] = "llama_adapter"
    default_learning_rate: ClassVar[float] = 3e-2

    layers: int = Field(ge=1)
    """How many of the top layers; the paper takes all but the lowest two."""
    tokens: VirtualTokenCount = 10

    def refuse(self, base: PretrainedConfig) -> None:
        """Raises UsageError for another kind of base, or one with fewer layers."""
        if base.model_type not in BASES:
            raise UsageError(
                f"adapter.method: llama_adapter needs a base of {' or '.join(BASES)}, not {base.model_type}"
            )
        if self.layers > base.num_hidden_layers:
            raise UsageError(f"adapter.layers: the base has {base.num_hidden_layers}")

    def peft_config(self) -> PeftConfig:
        """See Method."""
        from peft import AdaptionPromptConfig

        return AdaptionPromptConfig(task_type=CAUSAL_LM, adapter_len=self.tokens, adapter_layers=self.layers)

    def prepare(self, model: PeftModel) -> None:
        """Lets PEFT's model call the forward that TRL gave the base afterwards, and which alone gives TRL's loss.

        PEFT binds `forward` when it wraps the base (tuners/adaption_prompt/model.py). Raises UsageError where prompts
        in 32 bits would meet plain weights in 16 without autocast.
        """
        import torch
        from peft.tuners.adaption_prompt import AdaptedAttention

        weight = next(m for m in model.modules() if isinstance(m, AdaptedAttention)).model.k_proj.weight
        if weight.device.type == "cpu" and weight.dtype == torch.float16:
            raise UsageError("adapter.method: llama_adapter on a CPU needs base.quantization nf4 or a bfloat16 base")
        model.base_model.forward = model.get_base_model().forward
