"""One adapter of every served method, as PEFT configures it, for any of the tiny families."""

from __future__ import annotations

from peft import (
    AdaLoraConfig,
    AdaptionPromptConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
)

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
}
NOISE = {"vera": 0.5, "ia3": 0.5, "prefix": 2.0, "prompt": 1.0, "p-tuning": 1.0, "llama-adapter": 3.0}
# What PEFT can't run on NF4: LoHa and LoKr read a packed weight's shape; in bfloat16 (IA)³ gives float32, which
# attention refuses, and DoRA dequantises a weight that the packed kernel has turned into something else.
NOT_ON_NF4 = {"loha", "lokr", "lokr, whole"}
NOT_ON_BFLOAT16_NF4 = NOT_ON_NF4 | {"dora", "ia3"}

# PEFT knows these alone.
ONLY_ON_LLAMA_AND_MISTRAL: dict[str, PeftConfig] = {
    "llama-adapter": AdaptionPromptConfig(task_type=CAUSAL_LM, adapter_len=6, adapter_layers=2)
}
