"""Which bases are served and which are refused, and what the engine learns of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import make_adapter, save_adapter
from peft import LoHaConfig
from tiny import FAMILIES, SHAPE, make_checkpoint, make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from hatrack_client.cli import run as hatrack
from hatrack_server.config import EngineConfig
from hatrack_server.engine.worker import describe_base
from hatrack_server.errors import StartupError
from hatrack_server.model.checkpoint import identify, resolve_checkpoint
from hatrack_server.model.load import load_base
from hatrack_server.model.paged import PagedModel
from hatrack_server.model.shapes import shapes_of_checkpoint

TINY_HEADS = {"n_head": 4, "n_layer": 2, "n_embd": 64, "n_positions": 512, "eos_token_id": 257}


def paged(checkpoint: Path, **settings: Any) -> PagedModel:
    return PagedModel(EngineConfig(model=checkpoint, device="cpu", **{"kv_cache_gb": 0.004, **settings}))


def any_checkpoint(path: Path, family: str, **config: Any) -> Path:
    torch.manual_seed(0)
    made = AutoConfig.for_model(family, **config)
    AutoModelForCausalLM.from_config(made, dtype=torch.float32).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("bloom", {"vocab_size": 320, "hidden_size": 64, "n_layer": 2, "n_head": 4}),
        ("falcon", {"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}),
        ("gptj", {"vocab_size": 320, "rotary_dim": 8, **TINY_HEADS}),
        ("mamba", {"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 4}),
    ],
)
def test_what_would_be_served_wrongly_is_refused(family: str, config: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=f"{family} can't be served: "):
        paged(any_checkpoint(tmp_path, family, **config))


def test_a_layout_that_the_probe_finds_wrong_is_refused(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hatrack_server.model import batch

    causal = batch.causal_mask
    monkeypatch.setattr(batch, "causal_mask", lambda positions, *rest: causal(positions - 1, *rest))
    with pytest.raises(StartupError, match="paged attention differs"):
        paged(tiny_llama)


def test_the_probe_leaves_a_window_behind_that_is_longer_than_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hatrack_server.model import batch

    checkpoint = make_checkpoint(tmp_path, "mistral", sliding_window=400)
    assert paged(checkpoint).config.sliding_window == 400
    causal = batch.causal_mask
    monkeypatch.setattr(batch, "causal_mask", lambda positions, places, window: causal(positions, places, None))
    with pytest.raises(StartupError, match="paged attention differs"):
        paged(checkpoint)


@pytest.mark.parametrize("rope", [{"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}])
def test_positions_that_depend_on_the_batch_are_refused(rope: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="longest row"):
        paged(make_checkpoint(tmp_path, rope_parameters=rope))


def test_other_families_are_served(tmp_path: Path) -> None:
    assert paged(
        any_checkpoint(tmp_path / "gpt2", "gpt2", vocab_size=320, **TINY_HEADS)
    ).layers.shapes.linears.keys() >= {"transformer.h.1.mlp.c_fc"}
    neox = {key: SHAPE[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    model = paged(any_checkpoint(tmp_path / "neox", "gpt_neox", num_attention_heads=4, **neox))
    assert "gpt_neox.layers.0.attention.query_key_value" in model.layers.shapes.linears


def test_nf4_on_disk_is_taken_as_it_is(tiny_llama: Path, tmp_path: Path) -> None:
    quantised = load_base(tiny_llama, quantization="nf4", dtype=torch.float32, device="cpu")
    quantised.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    ids = torch.arange(40)
    at_load = paged(tiny_llama, dtype="float32", packed=False).eager_logits(ids)
    on_disk = paged(tmp_path, dtype="float32", packed=False).eager_logits(ids)
    torch.testing.assert_close(on_disk, at_load, rtol=0, atol=1e-5)
    with pytest.raises(StartupError, match="quantised on disk"):
        paged(tmp_path, quantization="none")


def test_what_the_front_process_learns(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path)
    (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, 259]}))
    config = EngineConfig(model=checkpoint, device="cpu", kv_cache_gb=0.004)
    base = describe_base(config, PagedModel(config))
    assert base.eos_token_ids == {257, 259}
    assert (base.vocab_size, base.max_model_len) == (320, 512)
    assert base.shapes.linears["model.layers.1.mlp.down_proj"].in_features == 128
    assert base.identity == identify(checkpoint, "nf4")
    # 2 layers of 4 linears 64x64, 64x32 …, 73,728 weights: half a byte each, and its scales in a packed layout or not.
    assert 4.1 <= base.memory["NF4 weights"] * 8 / 73_728 <= 4.6
    assert base.memory["KV cache"] == pytest.approx(0.004e9, rel=0.01)


def test_the_identity_follows_every_file(tiny_llama: Path, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other", seed=1)
    assert identify(tiny_llama, "nf4").weights != identify(other, "nf4").weights
    assert identify(tiny_llama, "nf4").tokenizer == identify(other, "nf4").tokenizer
    assert identify(tiny_llama, "nf4").quantization != identify(tiny_llama, "none").quantization
    before = identify(other, "nf4").chat_template
    make_tokenizer(chat_template="{{ messages }}").save_pretrained(other)
    assert identify(other, "nf4").chat_template != before


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model.safetensors"])
def test_an_incomplete_checkpoint_is_named(missing: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(StartupError, match="safetensors" if missing.startswith("model") else missing):
        resolve_checkpoint(str(tmp_path))


def test_a_path_that_does_not_exist_is_named() -> None:
    with pytest.raises(StartupError, match="/nowhere/at/all"):
        resolve_checkpoint("/nowhere/at/all")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_configuration_alone_tells_where_adapters_may_act(family: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, family)
    (checkpoint / "model.safetensors").write_bytes(b"not read")
    told = shapes_of_checkpoint(checkpoint)
    make_checkpoint(tmp_path, family)
    assert told == paged(checkpoint).layers.shapes
    assert len(told.attention) == SHAPE["num_hidden_layers"]


def test_conv1d_counts_as_linear(tmp_path: Path) -> None:
    checkpoint = any_checkpoint(tmp_path, "gpt2", vocab_size=320, **TINY_HEADS)
    assert shapes_of_checkpoint(checkpoint) == paged(checkpoint).layers.shapes


class TestInspect:
    def run(self, capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = hatrack(["adapters", "inspect", *map(str, arguments)])
        return (status, *capsys.readouterr())

    def test_says_what_an_adapter_is(
        self, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        base = AutoModelForCausalLM.from_pretrained(tiny_llama)
        save_adapter(
            base, tmp_path, LoHaConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "up_proj"]), seed=0
        )
        status, out, err = self.run(capsys, tmp_path, "--model", tiny_llama)
        assert (status, err) == (0, "")
        said = dict(line.strip().split(None, 1) for line in out.replace("when resident", "resident").splitlines())
        assert (said["method"], said["targets"], said["rank"]) == ("LOHA", "q_proj, up_proj", "4")
        assert said["parameters"] == f"{2 * 2 * (2 * (64 + 64) + 2 * (64 + 128)):,}"
        assert said["accepted"].startswith("yes")

    def test_says_why_it_would_be_refused(
        self, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        base = AutoModelForCausalLM.from_pretrained(tiny_llama)
        make_adapter(base, tmp_path, seed=0, r=16, target_modules=["q_proj"])
        status, out, err = self.run(capsys, tmp_path, "--model", tiny_llama, "--max-rank", 8)
        assert (status, out) == (2, "")
        assert err.startswith("hatrack: adapter_config.json: r: ")
        assert self.run(capsys, tmp_path / "absent", "--model", tiny_llama)[0] == 2
        assert self.run(capsys, tmp_path, "--model", tmp_path / "absent")[0] == 2

    def test_the_bases_configuration_is_enough(
        self, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        make_adapter(AutoModelForCausalLM.from_pretrained(tiny_llama), tmp_path, seed=0, target_modules=["q_proj"])
        bare = tmp_path / "base"
        bare.mkdir()
        (bare / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
        assert self.run(capsys, tmp_path, "--model", bare)[0] == 0


@pytest.mark.parametrize(("family", "tied", "offset"), [("qwen3", False, 0), ("gemma2", True, 1), ("opt", True, 0)])
def test_ends_and_norms_of_the_residual_stream_may_be_replaced(
    family: str, tied: bool, offset: float, tmp_path: Path
) -> None:
    model = paged(make_checkpoint(tmp_path, family))
    shapes = model.layers.shapes
    assert shapes.tied is tied
    assert shapes.head == "lm_head"
    assert {shape for own in shapes.replaceable.values() for shape in own.values()} == {(320, 64), (64,)}
    norms = shapes.replaceable.keys() - shapes.ends
    assert len(norms) >= 2 * 2
    assert not any("q_norm" in name or "k_norm" in name for name in norms)
    assert {model.layers.norm_offset(name) for name in norms} == {offset}
