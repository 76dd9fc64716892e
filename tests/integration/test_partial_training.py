"""Partial fine-tuning on an NF4 base, from a run to a merged checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny import make_checkpoint
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTTrainer

from hatrack.manifest import Manifest, folder_digest
from hatrack_server.model.load import load_base, prepare_for_training, read_config
from hatrack_trainer.config import BaseSection, DataSection, OutputSection, TrainConfig, TrainSection
from hatrack_trainer.data import Example
from hatrack_trainer.merge import merge
from hatrack_trainer.methods import Method, read_method
from hatrack_trainer.run import train
from hatrack_trainer.sft import make_trainer

EXACT = 2e-4  # of the largest logit, in float32
EOS, IGNORED = 257, -100
PROMPT = [256, 65, 66]
EXAMPLES = [
    Example([*PROMPT, 67, 68, 69, 70, EOS], [IGNORED] * 3 + [67, 68, 69, 70, EOS]),
    Example([256, 70, 71, EOS], [IGNORED, IGNORED, 71, EOS]),
]
KEYS: list[dict[str, Any]] = [
    {"parts": ["biases"]},
    {"parts": ["lm_head"]},
    {"last_layers": 1},
    {"parts": ["norms", "biases", "lm_head"], "last_layers": 1},
]
# PEFT does not know that the copy of the head needs no tie.
pytestmark = pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True. and a tied layer:UserWarning")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With biases, its head sharing the embedding's weight, in 16 bits: NF4 is then the same in whatever precision."""
    path = make_checkpoint(tmp_path_factory.mktemp("base") / "qwen2", "qwen2", tie_word_embeddings=True)
    AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).save_pretrained(path)
    return path


def section(**keys: Any) -> Method:
    read: Method = read_method({"method": "partial", **keys})
    return read


def configure(checkpoint: Path, adapter: Method, data: Path, out: Path, **settings: Any) -> TrainConfig:
    return TrainConfig(
        base=BaseSection(model=str(checkpoint)),
        adapter=adapter,
        data=DataSection(train=data),
        train=TrainSection(**{"batch_size": 2, "schedule": "constant", "learning_rate": 1e-2, **settings}),
        output=OutputSection(dir=out),
    )


def quantised(checkpoint: Path, adapter: Method) -> nn.Module:
    unquantised = adapter.unquantised(read_config(checkpoint))
    base = load_base(checkpoint, quantization="nf4", dtype=torch.float32, device="cpu", unquantised=unquantised)
    prepare_for_training(base)
    return base


def trainer_of(base: nn.Module, checkpoint: Path, adapter: Method) -> SFTTrainer:
    config = configure(checkpoint, adapter, checkpoint, checkpoint, max_steps=20)
    return make_trainer(config, base, AutoTokenizer.from_pretrained(checkpoint), EXAMPLES, EXAMPLES)


@pytest.mark.parametrize("keys", KEYS, ids=str)
def test_trained_parts_move_and_no_byte_of_the_base_does(checkpoint: Path, keys: dict[str, Any]) -> None:
    base = quantised(checkpoint, section(**keys))
    leaves = {name: module for name, module in base.named_modules() if not list(module.children())}
    before = weights_of(leaves)
    trainer = trainer_of(base, checkpoint, section(**keys))
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    beginning = {name: parameter.detach().clone() for name, parameter in trained.items()}
    loss = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.8 * loss
    assert not any(torch.equal(tensor, trained[name]) for name, tensor in beginning.items())
    after = weights_of(leaves)
    assert any("quant_state" in key for key in after)
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())


def weights_of(leaves: dict[str, nn.Module]) -> dict[str, Tensor]:
    return {f"{name}.{key}": one.clone() for name, leaf in leaves.items() for key, one in leaf.state_dict().items()}


@pytest.mark.parametrize("keys", KEYS, ids=str)
def test_a_run_can_be_merged_and_transformers_answers_as_what_was_trained(
    checkpoint: Path, tmp_path: Path, keys: dict[str, Any]
) -> None:
    data, out, merged = tmp_path / "rows.jsonl", tmp_path / "out", tmp_path / "merged"
    data.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "say", "completion": "something"}\n')
    said: list[str] = []
    result = train(configure(checkpoint, section(**keys), data, out, max_steps=4), say=said.append)
    assert said[: len(section(**keys).remarks(read_config(checkpoint)))] == section(**keys).remarks(
        read_config(checkpoint)
    )
    manifest = Manifest.from_json((out / "manifest.json").read_text())
    assert (manifest.method, manifest.artifact) == ("PARTIAL", result.digest) == ("PARTIAL", folder_digest(out))
    assert "these are weights of its own, of which `hatrack adapters merge` makes a" in (out / "README.md").read_text()
    assert {tensor.dtype for tensor in load_file(out / "adapter_model.safetensors").values()} == {torch.float32}

    doubts: list[str] = []
    merge(out, base=str(checkpoint), into="dequantized", out=merged, precision="float32", say=doubts.append)
    assert doubts == []
    own_head = "lm_head" in keys.get("parts", [])
    assert json.loads((merged / "config.json").read_text())["tie_word_embeddings"] is not own_head
    plain = AutoModelForCausalLM.from_pretrained(merged)
    trained = PeftModel.from_pretrained(quantised(checkpoint, section(**keys)), out)
    bare = quantised(checkpoint, section(**keys))
    expected = logits(trained, PROMPT)
    assert difference(logits(bare, PROMPT), expected) > 0.01
    assert difference(logits(plain, PROMPT), expected) < EXACT
    assert greedy(plain) == greedy(trained)


def test_the_way_into_the_original_weights(checkpoint: Path, tmp_path: Path) -> None:
    adapter = section(parts=["norms", "lm_head"], last_layers=1)
    trainer = trainer_of(quantised(checkpoint, adapter), checkpoint, adapter)
    trainer.train()
    trainer.model.save_pretrained(str(tmp_path / "out"), save_embedding_layers=False)
    merge(tmp_path / "out", base=str(checkpoint), into="original", out=tmp_path / "merged", precision="float32")
    found = load_file(tmp_path / "merged" / "model.safetensors")
    original = load_file(checkpoint / "model.safetensors")
    saved = {
        key.removeprefix("base_model.model.").replace(".partial_weights", ""): tensor
        for key, tensor in load_file(tmp_path / "out" / "adapter_model.safetensors").items()
    }
    assert found.keys() == original.keys() | saved.keys()
    assert all(torch.equal(tensor, saved.get(key, original.get(key)).float()) for key, tensor in found.items())


def test_activations_may_be_computed_twice(checkpoint: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    adapter = section(parts=["norms", "biases", "lm_head"], last_layers=1)
    digests = {
        train(configure(checkpoint, adapter, data, tmp_path / name, max_steps=3, activation_checkpointing=twice)).digest
        for name, twice in (("once", False), ("twice", True))
    }
    assert len(digests) == 1


@torch.inference_mode()
def logits(model: nn.Module, ids: list[int]) -> Tensor:
    found: Tensor = model.eval()(torch.tensor([ids])).logits[0].float()
    return found


def difference(a: Tensor, b: Tensor) -> float:
    """The largest, as a part of the largest logit."""
    return float((a - b).abs().max() / b.abs().max())


def greedy(model: nn.Module) -> list[int]:
    ids = list(PROMPT)
    for _ in range(12):
        ids.append(int(logits(model, ids)[-1].argmax()))
    return ids
