"""Preference pairs, learned by DPO on an NF4 base through TRL."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoTokenizer, PreTrainedModel

from hatrack.manifest import Manifest
from hatrack_server.model.load import load_base, prepare_for_training
from hatrack_server.text.codec import TextCodec
from hatrack_trainer.config import BaseSection, DataSection, OutputSection, TrainConfig, TrainSection
from hatrack_trainer.data import Example
from hatrack_trainer.data.read import read_data
from hatrack_trainer.dpo import PairTrainer, make_pair_trainer
from hatrack_trainer.errors import UsageError
from hatrack_trainer.methods import Method, methods, read_method
from hatrack_trainer.methods.lora import Lora
from hatrack_trainer.run import train

NEEDED: dict[str, dict[str, Any]] = {"llama_adapter": {"layers": 2}, "partial": {"parts": ["norms"]}}
"""The keys of a method that have no default."""
EOS = 257
BETA = 0.1
PAIRS = [
    {"prompt": "to be", "chosen": " or not", "rejected": " eaten"},
    {"prompt": "a", "chosen": "b", "rejected": "cdefg"},
    {"prompt": "one two", "chosen": " three", "rejected": " 4"},
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "pairs.jsonl", PAIRS)


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def configure(base: Path, data: Path, adapter: Method | None = None, **settings: Any) -> TrainConfig:
    return TrainConfig(
        base=BaseSection(model=str(base)),
        adapter=adapter or Lora(rank=4),
        data=DataSection(train=data, eval=data, max_length=48),
        train=TrainSection(**{"batch_size": 3, "schedule": "constant", **settings}),
        output=OutputSection(dir=data.parent / "out"),
    )


def trainer_of(config: TrainConfig) -> PairTrainer:
    checkpoint = Path(config.base.model)
    base = load_base(checkpoint, quantization="nf4", dtype=torch.float32, device="cpu")
    examples = read_data(config.data, checkpoint).train.examples
    return make_pair_trainer(config, base, AutoTokenizer.from_pretrained(checkpoint), examples, examples)


def bare_base(checkpoint: Path) -> PreTrainedModel:
    base = load_base(checkpoint, quantization="nf4", dtype=torch.float32, device="cpu")
    prepare_for_training(base)
    return base


def perturb(trainer: PairTrainer) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)


def test_pairs_are_tokenised_as_they_are_served(tiny_llama: Path, data: Path) -> None:
    row = trainer_of(configure(tiny_llama, data)).train_dataset[0]
    codec = TextCodec(tiny_llama)
    assert row["prompt_ids"] == codec.encode("to be")
    assert row["chosen_ids"] == [*codec.encode(" or not")[1:], EOS]
    assert row["rejected_ids"] == [*codec.encode(" eaten")[1:], EOS]


def test_a_pair_of_chats_shares_the_served_prompt(tiny_llama: Path, tmp_path: Path) -> None:
    talk = {role: [{"role": name, "content": role}] for role, name in
            (("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant"))}  # fmt: skip
    row = trainer_of(configure(tiny_llama, write(tmp_path / "chats.jsonl", [talk]))).train_dataset[0]
    codec = TextCodec(tiny_llama)
    assert row["prompt_ids"] == codec.encode_chat([{"role": "user", "content": "prompt"}], add_generation_prompt=True)
    assert codec.decode(row["chosen_ids"]) == "chosen\n"
    assert row["chosen_ids"][-1] == row["rejected_ids"][-1] == EOS


def test_the_loss_begins_at_log_2_and_chosen_completions_come_to_be_preferred(tiny_llama: Path, data: Path) -> None:
    trainer = trainer_of(configure(tiny_llama, data, max_steps=20, learning_rate=1e-3))
    before = trainer.evaluate()
    assert before["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert before["eval_rewards/margins"] == pytest.approx(0.0, abs=1e-6)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    after = trainer.evaluate()
    assert after["eval_rewards/margins"] > 0.1
    assert after["eval_rewards/accuracies"] == 1.0
    assert after["eval_loss"] < before["eval_loss"] - 0.05


def test_the_loss_is_that_of_the_paper(tiny_llama: Path, data: Path) -> None:
    trainer = trainer_of(configure(tiny_llama, data, dpo_beta=0.3))
    perturb(trainer)
    plain = bare_base(tiny_llama)
    examples = read_data(configure(tiny_llama, data).data, tiny_llama).train.examples
    with torch.no_grad():
        ratios = [likelihood(trainer.model.eval(), each) - likelihood(plain, each) for each in examples]
    chosen, rejected = torch.stack(ratios[::2]), torch.stack(ratios[1::2])
    expected = -logsigmoid(0.3 * (chosen - rejected)).mean()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-4)
    assert abs(expected.item() - math.log(2)) > 0.05


def likelihood(model: Any, example: Example) -> Tensor:
    """The log-likelihood of what the example learns, from the model's logits."""
    logits = model(input_ids=torch.tensor([example.input_ids])).logits[0, :-1].log_softmax(-1)
    places = range(example.start, len(example.labels))
    return torch.stack([logits[place - 1, example.labels[place]] for place in places]).sum()


