"""What PEFT gives for one adapter alone on the same base: the oracle of every parity test."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from hatrack_server.kernels.nf4_linear import dequantized
from hatrack_server.model.load import load_base

NOISE = 0.1  # standard deviation of random adapter weights


def make_adapter(base: PreTrainedModel, path: Path, *, seed: int, **config: Any) -> Path:
    """Saves a LoRA adapter with random, non-zero weights through PEFT itself; leaves `base` as it was."""
    return save_adapter(base, path, LoraConfig(task_type="CAUSAL_LM", **config), seed=seed)


def save_adapter(base: PreTrainedModel, path: Path, config: PeftConfig, *, seed: int, noise: float = NOISE) -> Path:
    """Saves an adapter of any method with random weights through PEFT itself; leaves `base` as it was.

    Vectors that scale something are random about what they were, everything else about 0.
    """
    model = get_peft_model(base, copy.copy(config))  # PEFT writes the base's name into it
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if any(mark in name for mark in (getattr(model, "prefix", "adaption_"), "prompt_encoder")):
            random = torch.randn(parameter.shape, generator=generator) * noise
            scales = "ia3_l" in name or "lora_magnitude_vector" in name
            parameter.data = parameter.data.float() * (1 + random) if scales else random
    model.save_pretrained(path, save_embedding_layers=False)
    _take_off(model)
    return path


class Oracle:
    """The base, loaded anew without our wrappers, with PEFT's adapters on it one at a time."""

    def __init__(self, checkpoint: Path, *, quantization: str, dtype: torch.dtype, packed: bool) -> None:
        self._load = functools.partial(
            load_base, checkpoint, quantization=quantization, dtype=dtype, device="cpu", attn_implementation="eager"
        )
        self.base = self._load()
        for module in self.base.modules():
            if isinstance(module, Linear4bit) and not packed:
                module.support_avx512bf16_for_cpu = False

    @functools.cached_property
    def plain(self) -> PreTrainedModel:
        """The same base with its NF4 weights dequantised, in plain linear layers."""
        base = self._load()
        for name, layer in list(base.named_modules()):
            if isinstance(layer, Linear4bit):
                parent, _, child = name.rpartition(".")
                plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
                plain.weight.data = dequantized(layer).to(base.dtype)
                if layer.bias is not None:
                    plain.bias.data = layer.bias.data.to(base.dtype)
                setattr(base.get_submodule(parent), child, plain.requires_grad_(False))
        base.is_loaded_in_4bit = False
        return base.eval()

    @torch.inference_mode()
    def logits(self, adapter: Path | None, tokens: list[int], *, plain: bool = False) -> Tensor:
        """Teacher-forced float32 logits [len(tokens), vocab] with `adapter` (None: the bare base)."""
        ids, base = torch.tensor([tokens]), self.plain if plain else self.base
        if adapter is None:
            return base(ids).logits[0].float()
        model = PeftModel.from_pretrained(base, adapter).eval()
        try:
            return model(ids).logits[0, -len(tokens) :].float()  # behind those of a soft prompt
        finally:
            _take_off(model)


def _take_off(model: PeftModel) -> None:
    """Leaves the base as it was; PEFT would leave its config there, and warn at the next adapter."""
    if model.active_peft_config.peft_type is PeftType.ADAPTION_PROMPT:
        model.base_model._remove_adapted_attentions("default")
    base = model.get_base_model()
    for name, layer in list(base.named_modules()):  # what `unload` does, which refuses (IA)³ on NF4
        if isinstance(layer, BaseTunerLayer):
            parent, _, child = name.rpartition(".")
            setattr(base.get_submodule(parent), child, layer.get_base_layer())
    if hasattr(base, "peft_config"):
        del base.peft_config
