"""A trained adapter as PEFT has it, apart from the server: what it answers, and how much of it was learned."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedTokenizerBase

import hatrack_trainer.tuners.bottleneck
import hatrack_trainer.tuners.lycoris  # noqa: F401  PEFT can't load them without
from hatrack_server.model.load import load_base, prepare_for_training

FROZEN = ("vera_A", "vera_B")  # drawn once, and saved for whoever would draw otherwise


def load_trained(base: Path, artifact: Path | None = None) -> nn.Module:
    """The base on NF4, which computes in float32, with the adapter in `artifact`, if any; ready to answer."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_base(base, quantization="nf4", dtype=torch.float32, device=device)
    prepare_for_training(model)
    if artifact is None:
        return model
    with warnings.catch_warnings():
        # PEFT asks transformers by an old name, and looks for layers by the names of AdaLoRA's tensors.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "The following rank_pattern keys did not match", RuntimeWarning)
        return PeftModel.from_pretrained(model, artifact).eval()


@torch.inference_mode()
def greedy(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_tokens: int
) -> list[tuple[int, ...]]:
    """The likeliest tokens after each prompt, up to the end-of-sequence token, which is the last of them.

    Whole forward passes over rows of one length: with padding, a learned prefix would not stand next to the text.
    """
    encoded = tokenizer(list(prompts))["input_ids"]
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    answers: dict[int, tuple[int, ...]] = {}
    for length, group in groupby(order, key=lambda i: len(encoded[i])):
        rows = list(group)
        ids = torch.tensor([encoded[i] for i in rows], device=next(model.parameters()).device)
        for _ in range(max_tokens):
            following = model(input_ids=ids).logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, following], dim=1)
        for row, tokens in zip(rows, ids[:, length:].tolist(), strict=True):
            answers[row] = _to_the_end(tokens, tokenizer.eos_token_id)
    return [answers[i] for i in range(len(prompts))]


def _to_the_end(tokens: list[int], end: int) -> tuple[int, ...]:
    return tuple(tokens[: tokens.index(end) + 1] if end in tokens else tokens)


def learned_parameters(artifact: Path) -> int:
    """How many numbers of the artifact were learned."""
    with safe_open(artifact / "adapter_model.safetensors", framework="pt") as file:
        learned = [name for name in file.keys() if not name.endswith(FROZEN)]  # noqa: SIM118 -- it is no mapping
        return sum(math.prod(file.get_slice(name).get_shape()) for name in learned)
