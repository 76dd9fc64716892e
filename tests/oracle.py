"""What PEFT gives for one adapter alone on the same base: the oracle of every parity test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from hatrack_server.model.load import load_base

NOISE = 0.1  # standard deviation of random adapter weights


def make_adapter(base: PreTrainedModel, path: Path, *, seed: int, **config: Any) -> Path:
    """Saves a LoRA adapter with random, non-zero weights through PEFT itself; leaves `base` as it was."""
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **config))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * NOISE
    model.save_pretrained(path, save_embedding_layers=False)
    _take_off(model)
    return path


class Oracle:
    """The base, loaded anew without our wrappers, with PEFT's adapters on it one at a time."""

    def __init__(self, checkpoint: Path, *, quantization: str, dtype: torch.dtype, packed: bool) -> None:
        self.base = load_base(
            checkpoint, quantization=quantization, dtype=dtype, device="cpu", attn_implementation="eager"
        )
        for module in self.base.modules():
            if isinstance(module, Linear4bit) and not packed:
                module.support_avx512bf16_for_cpu = False

    @torch.inference_mode()
    def logits(self, adapter: Path | None, tokens: list[int]) -> Tensor:
        """Teacher-forced float32 logits [len(tokens), vocab] with `adapter` (None: the bare base)."""
        ids = torch.tensor([tokens])
        if adapter is None:
            return self.base(ids).logits[0].float()
        model = PeftModel.from_pretrained(self.base, adapter).eval()
        try:
            return model(ids).logits[0].float()
        finally:
            _take_off(model)


def _take_off(model: PeftModel) -> None:
    """Leaves the base as it was; PEFT would leave its config there, and warn at the next adapter."""
    base = model.unload()
    if hasattr(base, "peft_config"):
        del base.peft_config
