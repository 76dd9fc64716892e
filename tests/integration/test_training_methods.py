"""Every method, trained on an NF4 base through TRL, and served: the server answers as the trained PEFT model does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from inprocess import GREEDY, InProcess, tokens
from oracle import Oracle
from peft import get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from tiny import make_checkpoint
from torch import Tensor, nn
from transformers import AutoTokenizer
from trl import SFTTrainer

from hatrack.manifest import Manifest
from hatrack_server.catalog.gate import describe
from hatrack_server.config import EngineConfig
from hatrack_server.model.load import load_base
from hatrack_server.model.paged import PagedModel
from hatrack_trainer.config import BaseSection, DataSection, OutputSection, TrainConfig, TrainSection
from hatrack_trainer.data import Example
from hatrack_trainer.errors import TrainingStopped, UsageError
from hatrack_trainer.methods import Method, methods, read_method
from hatrack_trainer.run import train
from hatrack_trainer.sft import GradientWatch, make_trainer
from hatrack_trainer.tuners.adalora import skewness

# PEFT takes what AdaLoRA has pruned to rank 0 for a shard that was not gathered.
pytestmark = pytest.mark.filterwarnings("ignore:Adapter 'default'. .* LoRA tensor.s. have invalid shape")

KEYS: dict[str, dict[str, Any]] = {
    "adalora": {"rank": 2, "initial_rank": 4},
    "bottleneck": {"rank": 16, "placement": "houlsby", "activation": "gelu"},
    "dora": {"rank": 4},
    "ia3": {},
    "llama_adapter": {"layers": 2, "tokens": 6},
    "loha": {"rank": 4},
    "lokr": {"rank": 2},
    "lora": {"rank": 4},
    "p_tuning": {"tokens": 6},
    "partial": {"parts": ["norms"]},
    "prefix_tuning": {"tokens": 6},
    "prompt_tuning": {"tokens": 6},
    "rslora": {"rank": 4},
    "vera": {"rank": 64},
}
STEPS = 20
EOS, IGNORED = 257, -100
PROMPT = [256, 65, 66]
EXAMPLES = [
    Example([*PROMPT, 67, 68, 69, 70, EOS], [IGNORED] * 3 + [67, 68, 69, 70, EOS]),
    Example([256, 70, 71, EOS], [IGNORED, IGNORED, 71, EOS]),
]


def section(name: str, **keys: Any) -> Method:
    read: Method = read_method({"method": name, **KEYS[name], **keys})
    return read


def configure(checkpoint: Path, name: str, **more: Any) -> TrainConfig:
    return TrainConfig(
        base=BaseSection(model=str(checkpoint)),
        adapter=section(name, **more.get("keys", {})),
        data=DataSection(train=more.get("data", checkpoint)),
        train=TrainSection(max_steps=more.get("steps", STEPS), batch_size=2, schedule="constant"),
        output=OutputSection(dir=more.get("out", checkpoint)),
    )


def trainer_of(checkpoint: Path, name: str, dtype: torch.dtype = torch.float32, **more: Any) -> SFTTrainer:
    base = load_base(checkpoint, quantization=more.get("quantization", "nf4"), dtype=dtype, device="cpu")
    return make_trainer(configure(checkpoint, name, **more), base, AutoTokenizer.from_pretrained(checkpoint), EXAMPLES)


@dataclass
class Run:
    """A finished training on an NF4 base that computes in float32, and what was before."""

    name: str
    trainer: SFTTrainer
    leaves: dict[str, nn.Module]  # the base's modules that hold weights
    base_before: dict[str, Tensor]
    loss_before: float


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module", params=KEYS)
def run(request: pytest.FixtureRequest, checkpoint: Path) -> Run:
    base = load_base(checkpoint, quantization="nf4", dtype=torch.float32, device="cpu")
    leaves = {name: module for name, module in base.named_modules() if not list(module.children())}
    before = weights_of(leaves)
    trainer = make_trainer(
        configure(checkpoint, request.param), base, AutoTokenizer.from_pretrained(checkpoint), EXAMPLES, EXAMPLES
    )
    loss = trainer.evaluate()["eval_loss"]
    trainer.train()
    return Run(request.param, trainer, leaves, before, loss)


def weights_of(leaves: dict[str, nn.Module]) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": tensor.clone() for name, leaf in leaves.items() for key, tensor in leaf.state_dict().items()
    }


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[InProcess]:
    config = EngineConfig.model_validate(
        {
            "model": checkpoint,
            "quantization": "nf4",
            "dtype": "float32",
            "packed": False,
            "device": "cpu",
            "kv_cache_gb": 0.004,
        }
    )
    engine = InProcess(PagedModel(config), config)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def artifact(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(run.name)
    run.trainer.model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def test_none_is_left_out() -> None:
    assert KEYS.keys() == methods().keys()


def test_the_loss_falls(run: Run) -> None:
    assert run.trainer.evaluate()["eval_loss"] < 0.8 * run.loss_before


def test_the_base_s_bytes_are_what_they_were(run: Run) -> None:
    after = weights_of(run.leaves)
    assert any("quant_state" in key for key in after)
    assert after.keys() == run.base_before.keys()
    assert all(torch.equal(tensor, after[key]) for key, tensor in run.base_before.items())


def test_gradients_survive_an_evaluation(run: Run) -> None:
    before = gradient_norms(run.trainer)
    run.trainer.evaluate()
    assert gradient_norms(run.trainer) == before
    assert before
    assert any(before.values())


def gradient_norms(trainer: SFTTrainer) -> dict[str, float]:
    trainer.model.train().zero_grad()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    trainer.compute_loss(trainer.model, batch).backward()
    return {name: float(p.grad.norm()) for name, p in trainer.model.named_parameters() if p.requires_grad}


def test_it_is_saved_as_peft_saves_it(run: Run, artifact: Path, checkpoint: Path) -> None:
    plain = Oracle(checkpoint, quantization="nf4", dtype=torch.float32, packed=False).plain
    wanted = get_peft_model_state_dict(get_peft_model(plain, section(run.name).peft_config()))
    found = load_file(artifact / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert found.keys() == wanted.keys()
    if run.name != "adalora":  # what is pruned is left out
        assert {key: found[key].shape for key in found} == {key: wanted[key].shape for key in wanted}


def test_the_server_answers_as_the_trained_model(run: Run, artifact: Path, server: InProcess) -> None:
    describe(artifact, server.engine.model.layers.shapes, max_rank=server.config.max_rank)
    own, bare = server.submit(PROMPT, artifact), server.submit(PROMPT)
    answers = {number: tokens(deltas) for number, deltas in server.run().items()}
    assert answers[own] == greedy(run.trainer.model, PROMPT, GREEDY.max_tokens)
    assert answers[own] != answers[bare]


@torch.inference_mode()
def greedy(model: nn.Module, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model.eval()(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", KEYS)
def test_a_whole_run_in_16_bits(checkpoint: Path, tmp_path: Path, server: InProcess, name: str) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    config = configure(checkpoint, name, data=data, out=tmp_path / "out", steps=GradientWatch.STEPS)
    assert train(config).steps == GradientWatch.STEPS
    manifest = Manifest.from_json((tmp_path / "out" / "manifest.json").read_text())
    assert manifest.training["settings"]["learning_rate"] == section(name).default_learning_rate
    spec = describe(tmp_path / "out", server.engine.model.layers.shapes, max_rank=server.config.max_rank)
    assert spec.method == manifest.method


@pytest.mark.parametrize("steps", [1, 2])
def test_adalora_ends_well_after_fewer_steps_than_it_prunes_in(checkpoint: Path, tmp_path: Path, steps: int) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    assert train(configure(checkpoint, "adalora", data=data, out=tmp_path / "out", steps=steps)).steps == steps


def test_nothing_of_adalora_is_trained_that_is_not_saved(checkpoint: Path) -> None:
    trainer = trainer_of(checkpoint, "adalora", torch.bfloat16)
    trained = {key for key, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    saved = get_peft_model_state_dict(trainer.model)
    assert {key.replace(".default", "") for key in trained} == saved.keys()


def test_llama_adapters_and_plain_weights_without_autocast_do_not_meet_on_a_cpu(checkpoint: Path) -> None:
    with pytest.raises(UsageError, match=r"llama_adapter on a CPU needs base\.quantization nf4"):
        trainer_of(checkpoint, "llama_adapter", torch.float16, quantization="none")


def test_llama_adapters_learn_beside_plain_weights_in_bfloat16(checkpoint: Path) -> None:
    trainer = trainer_of(checkpoint, "llama_adapter", torch.bfloat16, quantization="none")
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_a_part_that_gets_no_gradient_stops_the_run(checkpoint: Path) -> None:
    trainer = trainer_of(checkpoint, "lora")
    cut_off = trainer.model.get_base_model().model.layers[0].mlp
    cut_off.register_forward_hook(lambda _module, _inputs, output: output.detach())
    sentence = r"parts of the adapter get no gradient, .*layers\.0\.mlp\.down_proj\.lora_A.* and 3 more$"
    with pytest.raises(TrainingStopped, match=sentence):
        trainer.train()


def test_ranks_are_allocated_within_the_budget(checkpoint: Path, tmp_path: Path) -> None:
    trainer = trainer_of(checkpoint, "adalora")
    trainer.train()
    trainer.model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    ranks = [len(tensor) for key, tensor in saved.items() if key.endswith("lora_E")]
    assert len(ranks) == 2 * 7  # of linear layers in two blocks
    assert sum(ranks) == 2 * len(ranks)
    assert len(set(ranks)) > 1


def test_bases_of_adalora_are_drawn_towards_orthonormal_ones(checkpoint: Path) -> None:
    skews = {}
    for weight in (0.0, 5.0):
        trainer = trainer_of(checkpoint, "adalora", keys={"orthogonality": weight})
        trainer.train()
        skews[weight] = skewness(trainer.model).item()
    assert skews[5.0] < 0.7 * skews[0.0]
