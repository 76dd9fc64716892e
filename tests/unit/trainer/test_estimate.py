"""What a run takes, against what it really takes: every tensor that a real step makes on the CPU is counted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny import make_checkpoint
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel
from trl import SFTTrainer

from hatrack_server.model.load import load_base, read_config
from hatrack_trainer.config import BaseSection, DataSection, OutputSection, TrainConfig, TrainSection
from hatrack_trainer.data import Example
from hatrack_trainer.data.read import ExampleSet, read_data
from hatrack_trainer.errors import NoEstimate, UsageError
from hatrack_trainer.estimate.memory import Batch, estimate_memory, largest_batch
from hatrack_trainer.estimate.peak import Peak
from hatrack_trainer.estimate.remedies import changed, check_fits, fitting, gigabytes
from hatrack_trainer.estimate.report import batches_of, evaluations_of, steps_of
from hatrack_trainer.estimate.sketch import tensors_of
from hatrack_trainer.methods import methods, read_method
from hatrack_trainer.sft import make_trainer

NEEDED: dict[str, dict[str, Any]] = {"llama_adapter": {"layers": 2}, "partial": {"parts": ["norms", "lm_head"]}}
PADDED = 3


@pytest.fixture(scope="module")
def medium(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large enough for activations to outweigh what is tiny only here."""
    shape = {"vocab_size": 2048, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4}
    return make_checkpoint(tmp_path_factory.mktemp("medium") / "llama", **shape)


def configure(checkpoint: Path, method: str = "lora", quantization: Any = "nf4", **train: Any) -> TrainConfig:
    return TrainConfig(
        base=BaseSection(model=str(checkpoint), quantization=quantization),
        adapter=read_method({"method": method, **NEEDED.get(method, {})}),
        data=DataSection(train=Path("rows.jsonl")),
        train=TrainSection(**train),
        output=OutputSection(dir=Path("out")),
    )


def real(config: TrainConfig, checkpoint: Path, batch: Batch) -> tuple[int, SFTTrainer]:
    """The bytes of the base, and what is to train it, loaded for real."""
    base = load_base(
        checkpoint,
        quantization=config.base.quantization,
        dtype=None,
        device="cpu",
        unquantised=config.adapter.unquantised(read_config(checkpoint)),
    )
    size_alone = size(tensors_of(base))
    return size_alone, make_trainer(config, base, AutoTokenizer.from_pretrained(checkpoint), rows(batch))


def states(trainer: SFTTrainer) -> int:
    return size(
        value for state in trainer.optimizer.state.values() for value in state.values() if isinstance(value, Tensor)
    )


def rows(batch: Batch) -> list[Example]:
    lengths = [batch.tokens, *[batch.tokens - PADDED] * (batch.rows - 1)]
    ids = [65 + index * 7 % 50 for index in range(batch.tokens)]  # alike, they would give no gradient to queries
    return [Example(ids[:length], [-100, *ids[1:length]]) for length in lengths]


def step_peak(trainer: SFTTrainer) -> int:
    """The most that lives at once of what one step makes beside weights and gradients, after a first one."""
    trainer.train()
    model: PeftModel = trainer.model.train()
    inputs = trainer.data_collator([trainer.train_dataset[index] for index in range(len(trainer.train_dataset))])
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [each.grad for each in model.parameters() if each.grad is not None]
    with Peak([*tensors_of(model), *gradients, *inputs.values()]) as peak:
        trainer.compute_loss(model, inputs).backward()
    return peak.bytes


def size(tensors: Iterator[Tensor] | Any) -> int:
    return sum(
        storage.nbytes() for storage in {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors}.values()
    )


