"""One adapter of every served method, as PEFT configures it, for any of the tiny families."""

from __future__ import annotations

from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    PeftConfig,
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
    "ia3": IA3Config(task_type=CAUSAL_LM, target_modules=["k_proj", "v_proj", *DOWN], feedforward_modules=DOWN),
    "adalora": AdaLoraConfig(
        task_type=CAUSAL_LM, init_r=6, target_r=2, total_step=10, lora_alpha=600, target_modules=["v_proj", *DOWN]
    ),
    "vera": VeraConfig(task_type=CAUSAL_LM, r=16, target_modules=["v_proj", *DOWN]),
    "miss": MissConfig(task_type=CAUSAL_LM, r=8, target_modules=["v_proj", *UP]),
}
NOISE = {"vera": 1.0, "ia3": 0.5}
# LoHa and LoKr read a packed weight's shape in PEFT; DoRA dequantises it, which is garbage after the packed kernel.
NOT_ON_NF4 = {"loha", "lokr", "lokr, whole"}
NOT_ON_PACKED_NF4 = NOT_ON_NF4 | {"dora"}
