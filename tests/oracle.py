"""What PEFT gives for one adapter alone on the same base: the oracle of every parity test."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from hatrack_server.kernels.nf4_linear import dequantized
from hatrack_server.model.load import load_base

REPLACING = ("modules_to_save", "trainable_tokens_delta", "ln_tuning_layers", "partial_weights")
NOISE = 0.1  # standard deviation of random adapter weights


def make_adapter(base: PreTrainedModel, path: Path, *, seed: int, **config: Any) -> Path:
    """Saves a LoRA adapter with random, non-zero weights through PEFT itself; leaves `base` as it was."""
    return save_adapter(base, path, LoraConfig(task_type="CAUSAL_LM", **config), seed=seed)


def save_adapter(base: PreTrainedModel, path: Path, config: PeftConfig, *, seed: int, noise: float = NOISE) -> Path:
    """Saves an adapter of any method with random weights through PEFT itself; leaves `base` as it was.

    Vectors that scale something and what stands in the base's place are random about what they were, all else about 0.
    """
    model = get_peft_model(base, copy.copy(config))  # PEFT writes the base's name into it
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if any(mark in name for mark in (getattr(model, "prefix", "adaption_"), "prompt_encoder", *REPLACING)):
            random = torch.randn(parameter.shape, generator=generator) * noise
            if any(mark in name for mark in ("ia3_l", "lora_magnitude_vector")):
                random = parameter.data.float() * (1 + random)
            elif any(mark in name for mark in REPLACING):
                random = parameter.data + random.to(parameter.dtype)
            parameter.data = random
    model.save_pretrained(path)
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
    _put_back(base, AuxiliaryTrainingWrapper, lambda wrapper: wrapper.original_module)
    _put_back(base, BaseTunerLayer, BaseTunerLayer.get_base_layer)  # `unload` would refuse (IA)³ on NF4
    if hasattr(base, "peft_config"):
        del base.peft_config


def _put_back(base: PreTrainedModel, kind: type, original: Callable[[Any], nn.Module]) -> None:
    for name, layer in list(base.named_modules()):
        if isinstance(layer, kind):
            parent, _, child = name.rpartition(".")
            setattr(base.get_submodule(parent), child, original(layer))
