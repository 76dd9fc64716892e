from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LNTuningModel, PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from safetensors.torch import load_file
from tiny import FAMILIES, make_checkpoint
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from hatrack_client.cli import run as hatrack
from hatrack_server.adapters import methods as served
from hatrack_server.errors import InvalidArtifact
from hatrack_server.model.load import load_base, prepare_for_training, read_config
from hatrack_server.model.shapes import shapes_of_checkpoint
from hatrack_trainer.errors import UsageError
from hatrack_trainer.methods import read_method
from hatrack_trainer.methods.partial import Partial

IDS = torch.arange(40, 52)[None]
BIASED = ("qwen2", "phi", "opt")
# PEFT does not know that the copy of the head needs no tie.
pytestmark = pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True. and a tied layer:UserWarning")


def section(**keys: Any) -> Partial:
    read: Partial = read_method({"method": "partial", **keys})
    return read


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {family: make_checkpoint(folder / family, family) for family in (*FAMILIES, "opt")}


def quantised(checkpoint: Path, adapter: Partial, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    unquantised = adapter.unquantised(read_config(checkpoint))
    base = load_base(checkpoint, quantization="nf4", dtype=dtype, device="cpu", unquantised=unquantised)
    prepare_for_training(base)
    return base


def adapted(checkpoint: Path, dtype: torch.dtype = torch.float32, **keys: Any) -> PeftModel:
    adapter = section(**keys)
    model = get_peft_model(quantised(checkpoint, adapter, dtype), adapter.peft_config())
    adapter.prepare(model)
    return model


def trainable(model: nn.Module) -> Iterator[str]:
    """The base's names of what is trained."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            for infix in (".partial_weights.default", ".modules_to_save.default", ".ln_tuning_layers.default"):
                name = name.replace(infix, "")
            yield name.removeprefix("base_model.model.")


@pytest.mark.parametrize("family", [*FAMILIES, "opt"])
def test_a_part_is_what_its_name_says(checkpoints: dict[str, Path], family: str) -> None:
    base = AutoModelForCausalLM.from_pretrained(checkpoints[family])
    all_names = {name for name, _ in base.named_parameters(remove_duplicate=False)}

    def parts(**keys: Any) -> set[str]:
        return set(trainable(adapted(checkpoints[family], **keys)))

    norms = {name for name in all_names if "norm" in name and not {"q_norm", "k_norm"} & set(name.split("."))}
    assert parts(parts=["norms"]) == norms
    head = {name for name in all_names if "lm_head" in name}
    assert parts(parts=["lm_head"]) == head
    top = {name for name in all_names if "layers.1." in name}
    assert parts(last_layers=1) == top
    if family in BIASED:
        biases = {name for name in all_names - head if name.endswith("bias")}
        assert parts(parts=["biases"]) == biases
        assert parts(parts=["biases", "norms", "lm_head"], last_layers=1) == norms | head | top | biases


@pytest.mark.parametrize("family", ["llama", "phi", "opt"])
def test_gradients_are_those_of_the_base_s_own_weights(checkpoints: dict[str, Path], family: str) -> None:
    keys = {"parts": ["norms", "lm_head", *(["biases"] if family in BIASED else [])], "last_layers": 1}
    model, plain = adapted(checkpoints[family], **keys), quantised(checkpoints[family], section(**keys))
    if plain.config.tie_word_embeddings:
        plain.lm_head.weight = nn.Parameter(plain.lm_head.weight.clone())
    names = set(trainable(model))
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(name in names)
    assert torch.equal(model(IDS).logits, plain(IDS).logits)
    for one in (model, plain):
        one(IDS, labels=IDS).loss.backward()
    expected = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    grads = {
        n: p.grad for n, p in zip(trainable(model), (p for p in model.parameters() if p.requires_grad), strict=True)
    }
    assert grads.keys() == expected.keys() == names
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        name for name, p in model.named_parameters() if p.requires_grad
    }
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6)


def test_only_what_is_trained_whole_is_loaded_unquantised(checkpoints: dict[str, Path]) -> None:
    base = quantised(checkpoints["llama"], section(parts=["norms"], last_layers=1))
    packed = {name for name, module in base.named_modules() if isinstance(module, Linear4bit)}
    assert len(packed) == 7
    assert all(name.startswith("model.layers.0.") for name in packed)
    original = AutoModelForCausalLM.from_pretrained(checkpoints["llama"]).state_dict()
    top = {name: tensor for name, tensor in base.state_dict().items() if "layers.1." in name}
    assert len(top) == 9
    assert all(torch.equal(tensor, original[name]) for name, tensor in top.items())


@pytest.mark.parametrize("keys", [{"parts": ["norms"]}, {"parts": ["norms", "lm_head"], "last_layers": 1}])
def test_copies_are_in_32_bits_and_the_base_computes_in_16(checkpoints: dict[str, Path], keys: dict[str, Any]) -> None:
    model = adapted(checkpoints["llama"], torch.bfloat16, **keys)
    for parameter in model.parameters():
        parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    section(**keys).prepare(model)
    plain = quantised(checkpoints["llama"], section(**keys), torch.bfloat16)
    assert plain.dtype == torch.bfloat16
    torch.testing.assert_close(model(IDS).logits.float(), plain(IDS).logits.float(), rtol=0, atol=0.3)
    model(IDS, labels=IDS).loss.backward()
    assert {p.grad.dtype for p in model.parameters() if p.requires_grad and p.grad is not None} == {torch.float32}


@torch.no_grad()
def shift(model: PeftModel) -> None:
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += 0.1 * torch.randn_like(parameter)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model.eval()(IDS).logits
    return found


@pytest.mark.parametrize(
    "keys",
    [
        {"parts": ["biases"]},
        {"parts": ["lm_head"]},
        {"parts": ["norms", "lm_head"]},
        {"parts": ["biases", "norms", "lm_head"], "last_layers": 1},
    ],
)
def test_comes_back_from_its_file_and_can_be_switched_off(
    checkpoints: dict[str, Path], tmp_path: Path, keys: dict[str, Any]
) -> None:
    model = adapted(checkpoints["opt"], **keys)
    plain = logits(model)
    shift(model)
    trained = logits(model)
    assert not torch.allclose(trained, plain, atol=0.1)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["last_layers"]) == ("PARTIAL", keys.get("last_layers", 0))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    infixed = {key.removeprefix("base_model.model.").replace(".partial_weights", "") for key in tensors}
    assert infixed == set(trainable(model))
    loaded = PeftModel.from_pretrained(quantised(checkpoints["opt"], section(**keys)), tmp_path)
    assert torch.equal(logits(loaded), trained)


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")
def test_norms_alone_are_what_stock_peft_and_the_server_know(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(checkpoints["qwen3"], parts=["norms"])
    shift(model)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LN_TUNING"
    monkeypatch.setitem(PEFT_TYPE_TO_TUNER_MAPPING, PeftType.LN_TUNING, LNTuningModel)
    base = quantised(checkpoints["qwen3"], section(parts=["norms"]))
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path)), logits(model))
    method = served.method_of(config)
    assert method.PEFT_TYPE == "LN_TUNING"


def test_everything_else_is_refused_by_the_server_which_names_the_way(checkpoints: dict[str, Path]) -> None:
    shapes = shapes_of_checkpoint(checkpoints["llama"])
    with pytest.raises(InvalidArtifact) as refusal:
        served.describe({"peft_type": "PARTIAL"}, {}, shapes, max_rank=8)
    assert str(refusal.value).endswith(
        "'PARTIAL' is not supported: it changes weights of the base, which all requests share: make a base of it, by "
        "hatrack adapters merge"
    )


def test_quantised_weights_can_not_be_trained(checkpoints: dict[str, Path]) -> None:
    base = load_base(checkpoints["llama"], quantization="nf4", dtype=None, device="cpu")
    with pytest.raises(ValueError, match=r"^weights that are quantised can't be trained; load them unquantised$"):
        get_peft_model(base, section(last_layers=1).peft_config())


class TestRefusals:
    def refused(self, config: Any, **keys: Any) -> str:
        with pytest.raises(UsageError) as refusal:
            section(**keys).refuse(config)
        return str(refusal.value)

    def test_biases_that_the_base_lacks(self, checkpoints: dict[str, Path]) -> None:
        sentence = "adapter.parts: biases: a base of llama has none"
        assert self.refused(read_config(checkpoints["llama"]), parts=["norms", "biases"]) == sentence

    def test_more_layers_than_the_base_has(self, checkpoints: dict[str, Path]) -> None:
        assert self.refused(read_config(checkpoints["llama"]), last_layers=3) == "adapter.last_layers: the base has 2"

    def test_layers_that_are_quantised_on_disk(self, checkpoints: dict[str, Path], tmp_path: Path) -> None:
        load_base(checkpoints["llama"], quantization="nf4", dtype=None, device="cpu").save_pretrained(tmp_path)
        section(parts=["norms", "lm_head"]).refuse(read_config(tmp_path))
        assert self.refused(read_config(tmp_path), last_layers=1) == (
            "adapter.last_layers: the base is quantised on disk, and only original weights can be trained; take the "
            "checkpoint that it was made from"
        )

    def test_registering_what_can_not_be_served(
        self, checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        rows, file = tmp_path / "rows.jsonl", tmp_path / "train.yaml"
        rows.write_text('{"prompt": "a", "completion": "b"}')
        sections = {
            "base": {"model": str(checkpoints["llama"])},
            "adapter": {"method": "partial", "last_layers": 1},
            "data": {"train": str(rows)},
            "output": {"dir": str(tmp_path / "out")},
            "registration": {"name": "one", "server": "127.0.0.1:9"},
        }
        file.write_text(json.dumps(sections))  # JSON is YAML
        assert hatrack(["train", "run", str(file), "--register"]) == 2
        assert capsys.readouterr().err.strip() == (
            "hatrack: --register: what adapter.method partial trains can't be served beside others, but for norms "
            "alone; run without --register, and merge what comes out by `hatrack adapters merge`"
        )

    def test_a_head_that_several_processes_share(
        self, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        monkeypatch.setenv("FSDP_VERSION", "2")
        section(parts=["norms"], last_layers=1).refuse(read_config(checkpoints["llama"]))
        assert self.refused(read_config(checkpoints["llama"]), parts=["lm_head"]) == (
            "adapter.parts: lm_head can't be trained with FSDP, where each process would learn from its own rows "
            "alone; without, several processes can train it"
        )

    def test_layers_of_experts(self) -> None:
        config = AutoConfig.for_model("mixtral", hidden_size=32, intermediate_size=32, num_hidden_layers=2)
        assert self.refused(config, last_layers=1) == (
            "adapter.last_layers: mlp.experts of this base is more than a weight and a bias, and can't be trained"
        )


def test_what_the_user_should_know_is_said(checkpoints: dict[str, Path]) -> None:
    tied, untied = read_config(checkpoints["opt"]), read_config(checkpoints["llama"])
    merge = (
        "adapter: what it trains becomes part of the base, so it can't be served beside others: merge it by `hatrack "
        "adapters merge`"
    )
    copy = (
        "adapter.parts: lm_head: the base's head shares its weight with the embedding: a copy of it is trained, and "
        "the embedding stays"
    )
    assert section(parts=["norms"]).remarks(tied) == []
    assert section(parts=["lm_head"]).remarks(tied) == [copy, merge]
    assert section(parts=["lm_head"]).remarks(untied) == section(last_layers=1).remarks(tied) == [merge]
