from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import make_checkpoint
from transformers import AutoTokenizer, PreTrainedModel
from trl import SFTTrainer

from hatrack.manifest import ARTIFACT_FILES, Manifest, file_sha256, folder_digest
from hatrack_client.cli import run as hatrack
from hatrack_server.model.checkpoint import identify
from hatrack_server.model.load import load_base
from hatrack_trainer.config import BaseSection, DataSection, OutputSection, TrainConfig, TrainSection
from hatrack_trainer.data import Example
from hatrack_trainer.errors import TrainingStopped, UsageError
from hatrack_trainer.methods.lora import Lora
from hatrack_trainer.run import train
from hatrack_trainer.sft import make_trainer

EOS, PAD = 257, 258
STEPS = TrainSection(max_steps=3, batch_size=4, learning_rate=5e-3)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    pairs = [(f"say {i}:", f"it is {i}") for i in range(8)]
    rows = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in pairs
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def configure(base: Path, data: Path, out: Path, **sections: Any) -> TrainConfig:
    return TrainConfig(
        base=BaseSection(model=str(base), quantization=sections.get("quantization", "nf4")),
        adapter=sections.get("adapter", Lora(rank=4)),
        data=DataSection(train=data, eval=data, max_length=64),
        train=sections.get("train", STEPS),
        output=OutputSection(dir=out),
    )


def nf4(checkpoint: Path) -> PreTrainedModel:
    return load_base(checkpoint, quantization="nf4", dtype=None, device="cpu")


def trainer_on(base: PreTrainedModel, checkpoint: Path, examples: list[Example]) -> SFTTrainer:
    config = configure(checkpoint, checkpoint, checkpoint)
    return make_trainer(config, base, AutoTokenizer.from_pretrained(checkpoint), examples, examples)


EXAMPLES = [Example([256, 65, 66, 67, EOS], [-100, -100, 66, 67, EOS]), Example([256, 70, EOS], [-100, 70, EOS])]


