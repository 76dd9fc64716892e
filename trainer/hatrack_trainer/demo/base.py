"""The demo's base: a small character-level Llama, pre-trained on the spot on the text skills."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hatrack_trainer.data import IGNORED
from hatrack_trainer.demo.skills import ALPHABET, pretraining_pair

BOS, EOS, PAD, UNKNOWN_CHARACTER = range(4)
SPECIAL_TOKENS = ("<s>", "</s>", "<pad>", "<unk>")


@dataclass(frozen=True, slots=True)
class Pretraining:
    """What makes the base; equal settings make an equal base on one machine."""

    hidden_size: int = 128  # a multiple of 64, as NF4's blocks want it
    intermediate_size: int = 384
    layers: int = 4
    heads: int = 4
    steps: int = 900  # with 600, whether it learns to reverse is left to chance
    batch_size: int = 64
    learning_rate: float = 3e-3
    seed: int = 0


def make_base(settings: Pretraining, folder: Path, on_step: Callable[[int, float], None]) -> None:
    """Trains the base and writes it with its tokenizer to `folder`; `on_step` gets each step's number and loss."""
    torch.manual_seed(settings.seed)
    tokenizer = make_tokenizer()
    model = LlamaForCausalLM(_model_config(settings, len(tokenizer)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=settings.steps, pct_start=0.1
    )
    for step, (input_ids, labels) in enumerate(_batches(settings, tokenizer.get_vocab()), start=1):
        loss = model(input_ids=input_ids, attention_mask=input_ids.ne(PAD).long(), labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        on_step(step, loss.item())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character; `<s>` is put before every text."""
    tokens = [*SPECIAL_TOKENS, *ALPHABET]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",  # noqa: S106
        eos_token="</s>",  # noqa: S106
        pad_token="<pad>",  # noqa: S106
        unk_token="<unk>",  # noqa: S106
    )


def _model_config(settings: Pretraining, vocab_size: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=128,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )


def _batches(settings: Pretraining, vocab: dict[str, int]) -> Iterator[tuple[Tensor, Tensor]]:
    """`steps` pairs of input ids and labels, both [batch, longest row], padded on the right."""
    rng = random.Random(settings.seed)  # noqa: S311 -- data to learn from, not a secret
    for _ in range(settings.steps):
        rows, labels = [], []
        for _ in range(settings.batch_size):
            prompt, completion = pretraining_pair(rng)
            answer = [*(vocab[c] for c in completion), EOS]
            question = [BOS, *(vocab[c] for c in prompt)]
            rows.append(torch.tensor(question + answer))
            labels.append(torch.tensor([IGNORED] * len(question) + answer))
        yield _pad(rows, PAD), _pad(labels, IGNORED)


def _pad(rows: list[Tensor], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
