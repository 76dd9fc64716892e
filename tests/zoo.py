"""One adapter of every served method, as PEFT configures it, for any of the tiny families."""

from __future__ import annotations

from pathlib import Path

from oracle import Oracle, save_adapter
from peft import (
    AdaLoraConfig,
    AdaptionPromptConfig,
    DeftConfig,
    DeloraConfig,
    GraloraConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TinyLoraConfig,
    TrainableTokensConfig,
    UniLoraConfig,
    VBLoRAConfig,
    VeraConfig,
)

from hatrack_trainer.tuners.bottleneck import BottleneckConfig

CAUSAL_LM = "CAUSAL_LM"
UP, DOWN = ["up_proj", "fc1"], ["down_proj", "fc2"]  # what Phi calls otherwise

# Strong enough for each other to be told apart by far more than bfloat16's noise.
ZOO: dict[str, PeftConfig] = {
    "lora": LoraConfig(task_type=CAUSAL_LM, r=4, lora_alpha=32, target_modules=["q_proj", "v_proj"]),
    "rslora": LoraConfig(task_type=CAUSAL_LM, r=16, lora_alpha=16, use_rslora=True, target_modules=["k_proj", *DOWN]),
    "lora with biases": LoraConfig(
        task_type=CAUSAL_LM, r=8, lora_alpha=16, lora_bias=True, target_modules=["v_proj", *UP]
    ),
    "dora": LoraConfig(task_type=CAUSAL_LM, r=8, lora_alpha=16, use_dora=True, target_modules="all-linear"),
    "loha": LoHaConfig(task_type=CAUSAL_LM, r=4, alpha=96, target_modules=["v_proj", *UP]),
    "lokr": LoKrConfig(task_type=CAUSAL_LM, r=2, alpha=16, target_modules=["q_proj", "v_proj", *DOWN]),
    "lokr, whole": LoKrConfig(task_type=CAUSAL_LM, r=64, alpha=256, target_modules=["v_proj"]),
    "prompt": PromptTuningConfig(task_type=CAUSAL_LM, num_virtual_tokens=9),
    "p-tuning": PromptEncoderConfig(task_type=CAUSAL_LM, num_virtual_tokens=5, encoder_hidden_size=16),
    "prefix": PrefixTuningConfig(task_type=CAUSAL_LM, num_virtual_tokens=21),
    "ia3": IA3Config(task_type=CAUSAL_LM, target_modules=["k_proj", "v_proj", *DOWN], feedforward_modules=DOWN),
    "adalora": AdaLoraConfig(
        task_type=CAUSAL_LM, init_r=6, target_r=2, total_step=10, lora_alpha=400, target_modules=["v_proj", *DOWN]
    ),
    "vera": VeraConfig(task_type=CAUSAL_LM, r=16, target_modules=["v_proj", *DOWN]),
    "miss": MissConfig(task_type=CAUSAL_LM, r=8, target_modules=["v_proj", *UP]),
    "lora on the embedding": LoraConfig(
        task_type=CAUSAL_LM, r=8, lora_alpha=32, target_modules=["embed_tokens", "v_proj"]
    ),
    "bottleneck, houlsby": BottleneckConfig(task_type=CAUSAL_LM, r=12, activation="silu", placement="houlsby"),
    "bottleneck, pfeiffer": BottleneckConfig(task_type=CAUSAL_LM, r=5, activation="relu"),
    "lora and a new head": LoraConfig(
        task_type=CAUSAL_LM, r=4, target_modules="all-linear", modules_to_save=["lm_head", "norm"]
    ),
    "ia3 and a new embedding": IA3Config(
        task_type=CAUSAL_LM, target_modules=["v_proj"], feedforward_modules=[], modules_to_save=["embed_tokens"]
    ),
    "lora and new tokens": LoraConfig(
        task_type=CAUSAL_LM, r=4, target_modules=["v_proj"], trainable_token_indices=[*range(0, 250, 2)]
    ),
    "new tokens": TrainableTokensConfig(task_type=CAUSAL_LM, token_indices=[*range(0, 255, 3)]),
    "norms": LNTuningConfig(task_type=CAUSAL_LM, target_modules=["input_layernorm", "post_attention_layernorm"]),
    "vb-lora": VBLoRAConfig(
        task_type=CAUSAL_LM, r=4, num_vectors=24, vector_length=32, target_modules=["v_proj", *DOWN]
    ),
    "uni-lora": UniLoraConfig(task_type=CAUSAL_LM, r=8, theta_d_length=300, target_modules=["v_proj", *UP]),
    "tinylora": TinyLoraConfig(task_type=CAUSAL_LM, r=3, u=12, weight_tying=0.5, target_modules=["v_proj", *DOWN]),
    "delora": DeloraConfig(task_type=CAUSAL_LM, r=8, target_modules=["v_proj", *UP]),
    "gralora": GraloraConfig(task_type=CAUSAL_LM, r=8, hybrid_r=2, gralora_k=4, target_modules=["v_proj", *DOWN]),
    "hra": HRAConfig(task_type=CAUSAL_LM, r=8, target_modules=["v_proj", *DOWN]),
    # Its own initialisation reads the weight, which on NF4 is packed.
    "deft": DeftConfig(
        task_type=CAUSAL_LM, r=8, decomposition_method="qr", init_weights=False, target_modules=["v_proj", *UP]
    ),
}
NOISE = {
    "vb-lora": 0.25,
    "uni-lora": 0.5,
    "tinylora": 0.5,
    "lora and a new head": 0.03,
    "lora and new tokens": 0.05,
    "new tokens": 0.05,
    "norms": 0.5,
    "delora": 20.0,
    "vera": 0.5,
    "ia3": 0.5,
    "prefix": 2.0,
    "prompt": 1.0,
    "p-tuning": 1.0,
    "llama-adapter": 3.0,
}
# What PEFT can't run on NF4: LoHa, LoKr, DeLoRA, HRA and TinyLoRA read a packed weight, and Uni-LoRA turns its scales
# into that one's integers, mostly 0; in bfloat16 (IA)³ gives float32, which attention refuses, and DoRA dequantises a
# weight that the packed kernel has turned into something else.
NOT_ON_NF4 = {"loha", "lokr", "lokr, whole", "delora", "hra", "uni-lora", "tinylora"}
NOT_ON_BFLOAT16_NF4 = NOT_ON_NF4 | {"dora", "ia3", "ia3 and a new embedding"}

