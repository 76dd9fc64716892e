"""A base that is broken, as a cut-off download leaves it, is refused in one sentence that names the file or folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_checkpoint

from hatrack_client.cli import run as hatrack
from hatrack_server.config import EngineConfig
from hatrack_server.errors import StartupError
from hatrack_server.model.checkpoint import eos_token_ids
from hatrack_server.model.load import Quantization, load_base, read_config
from hatrack_server.model.paged import PagedModel
from hatrack_server.text.codec import TextCodec


@pytest.fixture
def base(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "base"))


def change_config(base: Path, **changes: Any) -> None:
    file = base / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_tensors(base: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(base / "model.safetensors")
    change(tensors)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


def refused(call: Callable[[], Any], place: Path, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    with pytest.raises(StartupError) as refusal:
        call()
    sentence = refusal.value.message
    assert sentence.startswith(str(place))
    assert "\n" not in sentence
    printed = capsys.readouterr()
    assert (printed.out, "REPORT" in printed.err) == ("", False)  # on stderr there may be a bar
    return sentence.removeprefix(str(place))


@pytest.mark.parametrize("content", [b"", b"garbage", None], ids=["empty", "garbage", "cut off"])
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_weights_that_are_no_safetensors(
    base: Path, content: bytes | None, quantization: Quantization, capsys: pytest.CaptureFixture[str]
) -> None:
    file = base / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] if content is None else content)
    load = partial(load_base, base, quantization=quantization, dtype=None, device="cpu")
    assert "can't be loaded: " in refused(load, base, capsys)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda base: change_tensors(base, lambda tensors: tensors.pop("model.norm.weight")), "norm.weight is missing"),
        (
            lambda base: change_tensors(base, lambda tensors: tensors.update({"model.norm.weight": torch.ones(7)})),
            "model.norm.weight is of shape [7], not [64]",
        ),
        (
            lambda base: change_tensors(
                base, lambda tensors: tensors.update({"model.layers.0.mlp.up_proj.weight": torch.ones(7, 64)})
            ),
            "model.layers.0.mlp.up_proj.weight is of shape [7, 64], not [128, 64]",
        ),
        (lambda base: change_config(base, vocab_size=400), "is of shape [320, 64], not [400, 64]"),
        (lambda base: change_config(base, num_attention_heads=3, head_dim=None), ""),
        (lambda base: change_config(base, hidden_size=0), ""),
        (lambda base: change_config(base, model_type="bert", architectures=["BertForMaskedLM"]), ""),
    ],
    ids=["missing", "of another shape", "of another shape, to quantise", "vocabulary", "heads", "no width", "bert"],
)
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_weights_that_do_not_fit_the_configuration(
    base: Path,
    change: Callable[[Path], None],
    sentence: str,
    quantization: Quantization,
    capsys: pytest.CaptureFixture[str],
) -> None:
    change(base)
    load = partial(load_base, base, quantization=quantization, dtype=None, device="cpu")
    assert sentence in refused(load, base, capsys)


def test_tensors_that_are_not_used_are_told(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    change_config(base, num_hidden_layers=1)
    load_base(base, quantization="nf4", dtype=None, device="cpu")
    assert [record.getMessage() for record in caplog.records] == [
        f"{base}: 9 of its tensors are not used, e.g. model.layers.1.input_layernorm.weight"
    ]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"a": "\xff"}'], ids=["empty", "cut off", "list", "binary"])
@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("config.json", read_config),
        ("config.json", eos_token_ids),
        ("generation_config.json", eos_token_ids),
        ("generation_config.json", lambda base: PagedModel(EngineConfig(model=base))),
        ("tokenizer.json", TextCodec),
        ("tokenizer_config.json", TextCodec),
    ],
)
def test_json_that_is_none(
    base: Path, name: str, content: bytes, read: Callable[[Path], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    (base / name).write_bytes(content)
    assert refused(lambda: read(base), base / name, capsys).startswith(" can't be loaded: ")


def test_a_template_that_is_none(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = base / "chat_template.jinja"
    file.write_bytes(b"\xff")
    refused(lambda: TextCodec(base), file, capsys)
    file.unlink()
    (base / "tokenizer_config.json").write_text('{"chat_template": [{}]}')
    refused(lambda: TextCodec(base), base / "tokenizer_config.json", capsys)


def test_code_of_its_own_is_never_run(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    change_config(base, model_type="own", auto_map=own)
    (base / "own.py").write_text("raise SystemExit")
    sentence = refused(lambda: read_config(base), base / "config.json", capsys)
    assert sentence == " can't be loaded: it needs code of its own (auto_map), which is never run"
    change_config(base, model_type="llama")  # for which transformers has code
    load_base(base, quantization="nf4", dtype=None, device="cpu")


def test_a_run_says_it_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_checkpoint(tmp_path / "base")
    (base / "model.safetensors").write_bytes(b"")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n')
    sections = {"base": {"model": str(base)}, "data": {"train": str(rows)}, "output": {"dir": str(tmp_path / "out")}}
    (tmp_path / "train.yaml").write_text(json.dumps(sections))
    assert hatrack(["train", "run", str(tmp_path / "train.yaml")]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"hatrack: {base} can't be loaded: ")
    assert not (tmp_path / "out").exists()
