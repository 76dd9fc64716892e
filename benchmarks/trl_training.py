"""QLoRA with TRL and PEFT, as their documentation has it; prints a TrainingMeasurement as its last line.

python benchmarks/trl_training.py BASE ROWS.jsonl --rows 2 --steps 3 --device cpu
"""

from __future__ import annotations

import json
import tempfile
from typing import Any

import torch
from datasets import load_dataset
from peft import LoraConfig, prepare_model_for_kbit_training
from training_clock import Clock
from training_options import LEARNING_RATE, TOKENS, child_arguments
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
from trl import SFTConfig, SFTTrainer
from workload import RANK


class Ticking(TrainerCallback):
    """Tells the clock of each step."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def on_log(self, _args: Any, _state: Any, _control: Any, logs: dict[str, float], **_: Any) -> None:
        """Called by the trainer."""
        if "loss" in logs:
            self._clock.step(logs["loss"])


def main() -> None:
    """Trains."""
    args = child_arguments(__doc__)
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        args.base, quantization_config=nf4, dtype=torch.bfloat16, device_map=args.device
    )
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=args.checkpointing)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder,
            max_length=TOKENS,
            max_steps=args.steps + 1,
            per_device_train_batch_size=args.rows,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            max_grad_norm=1.0,
            gradient_checkpointing=args.checkpointing,
            optim="paged_adamw_32bit" if args.device == "cuda" else "adamw_torch",
            use_cpu=args.device == "cpu",
            dataloader_pin_memory=args.device == "cuda",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            seed=0,
        )
        trainer = SFTTrainer(
            model=model,
            args=arguments,
            train_dataset=load_dataset("json", data_files=str(args.data), split="train", cache_dir=folder),
            processing_class=AutoTokenizer.from_pretrained(args.base),
            peft_config=LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"),
            callbacks=[Ticking(clock)],
        )
        trainer.train()
    print(json.dumps(clock.found()))


if __name__ == "__main__":
    main()
