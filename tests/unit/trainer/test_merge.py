from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from oracle import Oracle, save_adapter
from peft import (
    AdaLoraConfig,
    C3AConfig,
    FourierFTConfig,
    HiraConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    RandLoraConfig,
    RoadConfig,
    TrainableTokensConfig,
    WaveFTConfig,
)
from safetensors.torch import load_file, save_file
from tiny import make_checkpoint, make_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, PreTrainedModel
from typer.testing import CliRunner
from zoo import EXPECTED_WARNINGS, NOISE, NOT_ON_NF4, ZOO

from hatrack.manifest import BaseIdentity, Manifest, file_sha256, folder_digest
from hatrack_server.model.checkpoint import identify
from hatrack_server.model.load import load_base
from hatrack_trainer.errors import TrainerError, UsageError
from hatrack_trainer.merge import Into, merge
from hatrack_trainer.merge_command import merge as merge_command
from hatrack_trainer.mergeable import MERGEABLE, NO_CHANGE_OF_WEIGHTS
from hatrack_trainer.tuners.partial import PartialConfig

PRUNED = "ignore:The following rank_pattern keys did not match:RuntimeWarning"  # PEFT forgets that AdaLoRA's do
pytestmark = [pytest.mark.filterwarnings(warning) for warning in (*EXPECTED_WARNINGS, PRUNED)]

TOKENS = [256, *range(60, 100)]
ON: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}
LORA: dict[str, Any] = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 32}
MORE: dict[str, PeftConfig] = {
    "adalora, pruned": AdaLoraConfig(
        **ON,
        init_r=4,
        total_step=10,
        lora_alpha=400,
        rank_pattern={
            f"model.layers.{layer}.self_attn.{name}.lora_E": [True, False, True, False]
            for layer in range(2)
            for name in ON["target_modules"]
        },
    ),
    "lora with patterns": LoraConfig(**ON, r=4, rank_pattern={"v_proj": 8}, alpha_pattern={"q_proj": 64}),
    # These the server refuses.
    "c3a": C3AConfig(**ON, block_size=16),
    "fourierft": FourierFTConfig(**ON, n_frequency=200),
    "hira": HiraConfig(**ON, r=8),
    "partial": PartialConfig(task_type="CAUSAL_LM", parts=["norms", "lm_head"], last_layers=1),
    "oft": OFTConfig(**ON, r=0, oft_block_size=8),
    "randlora": RandLoraConfig(**ON, r=8),
    "road": RoadConfig(**ON, variant="road_2", group_size=32),
    "waveft": WaveFTConfig(**ON, n_frequency=200),
}
EXACT = 2e-4  # of the largest logit, in float32
CANT_BE_MERGED = {"lora with biases"} | {
    name for name, config in ZOO.items() if config.peft_type.value in NO_CHANGE_OF_WEIGHTS
}
MERGED = sorted((ZOO | MORE).keys() - CANT_BE_MERGED)
FAMILIAR = ["lora", "dora", "loha", "lokr", "ia3", "adalora", "vera"]


def in_bfloat16(checkpoint: Path) -> Path:
    """As most bases come: NF4 then has the same codes in whatever precision it computes."""
    AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).save_pretrained(checkpoint)
    return checkpoint


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return in_bfloat16(make_checkpoint(tmp_path_factory.mktemp("base") / "llama"))


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return in_bfloat16(make_checkpoint(tmp_path_factory.mktemp("base") / "tied", tie_word_embeddings=True))


@pytest.fixture(scope="module")
def original(base: Path) -> Oracle:
    return Oracle(base, quantization="none", dtype=torch.float32, packed=False)


@pytest.fixture(scope="module")
def quantised(base: Path) -> Oracle:
    return Oracle(base, quantization="nf4", dtype=torch.float32, packed=False)