class TestMemory:
    @pytest.mark.parametrize("method", sorted(methods()))
    def test_of_every_method_is_what_it_really_takes(self, tiny_llama: Path, method: str) -> None:
        batch, config = Batch(2, 32), configure(tiny_llama, method, batch_size=2, max_steps=3)
        estimated = estimate_memory(config, tiny_llama, batch, cuda=False)
        base, trainer = real(config, tiny_llama, batch)
        everything = size(tensors_of(trainer.model))
        trainer.train()
        assert estimated.base == pytest.approx(base, rel=0.02)
        assert estimated.adapter == pytest.approx(everything - base, rel=0.02)
        assert estimated.optimizer == pytest.approx(states(trainer), rel=0.05)
        assert estimated.gradients == size(p for p in trainer.model.parameters() if p.requires_grad)

    @pytest.mark.parametrize(
        ("quantization", "batch", "checkpointing"),
        [
            ("nf4", Batch(4, 64), False),
            ("none", Batch(4, 64), True),
            ("nf4", Batch(1, 192), True),
            ("none", Batch(1, 192), False),
        ],
    )
    def test_of_activations(self, medium: Path, batch: Batch, checkpointing: bool, quantization: str) -> None:
        config = configure(medium, quantization=quantization, activation_checkpointing=checkpointing, max_steps=1)
        estimated = estimate_memory(config, medium, batch, cuda=False).activations
        assert estimated == pytest.approx(step_peak(real(config, medium, batch)[1]), rel=0.15)

    @pytest.mark.parametrize("method", ["dora", "loha", "prefix_tuning", "partial"])
    def test_of_activations_of_methods_that_keep_others(self, medium: Path, method: str) -> None:
        batch, config = Batch(2, 96), configure(medium, method, max_steps=1)
        estimated = estimate_memory(config, medium, batch, cuda=False).activations
        assert estimated == pytest.approx(step_peak(real(config, medium, batch)[1]), rel=0.15)

    def test_of_attention_that_is_not_fused(self, tmp_path: Path) -> None:
        checkpoint, batch = make_checkpoint(tmp_path / "gemma2", "gemma2"), Batch(2, 256)
        config = configure(checkpoint, max_steps=1)
        estimated = estimate_memory(config, checkpoint, batch, cuda=False).activations
        assert estimated == pytest.approx(step_peak(real(config, checkpoint, batch)[1]), rel=0.15)

    @pytest.mark.parametrize("optimizer", ["adamw_8bit", "lion_8bit"])
    def test_of_states_in_8_bits(self, medium: Path, optimizer: str) -> None:
        settings = {"adapter.rank": 64, "train.optimizer": optimizer, "train.max_steps": 1}
        batch, config = Batch(1, 16), changed(configure(medium), settings)
        _, trainer = real(config, medium, batch)
        trainer.train()
        assert estimate_memory(config, medium, batch, cuda=False).optimizer == pytest.approx(states(trainer), rel=0.05)

    def test_of_paged_states(self, tiny_llama: Path) -> None:
        config = changed(configure(tiny_llama), {"train.optimizer": "paged_adamw_32bit"})
        found = [estimate_memory(config, tiny_llama, Batch(1, 16), cuda=cuda).optimizer for cuda in (False, True)]
        assert found[0] == found[1]

    def test_of_a_base_that_can_not_be_sketched(self, tmp_path: Path) -> None:
        checkpoint = make_checkpoint(tmp_path / "opt", "opt")
        with pytest.raises(NoEstimate, match="the memory can't be estimated: "):
            estimate_memory(configure(checkpoint, "llama_adapter"), checkpoint, Batch(1, 16), cuda=False)

    def test_leaves_bitsandbytes_able_to_load_a_base(self, tiny_llama: Path) -> None:
        from bitsandbytes.functional import name2qmap

        name2qmap.pop("dynamic", None)
        estimate_memory(configure(tiny_llama), tiny_llama, Batch(1, 16), cuda=False)
        base: PreTrainedModel = load_base(tiny_llama, quantization="nf4", dtype=None, device="cpu")
        assert base(input_ids=torch.tensor([[65, 66]])).logits.isfinite().all()


class TestLargestBatch:
    """Of three rows, whose longest has 4 tokens more than the shortest."""

    @pytest.fixture
    def three(self, tiny_llama: Path, tmp_path: Path) -> ExampleSet:
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(f'{{"prompt": "a", "completion": "{"b" * count}"}}\n' for count in (1, 3, 5)))
        return read_data(DataSection(train=file), tiny_llama).train

    def test_has_no_more_rows_than_there_are(self, tiny_llama: Path, three: ExampleSet) -> None:
        longest = max(len(example.input_ids) for example in three.examples)
        assert largest_batch(configure(tiny_llama, batch_size=2), three) == Batch(2, longest)
        assert largest_batch(configure(tiny_llama, batch_size=2**16), three) == Batch(3, longest)

    def test_has_no_more_packed_tokens_than_there_are(self, tiny_llama: Path, three: ExampleSet) -> None:
        total = sum(len(example.input_ids) for example in three.examples)
        config = configure(tiny_llama, batch_size=1, packing=True)
        assert largest_batch(config, three) == Batch(1, total)
        assert largest_batch(changed(config, {"data.max_length": 8}), three) == Batch(1, 8)


class TestPeak:
    def test_is_the_most_that_lived_at_once(self) -> None:
        kept = torch.zeros(10)
        with Peak([kept]) as peak:
            first = kept + 1
            del first
            second = torch.zeros(20)
            second.view(4, 5).add_(1)
            third = second * 2
        assert third.sum() == 40
        assert peak.bytes == 160


