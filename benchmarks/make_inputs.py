"""Makes a base and adapters of real shapes with random weights: throughput does not depend on their values.

    python benchmarks/make_inputs.py FOLDER --shape tinyllama-1.1b --adapters 32

What is there already is left as it is. The base is written block by block, so that memory holds one of any shape.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import torch
from make_mix import make_mixed_adapter, mix
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from workload import RANK, SHAPES, SMALL, Inputs

CONFIGS = {
    "tiny": LlamaConfig(
        vocab_size=512,
        hidden_size=128,
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
    "llama-3-8b": LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        rope_theta=500000.0,
    ),
}
SMALL_RANK, SMALL_TARGETS = 8, ("q_proj", "v_proj")
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def main() -> None:
    """Makes what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="tinyllama-1.1b")
    parser.add_argument("--adapters", type=int, default=32)
    parser.add_argument("--small", action="store_true", help="and one of rank 8 on q_proj and v_proj")
    parser.add_argument("--mix", action="store_true", help="and adapters of twelve methods")
    args = parser.parse_args()
    inputs, config = Inputs(args.folder), CONFIGS[args.shape]
    if not inputs.base.exists():
        make_base(config, inputs.base)
    for seed in range(args.adapters):
        if not inputs.adapter(f"a{seed}").exists():
            make_adapter(config, seed, inputs.adapter(f"a{seed}"))
    if args.small and not inputs.adapter(SMALL).exists():
        make_adapter(config, 0, inputs.adapter(SMALL), SMALL_RANK, SMALL_TARGETS)
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
    config.architectures, config.dtype = [LlamaForCausalLM.__name__], torch.bfloat16
    partial = _partial(path)
    write_weights(config, partial)
    config.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(path)


def write_weights(config: LlamaConfig, path: Path) -> None:
    """One file of tensors for each block and each end of the model, and their index."""
    torch.manual_seed(0)
    files: dict[str, str] = {}
    for number, shapes in enumerate(parts(config)):
        file = f"model-{number:05}.safetensors"
        tensors = {name: random_weight(name, shape, config) for name, shape in shapes.items()}
        save_file(tensors, path / file, metadata={"format": "pt"})
        files |= dict.fromkeys(tensors, file)
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    index = {"metadata": {"total_size": size}, "weight_map": files}
    (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def parts(config: LlamaConfig) -> Iterator[dict[str, tuple[int, ...]]]:
    """The model's tensors, block by block."""
    with torch.device("meta"):
        state = LlamaForCausalLM(config).state_dict()
    for _, names in groupby(state, key=lambda name: name.split(".")[:3]):
        yield {name: tuple(state[name].shape) for name in names}


def random_weight(name: str, shape: tuple[int, ...], config: LlamaConfig) -> Tensor:
    """As an untrained model has it."""
    if name.endswith("norm.weight"):
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(std=config.initializer_range)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, then the special tokens; needs no training data."""
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL_TOKENS)


def make_adapter(
    config: LlamaConfig, seed: int, path: Path, rank: int = RANK, targets: Sequence[str] | None = None
) -> None:
    """A LoRA adapter over all linear layers of every block, or the named ones, in PEFT's format; B is not zero."""
    draw = torch.Generator().manual_seed(seed)
    linears = {
        name: shape for name, shape in block_linears(config).items() if not targets or name.endswith(tuple(targets))
    }
    tensors = {}
    for layer in range(config.num_hidden_layers):
        for name, (inputs, outputs) in linears.items():
            key = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{key}.lora_A.weight"] = (torch.randn(rank, inputs, generator=draw) / inputs**0.5).bfloat16()
            tensors[f"{key}.lora_B.weight"] = (torch.randn(outputs, rank, generator=draw) * 0.01).bfloat16()
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
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