@pytest.fixture(scope="module")
def lora(original: Oracle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(original.base, tmp_path_factory.mktemp("adapter") / "lora", ZOO["lora"], seed=1)


def make(oracle: Oracle, name: str, folder: Path) -> Path:
    return save_adapter(
        oracle.plain, folder / "adapter", (ZOO | MORE)[name], seed=len(name), noise=NOISE.get(name, 0.1)
    )


@torch.inference_mode()
def logits(model: PreTrainedModel) -> Tensor:
    """[len(TOKENS), vocab]"""
    return model(torch.tensor([TOKENS])).logits[0].float()


def merged_logits(adapter: Path, base: Path, into: Into, out: Path) -> Tensor:
    """Of the checkpoint that is written, as plain transformers loads it."""
    merge(adapter, base=str(base), into=into, out=out, precision="float32")
    return logits(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32))


def difference(a: Tensor, b: Tensor) -> float:
    """The largest, as a part of the largest logit."""
    return float((a - b).abs().max() / b.abs().max())


def describe_base(adapter: Path, base: BaseIdentity, **changed: str) -> None:
    """Writes a manifest that names `base`, but for what is `changed`."""
    digest = changed.pop("artifact", folder_digest(adapter))
    names = {key: getattr(base, key) for key in BaseIdentity.__slots__} | changed
    (adapter / "manifest.json").write_text(Manifest(digest, BaseIdentity(**names), "LORA").to_json())