def cost(config: TrainConfig) -> int:
    """Of a base of 1000 and tokens that cost 1 each, a tenth where they are computed twice."""
    tokens = config.train.batch_size * config.data.max_length
    base = 1000 if config.base.quantization == "nf4" else 4000
    return base + (tokens // 10 if config.train.activation_checkpointing else tokens)


class TestFit:
    CONFIG = configure(Path("base"), batch_size=8)  # of 1024 tokens each

    @pytest.mark.parametrize(
        ("available", "sentence"),
        [
            (6000, "train.batch_size=4 and train.gradient_accumulation=2, or with train.activation_checkpointing=true"),
            (2100, "train.batch_size=1 and train.gradient_accumulation=8, or with train.activation_checkpointing=true"),
            (1900, "train.activation_checkpointing=true"),
            (
                1500,
                "train.batch_size=4 and train.gradient_accumulation=2 and train.activation_checkpointing=true",
            ),
            (
                1060,
                "train.batch_size=1 and train.gradient_accumulation=8 and train.activation_checkpointing=true and "
                "data.max_length=512",
            ),
        ],
    )
    def test_the_mildest_settings_that_fit_are_named(self, available: int, sentence: str) -> None:
        with pytest.raises(UsageError) as caught:
            check_fits(self.CONFIG, available, cost)
        assert str(caught.value) == f"needs 0.0 MB of memory of 0.0 MB: would fit with {sentence}"

    @pytest.mark.parametrize("available", [1020, 1200, 1900, 2100, 6000])
    def test_what_is_suggested_is_accepted(self, available: int) -> None:
        found = fitting(self.CONFIG, lambda config: cost(config) <= available)
        assert found
        for settings in found:
            check_fits(changed(self.CONFIG, settings), available, cost)

    def test_as_many_rows_a_step(self) -> None:
        config = changed(self.CONFIG, {"train.batch_size": 6, "train.gradient_accumulation": 2})
        settings = fitting(config, lambda config: cost(config) <= 5200)[0]
        assert settings == {"train.batch_size": 4, "train.gradient_accumulation": 3}

    def test_methods_that_compute_nothing_twice(self) -> None:
        config = changed(configure(Path("base"), "prefix_tuning", batch_size=8), {})
        assert [list(each) for each in fitting(config, lambda config: cost(config) <= 6000)] == [
            ["train.batch_size", "train.gradient_accumulation"]
        ]

    def test_a_base_that_fits_quantised_alone(self) -> None:
        config = changed(self.CONFIG, {"base.quantization": "none"})
        assert fitting(config, lambda config: cost(config) <= 2000)[0]["base.quantization"] == "nf4"

    @pytest.mark.parametrize(
        ("section", "advice"),
        [
            ({"rank": 4096}, "adapter.rank=512"),
            (
                {"method": "adalora", "rank": 2048, "initial_rank": 4095},
                "adapter.rank=256 and adapter.initial_rank=511",
            ),
            ({"method": "prompt_tuning", "tokens": 4000}, "adapter.tokens=500"),
        ],
    )
    def test_an_adapter_that_is_too_large(self, section: dict[str, Any], advice: str) -> None:
        config = self.CONFIG.model_copy(update={"adapter": read_method(section)})

        def of_the_adapter(config: TrainConfig) -> int:
            return max(getattr(config.adapter, key, 0) for key in ("initial_rank", "rank", "tokens"))

        with pytest.raises(UsageError, match=rf"would fit with {advice}$"):
            check_fits(config, 600, of_the_adapter)

    def test_a_base_that_fits_in_no_way(self) -> None:
        with pytest.raises(UsageError, match=r"^needs 0.0 MB of memory of 0.0 MB: take a smaller base$"):
            check_fits(self.CONFIG, 500, cost)

    def test_a_run_that_fits(self) -> None:
        check_fits(self.CONFIG, 10_000, cost)

    def test_sizes_are_for_people(self) -> None:
        assert [gigabytes(number) for number in (31_240_000_000, 120_000_000, 99_000)] == [
            "31.2 GB",
            "0.1 GB",
            "0.1 MB",
        ]


class TestTime:
    def test_batches_are_padded_to_their_longest_row(self) -> None:
        assert batches_of([5, 3, 8, 2, 4], configure(Path("base"), batch_size=2)) == [10, 16, 4]

    def test_packed_rows_are_full(self) -> None:
        config = changed(configure(Path("base"), batch_size=2, packing=True), {"data.max_length": 10})
        assert batches_of([5, 3, 8, 2, 4], config) == [20, 10]

    def test_steps(self) -> None:
        assert steps_of(5, configure(Path("base"), epochs=1.5, gradient_accumulation=2)) == 5
        assert steps_of(5, configure(Path("base"), max_steps=7)) == 7

    @pytest.mark.parametrize(
        ("held_out", "every", "evaluations"), [(None, None, 0), ("rows.jsonl", None, 1), ("rows.jsonl", 3, 4)]
    )
    def test_evaluations_of_ten_steps(self, held_out: str | None, every: int | None, evaluations: int) -> None:
        config = changed(configure(Path("base")), {"data.eval": held_out and Path(held_out), "eval.every": every})
        assert evaluations_of(10, config) == evaluations
