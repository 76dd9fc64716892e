"""Makes a base and adapters of real shapes with random weights: throughput does not depend on their values.

    python benchmarks/make_inputs.py FOLDER --shape tinyllama-1.1b --adapters 32

What is there already is left as it is.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from make_mix import make_mixed_adapter, mix
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from workload import RANK, Inputs

SHAPES = {
    "tiny": LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
    "tinyllama-1.1b": LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
    ),
}
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def main() -> None:
    """Makes what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="tinyllama-1.1b")
    parser.add_argument("--adapters", type=int, default=32)
    parser.add_argument("--mix", action="store_true", help="and adapters of twelve methods")
    args = parser.parse_args()
    inputs, config = Inputs(args.folder), SHAPES[args.shape]
    if not inputs.base.exists():
        make_base(config, inputs.base)
    for seed in range(args.adapters):
        if not inputs.adapter(f"a{seed}").exists():
            make_adapter(config, seed, inputs.adapter(f"a{seed}"))
    for seed, (name, peft_config) in enumerate(mix(config).items() if args.mix else ()):
        if not inputs.adapter(name).exists():
            partial = _partial(inputs.adapter(name))
            make_mixed_adapter(config, peft_config, partial, seed)
            partial.rename(inputs.adapter(name))


def make_base(config: LlamaConfig, path: Path) -> None:
    """A random bfloat16 checkpoint with a byte-level tokenizer; appears at `path` only once it is whole."""
    tokenizer = byte_tokenizer()
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.pad_token_id, config.max_position_embeddings = tokenizer.pad_token_id, 2048
    partial = _partial(path)
    torch.manual_seed(0)
    LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(path)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, then the special tokens; needs no training data."""
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL_TOKENS)


def make_adapter(config: LlamaConfig, seed: int, path: Path) -> None:
    """A LoRA adapter over all linear layers of every block, in PEFT's format; B is not zero."""
    draw = torch.Generator().manual_seed(seed)
    linears = block_linears(config)
    tensors = {}
    for layer in range(config.num_hidden_layers):
        for name, (inputs, outputs) in linears.items():
            key = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{key}.lora_A.weight"] = (torch.randn(RANK, inputs, generator=draw) / inputs**0.5).bfloat16()
            tensors[f"{key}.lora_B.weight"] = (torch.randn(outputs, RANK, generator=draw) * 0.01).bfloat16()
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [name.rpartition(".")[2] for name in linears],
        "inference_mode": True,
    }
    partial = _partial(path)
    save_file(tensors, partial / "adapter_model.safetensors", metadata={"format": "pt"})
    (partial / "adapter_config.json").write_text(json.dumps(settings, indent=2))
    partial.rename(path)


def block_linears(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of each linear layer of a block."""
    hidden, feed_forward = config.hidden_size, config.intermediate_size
    kv = config.num_key_value_heads * (hidden // config.num_attention_heads)
    return {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden, kv),
        "self_attn.v_proj": (hidden, kv),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (hidden, feed_forward),
        "mlp.up_proj": (hidden, feed_forward),
        "mlp.down_proj": (feed_forward, hidden),
    }


def _partial(path: Path) -> Path:
    partial = path.with_name(f"{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


if __name__ == "__main__":
    main()