def pretend(folder: Path, **config: Any) -> Path:
    """An adapter of a configuration alone."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({}, folder / "adapter_model.safetensors")
    return folder


class TestWeights:
    def test_every_method_is_tried_that_is_said_to_merge(self) -> None:
        assert {(ZOO | MORE)[name].peft_type.value for name in MERGED} == MERGEABLE

    @pytest.mark.parametrize("name", MERGED)
    def test_the_original_ones_give_what_peft_gives(
        self, original: Oracle, base: Path, name: str, tmp_path: Path
    ) -> None:
        adapter = make(original, name, tmp_path)
        expected = original.logits(adapter, TOKENS)
        assert difference(original.logits(None, TOKENS), expected) > 0.02
        assert difference(merged_logits(adapter, base, "original", tmp_path / "out"), expected) < EXACT

    @pytest.mark.parametrize("name", FAMILIAR)
    def test_the_dequantised_ones_give_what_peft_gives_on_the_quantised_base(
        self, quantised: Oracle, base: Path, name: str, tmp_path: Path
    ) -> None:
        adapter = make(quantised, name, tmp_path)
        expected = quantised.logits(adapter, TOKENS, plain=name in NOT_ON_NF4)
        assert difference(quantised.logits(None, TOKENS), expected) > 0.02
        assert difference(merged_logits(adapter, base, "dequantized", tmp_path / "out"), expected) < EXACT
        assert difference(merged_logits(adapter, base, "original", tmp_path / "other"), expected) > 0.05

    def test_are_saved_in_16_bits_unless_told_otherwise(
        self, original: Oracle, base: Path, lora: Path, tmp_path: Path
    ) -> None:
        merge(lora, base=str(base), into="original", out=tmp_path / "out")
        assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {
            torch.bfloat16
        }
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert loaded.dtype == torch.bfloat16
        assert difference(logits(loaded.float()), original.logits(lora, TOKENS)) < 0.02

    @pytest.mark.parametrize("into", ["original", "dequantized"])
    def test_gpt2_keeps_its_weights_the_other_way_round(self, into: Into, tmp_path: Path) -> None:
        shape = {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 128, "initializer_range": 0.2}
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=320, bos_token_id=256, eos_token_id=257, **shape)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
        make_tokenizer().save_pretrained(tmp_path / "base")
        base = in_bfloat16(tmp_path / "base")
        quantization = "none" if into == "original" else "nf4"
        oracle = Oracle(base, quantization=quantization, dtype=torch.float32, packed=False)
        lora = LoraConfig(**LORA, target_modules=["attn.c_proj", "c_attn"], fan_in_fan_out=into == "original")
        adapter = save_adapter(oracle.base, tmp_path / "adapter", lora, seed=0)
        expected = oracle.logits(adapter, TOKENS)
        assert difference(oracle.logits(None, TOKENS), expected) > 0.02
        assert difference(merged_logits(adapter, base, into, tmp_path / "out"), expected) < EXACT

    def test_a_base_that_is_quantised_on_disk(self, base: Path, quantised: Oracle, lora: Path, tmp_path: Path) -> None:
        on_disk = tmp_path / "nf4"
        load_base(base, quantization="nf4", dtype=None, device="cpu").save_pretrained(on_disk)
        make_tokenizer().save_pretrained(on_disk)
        sentence = "^--into original: .*nf4 is quantised on disk and has no original weights; take --into dequantized"
        with pytest.raises(UsageError, match=sentence):
            merge(lora, base=str(on_disk), into="original", out=tmp_path / "out")
        got = merged_logits(lora, on_disk, "dequantized", tmp_path / "out")
        assert difference(got, quantised.logits(lora, TOKENS)) < EXACT
        assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


class TestSharedEmbedding:
    @pytest.mark.parametrize(
        ("config", "stays"),
        [
            (LoraConfig(**LORA, target_modules=["q_proj"]), True),
            (LoraConfig(**LORA, target_modules=["q_proj", "lm_head"]), False),
            (LoraConfig(**LORA, target_modules=["embed_tokens"]), False),
            (LoraConfig(**LORA, target_modules=["embed_tokens"], ensure_weight_tying=True), True),
            (LoraConfig(**LORA, target_modules=["q_proj"], modules_to_save=["lm_head"]), False),
            (PartialConfig(task_type="CAUSAL_LM", parts=["norms", "lm_head"]), False),
            (PartialConfig(task_type="CAUSAL_LM", last_layers=1), True),
            (TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=[*range(40, 90)]), True),
        ],
        ids=["untouched", "head", "embedding", "both as one", "another head", "partial head", "top layer", "tokens"],
    )
    def test_is_parted_only_where_the_adapter_parts_it(
        self, tied: Path, config: PeftConfig, stays: bool, tmp_path: Path
    ) -> None:
        oracle = Oracle(tied, quantization="none", dtype=torch.float32, packed=False)
        adapter = save_adapter(oracle.base, tmp_path / "adapter", config, seed=3, noise=0.05)
        expected = oracle.logits(adapter, TOKENS)
        assert difference(oracle.logits(None, TOKENS), expected) > 0.02
        assert difference(merged_logits(adapter, tied, "original", tmp_path / "out"), expected) < EXACT
        assert ("lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")) is stays
        assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is stays


class TestFolder:
    def test_has_the_bases_tokenizer_template_and_generation_settings(
        self, base: Path, lora: Path, tmp_path: Path
    ) -> None:
        base = shutil.copytree(base, tmp_path / "base")
        (base / "generation_config.json").write_text('{"eos_token_id": [257, 258], "temperature": 0.5}')
        merge(lora, base=str(base), into="original", out=tmp_path / "deep" / "out")
        out = tmp_path / "deep" / "out"
        got, expected = identify(out, "none"), identify(base, "none")
        assert (got.tokenizer, got.chat_template) == (expected.tokenizer, expected.chat_template)
        assert (out / "generation_config.json").read_bytes() == (base / "generation_config.json").read_bytes()
        tokenizer, theirs = AutoTokenizer.from_pretrained(out), AutoTokenizer.from_pretrained(base)
        messages = [{"role": "user", "content": "Grüße, 🎩"}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert ids == theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert "Grüße, 🎩" in tokenizer.decode(ids)
        assert sorted(tmp_path.joinpath("deep").iterdir()) == [out]

    def test_says_what_it_is(self, base: Path, lora: Path, tmp_path: Path) -> None:
        merged = merge(lora, base=str(base), into="dequantized", out=tmp_path / "out")
        card = (tmp_path / "out" / "README.md").read_text()
        digest = folder_digest(lora)
        assert merged.adapter.digest == digest
        for part in ("llama", identify(base, "nf4").weights, f"LORA, digest `{digest}`", "bfloat16", "to a rounding"):
            assert part in card
        for file in (tmp_path / "out").glob("*.*"):
            assert str(tmp_path.parent).encode() not in file.read_bytes()

    def test_a_full_disk_leaves_nothing(self, base: Path, lora: Path, tmp_path: Path) -> None:
        with largest_file(50_000), pytest.raises(TrainerError, match=r"^--out: .* can't be written: .*File too large"):
            merge(lora, base=str(base), into="original", out=tmp_path / "deep" / "out")
        assert not any(tmp_path.iterdir())

    def test_links_in_a_circle(self, base: Path, lora: Path, tmp_path: Path) -> None:
        (tmp_path / "circle").symlink_to("circle")
        with pytest.raises(UsageError, match=r"^--out: .* is made of links that lead in a circle$"):
            merge(lora, base=str(base), into="original", out=tmp_path / "circle")

    def test_the_base_is_not_touched(self, base: Path, lora: Path, tmp_path: Path) -> None:
        before = {file: (file_sha256(file), file.stat().st_mtime_ns) for file in base.iterdir()}
        folder = base.stat().st_mtime_ns
        for into in ("original", "dequantized"):
            merge(lora, base=str(base), into=into, out=tmp_path / into)
        with pytest.raises(UsageError, match=r"^--out: .* is in the base's folder, where nothing is ever written"):
            merge(lora, base=str(base), into="original", out=base / "out")
        assert {file: (file_sha256(file), file.stat().st_mtime_ns) for file in base.iterdir()} == before
        assert base.stat().st_mtime_ns == folder

    def test_is_not_in_the_adapters_folder(self, lora: Path) -> None:
        with pytest.raises(UsageError, match=r"^--out: .* is in the adapter's folder, where nothing is ever written"):
            merge(lora, base="no/base", into="original", out=lora / "out")

    def test_must_not_exist_yet(self, lora: Path, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(UsageError, match=r"^--out: .* exists already; name a new folder"):
            merge(lora, base="no/base", into="original", out=tmp_path)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writing beyond `size` fails, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class TestRefusals:
    """Before the base is looked for, which isn't there."""

    def refused(self, adapter: Path, out: Path) -> str:
        with pytest.raises(UsageError) as refusal:
            merge(adapter, base=str(out / "no-base"), into="original", out=out)
        assert not out.exists()
        return str(refusal.value)

    @pytest.mark.parametrize("method", sorted(NO_CHANGE_OF_WEIGHTS))
    def test_methods_that_change_no_weight(self, method: str, tmp_path: Path) -> None:
        sentence = "adapters can't be merged: they add steps to what the model computes, and change no weight"
        assert self.refused(pretend(tmp_path / "adapter", peft_type=method), tmp_path / "out") == f"{method} {sentence}"

    @pytest.mark.parametrize("method", ["OSF", "nonsense", None, ["LORA"]])
    def test_methods_that_nobody_has_tried(self, method: Any, tmp_path: Path) -> None:
        sentence = self.refused(pretend(tmp_path / "adapter", peft_type=method), tmp_path / "out")
        assert sentence.startswith(f"adapter_config.json: peft_type: {method} adapters can't be merged; these can: ADA")

    @pytest.mark.parametrize(
        ("setting", "value", "sentence"),
        [
            ("alora_invocation_tokens", [1], "an adapter with it can't be merged"),
            ("layer_replication", [[0, 2], [1, 2]], "an adapter with it can't be merged"),
            ("megatron_config", {"tensor_model_parallel_size": 2}, "an adapter with it can't be merged"),
            ("init_lora_weights", "pissa_niter_4", "'pissa_niter_4' changed the base before training"),
        ],
    )
    def test_settings_that_need_more_than_weights(
        self, setting: str, value: Any, sentence: str, tmp_path: Path
    ) -> None:
        adapter = pretend(tmp_path / "adapter", peft_type="LORA", **{setting: value})
        assert self.refused(adapter, tmp_path / "out").startswith(f"adapter_config.json: {setting}: {sentence}")

    def test_a_folder_without_an_adapter(self, tmp_path: Path) -> None:
        assert self.refused(tmp_path, tmp_path / "out") == f"{tmp_path} has no adapter_config.json"
        (tmp_path / "adapter_config.json").write_text("[]")
        (tmp_path / "adapter_model.bin").touch()  # a pickle, which is never read
        assert self.refused(tmp_path, tmp_path / "out") == f"{tmp_path} has no adapter_model.safetensors"
        (tmp_path / "adapter_model.safetensors").touch()
        assert self.refused(tmp_path, tmp_path / "out") == "adapter_config.json: not a JSON object"
        (tmp_path / "adapter_config.json").write_text("{")
        assert self.refused(tmp_path, tmp_path / "out").startswith("adapter_config.json: can't be read: ")

    def test_a_manifest_of_other_files(self, base: Path, tmp_path: Path) -> None:
        adapter = pretend(tmp_path / "adapter", peft_type="LORA")
        describe_base(adapter, identify(base, "nf4"), artifact="0" * 64)
        sentence = "manifest.json: artifact: it was written for other files than these"
        assert self.refused(adapter, tmp_path / "out") == sentence
        (adapter / "manifest.json").write_text("{}")
        assert self.refused(adapter, tmp_path / "out") == "manifest.json: base: missing or not an object"


