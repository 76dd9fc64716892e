from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import FAMILIES, make_checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel

from hatrack_server.model.load import load_base, prepare_for_training
from hatrack_trainer.tuners.bottleneck import BLOCK_ENDS, BottleneckConfig

IDS = torch.arange(40, 52)[None]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("base"))


def quantised(checkpoint: Path) -> PreTrainedModel:
    base = load_base(checkpoint, quantization="nf4", dtype=torch.float32, device="cpu")
    prepare_for_training(base)
    return base


@pytest.mark.parametrize("family", FAMILIES)
def test_placements_are_the_ends_of_blocks(family: str, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(make_checkpoint(tmp_path, family))
    for placement, count in (("pfeiffer", 1), ("houlsby", 2)):
        model = get_peft_model(base, BottleneckConfig(r=3, placement=placement))  # type: ignore[arg-type]
        downs = {name for name, _ in model.named_parameters() if "bottleneck_down" in name and "weight" in name}
        assert len(downs) == count * base.config.num_hidden_layers
        assert all(parameter.requires_grad == ("bottleneck" in name) for name, parameter in model.named_parameters())
        base = model.unload()


@torch.no_grad()
def test_begins_at_the_base_and_comes_back_from_its_file(checkpoint: Path, tmp_path: Path) -> None:
    base = quantised(checkpoint)
    plain = base(IDS).logits
    model = get_peft_model(base, BottleneckConfig(task_type="CAUSAL_LM", r=3, placement="houlsby", activation="gelu"))
    assert torch.equal(model(IDS).logits, plain)
    for name, parameter in model.named_parameters():
        if "bottleneck_" in name:
            parameter.normal_(std=0.2)
    trained = model(IDS).logits
    assert not torch.allclose(trained, plain, atol=0.1)
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, plain)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], sorted(config["target_modules"])) == ("BOTTLENECK", ["down_proj", "o_proj"])
    attention = "base_model.model.model.layers.0.self_attn.o_proj.bottleneck"
    shapes = {key: tuple(t.shape) for key, t in load_file(tmp_path / "adapter_model.safetensors").items()}
    assert {key: shape for key, shape in shapes.items() if key.startswith(attention)} == {
        f"{attention}_down.weight": (3, 64),
        f"{attention}_down.bias": (3,),
        f"{attention}_up.weight": (64, 3),
        f"{attention}_up.bias": (64,),
    }
    again = PeftModel.from_pretrained(quantised(checkpoint), tmp_path).eval()
    assert torch.equal(again(IDS).logits, trained)
    with pytest.raises(NotImplementedError, match="not linear"):
        again.merge_and_unload()


def test_every_parameter_learns_on_nf4(checkpoint: Path) -> None:
    model = get_peft_model(quantised(checkpoint), BottleneckConfig(r=3, init_weights=False))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    model(IDS, labels=IDS).loss.backward()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trainable.values())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


@pytest.mark.parametrize("field", [{"r": 0}, {"activation": "swish"}, {"placement": "above"}], ids=str)
def test_what_is_malformed_is_refused_by_name(field: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(field))):
        BottleneckConfig(**field)  # type: ignore[arg-type]


def test_an_unknown_base_needs_its_targets_named(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = AutoModelForCausalLM.from_pretrained(checkpoint)
    monkeypatch.delitem(BLOCK_ENDS, "llama")
    with pytest.raises(ValueError, match="target_modules: must be given"):
        get_peft_model(base, BottleneckConfig())
