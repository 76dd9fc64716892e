"""Adapters of twelve kinds for one base, in PEFT's own format with random weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import (
    AdaLoraConfig,
    AdaptionPromptConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from hatrack_trainer.tuners.bottleneck import BottleneckConfig

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CAUSAL_LM = "CAUSAL_LM"
VIRTUAL_TOKENS = 16


def mix(config: LlamaConfig) -> dict[str, PeftConfig]:
    """The twelve by name: as much as each method's users train, over all linear layers where it has a choice."""
    return {
        "m0": LoraConfig(task_type=CAUSAL_LM, r=8, target_modules=LINEARS),
        "m1": LoraConfig(task_type=CAUSAL_LM, r=16, target_modules=LINEARS),
        "m2": LoraConfig(task_type=CAUSAL_LM, r=16, use_rslora=True, target_modules=LINEARS),
        "m3": LoraConfig(task_type=CAUSAL_LM, r=16, use_dora=True, target_modules=LINEARS),
        "m4": LoHaConfig(task_type=CAUSAL_LM, r=4, target_modules=LINEARS),
        "m5": LoKrConfig(task_type=CAUSAL_LM, r=8, target_modules=LINEARS),
        "m6": IA3Config(
            task_type=CAUSAL_LM,
            target_modules=["k_proj", "v_proj", "down_proj"],
            feedforward_modules=["down_proj"],
        ),
        "m7": AdaLoraConfig(task_type=CAUSAL_LM, init_r=12, target_r=8, total_step=10, target_modules=LINEARS),
        "m8": PrefixTuningConfig(task_type=CAUSAL_LM, num_virtual_tokens=VIRTUAL_TOKENS),
        "m9": PromptTuningConfig(task_type=CAUSAL_LM, num_virtual_tokens=VIRTUAL_TOKENS),
        "m10": AdaptionPromptConfig(
            task_type=CAUSAL_LM,
            adapter_len=10,
            adapter_layers=max(1, config.num_hidden_layers - 2),
            target_modules="self_attn",
        ),
        "m11": BottleneckConfig(task_type=CAUSAL_LM, r=64, placement="houlsby"),
    }


def make_mixed_adapter(config: LlamaConfig, peft_config: PeftConfig, path: Path, seed: int) -> None:
    """Writes one of them; the base's shapes are enough."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {
        name: (torch.randn(shape, generator=draw) * 0.02 + ("ia3_l" in name or "magnitude" in name)).bfloat16()
        for name, shape in shapes(config, peft_config).items()
    }
    settings = peft_config.to_dict() | {"peft_type": peft_config.peft_type.value, "inference_mode": True}
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    (path / "adapter_config.json").write_text(json.dumps(settings, default=sorted))


def shapes(config: LlamaConfig, peft_config: PeftConfig) -> dict[str, tuple[int, ...]]:
    """The tensors that PEFT would save."""
    hidden, layers = config.hidden_size, config.num_hidden_layers
    if isinstance(peft_config, PrefixTuningConfig):
        kv = config.num_key_value_heads * (hidden // config.num_attention_heads)
        return {"prompt_embeddings": (VIRTUAL_TOKENS, 2 * layers * kv)}
    if isinstance(peft_config, PromptTuningConfig):
        return {"prompt_embeddings": (VIRTUAL_TOKENS, hidden)}
    with torch.device("meta"):
        model = get_peft_model(LlamaForCausalLM(config), peft_config)
    saved: dict[str, Tensor] = get_peft_model_state_dict(model)
    return {name: tuple(tensor.shape) for name, tensor in saved.items()}
