"""What a run can be told besides its steps, each as its user means it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import tiny
import torch
from torch import Tensor
from transformers import AutoTokenizer, TrainerCallback

from hatrack.manifest import Manifest
from hatrack_server.model.load import load_base
from hatrack_trainer.config import BaseSection, DataSection, Optimizer, OutputSection, TrainConfig, TrainSection
from hatrack_trainer.data import Example
from hatrack_trainer.data.read import read_data
from hatrack_trainer.errors import UsageError
from hatrack_trainer.methods.lora import Lora
from hatrack_trainer.methods.virtual_tokens import PromptTuning
from hatrack_trainer.optimizers import runnable
from hatrack_trainer.run import train
from hatrack_trainer.sft import make_trainer

EOS, IGNORED = 257, -100
EXAMPLES = [
    Example([256, 70 + n, *range(n, 2 * n + 1), EOS], [IGNORED, IGNORED, *range(n, 2 * n + 1), EOS]) for n in range(8)
]


def configure(base: Path, data: Path, **settings: Any) -> TrainConfig:
    return TrainConfig(
        base=BaseSection(model=str(base)),
        adapter=Lora(rank=4),
        data=DataSection(train=data, max_length=64),
        train=TrainSection(**{"batch_size": 8, "schedule": "constant", **settings}),
        output=OutputSection(dir=data.parent / "out"),
    )


def trainer_of(checkpoint: Path, **settings: Any) -> Any:
    base = load_base(checkpoint, quantization="nf4", dtype=torch.float32, device="cpu")
    config = configure(checkpoint, checkpoint, **settings)
    return make_trainer(config, base, AutoTokenizer.from_pretrained(checkpoint), EXAMPLES, EXAMPLES)


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def write(file: Path, *texts: str) -> Path:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


class Gradients(TrainerCallback):
    """Keeps those of every step."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
        self.seen.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def test_accumulated_gradients_weigh_every_token_alike(tiny_llama: Path) -> None:
    seen, found = [], []
    for sizes in ({"batch_size": 8}, {"batch_size": 2, "gradient_accumulation": 4}):
        trainer = trainer_of(tiny_llama, max_steps=2, max_grad_norm=1e9, **sizes)
        gradients = Gradients()
        trainer.add_callback(gradients)
        trainer.train()
        seen.append(gradients.seen)
        found.append(losses(trainer))
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert len(seen[0]) == len(seen[1]) == 2
    for whole, summed in zip(*seen, strict=True):
        assert whole.keys() == summed.keys()
        for name, gradient in whole.items():
            largest = max(float(gradient.abs().max()), 1e-3)
            torch.testing.assert_close(summed[name], gradient, rtol=1e-3, atol=1e-5 * largest)


class Evaluation(TrainerCallback):
    """Asks for one after every step."""

    def on_step_end(self, _args: Any, _state: Any, control: Any, **_: Any) -> None:
        control.should_evaluate = True


def test_neftune_disturbs_training_and_not_evaluation(tiny_llama: Path) -> None:
    trained, evaluated = {}, {}
    for alpha in (None, 5.0):
        trainer = trainer_of(tiny_llama, max_steps=2, learning_rate=1e-12, neftune_alpha=alpha)
        trainer.add_callback(Evaluation())
        trainer.train()
        trained[alpha] = losses(trainer)
        evaluated[alpha] = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluated[None]) == 2
    assert evaluated[5.0] == pytest.approx(evaluated[None], rel=1e-6)
    for noisy, plain in zip(trained[5.0], trained[None], strict=True):
        assert abs(noisy - plain) > 0.05


def test_neftune_says_where_it_finds_no_embeddings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiny.MORE_FAMILIES, "gpt2", {})
    checkpoint = tiny.make_checkpoint(tmp_path / "base", "gpt2")
    base = load_base(checkpoint, quantization="none", dtype=torch.float32, device="cpu")
    config = configure(checkpoint, checkpoint, neftune_alpha=5.0)
    config = config.model_copy(update={"adapter": PromptTuning(tokens=2)})
    with pytest.raises(UsageError) as caught:
        make_trainer(config, base, AutoTokenizer.from_pretrained(checkpoint), EXAMPLES)
    assert str(caught.value) == "train.neftune_alpha: does not work with adapter.method prompt_tuning on this base"


@pytest.mark.parametrize("name", get_args(Optimizer))
def test_every_optimizer_learns_on_the_cpu(tiny_llama: Path, name: str) -> None:
    trainer = trainer_of(tiny_llama, max_steps=15, optimizer=name, learning_rate=1e-3 if "lion" in name else 5e-3)
    trainer.train()
    assert trainer.args.optim == runnable(name, cuda=False)
    assert losses(trainer)[-1] < 0.8 * losses(trainer)[0]


def test_the_run_records_what_it_used(tiny_llama: Path, tmp_path: Path) -> None:
    said: list[str] = []
    data = write(tmp_path / "rows.jsonl", *["ab", "cde", "f"] * 4)
    config = configure(tiny_llama, data, max_steps=3, batch_size=1, packing=True, optimizer="paged_adamw_8bit")
    train(config, say=said.append)
    assert said[-2:] == [
        "paged_adamw_8bit pages CUDA's memory: on the CPU this run uses adamw_8bit, the same unpaged",
        "packing: 12 documents in 1 row of 64 tokens, 75% full",
    ]
    settings = Manifest.from_json((config.output.dir / "manifest.json").read_text()).training["settings"]
    assert settings["packing"] is True
    assert settings["optimizer"] == "adamw_8bit"
    assert settings["paged"].startswith("0 of 56 optimizer states, 0.0 of ")


@pytest.mark.parametrize("padding", [{}, {"pad_token": "</s>"}], ids=["none", "the stop"])
@pytest.mark.parametrize("packing", [False, True])
def test_the_stop_is_learned_where_no_token_is_for_padding(
    tmp_path: Path, padding: dict[str, str], packing: bool
) -> None:
    checkpoint = tiny.make_checkpoint(tmp_path / "base", pad_token_id=None)
    tokenizer_config = checkpoint / "tokenizer_config.json"
    settings = json.loads(tokenizer_config.read_text())
    tokenizer_config.write_text(json.dumps({k: v for k, v in settings.items() if k != "pad_token"} | padding))
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert tokenizer.pad_token_id == (EOS if padding else None)
    config = configure(checkpoint, write(tmp_path / "rows.jsonl", "ab", "cdef"), packing=packing)
    examples = read_data(config.data, checkpoint).train.examples
    base = load_base(checkpoint, quantization="nf4", dtype=torch.float32, device="cpu")
    trainer = make_trainer(config, base, tokenizer, examples)
    batch = trainer.data_collator(list(trainer.train_dataset))
    assert int((batch["labels"] == EOS).sum()) == 2
    trainer.args.max_steps = 1
    trainer.train()


def test_tensorboard_s_files_lie_where_the_user_wants_them(tiny_llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    data = write(tmp_path / "rows.jsonl", "ab")
    folder = tmp_path / "events"
    train(configure(tiny_llama, data, max_steps=1, trackers=["tensorboard"], logging_dir=folder))
    assert [file.name.startswith("events.out.tfevents") for file in folder.iterdir()] == [True]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["events", "out", "rows.jsonl"]