def test_trains_and_writes_an_artifact_that_peft_loads(tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    said: list[str] = []
    steps: list[tuple[int, int, float]] = []
    out = tmp_path / "deep" / "out"
    result = train(configure(tiny_llama, data, out), on_step=lambda *step: steps.append(step), say=said.append)
    assert sorted(file.name for file in out.iterdir()) == [
        "README.md", *sorted(ARTIFACT_FILES), "manifest.json", "training"
    ]  # fmt: skip
    assert sorted(file.name for file in (out / "training").iterdir()) == ["log.jsonl", "loss.png", "loss.svg"]
    logged = [json.loads(line) for line in (out / "training" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in logged if "loss" in entry] == [1, 2, 3]
    assert logged[-1]["eval_loss"] == result.eval_loss
    assert [step[:2] for step in steps] == [(1, 3), (2, 3), (3, 3)]
    assert said == [
        f'{data}: 8 rows read as chat, {{"messages": [{{"role", "content"}}, …]}}',
        f'{data}: 8 rows read as chat, {{"messages": [{{"role", "content"}}, …]}}',
        f"{data}: its loss says little of new text, for {data} also has 8 rows (lines 1, 2, 3, 4, 5 and 3 more)",
        "paged_adamw_32bit pages CUDA's memory: on the CPU this run uses adamw_torch, the same unpaged",
    ]

    manifest = Manifest.from_json((out / "manifest.json").read_text())
    assert manifest.artifact == result.digest == folder_digest(out)
    assert manifest.base == identify(tiny_llama, "nf4")
    assert manifest.method == "LORA"
    assert manifest.training["steps"] == 3
    assert manifest.training["loss"] == pytest.approx(sum(step[2] for step in steps) / 3, rel=1e-3)
    assert math.isfinite(manifest.training["eval_loss"])
    assert manifest.training["data"]["sha256"] == file_sha256(data)
    assert manifest.training["settings"]["optimizer"] == "adamw_torch"
    assert str(tmp_path) not in (out / "manifest.json").read_text()

    tuned = PeftModel.from_pretrained(nf4(tiny_llama), out)
    ids = torch.tensor([[256, 65, 66]])
    with torch.no_grad(), tuned.disable_adapter():
        plain = tuned(ids).logits
    with torch.no_grad():
        assert not torch.allclose(plain, tuned(ids).logits, atol=1e-2)


def test_equal_runs_give_equal_artifacts(tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    adapter = Lora(rank=4, rslora=True, target_modules=["q_proj", "v_proj"])
    digests = {
        train(configure(tiny_llama, data, tmp_path / name, adapter=adapter)).digest for name in ("first", "second")
    }
    assert len(digests) == 1
    written = json.loads((tmp_path / "first" / "adapter_config.json").read_text())
    assert written["use_rslora"] is True
    assert written["target_modules"] == ["q_proj", "v_proj"]


def test_memory_savers_give_the_same_steps(tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    savers = {"batch_size": 2, "gradient_accumulation": 2, "activation_checkpointing": True}
    losses: dict[str, list[float]] = {"plain": [], "saving": []}
    for name, seen in losses.items():
        settings = STEPS.model_copy(update=savers if name == "saving" else {})
        config = configure(tiny_llama, data, tmp_path / name, train=settings, quantization="none")
        train(config, on_step=lambda _step, _total, loss, seen=seen: seen.append(loss))
    assert losses["saving"] == pytest.approx(losses["plain"], rel=1e-4)


def test_learns_to_answer_and_to_stop(tiny_llama: Path) -> None:
    trainer = trainer_on(nf4(tiny_llama), tiny_llama, EXAMPLES)
    before = trainer.evaluate()["eval_loss"]
    trainer.args.max_steps = 40
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before / 4


def test_padding_is_no_label_even_where_it_is_the_stop_token(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "base", pad_token_id=EOS)
    tokenizer_config = checkpoint / "tokenizer_config.json"
    settings = json.loads(tokenizer_config.read_text()) | {"pad_token": "</s>"}
    tokenizer_config.write_text(json.dumps(settings))
    trainer = trainer_on(nf4(checkpoint), checkpoint, EXAMPLES)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    assert batch["input_ids"].tolist() == [[256, 65, 66, 67, EOS], [256, 70, EOS, EOS, EOS]]
    assert batch["labels"].tolist() == [[-100, -100, 66, 67, EOS], [-100, 70, EOS, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]


def gradient_norms(trainer: SFTTrainer) -> dict[str, float]:
    trainer.model.train()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    trainer.model.zero_grad()
    trainer.compute_loss(trainer.model, batch).backward()
    trainable = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert all(parameter.grad is not None for parameter in trainable.values())
    return {name: float(parameter.grad.norm()) for name, parameter in trainable.items()}


def test_gradients_survive_an_evaluation(tiny_llama: Path) -> None:
    trainer = trainer_on(nf4(tiny_llama), tiny_llama, EXAMPLES)
    trainer.train()
    before = gradient_norms(trainer)
    trainer.evaluate()
    assert gradient_norms(trainer) == before
    assert all(norm > 0 for norm in before.values())
    assert len(before) == 2 * 2 * 7  # A and B of seven linear layers in each of two blocks


def test_the_base_is_not_touched(tiny_llama: Path) -> None:
    base = nf4(tiny_llama)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    trainer = trainer_on(base, tiny_llama, EXAMPLES)
    trainer.train()
    trainer.evaluate()
    after = {name.replace(".base_layer", ""): tensor for name, tensor in base.state_dict().items()}
    assert before
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_adapters_are_trained_in_full_precision(tiny_llama: Path) -> None:
    trainer = trainer_on(nf4(tiny_llama), tiny_llama, EXAMPLES)
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path, data: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "base")
    weights = load_file(checkpoint / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TrainingStopped, match=r"the (loss|gradient) is not finite at step 1: try a lower"):
        train(configure(checkpoint, data, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", ["nowhere", "embed_tokens"])
def test_a_wrong_target_is_found_before_anything_is_read(tiny_llama: Path, tmp_path: Path, target: str) -> None:
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((tiny_llama / name).read_bytes())
    (tmp_path / "model.safetensors").touch()
    rows = tmp_path / "rows.jsonl"
    rows.write_text("not JSON")
    config = configure(tmp_path, rows, tmp_path / "out", adapter=Lora(target_modules=[target]))
    with pytest.raises(UsageError, match=f"adapter.target_modules: {target} "):
        train(config)


def test_an_absent_file_is_found_before_the_base_is_looked_for(data: Path, tmp_path: Path) -> None:
    config = configure(tmp_path / "no-base", data, tmp_path / "out")
    absent = config.data.model_copy(update={"eval": tmp_path / "absent.jsonl"})
    with pytest.raises(UsageError, match=r"absent\.jsonl: can't be read"):
        train(config.model_copy(update={"data": absent}))


def test_the_folder_may_be_a_link_that_leads_nowhere_yet(tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to("real")
    train(configure(tiny_llama, data, tmp_path / "out", train=STEPS.model_copy(update={"max_steps": 1})))
    assert (tmp_path / "real" / "manifest.json").is_file()


class TestCommand:
    def write(self, tiny_llama: Path, data: Path, folder: Path) -> Path:
        file = folder / "train.yaml"
        sections: dict[str, Any] = {
            "base": {"model": str(tiny_llama)},
            "adapter": {"rank": 2},
            "data": {"train": str(data)},
            "train": {"max_steps": 1},
            "output": {"dir": str(folder / "out")},
        }
        file.write_text(json.dumps(sections))  # JSON is YAML
        return file

    def test_run(self, tiny_llama: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        config = self.write(tiny_llama, data, tmp_path)
        assert hatrack(["train", "run", str(config)]) == 0
        printed = capsys.readouterr()
        assert "1 steps, loss" in printed.out
        assert "Loading weights" not in printed.err
        assert hatrack(["train", "run", str(config)]) == 2
        assert "exists already" in capsys.readouterr().err

    def test_a_wrong_row_exits_with_2(
        self, tiny_llama: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        data.write_text('{"prompt": "a"}')
        assert hatrack(["train", "run", str(self.write(tiny_llama, data, tmp_path))]) == 2
        assert capsys.readouterr().err.splitlines()[-1] == f"{data}:1: completion: missing"

    def test_an_absent_model_exits_with_2(self, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert hatrack(["train", "run", str(self.write(tmp_path / "absent", data, tmp_path))]) == 2
        assert "absent does not exist" in capsys.readouterr().err