@pytest.mark.parametrize("name", methods())
def test_the_reference_is_the_base_and_every_part_learns(tiny_llama: Path, data: Path, name: str) -> None:
    adapter = read_method({"method": name, **NEEDED.get(name, {})})
    trainer = trainer_of(configure(tiny_llama, data, adapter))
    trained = {key for key, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    perturb(trainer)
    batch = trainer.data_collator(list(trainer.train_dataset))
    trainer.compute_loss(trainer.model.train(), batch).backward()
    after = {key: parameter for key, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert after.keys() == trained
    silent = {key for key, parameter in after.items() if parameter.grad is None or not parameter.grad.any()}
    assert not {key for key in silent if not any(part in key for part in adapter.may_lack_gradients)}
    base = bare_base(tiny_llama)
    ids = batch["input_ids"][:1]
    with torch.no_grad():
        wanted = base(input_ids=ids).logits
        tuned = trainer.model.eval()(input_ids=ids).logits[:, -ids.shape[1] :]
        with trainer.model.disable_adapter():
            reference = trainer.model(input_ids=ids).logits
    assert (tuned - wanted).abs().max() > 1e-2
    torch.testing.assert_close(reference, wanted, rtol=1e-4, atol=1e-4)


def test_gradient_accumulation_gives_the_same_steps(tiny_llama: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "four.jsonl", [*PAIRS, {"prompt": "x", "chosen": "yz", "rejected": "zy"}])
    losses = []
    for sizes in ({"batch_size": 4}, {"batch_size": 2, "gradient_accumulation": 2}):
        trainer = trainer_of(configure(tiny_llama, data, max_steps=3, learning_rate=1e-3, **sizes))
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.filterwarnings("error:`is_gradient_checkpointing`")
def test_a_whole_run_says_that_it_is_dpo(tiny_llama: Path, data: Path) -> None:
    said: list[str] = []
    config = configure(tiny_llama, data, Lora(rank=4, dropout=0.1), max_steps=3)
    assert train(config, say=said.append).eval_loss is not None
    assert (
        f"{data}: the adapter learns by DPO to prefer chosen to rejected, with train.dpo_beta 0.1 "
        "and a learning rate of 0.0001; adapter.dropout is not applied"
    ) in said
    assert f"{data}: its loss says little of new text, for {data} also has 3 rows (lines 1, 2, 3)" in said
    log = [json.loads(line) for line in (config.output.dir / "training" / "log.jsonl").read_text().splitlines()]
    assert all({"reward_margin", "reward_accuracy"} <= entry.keys() for entry in log)
    assert log[-1]["reward_margin"] > log[0]["reward_margin"]
    training = Manifest.from_json((config.output.dir / "manifest.json").read_text()).training
    assert training["data"]["format"] == "preference"
    assert training["data"]["rows"] == 3
    assert training["settings"]["learning_rate"] == pytest.approx(1e-4)
    assert training["settings"]["dpo_beta"] == BETA


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"packing": True}, "train.packing: does not work with preference pairs, which are compared row by row"),
        (
            {"neftune_alpha": 5.0},
            "train.neftune_alpha: does not work with preference pairs: their reference must be the base",
        ),
    ],
)
def test_what_would_make_pairs_unequal_is_refused(
    tiny_llama: Path, data: Path, settings: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UsageError) as caught:
        train(configure(tiny_llama, data, **settings))
    assert str(caught.value) == sentence