class TestBase:
    """What is found out once the base is there."""

    def test_another_one_is_refused(self, base: Path, tmp_path: Path) -> None:
        adapter = pretend(tmp_path / "adapter", peft_type="LORA")
        describe_base(adapter, identify(base, "nf4"), weights="0" * 64)
        with pytest.raises(UsageError, match=r"^manifest.json: base.weights: the adapter was trained on another base"):
            merge(adapter, base=str(base), into="original", out=tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_what_may_be_wrong_is_said(self, original: Oracle, base: Path, tmp_path: Path) -> None:
        adapter = make(original, "lora", tmp_path)
        trained_on = identify(base, "nf4")

        def said(number: int, into: Into = "dequantized") -> list[str]:
            doubts: list[str] = []
            merge(adapter, base=str(base), into=into, out=tmp_path / f"out{number}", say=doubts.append)
            return doubts

        assert said(0) == ["no manifest.json: the base that it was trained on is unknown"]
        describe_base(adapter, trained_on)
        assert said(1) == said(2, into="original") == []
        describe_base(adapter, trained_on, quantization="none", tokenizer="0", chat_template="0")
        assert said(3, into="original") == [
            "it was trained with another tokenizer than this base's",
            "it was trained with another chat template than this base's",
        ]
        assert said(4)[0] == "it was trained on unquantised weights: --into original is what it learned on"

    @pytest.mark.parametrize(
        ("change", "sentence"),
        [
            (lambda tensors, key: tensors.pop(key), "model.layers.0.self_attn.q_proj.lora_A.weight is missing"),
            (
                lambda tensors, key: tensors.update({key.replace("0", "7"): torch.ones(4, 64)}),
                "nothing of this base is adapted by base_model.model.model.layers.7.self_attn.q_proj.lora_A",
            ),
            (lambda tensors, key: tensors.update({key: torch.ones(4, 63)}), "PEFT can't merge .* size mismatch"),
            (
                lambda tensors, key: tensors[key].fill_(torch.nan),
                "the merged model.layers.0.self_attn.q_proj.weight holds NaN or infinity",
            ),
        ],
        ids=["missing", "left over", "of another shape", "not finite"],
    )
    def test_every_tensor_must_have_its_place_and_be_finite(
        self, original: Oracle, base: Path, change: Any, sentence: str, tmp_path: Path
    ) -> None:
        adapter = make(original, "lora", tmp_path)
        tensors = load_file(adapter / "adapter_model.safetensors")
        change(tensors, "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight")
        save_file(tensors, adapter / "adapter_model.safetensors")
        with pytest.raises(UsageError, match=sentence):
            merge(adapter, base=str(base), into="original", out=tmp_path / "out")
        assert sorted(tmp_path.iterdir()) == [adapter]

    def test_biases_need_a_bias_to_be_added_to(self, original: Oracle, base: Path, tmp_path: Path) -> None:
        adapter = make(original, "lora with biases", tmp_path)
        with pytest.raises(UsageError, match=r"PEFT can't merge .*: Impossible .* has no bias"):
            merge(adapter, base=str(base), into="original", out=tmp_path / "out")
        assert sorted(tmp_path.iterdir()) == [adapter]

    @pytest.mark.parametrize(
        ("name", "setting"), [("lora", {"trainable_token_indices": [10**9]}), ("vb-lora", {"vector_length": 0})]
    )
    def test_a_setting_at_which_peft_stumbles(
        self, original: Oracle, base: Path, name: str, setting: dict[str, Any], tmp_path: Path
    ) -> None:
        adapter = make(original, name, tmp_path)
        file = adapter / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | setting))
        with pytest.raises(UsageError, match=f"^{adapter}: PEFT can't merge this adapter into this base: .+"):
            merge(adapter, base=str(base), into="original", out=tmp_path / "out")

    def test_a_key_that_peft_does_not_know(self, original: Oracle, base: Path, tmp_path: Path) -> None:
        adapter = make(original, "lora", tmp_path)
        file = adapter / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"of_a_newer_peft": 1}))
        merge(adapter, base=str(base), into="original", out=tmp_path / "out")  # PEFT's warning would be an error here

    def test_a_name_too_long_for_any_file(self, lora: Path, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"^--base: model x+ is neither a folder nor a hub id"):
            merge(lora, base="x" * 300, into="original", out=tmp_path / "out")


