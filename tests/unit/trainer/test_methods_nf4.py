"""What PEFT has no layers for on NF4: each gives the gradients, and the files, that it gives on the same plain base."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from oracle import Oracle
from peft import AdaLoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import make_checkpoint
from torch import Tensor, nn

from hatrack_trainer.methods import Method
from hatrack_trainer.methods.bottleneck import Bottleneck
from hatrack_trainer.methods.lycoris import LoHa, LoKr
from hatrack_trainer.tuners.adalora import skewness

IDS = torch.arange(40, 64).view(2, 12)
SECTIONS: dict[str, Method] = {
    "loha": LoHa(rank=4),
    "loha with dropout": LoHa(rank=3, alpha=5, rank_dropout=0.4, target_modules=["q_proj", "down_proj"]),
    "lokr": LoKr(rank=2),
    "lokr with dropout": LoKr(rank=2, alpha=5, rank_dropout=0.4, target_modules=["v_proj", "up_proj"]),
    "lokr, all of factors": LoKr(rank=2, decompose_both=True),
    "lokr, all whole": LoKr(rank=64, decompose_factor=4),
    "bottleneck, houlsby": Bottleneck(rank=5, activation="gelu", placement="houlsby"),
    "bottleneck, pfeiffer": Bottleneck(rank=16),
    "bottleneck, silu": Bottleneck(rank=3, activation="silu"),
}
STEPS = 10


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("base"))


class PlainBottleneck(nn.Module):
    """y + U act(D y + b_D) + b_U, where y is what a linear layer gives."""

    def __init__(self, linear: nn.Module, act: Callable[[Tensor], Tensor], *parameters: Tensor) -> None:
        super().__init__()
        self.linear, self.act = linear, act
        self.d, self.b_d, self.u, self.b_u = (nn.Parameter(each.detach().clone()) for each in parameters)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y + self.act(y @ self.d.T + self.b_d) @ self.u.T + self.b_u


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda x: x * (x > 0),
    "gelu": lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2,
    "silu": lambda x: x / (1 + torch.exp(-x)),
}
ADAPTED = {"houlsby": ("o_proj", "down_proj"), "pfeiffer": ("down_proj",)}


def with_bottlenecks(plain: nn.Module, section: Bottleneck, nf4: PeftModel) -> nn.Module:
    """The plain base with bottlenecks that begin as those of `nf4`, and nothing of the class that is tested."""
    own = iter(trainable(nf4).values())
    plain.requires_grad_(False)
    for name, linear in list(plain.named_modules()):
        if name.endswith(ADAPTED[section.placement]):
            four = [next(own) for _ in range(4)]
            plain.set_submodule(name, PlainBottleneck(linear, ACTIVATIONS[section.activation], *four))
    assert next(own, None) is None
    return plain


def both(checkpoint: Path, section: Method) -> tuple[PeftModel, nn.Module]:
    """The same new adapter on an NF4 base that computes in float32, and on that base dequantised."""
    oracle = Oracle(checkpoint, quantization="nf4", dtype=torch.float32, packed=False)
    assert {layer.compute_dtype for layer in oracle.base.modules() if isinstance(layer, Linear4bit)} == {torch.float32}
    torch.manual_seed(1)
    nf4 = get_peft_model(oracle.base, section.peft_config())
    if isinstance(section, Bottleneck):
        return nf4, with_bottlenecks(oracle.plain, section, nf4)
    plain = get_peft_model(oracle.plain, section.peft_config())
    assert not any(isinstance(layer, Linear4bit) for layer in plain.modules())
    plain.load_state_dict({name: p.detach().clone() for name, p in trainable(nf4).items()}, strict=False)
    return nf4, plain


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def gradients(model: nn.Module, seed: int) -> list[Tensor]:
    """Of all that is trained, in the model's order, and of the embeddings, which lie before every layer."""
    model.train().zero_grad()
    torch.manual_seed(seed)  # of dropout
    embedding = next(each for each in model.modules() if isinstance(each, nn.Embedding))
    embeddings = embedding(IDS).detach().requires_grad_()
    model(inputs_embeds=embeddings, labels=IDS).loss.backward()
    return [tensor.grad.clone() for tensor in (*trainable(model).values(), embeddings)]


@pytest.mark.parametrize("name", SECTIONS)
def test_gradients_are_those_of_the_dequantised_base(checkpoint: Path, name: str) -> None:
    models = both(checkpoint, SECTIONS[name])
    # With a small epsilon, Adam's first steps would turn rounding errors of tiny gradients into whole steps.
    optimizers = [torch.optim.AdamW(trainable(model).values(), lr=1e-2, eps=1e-4) for model in models]
    keys = [*trainable(models[0]), "embeddings"]
    silent = set(keys)
    for step in range(STEPS):
        for key, found, wanted in zip(keys, *(gradients(model, step) for model in models), strict=True):
            assert (found - wanted).norm() <= 1e-3 * wanted.norm(), f"{key}, step {step}"
            silent -= {key} if wanted.any() else set()
        for optimizer in optimizers:
            optimizer.step()
    assert not silent


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in SECTIONS if "bottleneck" not in name])
def test_stock_peft_reads_what_is_saved(checkpoint: Path, tmp_path: Path, name: str) -> None:
    nf4, plain = both(checkpoint, SECTIONS[name])
    for parameter in trainable(nf4).values():
        parameter.normal_(std=0.2)
    logits = nf4.eval()(IDS).logits
    for model, folder in ((nf4, tmp_path / "nf4"), (plain, tmp_path / "plain")):
        model.save_pretrained(folder, save_embedding_layers=False)
    assert shapes(tmp_path / "nf4") == shapes(tmp_path / "plain")
    assert settings(tmp_path / "nf4") == settings(tmp_path / "plain")
    loaded = PeftModel.from_pretrained(
        Oracle(checkpoint, quantization="nf4", dtype=torch.float32, packed=False).plain, tmp_path / "nf4"
    )
    torch.testing.assert_close(loaded.eval()(IDS).logits, logits, rtol=1e-4, atol=1e-4)
    with loaded.disable_adapter():
        assert not torch.allclose(loaded(IDS).logits, logits, atol=0.1)


def shapes(folder: Path) -> dict[str, torch.Size]:
    return {key: tensor.shape for key, tensor in load_file(folder / "adapter_model.safetensors").items()}


def settings(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "adapter_config.json").read_text())
    return {key: sorted(value) if isinstance(value, list) else value for key, value in config.items()}


def test_skewness_is_what_peft_adds_to_a_loss(checkpoint: Path) -> None:
    oracle = Oracle(checkpoint, quantization="nf4", dtype=torch.float32, packed=False)
    config = AdaLoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], total_step=9, orth_reg_weight=0.0
    )
    model = get_peft_model(oracle.base, config)
    without = model(IDS, labels=IDS).loss
    config.orth_reg_weight = 0.3
    torch.testing.assert_close(model(IDS, labels=IDS).loss, without + 0.3 * skewness(model))
