from __future__ import annotations

import json
import re
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from tiny import make_checkpoint

from hatrack_client.cli import run as hatrack
from hatrack_trainer.config_file import load_config
from hatrack_trainer.data.read import read_data
from hatrack_trainer.estimate.memory import available_memory, check_memory
from hatrack_trainer.estimate.report import estimate


def configure(base: Path, folder: Path, row_length: int, max_length: int = 512) -> Path:
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": "x" * length}) + "\n" for length in (row_length, 7, 5, 9)))
    file = folder / "train.yaml"
    sections = {
        "base": {"model": str(base)},
        "data": {"train": str(rows), "max_length": max_length},
        "train": {"batch_size": 4, "epochs": 2},
        "output": {"dir": str(folder / "out")},
    }
    file.write_text(json.dumps(sections))  # JSON is YAML
    return file


def test_memory_by_part_and_time_by_real_steps(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configure(tiny_llama, tmp_path, row_length=20)
    assert hatrack(["train", "estimate", str(config), "--set", "train.gradient_accumulation=2"]) == 0
    *table, time = capsys.readouterr().out.splitlines()
    parts = ["memory", "base", "adapter", "gradients", "optimizer", "activations", "in", "free"]
    assert [line.split()[0] for line in table] == parts
    assert re.fullmatch(r"time: \d+ s for 2 steps, by \d+\.\d\d s for a batch of the longest rows; .*", time)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("changes", [[], ["train.packing=true", "data.max_length=64"]])
def test_held_out_rows_take_their_time(tiny_llama: Path, tmp_path: Path, changes: list[str]) -> None:
    held_out = tmp_path / "held-out.jsonl"
    held_out.write_text('{"text": "held out"}\n' * 2000)  # many more than are learned
    changes += [f"data.eval={held_out}", "eval.every=1", "train.epochs=3"]
    config = load_config(configure(tiny_llama, tmp_path, row_length=20), changes)
    duration = estimate(config, Console(file=StringIO()))
    assert duration.evaluations == duration.steps == 3
    learning = duration.seconds_per_batch * duration.steps
    assert duration.seconds > 10 * learning


def test_a_run_that_can_not_fit_is_refused_before_the_base_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = make_checkpoint(tmp_path / "base", max_position_embeddings=2**18)
    (base / "model.safetensors").write_bytes(b"not loaded")
    config = configure(base, tmp_path, row_length=200_000, max_length=2**18)
    for command in ("run", "estimate"):
        assert hatrack(["train", command, str(config)]) == 2
        sentence = " ".join(capsys.readouterr().err.split())
        assert re.search(r"hatrack: needs [\d.]+ GB of memory of [\d.]+ GB: would fit with ", sentence)
    assert not (tmp_path / "out").exists()
    suggested = re.findall(r"[\w.]+=\w+", sentence.rpartition("would fit with ")[2].split(", or")[0])
    settings = load_config(config, suggested)
    check_memory(settings, base, read_data(settings.data, base).train, cuda=False)
    assert available_memory(cuda=False) > 0