class TestCommand:
    app = typer.Typer()
    app.command()(merge_command)

    def run(self, *args: str | Path) -> tuple[int, str, str]:
        result = CliRunner().invoke(self.app, [str(arg) for arg in args])
        return result.exit_code, result.stdout, result.stderr

    def test_says_what_was_made_and_what_it_is_worth(self, base: Path, lora: Path, tmp_path: Path) -> None:
        options = ("--into", "dequantized", "--base", base, "--out", tmp_path / "out", "--dtype", "float32")
        code, out, err = self.run(lora, *options)
        assert code == 0
        assert out.startswith(f"{tmp_path / 'out'}: LORA adapter ")
        assert "answers are the server's to a rounding" in out
        assert "hatrack: warning: no manifest.json" in err
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.float32

    def test_a_refusal_is_one_sentence(self, base: Path, tmp_path: Path) -> None:
        adapter = pretend(tmp_path / "adapter", peft_type="PREFIX_TUNING")
        code, out, err = self.run(adapter, "--into", "original", "--base", base, "--out", tmp_path / "out")
        assert (code, out) == (2, "")
        assert err.strip().splitlines()[-1].startswith("hatrack: PREFIX_TUNING adapters can't be merged: ")
        code, _, err = self.run(adapter, "--into", "both", "--base", base, "--out", tmp_path / "out")
        assert code == 2
        assert "'both' is not one of" in err

    def test_a_full_disk_is_no_mistake_of_the_users(self, base: Path, lora: Path, tmp_path: Path) -> None:
        with largest_file(50_000):
            code, _, err = self.run(lora, "--into", "original", "--base", base, "--out", tmp_path / "out")
        assert code == 1
        assert "can't be written" in err

    def test_help_costs_no_torch(self) -> None:
        code = "import sys, hatrack_trainer.merge_command; sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
