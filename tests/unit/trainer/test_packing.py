"""Documents in one row learn as they do each in its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny import make_checkpoint
from torch import Tensor
from transformers import AutoTokenizer
from trl import SFTTrainer

from hatrack_server.model.load import load_base
from hatrack_trainer.config import BaseSection, DataSection, OutputSection, TrainConfig, TrainSection
from hatrack_trainer.config_file import load_config
from hatrack_trainer.data import Example
from hatrack_trainer.errors import ConfigError, UsageError
from hatrack_trainer.methods import Method, read_method
from hatrack_trainer.packing import PackedCollator, check_documents_apart, pack, packing_remark
from hatrack_trainer.sft import make_trainer

EOS, IGNORED = 257, -100
LENGTHS = (9, 3, 6, 5, 12, 2)
MAX_LENGTH = 14


def document(length: int, first: int) -> Example:
    ids = [256, *range(first, first + length - 2), EOS]
    return Example(ids, [IGNORED, *ids[1:]])


EXAMPLES = [document(length, 10 * number) for number, length in enumerate(LENGTHS)]


def configure(adapter: Method, **train: Any) -> TrainConfig:
    anywhere = Path("unused")
    return TrainConfig(
        base=BaseSection(model="unused"),
        adapter=adapter,
        data=DataSection(train=anywhere, max_length=MAX_LENGTH),
        train=TrainSection(**train),
        output=OutputSection(dir=anywhere),
    )


def rows() -> Dataset:
    columns = {"input_ids": [e.input_ids for e in EXAMPLES], "labels": [e.labels for e in EXAMPLES]}
    return pack(Dataset.from_dict(columns), MAX_LENGTH)


def test_documents_stay_whole_and_fill_the_rows() -> None:
    packed = rows()
    found = []
    for row in packed:
        assert len(row["input_ids"]) == sum(row["seq_lengths"]) <= MAX_LENGTH
        ends = torch.tensor(row["seq_lengths"]).cumsum(0)
        found += [row["input_ids"][end - length : end] for length, end in zip(row["seq_lengths"], ends, strict=True)]
    assert sorted(found) == sorted(example.input_ids for example in EXAMPLES)
    assert packing_remark(packed, MAX_LENGTH) == "packing: 6 documents in 3 rows of 14 tokens, 88% full"


def test_every_document_and_every_padding_begins_at_position_0() -> None:
    batch = PackedCollator()(
        [
            {"input_ids": [5, 6, 7, 8, 9], "labels": [IGNORED, 6, 7, IGNORED, 9], "seq_lengths": [3, 2]},
            {"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7], "seq_lengths": [3]},
        ]
    )
    assert batch.keys() == {"input_ids", "labels", "position_ids"}
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7, IGNORED, 9], [IGNORED, 6, 7, IGNORED, IGNORED]]


def learned(checkpoint: Path, adapter: Method, attention: str, *, packing: bool) -> tuple[float, dict[str, Tensor]]:
    """The loss of all documents in one batch, and its gradients, of an adapter that has begun to learn."""
    base = load_base(checkpoint, quantization="nf4", dtype=torch.float32, device="cpu", attn_implementation=attention)
    config = configure(adapter, packing=packing)
    trainer = make_trainer(config, base, AutoTokenizer.from_pretrained(checkpoint), EXAMPLES)
    trainable = {name: each for name, each in trainer.model.named_parameters() if each.requires_grad}
    generator = torch.Generator().manual_seed(0)
    for each in trainable.values():
        each.data += 0.02 * torch.randn(each.shape, generator=generator)
    loss = loss_of_all(trainer)
    loss.backward()
    assert all(each.grad is not None for each in trainable.values())
    return loss.item(), {name: each.grad for name, each in trainable.items() if each.grad is not None}


def loss_of_all(trainer: SFTTrainer) -> Tensor:
    trainer.model.train()
    batch = trainer.data_collator(list(trainer.train_dataset))
    loss: Tensor = trainer.compute_loss(trainer.model, batch)
    return loss


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("method", ["lora", "llama_adapter"])
def test_loss_and_gradients_are_those_of_separate_rows(tiny_llama: Path, method: str, attention: str) -> None:
    keys = {"rank": 4} if method == "lora" else {"layers": 2, "tokens": 4}
    adapter = read_method({"method": method, **keys})
    loss, gradients = learned(tiny_llama, adapter, attention, packing=True)
    plain_loss, plain_gradients = learned(tiny_llama, adapter, attention, packing=False)
    assert loss == pytest.approx(plain_loss, rel=1e-6)
    assert gradients.keys() == plain_gradients.keys()
    for name, gradient in plain_gradients.items():
        assert gradient.any()
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


def test_held_out_rows_are_not_packed(tiny_llama: Path) -> None:
    base = load_base(tiny_llama, quantization="nf4", dtype=torch.float32, device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    losses = []
    for packing in (True, False):
        config = configure(read_method({"method": "lora"}), packing=packing)
        trainer = make_trainer(config, base, tokenizer, EXAMPLES, EXAMPLES)
        losses.append(trainer.evaluate()["eval_loss"])
        base = trainer.model.unload()
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "phi"])
def test_bases_that_keep_documents_apart(tmp_path: Path, family: str) -> None:
    checkpoint = make_checkpoint(tmp_path, family)
    check_documents_apart(load_base(checkpoint, quantization="nf4", dtype=None, device="cpu"))


def test_a_base_in_which_documents_see_each_other_is_refused(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, "opt")
    base = load_base(checkpoint, quantization="nf4", dtype=None, device="cpu")
    with pytest.raises(UsageError, match=r"^train\.packing: documents of a row would see each other in this base$"):
        check_documents_apart(base)


@pytest.mark.parametrize("method", ["prefix_tuning", "prompt_tuning", "p_tuning"])
def test_virtual_tokens_are_refused(tmp_path: Path, method: str) -> None:
    file = tmp_path / "train.yaml"
    file.write_text(
        "base: {model: some/model}\ndata: {train: rows.jsonl}\noutput: {dir: out}\n"
        f"adapter: {{method: {method}}}\ntrain: {{packing: true}}\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert str(caught.value) == f"{file}: train.packing: does not work with adapter.method {method}"