# PEFT knows these alone.
ONLY_ON_LLAMA_AND_MISTRAL: dict[str, PeftConfig] = {
    "llama-adapter": AdaptionPromptConfig(task_type=CAUSAL_LM, adapter_len=6, adapter_layers=2)
}

# What PEFT says of these, rightly or not.
EXPECTED_WARNINGS = [
    "ignore:Model has `tie_word_embeddings=True`:UserWarning",
    "ignore:`lora_bias=True` was passed",
    "ignore:Unsupported layer type:UserWarning",  # norms
    "ignore:Setting `save_embedding_layers` to `True`",
    "ignore:Adapter 'default'. .* LoRA tensor.s. have invalid shape",  # the bias of lora_B, taken for its weight
]


def make_zoo(oracle: Oracle, folder: Path) -> dict[str, Path]:
    """Saves all that can be on the oracle's base; the artifacts' folders by name."""
    more = ONLY_ON_LLAMA_AND_MISTRAL if oracle.base.config.model_type in ("llama", "mistral") else {}
    return {
        name: save_adapter(oracle.plain, folder / name, config, seed=seed, noise=NOISE.get(name, 0.1))
        for seed, (name, config) in enumerate((ZOO | more).items())
    }


def not_on(precision: str) -> set[str]:
    """Those that PEFT can't run on an NF4 base of this precision."""
    return NOT_ON_BFLOAT16_NF4 if precision == "bfloat16" else NOT_ON_NF4
